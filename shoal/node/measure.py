"""What a run really did, measured from files: the log on disk, the nodes' events, the exported parameters.

The demo, the process tests and the benchmarks share these: nothing is assumed that a file does not show.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from shoal.protocol.codecs import unpack
from shoal.protocol.events import BytesMoved, EntryDecided, Stamped
from shoal.protocol.runlog import Commit, Entry, Rollback
from shoal.protocol.store import DiskStore


@dataclass(frozen=True, slots=True)
class LogCounts:
    """What the log commits. Sample ids count from 0; a rollback takes back what it undoes."""

    rounds: int
    losses: tuple[float, ...]  # mean per sample of each committed round, nats per token
    committed: int  # samples, repeats included
    lost: int  # ids below the log's cursor that no commit holds
    double_counted: int  # ids that more than one commit holds


@dataclass(frozen=True, slots=True)
class Comparison:
    """Exported parameters beside those of one machine. tripwire: what leaving out one microbatch would show."""

    max_abs_diff: float
    tripwire: float
    loss_last: float


def read_log(directory: Path) -> list[Entry]:
    """The entries after genesis on the disk of a node that has ended. Raises StoreError while it runs."""

    async def read() -> list[Entry]:
        store = DiskStore(directory / "store")
        try:
            found = [await store.get(key) for key in store.keys("log/")]
            return [Entry.from_bytes(bytes(unpack(data, max_parts=2)[0])) for data in found if data is not None]
        finally:
            await store.aclose()

    return asyncio.run(read())


def count(entries: Iterable[Entry]) -> LogCounts:
    """Rounds, losses and samples of the history that the entries end with. Pure."""
    history: list[tuple[Entry, Commit]] = []
    for entry in entries:
        if isinstance(entry.decision, Rollback):
            history = [(e, c) for e, c in history if e.step <= entry.step]
        if isinstance(entry.decision, Commit):
            history.append((entry, entry.decision))
    counts: Counter[int] = Counter()
    for entry, commit in history:
        counts.update(range(entry.next_sample - commit.samples, entry.next_sample))
    wanted = range(max((e.next_sample for e, _ in history), default=0))
    return LogCounts(
        rounds=len(history),
        losses=tuple(c.loss_sum / c.samples for _, c in history),
        committed=sum(counts.values()),
        lost=sum(1 for sample in wanted if not counts[sample]),
        double_counted=sum(1 for n in counts.values() if n > 1),
    )


def committed(streams: Iterable[Iterable[Stamped]]) -> list[tuple[float, EntryDecided]]:
    """(unix time, entry) of every committed round, each when the first of these nodes learned of it."""
    first: dict[str, tuple[float, EntryDecided]] = {}
    for stream in streams:
        for stamped in stream:
            entry = stamped.event
            if not isinstance(entry, EntryDecided) or entry.kind != "commit":
                continue
            if entry.digest not in first or stamped.at_s < first[entry.digest][0]:
                first[entry.digest] = (stamped.at_s, entry)
    return sorted(first.values(), key=lambda pair: pair[1].round)


def bytes_sent(streams: Iterable[Iterable[Stamped]]) -> int:
    """Bytes that these nodes' calls sent."""
    events = (stamped.event for stream in streams for stamped in stream)
    return sum(e.count for e in events if isinstance(e, BytesMoved) and e.direction == "sent")


def compare(
    manifest_path: Path, export_dir: Path, rounds: int, on_round: Callable[[int], None] = lambda step: None
) -> Comparison:
    """Train one machine for `rounds` on the manifest's samples, and hold the exported files against it."""
    import torch
    from safetensors.torch import load_file

    from shoal.protocol.manifest import load_manifest
    from shoal.swarm.data import load_corpus
    from shoal.swarm.reference import max_abs_difference, run_reference

    manifest = load_manifest(manifest_path)
    corpus = load_corpus(manifest.data, manifest_path.parent)
    # half of the cores: threads that wait for one another on a busy machine take many times as long
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    reference = run_reference(manifest, corpus, rounds, on_round=lambda step, _: on_round(step), tripwire=True)
    exported = load_file(export_dir / "model.safetensors")
    assert reference.tripwire is not None
    return Comparison(max_abs_difference(exported, reference.parameters), reference.tripwire, reference.losses[-1])
