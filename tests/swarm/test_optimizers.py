"""Optimizers by name: deterministic, resumable to the bit, refusing what they cannot do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shoal.swarm.optimizers import NAMES, FlatOptimizer, OptimizerError, OptimizerSpec, learning_rate

EIGHT_BIT = ("adam8bit", "adamw8bit", "lion8bit")
SIZE = 5000  # above the size from which bitsandbytes keeps 8-bit state


def spec(name: str) -> OptimizerSpec:
    return OptimizerSpec(name, 0.01, weight_decay=0.1, momentum=0.9 if name == "sgd" else 0.0, warmup_rounds=3)


def start(size: int = SIZE, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, dtype=dtype, generator=torch.Generator().manual_seed(0))


def gradient(step: int, like: Tensor) -> Tensor:
    return torch.randn(like.shape, dtype=like.dtype, generator=torch.Generator().manual_seed(100 + step))


def run(optimizer: FlatOptimizer, flat: Tensor, steps: range) -> None:
    for step in steps:
        optimizer.step(gradient(step, flat))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [SIZE, 40])
def test_a_resumed_optimizer_goes_on_bit_for_bit(name: str, size: int) -> None:
    flat = start(size)
    optimizer = FlatOptimizer(spec(name), flat)
    run(optimizer, flat, range(4))
    copy = flat.clone()
    resumed = FlatOptimizer(spec(name), copy)
    resumed.load_state(optimizer.state(), optimizer.steps)
    run(optimizer, flat, range(4, 8))
    run(resumed, copy, range(4, 8))
    assert torch.equal(flat, copy) and resumed.steps == optimizer.steps == 8
    mine, theirs = optimizer.state(), resumed.state()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    fresh = start(size)
    run(FlatOptimizer(spec(name), fresh), fresh, range(8))
    assert torch.equal(flat, fresh)  # the same steps twice: the same bits
    assert not torch.equal(flat, start(size))


@pytest.mark.parametrize("name", NAMES)
def test_the_state_is_part_of_what_resumes(name: str) -> None:
    """Without it the next steps differ: the test above could fail."""
    flat = start()
    optimizer = FlatOptimizer(spec(name), flat)
    run(optimizer, flat, range(4))
    copy = flat.clone()
    forgetful = FlatOptimizer(spec(name), copy)
    run(optimizer, flat, range(4, 6))
    run(forgetful, copy, range(4, 6))
    assert not torch.equal(flat, copy)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_flat_step_equals_torchs_own_step_on_the_separate_tensors(name: str) -> None:
    flat = start(60, torch.float64)
    parts = [torch.nn.Parameter(p.clone()) for p in flat.split([10, 20, 30])]
    s = spec(name)
    theirs: torch.optim.Optimizer
    if name == "sgd":
        theirs = torch.optim.SGD(parts, lr=s.learning_rate, momentum=0.9, weight_decay=0.1)
    else:
        theirs = torch.optim.AdamW(parts, lr=s.learning_rate, betas=s.betas, eps=s.eps, weight_decay=0.1)
    ours = FlatOptimizer(s, flat)
    for step in range(5):
        g = gradient(step, flat)
        for part, piece in zip(parts, g.split([10, 20, 30]), strict=True):
            part.grad = piece
        theirs.param_groups[0]["lr"] = learning_rate(s, step)
        theirs.step()
        ours.step(g)
    assert (flat - torch.cat([p.detach() for p in parts])).abs().max() < 1e-13


def test_learning_rate_warms_up_and_stays() -> None:
    s = OptimizerSpec("sgd", 0.4, warmup_rounds=4)
    assert [learning_rate(s, i) for i in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    assert learning_rate(OptimizerSpec("sgd", 0.4), 0) == 0.4


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_eight_bit_state_is_eight_bit_and_refuses_float64(name: str) -> None:
    flat = start()
    optimizer = FlatOptimizer(spec(name), flat)
    run(optimizer, flat, range(1))
    assert optimizer.state()["state1"].dtype == torch.uint8
    with pytest.raises(OptimizerError, match=r'set \[model\] dtype = "float32"'):
        FlatOptimizer(spec(name), start(dtype=torch.float64))


def test_unknown_names_are_refused_with_the_list() -> None:
    with pytest.raises(OptimizerError, match="sgd, adamw, adam8bit"):
        FlatOptimizer(OptimizerSpec("adamm"), start())


@pytest.mark.parametrize("name", NAMES)
def test_a_foreign_state_is_refused_without_effect(name: str) -> None:
    flat = start()
    optimizer = FlatOptimizer(spec(name), flat)
    run(optimizer, flat, range(2))
    good = optimizer.state()
    key = next(k for k, v in good.items() if v.ndim == 1)
    value = good[key]
    for bad in [{**good, "extra": value}, {**good, key: value[:-1]}, {**good, key: value.double()}, {}]:
        with pytest.raises(OptimizerError, match="the state is not one of"):
            optimizer.load_state(bad, 2)
    after = optimizer.state()
    assert all(torch.equal(good[k], after[k]) for k in good)
