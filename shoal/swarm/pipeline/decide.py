"""What the leader does next, from what members reported. Pure (DESIGN 4.4: freeze, plan, repair, reduce, decide)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shoal.protocol.runlog import Chain, Entry, Pin
from shoal.swarm.pipeline.ledger import Bucket
from shoal.swarm.pipeline.messages import PreparedReport, Report
from shoal.swarm.pipeline.plan import StagePlan, plan_stage


@dataclass(frozen=True, slots=True)
class StageState:
    """One stage after a freeze.

    servers: live and ready, in the round's order; prepared: a complete reduced gradient that somebody already stores,
    with its holders; plan: how to make one, when nobody does.
    """

    stage: int
    servers: tuple[str, ...]
    prepared: tuple[PreparedReport, tuple[str, ...]] | None
    plan: StagePlan | None

    @property
    def enough(self) -> int:
        """How many holders a decision needs: min(2, live)."""
        return min(2, len(self.servers))


def survey(
    stages: int, microbatches: int, reports: Mapping[str, Report], order: Sequence[str], turn: int = 0
) -> tuple[StageState, ...]:
    """The state of every stage, from the reports of the peers that answered a freeze.

    Any stored reduced gradient of the round covers every sample once, whichever plan made it, so it is used as it is:
    the one with most holders, ties by digest. turn: which attempt at this round it is (see `plan_stage`).
    """
    return tuple(_survey_stage(stage, microbatches, reports, order, turn) for stage in range(stages))


def _survey_stage(
    stage: int, microbatches: int, reports: Mapping[str, Report], order: Sequence[str], turn: int
) -> StageState:
    servers = tuple(p for p in order if p in reports and reports[p].ready and reports[p].stage == stage)
    if not servers:
        return StageState(stage, (), None, None)
    holders: dict[str, set[str]] = {}
    known: dict[str, PreparedReport] = {}
    for peer in servers:
        for prepared in reports[peer].prepared:
            holders.setdefault(prepared.gradient, set()).add(peer)
            known.setdefault(prepared.gradient, prepared)
    if holders:
        best = min(holders, key=lambda digest: (-len(holders[digest]), digest))
        return StageState(stage, servers, (known[best], tuple(p for p in servers if p in holders[best])), None)
    ledgers = {peer: [Bucket(b.id, b.microbatches, b.loss_sum) for b in reports[peer].buckets] for peer in servers}
    return StageState(stage, servers, None, plan_stage(stage, microbatches, ledgers, servers, turn))


def uncovered(states: Sequence[StageState]) -> tuple[int, ...]:
    return tuple(s.stage for s in states if not s.servers)


def needs_rollback(head: Entry, reports: Mapping[str, Report], stages: Sequence[int]) -> bool:
    """May (and must) history go back to the pinned snapshot?

    Only when every uncovered stage has live servers, all of which looked everywhere and found no newer state, and
    somebody alive holds the pinned state of every stage, since all of them go back. Without a pin the start is step 0,
    which everybody can compute.
    """
    if not stages or head.step == (head.pin.step if head.pin else 0):
        return False
    for stage in stages:
        servers = [r for r in reports.values() if r.stage == stage]
        if not servers or not all(r.stuck for r in servers):
            return False
    pin = head.pin
    return pin is None or all(_held(reports, pin.step, stage, digest) for stage, digest in enumerate(pin.digests))


def _held(reports: Mapping[str, Report], step: int, stage: int, digest: str) -> bool:
    return any(
        s.step == step and s.stage == stage and s.digest == digest for r in reports.values() for s in r.snapshots
    )


def next_pins(
    chain: Chain, stages: int, reports: Mapping[str, Report], order: Sequence[str]
) -> tuple[Pin | None, Pin | None]:
    """(pin, candidate) of the next entry: a snapshot is pinned only once two peers hold each stage of it.

    Until then it is the candidate, which its keepers fetch, and a rollback still goes to the older pin: the death of
    one peer must not take the only snapshot that the log would go back to.
    """
    pin, candidate = chain.head.pin, chain.head.candidate
    if candidate is None or not _copies(candidate, reports):
        candidate = next_pin(chain, stages, reports, order)
    if candidate is None or _copies(candidate, reports) < min(2, len(reports)):
        return pin, candidate
    return candidate, None


def _copies(pin: Pin, reports: Mapping[str, Report]) -> int:
    """How many peers hold the least held snapshot of a pin."""
    held = [(s.step, s.stage, s.digest) for r in reports.values() for s in r.snapshots]
    return min(held.count((pin.step, stage, digest)) for stage, digest in enumerate(pin.digests))


def next_pin(chain: Chain, stages: int, reports: Mapping[str, Report], order: Sequence[str]) -> Pin | None:
    """The newest step of which every stage has a snapshot; the first in order is canonical. None keeps the old pin.

    Only servers that are at the log's step are heard: another's snapshots may come from a history rolled back since.
    """
    head = chain.head
    oldest = head.pin.step if head.pin else 0
    found: dict[int, dict[int, str]] = {}  # step -> stage -> digest
    for peer in order:
        if peer not in reports or not reports[peer].ready:
            continue
        for s in reports[peer].snapshots:
            if reports[peer].stage == s.stage < stages and oldest < s.step <= head.step:
                found.setdefault(s.step, {}).setdefault(s.stage, s.digest)
    step = max((step for step, by_stage in found.items() if len(by_stage) == stages), default=None)
    entry = None if step is None else chain.commit_of(step)
    if step is None or entry is None:
        return None
    digests = tuple(found[step][stage] for stage in range(stages))
    return Pin(step=step, next_sample=entry.next_sample, samples_total=entry.samples_total, digests=digests)
