"""Freeze, plan, repair: which buckets make the round, and who replays what is missing (DESIGN 4.4). Pure.

Per stage, a plan is a disjoint set of buckets plus holes: microbatches that no chosen bucket holds, each given to a
named server. Choosing disjoint sets of greatest total size is weighted set packing (NP-hard); greedy by size is exact
here almost always, because only retried microbatches can be held twice and those sit in buckets of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shoal.swarm.pipeline.ledger import Bucket


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage of a plan.

    chosen: (server, bucket ids) in the order in which sums are added; holes: (microbatch, server that replays it);
    discard: (server, bucket ids) that were left out and are forgotten, so that their microbatches can be added again;
    wasted: accumulated microbatches in them; loss_sum: over the chosen buckets.
    """

    stage: int
    chosen: tuple[tuple[str, tuple[int, ...]], ...]
    holes: tuple[tuple[int, str], ...]
    discard: tuple[tuple[str, tuple[int, ...]], ...]
    wasted: int
    loss_sum: float


MAX_LOSS_SUM = 1e30  # nats; what a bucket may report, so that no sum of them overflows


def plan_stage(
    stage: int, microbatches: int, ledgers: Mapping[str, Sequence[Bucket]], order: Sequence[str], turn: int = 0
) -> StagePlan:
    """Plan one stage from the ledgers of the servers that answered.

    ledgers: server -> buckets, for every live server (possibly empty); order: the servers in the round's order, which
    breaks ties and spreads holes; turn: which attempt at this round it is, so that a hole which a server never manages
    to fill goes to another one next time. A bucket that names a microbatch twice or none of this round, or whose loss
    is no number, is left out. Raises ValueError when no server answered.
    """
    servers = [peer for peer in order if peer in ledgers]
    if not servers:
        raise ValueError(f"stage {stage} has no server")
    rank = {peer: i for i, peer in enumerate(servers)}
    candidates = sorted(
        (
            (peer, bucket)
            for peer in servers
            for bucket in {b.id: b for b in ledgers[peer]}.values()  # an id counts once
            if bucket.microbatches
        ),
        key=lambda pb: (-len(pb[1].microbatches), rank[pb[0]], pb[1].id),
    )
    covered: set[int] = set()
    chosen: dict[str, list[int]] = {}
    losses: list[tuple[int, int, float]] = []
    rejected: dict[str, list[int]] = {}
    wasted = 0
    for peer, bucket in candidates:
        held = set(bucket.microbatches)
        if held & covered or not _sound(bucket, microbatches):
            wasted += len(held)
            rejected.setdefault(peer, []).append(bucket.id)
            continue
        covered |= held
        chosen.setdefault(peer, []).append(bucket.id)
        losses.append((rank[peer], bucket.id, bucket.loss_sum))
    missing = [m for m in range(microbatches) if m not in covered]
    return StagePlan(
        stage=stage,
        chosen=tuple((peer, tuple(sorted(chosen[peer]))) for peer in servers if peer in chosen),
        holes=tuple((microbatch, servers[(i + turn) % len(servers)]) for i, microbatch in enumerate(missing)),
        discard=tuple((peer, tuple(sorted(rejected[peer]))) for peer in servers if peer in rejected),
        wasted=wasted,
        loss_sum=sum(loss for _, _, loss in sorted(losses)),
    )


def _sound(bucket: Bucket, microbatches: int) -> bool:
    distinct = len(set(bucket.microbatches)) == len(bucket.microbatches)
    inside = all(0 <= m < microbatches for m in bucket.microbatches)
    return distinct and inside and math.isfinite(bucket.loss_sum) and abs(bucket.loss_sum) <= MAX_LOSS_SUM
