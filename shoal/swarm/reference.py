"""The one machine: what a swarm's parameters must equal after the same rounds on the same samples.

It is the oracle of every equivalence test and the baseline of every benchmark: same manifest, same sample ids, same
microbatch seeds, microbatches summed in order (in float64), the same optimizer, the same stages one after another. The
*tripwire* is how far the final parameters would move if one microbatch of the last round were left out: a comparison
that cannot see this much proves nothing.

    python -m shoal.swarm.reference run.toml --rounds 40
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from shoal.swarm.data import Corpus, Cursor, DataError, DataSettings, Sequences, load_corpus, microbatch_seed
from shoal.swarm.optimizers import OptimizerError
from shoal.swarm.split import UnsupportedModel
from shoal.swarm.stage import DataShape, StageProgram, StageSettings, build_stage

OnRound = Callable[[int, float], None]  # (steps done, mean loss of the round in nats per token)


class BatchSettings(Protocol):
    """What is read from `[batch]` of the manifest."""

    @property
    def samples(self) -> int: ...
    @property
    def microbatch(self) -> int: ...


class DataSection(DataSettings, DataShape, Protocol):
    """What is read from `[data]` of the manifest."""


class ReferenceSettings(StageSettings, Protocol):
    """What `run_reference` reads from the manifest."""

    @property
    def data(self) -> DataSection: ...
    @property
    def batch(self) -> BatchSettings: ...


@dataclass(frozen=True)
class ReferenceResult:
    """What the one machine ended with. `states`: `StageProgram.state()` per stage, CPU."""

    states: list[dict[str, Tensor]]
    losses: list[float]  # mean per sample of each round, nats per token
    samples: int  # samples consumed
    tripwire: float | None = None  # max abs parameter difference; None unless asked for

    @property
    def parameters(self) -> dict[str, Tensor]:
        """All parameters by their names in the unsplit model."""
        return parameters_of(self.states)


def parameters_of(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The parameters in the states of all stages, by their names in the unsplit model."""
    prefix = "parameter."
    return {k.removeprefix(prefix): v for state in states for k, v in state.items() if k.startswith(prefix)}


def max_abs_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest absolute difference over all parameters; infinite unless both have the same names, shapes and no NaN."""
    if a.keys() != b.keys() or any(a[name].shape != b[name].shape for name in a):
        return float("inf")
    worst = 0.0
    for name in a:
        difference = float((a[name].double() - b[name].double()).abs().max()) if a[name].numel() else 0.0
        worst = max(worst, difference) if difference == difference else float("inf")
    return worst


def run_microbatch(
    programs: Sequence[StageProgram], x: Tensor, labels: Tensor, *, seed: int, recompute: bool = False
) -> tuple[list[Tensor], float]:
    """One microbatch through all stages: x, labels int64 (b, t) -> (flat gradient sum per stage, loss sum).

    Without `recompute`, stages built with keep_graphs ≥ 1 do forward once; bit-equal either way."""
    inputs = [x]
    for program in programs[:-1]:
        inputs.append(program.forward(inputs[-1], seed=seed, keep=not recompute))
    result = programs[-1].backward(inputs[-1], seed=seed, labels=labels)
    losses = result.losses
    gradients = [result.gradient]
    for program, stage_input in zip(reversed(programs[:-1]), reversed(inputs[:-1]), strict=True):
        result = program.backward(stage_input, seed=seed, dy=result.dx)
        gradients.append(result.gradient)
    return gradients[::-1], losses


def run_rounds(
    programs: Sequence[StageProgram],
    sequences: Sequences,
    rounds: int,
    *,
    samples: int,
    microbatch: int,
    seed: int,
    on_round: OnRound | None = None,
    recompute: bool = False,
    drop_microbatch: tuple[int, int] | None = None,
    double_microbatch: tuple[int, int] | None = None,
    tripwire: bool = False,
) -> ReferenceResult:
    """Train given stages from where they stand (`programs[0].step` committed rounds) for `rounds` more.

    `samples` per round, `microbatch` divides it. drop_/double_microbatch (step, microbatch): leave it out of, or count
    it twice in, that step's sum, which is still divided by `samples`: the two faults that a swarm must not have."""
    if samples % microbatch:
        raise ValueError(f"microbatch = {microbatch} does not divide samples = {samples}")
    losses: list[float] = []
    measured: float | None = None
    first = programs[0].step
    cursor = Cursor(first * samples)
    for step in range(first, first + rounds):
        watched = tripwire and step == first + rounds - 1
        sums = [torch.zeros(p.numel, dtype=torch.float64) for p in programs]  # exact: no trace of the order
        without = [torch.zeros(p.numel, dtype=torch.float64) for p in programs] if watched else []
        before = [p.state() for p in programs] if watched else []
        loss = 0.0
        for m in range(samples // microbatch):
            x, labels = sequences.batch(cursor.microbatch(m, microbatch))
            gradients, loss_sum = run_microbatch(
                programs, x, labels, seed=microbatch_seed(seed, step, m), recompute=recompute
            )
            loss += loss_sum
            times = 1 - ((step, m) == drop_microbatch) + ((step, m) == double_microbatch)
            for _ in range(times):
                for total, gradient in zip(sums, gradients, strict=True):
                    total += gradient
            if m > 0:
                for total, gradient in zip(without, gradients, strict=False):
                    total += gradient
        for program, total in zip(programs, sums, strict=True):
            program.apply(total, samples)
        if watched:
            after = [p.state() for p in programs]
            for program, state, total in zip(programs, before, without, strict=True):
                program.load_state(state)
                program.apply(total, samples)
            measured = max_abs_difference(parameters_of(after), parameters_of([p.state() for p in programs]))
            for program, state in zip(programs, after, strict=True):
                program.load_state(state)
        _, cursor = cursor.take(samples)
        losses.append(loss / samples)
        if on_round is not None:
            on_round(step + 1, losses[-1])
    return ReferenceResult([p.state() for p in programs], losses, rounds * samples, measured)


def run_reference(
    manifest: ReferenceSettings,
    corpus: Corpus,
    rounds: int,
    *,
    device: torch.device | str = "cpu",
    on_round: OnRound | None = None,
    recompute: bool = False,
    drop_microbatch: tuple[int, int] | None = None,
    double_microbatch: tuple[int, int] | None = None,
    tripwire: bool = False,
) -> ReferenceResult:
    """Train the manifest's model from its initialisation for `rounds` rounds in this process; see `run_rounds`.

    The number of torch threads is the caller's. Raises what `build_stage` raises, and DataError."""
    programs = [build_stage(manifest, s, device=device, keep_graphs=1) for s in range(manifest.model.stages)]
    sequences = corpus.sequences(manifest.data.sequence_length, seed=manifest.seed)
    return run_rounds(
        programs,
        sequences,
        rounds,
        samples=manifest.batch.samples,
        microbatch=manifest.batch.microbatch,
        seed=manifest.seed,
        on_round=on_round,
        recompute=recompute,
        drop_microbatch=drop_microbatch,
        double_microbatch=double_microbatch,
        tripwire=tripwire,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. 0: done; 2: the manifest, model or data cannot be used (one line says why)."""
    parser = argparse.ArgumentParser(prog="python -m shoal.swarm.reference", description="Train a run on one machine.")
    parser.add_argument("manifest", type=Path, help="run.toml")
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--threads", type=int, default=0, help="torch threads (default: torch's choice)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--recompute", action="store_true", help="recompute forward in backward, as a swarm does")
    options = parser.parse_args(argv)
    from shoal.protocol.manifest import ManifestError, load_manifest

    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        manifest = load_manifest(options.manifest)
        corpus = load_corpus(manifest.data, options.manifest.parent)
        print(f"corpus {len(corpus.data)} bytes, sha256 {corpus.sha256}, unigram entropy {corpus.unigram_entropy:.4f}")
        start = time.perf_counter()
        result = run_reference(
            manifest,
            corpus,
            options.rounds,
            device=options.device,
            recompute=options.recompute,
            tripwire=True,
            on_round=lambda step, loss: print(f"round {step:4d}  loss {loss:.4f}", flush=True),
        )
    except (ManifestError, DataError, UnsupportedModel, OptimizerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    wall_s = time.perf_counter() - start
    print(f"{result.samples} samples in {wall_s:.1f} s ({result.samples / wall_s:.1f} samples/s)")
    print(f"tripwire {result.tripwire:.3e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
