"""A stage as computation: exact gradients, recomputation sees the same randomness, bad input has no effect."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shoal.protocol.events import Reason
from shoal.protocol.manifest import Manifest
from shoal.protocol.transport import Refused
from shoal.swarm.optimizers import OptimizerSpec
from shoal.swarm.reference import run_microbatch
from shoal.swarm.stage import BadState, StageProgram, build_stage, token_loss
from shoal.swarm.toy import toy_stage


def manifest(
    stages: int = 2, architecture: str = "llama", dtype: str = "float32", seed: int = 1, **config: Any
) -> Manifest:
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "tie_word_embeddings": False,
    }
    return Manifest.model_validate(
        {
            "name": "tiny",
            "seed": seed,
            "model": {"architecture": architecture, "stages": stages, "dtype": dtype, "config": {**small, **config}},
            "data": {"sequence_length": 16},
            "optimizer": {"learning_rate": 1e-2},
        }
    )


def tokens(b: int = 3, t: int = 16, vocab: int = 256, seed: int = 0) -> tuple[Tensor, Tensor]:
    both = torch.randint(0, vocab, (b, t + 1), generator=torch.Generator().manual_seed(seed))
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def chain(programs: list[StageProgram], x: Tensor, labels: Tensor, seed: int = 5) -> tuple[list[Tensor], float]:
    return run_microbatch(programs, x, labels, seed=seed, recompute=True)


def test_gradients_of_chained_stages_equal_autograd_through_all_of_them() -> None:
    programs = [toy_stage(0, i, 3, width=6, vocab=11) for i in range(3)]
    x, labels = tokens(4, 5, 11)
    gradients, losses = chain(programs, x, labels)
    hidden = x
    for program in programs:
        hidden = program.module(hidden)
    loss = nn.functional.cross_entropy(hidden.flatten(0, 1), labels.flatten()) * 4  # mean over tokens, sum over samples
    assert losses == pytest.approx(loss.item(), abs=1e-12)
    parameters = [p for program in programs for p in program.module.parameters()]
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    assert (torch.cat(gradients) - expected).abs().max() < 1e-14


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_step_does_not_depend_on_the_split(stages: int) -> None:
    x, labels = tokens()
    ends = []
    for count in (1, stages):
        programs = [build_stage(manifest(count, dtype="float64"), i) for i in range(count)]
        gradients, _ = chain(programs, x, labels)
        for program, gradient in zip(programs, gradients, strict=True):
            program.apply(gradient, 3)
        ends.append({k: v for p in programs for k, v in p.parameters().items()})
    assert ends[0].keys() == ends[1].keys()
    assert all((ends[0][k] - ends[1][k]).abs().max() < 1e-9 for k in ends[0])


def test_the_same_microbatch_gives_the_same_bits() -> None:
    x, labels = tokens()
    runs = [chain([build_stage(manifest(2), i) for i in range(2)], x, labels) for _ in range(2)]
    assert runs[0][1] == runs[1][1]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][0], runs[1][0], strict=True))


def test_dropout_is_the_microbatchs_own_and_recomputation_sees_it() -> None:
    settings = manifest(2, "gpt2", dtype="float64", resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3, n_positions=16)
    first, second = (build_stage(settings, i) for i in range(2))
    x, labels = tokens()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    y = first.forward(x, seed=7)
    torch.manual_seed(2)  # whatever the process does in between
    assert torch.equal(first.forward(x, seed=7), y)
    assert not torch.equal(first.forward(x, seed=8), y)
    torch.manual_seed(1)
    first.forward(x, seed=9)
    assert torch.equal(torch.get_rng_state(), state)  # and the process's own randomness is left alone
    # Backward's recomputed forward draws the same masks: a finite difference of the forward agrees with its gradient.
    dy = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0))
    gradient = first.backward(x, seed=7, dy=dy).gradient
    direction = torch.randn(first.numel, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    before, eps = first._flat.clone(), 1e-6
    values = []
    for sign in (1, -1):
        first._flat.copy_(before + sign * eps * direction)
        values.append(float((first.forward(x, seed=7) * dy).sum()))
    assert (values[0] - values[1]) / (2 * eps) == pytest.approx(float(gradient @ direction), rel=1e-4)
    assert second.backward(y, seed=7, labels=labels).losses == second.backward(y, seed=7, labels=labels).losses


def test_kept_graphs_change_no_bit_are_bounded_and_may_be_dropped() -> None:
    plain, keeping = toy_stage(0, 1, 3), toy_stage(0, 1, 3, keep_graphs=2)
    xs = [torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    dy = torch.ones(2, 3, 8, dtype=torch.float64)
    for seed, x in enumerate(xs):
        assert torch.equal(keeping.forward(x, seed=seed, keep=True), plain.forward(x, seed=seed))
    assert len(keeping._graphs) == 2
    for seed, x in enumerate(xs):
        kept, fresh = keeping.backward(x, seed=seed, dy=dy), plain.backward(x, seed=seed, dy=dy)
        assert torch.equal(kept.gradient, fresh.gradient)
        assert kept.dx is not None and fresh.dx is not None and torch.equal(kept.dx, fresh.dx)
    keeping.forward(xs[0], seed=0, keep=True)
    other = keeping.backward(xs[1], seed=0, dy=dy)  # same seed, another input: recomputed, not taken from the cache
    assert torch.equal(other.gradient, plain.backward(xs[1], seed=0, dy=dy).gradient)
    keeping.forward(xs[0], seed=0, keep=True)
    for program in (plain, keeping):
        program.apply(torch.ones(program.numel, dtype=torch.float64), 2)
    assert torch.equal(keeping.backward(xs[0], seed=0, dy=dy).gradient, plain.backward(xs[0], seed=0, dy=dy).gradient)
    keeping.forward(xs[0], seed=0, keep=True)
    keeping.drop_cache()
    assert not keeping._graphs


def test_forward_and_backward_change_nothing_and_apply_changes_the_state() -> None:
    program = toy_stage(0, 0, 1)
    x, labels = tokens(2, 4, 16)
    before = program.digest()
    program.forward(x, seed=1)
    gradient = program.backward(x, seed=1, labels=labels).gradient
    assert program.digest() == before and program.step == 0
    kept = gradient.clone()
    program.apply(gradient, 2)
    assert program.digest() != before and program.step == 1 and torch.equal(gradient, kept)


def test_apply_takes_the_mean_over_the_samples() -> None:
    program = toy_stage(0, 1, 3, optimizer=OptimizerSpec("sgd", 0.5))
    before = program._flat.clone()
    program.apply(torch.full((program.numel,), 8.0, dtype=torch.float64), 4)
    assert torch.allclose(program._flat, before - 0.5 * 8 / 4, atol=1e-15)


def test_a_loaded_state_goes_on_bit_for_bit() -> None:
    x, labels = tokens()
    program, newcomer = build_stage(manifest(1), 0), build_stage(manifest(1, seed=9), 0)
    for seed in range(3):
        program.apply(program.backward(x, seed=seed, labels=labels).gradient, 3)
    assert newcomer.digest() != program.digest()
    newcomer.load_state(program.state())
    assert newcomer.digest() == program.digest() and newcomer.step == 3
    for p in (program, newcomer):
        p.apply(p.backward(x, seed=4, labels=labels).gradient, 3)
    assert newcomer.digest() == program.digest()


def test_a_state_is_a_copy() -> None:
    program = toy_stage(0, 1, 3)
    state = program.state()
    program.apply(torch.ones(program.numel, dtype=torch.float64), 1)
    assert not torch.equal(state["parameter.stages.1.weight"], program.state()["parameter.stages.1.weight"])


def test_a_state_that_does_not_fit_is_refused_without_effect() -> None:
    program = toy_stage(0, 1, 3, optimizer=OptimizerSpec("adamw", 0.1))
    program.apply(torch.ones(program.numel, dtype=torch.float64), 1)
    good, digest = program.state(), program.digest()
    name = "parameter.stages.1.weight"
    nan = good[name].clone()
    nan[0, 0] = float("nan")
    bad: list[dict[str, Tensor]] = [
        {k: v for k, v in good.items() if k != name},
        {k: v for k, v in good.items() if k != "step"},
        {k: v for k, v in good.items() if k != "optimizer.exp_avg"},
        {**good, "other": torch.zeros(1)},
        {**good, name: good[name][:4]},
        {**good, name: good[name].float()},
        {**good, name: nan},
        {**good, "optimizer.exp_avg": good["optimizer.exp_avg"] * float("inf")},
        {**good, "step": torch.tensor(-1)},
        toy_stage(0, 2, 3).state(),
    ]
    for state in bad:
        with pytest.raises(BadState):
            program.load_state(state)
        assert program.digest() == digest


def test_malformed_input_is_refused_typed_and_without_effect() -> None:
    first, middle, last = (toy_stage(0, i, 3) for i in range(3))
    x, labels = tokens(2, 4, 16)
    hidden = torch.zeros(2, 4, 8, dtype=torch.float64)
    calls: list[Any] = [
        lambda: first.forward(x.int(), seed=0),
        lambda: first.forward(x[0], seed=0),
        lambda: first.forward(x + 16, seed=0),
        lambda: first.forward(x - 99, seed=0),
        lambda: first.forward(x[:0], seed=0),
        lambda: middle.forward(hidden.float(), seed=0),
        lambda: middle.forward(hidden[..., :3], seed=0),
        lambda: middle.backward(hidden, seed=0),
        lambda: middle.backward(hidden, seed=0, dy=hidden[:1]),
        lambda: middle.backward(hidden, seed=0, dy=hidden, labels=labels),
        lambda: last.backward(hidden, seed=0, labels=labels[:, :2]),
        lambda: last.backward(hidden, seed=0, labels=labels + 16),
        lambda: last.backward(hidden, seed=0, dy=hidden),
        lambda: last.apply(torch.zeros(3, dtype=torch.float64), 1),
        lambda: last.apply(torch.zeros(last.numel, dtype=torch.float64), 0),
    ]
    digests = [p.digest() for p in (first, middle, last)]
    for number, call in enumerate(calls):
        with pytest.raises(Refused) as refused:
            call()
        assert refused.value.reason is Reason.MALFORMED, number
    assert [p.digest() for p in (first, middle, last)] == digests


def test_numbers_that_are_not_finite_are_refused() -> None:
    middle, last = toy_stage(0, 1, 3), toy_stage(0, 2, 3)
    _, labels = tokens(2, 4, 16)
    fine = torch.zeros(2, 4, 8, dtype=torch.float64)
    bad = fine.clone()
    bad[1, 2, 3] = float("nan")
    gradient = torch.zeros(middle.numel, dtype=torch.float64)
    gradient[-1] = float("inf")
    digest = middle.digest()
    calls: list[Any] = [
        lambda: middle.forward(bad, seed=0),
        lambda: middle.backward(fine, seed=0, dy=bad),
        lambda: last.backward(bad, seed=0, labels=labels),
        lambda: middle.apply(gradient, 1),
    ]
    for call in calls:
        with pytest.raises(Refused) as refused:
            call()
        assert refused.value.reason is Reason.NOT_FINITE
    assert middle.digest() == digest


def test_any_small_module_makes_a_stage() -> None:
    def squares(output: Tensor, labels: Tensor) -> Tensor:
        return (output.squeeze(-1) - labels).square().mean(1).sum()

    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    program = StageProgram(module, index=1, last=True, optimizer=OptimizerSpec(), loss=squares)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    result = program.backward(x, seed=0, labels=torch.zeros(2, 3, dtype=torch.int64))
    assert result.dx is not None and result.dx.shape == x.shape and result.gradient.shape == (4 * 4 + 4 + 4 + 1,)
    assert set(program.parameters()) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_the_loss_is_the_sum_over_samples_of_the_mean_over_tokens() -> None:
    logits, labels = torch.randn(3, 5, 7, dtype=torch.float64), torch.randint(0, 7, (3, 5))
    each = [nn.functional.cross_entropy(logits[i], labels[i]) for i in range(3)]
    assert float(token_loss(logits, labels)) == pytest.approx(float(sum(each)), abs=1e-12)


def test_the_overhead_on_a_toy_stays_small() -> None:
    """The simulator runs thousands of microbatches: 150 µs a call is the aim, best of many on a shared machine."""
    program = toy_stage(0, 1, 3)
    x = torch.zeros(2, 3, 8, dtype=torch.float64)
    best = float("inf")
    for _ in range(60):
        start = time.perf_counter()
        program.forward(x, seed=1)
        program.backward(x, seed=1, dy=x)
        best = min(best, time.perf_counter() - start)
    assert best < 2 * 300e-6, f"forward + backward took {best * 1e6:.0f} µs at best"


@pytest.mark.gpu
def test_gpu_agrees_with_cpu() -> None:
    x, labels = tokens()
    ends = []
    for device in ("cpu", "cuda"):
        programs = [build_stage(manifest(2), i, device=device) for i in range(2)]
        assert programs[0].digest() == build_stage(manifest(2), 0).digest()  # the same first bits on every device
        gradients, losses = chain(programs, x, labels)
        assert all(g.device.type == "cpu" for g in gradients)
        ends.append((torch.cat(gradients), losses))
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-5)
    assert (ends[0][0] - ends[1][0]).abs().max() < 1e-4 * ends[0][0].abs().max()


def test_a_forward_that_does_not_fit_beside_kept_graphs_runs_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    program = toy_stage(0, 0, 2, keep_graphs=2)
    x = torch.randint(0, 16, (2, 4))
    expected = program.forward(x, seed=1)
    program.forward(x, seed=2, keep=True)
    run, refused = program._run, []

    def out_of_memory(*args: Any) -> Any:
        if torch.is_grad_enabled():
            refused.append(args)
            raise torch.OutOfMemoryError("no room for another graph")
        return run(*args)

    monkeypatch.setattr(program, "_run", out_of_memory)
    assert torch.equal(program.forward(x, seed=1, keep=True), expected)
    assert refused and not program._graphs, "the kept graphs were let go"
