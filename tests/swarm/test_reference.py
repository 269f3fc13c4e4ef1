"""The one machine: it learns, its two faults show, and recomputation or a split changes nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from shoal.protocol.manifest import Manifest
from shoal.swarm.data import Corpus
from shoal.swarm.optimizers import OptimizerSpec
from shoal.swarm.reference import ReferenceResult, max_abs_difference, run_microbatch, run_reference, run_rounds
from shoal.swarm.stage import build_stage
from shoal.swarm.toy import toy_stage

TEXT = Corpus(bytes(np.random.default_rng(0).integers(0, 4, 2000, dtype=np.uint8).repeat(3)))  # learnable, 4 symbols


def toy(stages: int = 2, name: str = "adamw", rounds: int = 6, **options: Any) -> ReferenceResult:
    programs = [toy_stage(0, i, stages, optimizer=OptimizerSpec(name, 0.05)) for i in range(stages)]
    keep = {"samples": 8, "microbatch": 2, "seed": 1, **options}
    return run_rounds(programs, TEXT.sequences(6, seed=1), rounds, **keep)


def manifest(stages: int = 2) -> Manifest:
    config = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return Manifest.model_validate(
        {
            "name": "tiny",
            "model": {"architecture": "llama", "stages": stages, "config": config},
            "data": {"sequence_length": 12},
            "batch": {"samples": 4, "microbatch": 2},
            "optimizer": {"learning_rate": 1e-2},
        }
    )


def test_it_learns_and_is_deterministic() -> None:
    seen: list[tuple[int, float]] = []
    first = toy(rounds=25, on_round=lambda step, loss: seen.append((step, loss)))
    assert first.losses[-1] < first.losses[0] - 0.5
    assert seen == list(enumerate(first.losses, start=1)) and first.samples == 200
    second = toy(rounds=25)
    assert second.losses == first.losses and max_abs_difference(first.parameters, second.parameters) == 0


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_lost_or_doubled_microbatch_shows_in_the_parameters(name: str) -> None:
    plain = toy(name=name, tripwire=True)
    assert plain.tripwire is not None and plain.tripwire > 1e-6
    for fault in ("drop_microbatch", "double_microbatch"):
        for step in (0, 5):
            for microbatch in (0, 3):
                other = toy(name=name, **{fault: (step, microbatch)})
                assert max_abs_difference(plain.parameters, other.parameters) > 1e-6


def test_the_tripwire_is_the_run_without_one_microbatch_of_the_last_round() -> None:
    plain, lost = toy(tripwire=True), toy(drop_microbatch=(5, 0))
    assert plain.tripwire == pytest.approx(max_abs_difference(plain.parameters, lost.parameters), abs=1e-15)
    again = toy()
    assert max_abs_difference(plain.parameters, again.parameters) == 0  # measuring it leaves the result alone


def test_microbatch_size_and_split_change_only_rounding() -> None:
    whole = toy(stages=2, microbatch=8)
    cut = toy(stages=2, microbatch=1)
    assert 0 <= max_abs_difference(whole.parameters, cut.parameters) < 1e-10
    with pytest.raises(ValueError, match="does not divide"):
        toy(microbatch=3)


def test_training_goes_on_from_where_the_stages_stand() -> None:
    programs = [toy_stage(0, i, 2, optimizer=OptimizerSpec("adamw", 0.05)) for i in range(2)]
    for rounds in (2, 4):
        result = run_rounds(programs, TEXT.sequences(6, seed=1), rounds, samples=8, microbatch=2, seed=1)
    assert max_abs_difference(result.parameters, toy(rounds=6).parameters) == 0


def test_a_transformers_model_recompute_and_kept_graphs_are_bit_equal() -> None:
    corpus = Corpus(bytes(range(256)) * 8)
    kept, recomputed = (run_reference(manifest(), corpus, 2, recompute=r) for r in (False, True))
    assert kept.losses == recomputed.losses
    assert max_abs_difference(kept.parameters, recomputed.parameters) == 0
    names = {"model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"}
    assert names <= kept.parameters.keys()
    # The same seeds whatever the split: one stage ends where two do, up to float32 rounding under AdamW.
    one = run_reference(manifest(stages=1), corpus, 2)
    assert max_abs_difference(kept.parameters, one.parameters) < 1e-4


def test_float64_sums_leave_no_trace_of_order_and_grouping() -> None:
    """Float32 sums differ in the last bit by grouping, and AdamW on a real model makes that grow without bound."""
    sequences = Corpus(bytes(range(256)) * 8).sequences(12)
    digests: dict[torch.dtype, set[tuple[str, ...]]] = {torch.float32: set(), torch.float64: set()}
    for dtype, seen in digests.items():
        for groups in ([[0, 1, 2, 3, 4]], [[4, 0], [3], [2, 1]], [[2, 4, 1], [0, 3]]):
            programs = [build_stage(manifest(), s) for s in range(2)]
            totals = [torch.zeros(p.numel, dtype=dtype) for p in programs]
            for group in groups:
                sums = [torch.zeros(p.numel, dtype=dtype) for p in programs]
                for m in group:
                    gradients, _ = run_microbatch(programs, *sequences.batch(range(2 * m, 2 * m + 2)), seed=m)
                    for total, gradient in zip(sums, gradients, strict=True):
                        total += gradient
                for total, part in zip(totals, sums, strict=True):
                    total += part
            for program, total in zip(programs, totals, strict=True):
                program.apply(total, 10)
            seen.add(tuple(p.digest() for p in programs))
    assert len(digests[torch.float64]) == 1
    assert len(digests[torch.float32]) > 1


def test_differences_that_cannot_be_compared_are_infinite() -> None:
    a = {"w": torch.zeros(3)}
    assert max_abs_difference(a, {"w": torch.tensor([0.0, 0.5, -1.0])}) == 1.0
    assert max_abs_difference(a, {}) == max_abs_difference(a, {"w": torch.zeros(2)}) == float("inf")
    assert max_abs_difference(a, {"w": torch.tensor([0.0, float("nan"), 0.0])}) == float("inf")
    assert dataclasses.is_dataclass(ReferenceResult)
