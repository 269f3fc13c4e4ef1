"""The run's phone book: signed peer records in hivemind's Kademlia DHT, in our own event loop, without forks.

Key `shoal/<run id>/peers`, subkey = PeerID, value = the bytes of a sealed `protocol.records.PeerRecord`. The DHT has no
liveness detection and stock nodes store anything: 200 records of 1 MB expiring in 50 years were all accepted. Ours
store and return only records that `open_record` accepts for exactly this subkey, that fit the size bound, and whose
expiry in the DHT is the signed one (so an older record cannot be replayed over a newer one). The DHT is a hint for
finding peers: what counts is the run log, and what peers say when called.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from hivemind.dht.crypto import DHTRecord, RecordValidatorBase
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.utils import MSGPackSerializer

from shoal.protocol.p2p import P2PTransport
from shoal.protocol.p2pd import BootstrapUnreachable, DaemonFailed
from shoal.protocol.records import MAX_LIFETIME_S, MAX_RECORD_BYTES, PeerRecord, open_record
from shoal.protocol.transport import Refused

log = logging.getLogger(__name__)

MAX_RECORDS = 1024  # subkeys that one node accepts at a time
MAX_CLOCK_SKEW_S = 60.0
_MSGPACK_OVERHEAD_BYTES = 16


def peers_key(run_id: str) -> str:
    return f"shoal/{run_id}/peers"


class RecordValidator(RecordValidatorBase):
    """What our DHT nodes store for others and believe from others: nothing but good peer records of this run."""

    def __init__(self, run_id: str, clock: Callable[[], float]) -> None:
        self._run_id = run_id
        self._clock = clock
        self._key: bytes = DHTID.generate(source=peers_key(run_id)).to_bytes()
        self._accepted: dict[bytes, float] = {}  # subkey → expiry (unix seconds)

    def validate(self, record: DHTRecord) -> bool:
        """Never raises: whatever a stranger sends is either a good record or False."""
        try:
            return self._is_good(record)
        except Exception:
            log.debug("a record in the directory cannot be read", exc_info=True)
            return False

    def _is_good(self, record: DHTRecord) -> bool:
        now = self._clock()
        if record.key != self._key or len(record.value) > MAX_RECORD_BYTES + _MSGPACK_OVERHEAD_BYTES:
            return False
        if len(record.subkey) > 80 or not now < record.expiration_time <= now + MAX_LIFETIME_S + MAX_CLOCK_SKEW_S:
            return False
        peer, value = MSGPackSerializer.loads(record.subkey), MSGPackSerializer.loads(record.value)
        if not isinstance(peer, str) or not isinstance(value, bytes):
            return False
        opened = _open(value, peer, self._run_id, now)
        if opened is None or abs(opened.expires_at - record.expiration_time) > 0.001:
            return False
        return self._has_room(record, now)

    def _has_room(self, record: DHTRecord, now: float) -> bool:
        if record.subkey not in self._accepted and len(self._accepted) >= MAX_RECORDS:
            self._accepted = {subkey: until for subkey, until in self._accepted.items() if until > now}
            if len(self._accepted) >= MAX_RECORDS:
                return False
        self._accepted[record.subkey] = record.expiration_time
        return True


class Directory:
    """Publish one's own record and read those of others. Every operation has a deadline of `timeout_s`."""

    def __init__(self, transport: P2PTransport, run_id: str, clock: Callable[[], float], timeout_s: float) -> None:
        self._transport = transport
        self._run_id = run_id
        self._clock = clock
        self._timeout_s = timeout_s
        self._node: DHTNode

    @classmethod
    async def create(
        cls,
        transport: P2PTransport,
        run_id: str,
        *,
        initial_peers: Sequence[str] | None = None,
        clock: Callable[[], float] = time.time,
        timeout_s: float = 20.0,
    ) -> Directory:
        """Join the DHT of the run.

        initial_peers: multiaddrs with /p2p/<PeerID>, by default those of the transport. Raises BootstrapUnreachable
        when there are some and none of them answers, DaemonFailed when p2pd does not serve us."""
        peers = transport.initial_peers if initial_peers is None else tuple(initial_peers)
        self = cls(transport, run_id, clock, timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                self._node = await DHTNode.create(
                    p2p=transport.daemon.p2p,
                    initial_peers=list(peers) or None,
                    record_validator=RecordValidator(run_id, clock),
                    cache_locally=False,  # `peers` wants what is there now
                    cache_on_store=False,
                    cache_nearest=0,
                    strict=False,  # strict refuses to start when two clocks differ by 3 s
                )
        except TimeoutError as error:
            raise DaemonFailed(
                f"the DHT was not ready after {timeout_s:g} s", "try again; see the node's log"
            ) from error
        except RuntimeError as error:
            raise BootstrapUnreachable(
                f"no bootstrap peer answered in the DHT: {', '.join(peers)}",
                "check that the bootstrap peer belongs to this run, is running and reachable from here",
            ) from error
        return self

    async def publish(self, record: bytes, expires_at: float) -> bool:
        """Store our own sealed record until `expires_at` (unix seconds, its signed expiry). False: not stored.

        A record that other nodes would refuse is a ValueError: ours, past the size bound, or with another expiry."""
        opened = open_record(record, now=self._clock(), expected_run=self._run_id, expected_peer=self._transport.peer)
        if opened.expires_at != expires_at:
            raise ValueError("a record expires in the directory when it says that it does")
        try:
            async with asyncio.timeout(self._timeout_s):
                return bool(
                    await self._node.store(peers_key(self._run_id), record, expires_at, subkey=self._transport.peer)
                )
        except TimeoutError:
            return False
        except Exception:
            log.exception("publishing our record failed")
            return False

    async def peers(self) -> dict[str, PeerRecord]:
        """The good records of the run by PeerID, our own included. Empty when the DHT does not answer in time."""
        try:
            async with asyncio.timeout(self._timeout_s):
                found = await self._node.get(peers_key(self._run_id), latest=True)
        except TimeoutError:
            return {}
        except Exception:
            log.exception("reading the directory failed")
            return {}
        if found is None or not isinstance(found.value, dict):
            return {}
        records = {}
        for peer, item in found.value.items():
            if isinstance(peer, str) and isinstance(item.value, bytes):
                opened = _open(item.value, peer, self._run_id, self._clock())
                if opened is not None:
                    records[peer] = opened
        return records

    async def close(self) -> None:
        """Leave the DHT. Close the transport after this."""
        self._node.is_alive = False
        if self._transport.daemon.is_gone:  # there is nobody to tell, and hivemind would wait for an answer
            return
        try:
            async with asyncio.timeout(3.0):
                await self._node.shutdown()
        except TimeoutError:
            log.debug("the DHT node did not shut down in time")


def _open(data: bytes, peer: str, run_id: str, now: float) -> PeerRecord | None:
    try:
        return open_record(data, now=now, expected_run=run_id, expected_peer=peer)
    except Refused as refusal:
        log.debug("a record of %s was refused: %s", peer, refusal)
        return None
