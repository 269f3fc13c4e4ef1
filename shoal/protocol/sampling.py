"""One keyed order for every choice that peers must agree on without talking (MoDeST, de Vos et al. 2023, section 4.2).

`order` sorts members by a keyed hash of (run, round, peer). It picks leaders, feeders, committee seats, who replays
lost work and whose snapshot is canonical. The key is a beacon that only member ids flow into, never float data, so a
leader cannot steer it by choosing gradients; what it can still do is withhold an entry (DESIGN 4.2).
MoDeST orders by md5(peer || round); we use keyed BLAKE2b, so that an order is not known before its beacon.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the log checks its beacons with `next_beacon`
    from shoal.protocol.runlog import Chain, Entry


def _hash(key: bytes, *parts: str) -> bytes:
    """Keyed BLAKE2b-256 over length-prefixed parts, so that no two lists of parts collide."""
    state = hashlib.blake2b(key=key[:64], digest_size=32)
    for part in parts:
        data = part.encode()
        state.update(len(data).to_bytes(4, "big"))
        state.update(data)
    return state.digest()


def order(members: Iterable[str], run: str, round_: int, beacon: str, purpose: str = "") -> tuple[str, ...]:
    """Members sorted by their keyed hash for this round; `purpose` gives independent orders for independent choices."""
    key = bytes.fromhex(beacon)
    return tuple(sorted(members, key=lambda peer: _hash(key, run, str(round_), purpose, peer)))


def next_beacon(previous: Entry | None, run: str) -> str:
    """Beacon of the entry after `previous` (hex): hashes the previous beacon and the ids of settled members.

    A member counts once it was admitted before entry r-1, so that nobody can grind an identity into the beacon that
    orders the round it joins.
    """
    if previous is None:
        return _hash(b"shoal beacon", run).hex()
    settled = sorted(m.peer for m in previous.members if m.since < previous.round)
    return _hash(bytes.fromhex(previous.beacon), run, *settled).hex()


def beacon_for(chain: Chain, round_: int) -> str:
    """The beacon that orders `round_`: that of log entry round_ - 2 (or of genesis in the first rounds)."""
    return chain.entry(max(0, round_ - 2)).beacon
