"""Fetch a blob from several donors at once (DESIGN 4.8).

A fetcher trusts nothing but the blob's digest: it checks the index against the digest, the sizes against its own
bounds, each chunk against the index, and stores at once what it has checked, so that a broken fetch goes on where it
stopped. As in BitTorrent (Cohen, 2003), donors are asked for different chunks at the same time, each takes the next one
when it is free, and near the end a chunk that is slow to come is asked for again from an idle donor.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from shoal.protocol.blobs import (
    INDEX,
    MIB,
    BlobError,
    BlobIndex,
    BlobStore,
    ChunkRequest,
    IndexRequest,
    chunk_method,
    require_digest,
    sha256_hex,
)
from shoal.protocol.deadlines import Deadline
from shoal.protocol.events import CallFailed, ChunkFetched, Event, Reason
from shoal.protocol.transport import CallError, Empty, Reply, Transport, Unanswered

MAX_IN_FLIGHT_BYTES = 64 * MIB  # of one fetch, over all donors
INDEX_CALLS = 8  # most donors asked for the index at a time
STRIKES = 4  # failures in a row after which a donor is given up
PAUSE_S = 0.25  # after the first failure of a donor; doubles with each further one


class BlobUnavailable(BlobError):
    """No donor is left that could give what is missing. `reasons`: why each donor was given up. What was fetched is
    kept; calling `fetch` again, with these donors or others, goes on from there."""

    def __init__(self, digest: str, reasons: Mapping[str, Reason]) -> None:
        told = ", ".join(f"{donor}: {reason}" for donor, reason in reasons.items()) or "there were none"
        super().__init__(
            Reason.NOT_FOUND, f"no donor could give blob {digest[:12]} ({told}); try again with other donors"
        )
        self.digest = digest
        self.reasons = dict(reasons)


@dataclass(frozen=True, slots=True)
class FetchResult:
    """`donors_used`: those who gave at least one chunk, in the order of `donors`. `size_bytes`: the whole blob.
    `fetched_bytes`: how much of it came over the network in this call (the rest was here already)."""

    donors_used: tuple[str, ...]
    size_bytes: int
    fetched_bytes: int
    seconds: float


def donor_deadline(donor: str) -> Deadline:
    """The default estimator of one donor's seconds per chunk: a 16 MiB chunk may take 60 s (2.2 Mbit/s)."""
    return Deadline(initial_s=15.0, floor_s=1.0, ceiling_s=60.0, k=6.0)


async def fetch(
    transport: Transport,
    blobs: BlobStore,
    digest: str,
    donors: Sequence[str],
    *,
    emit: Callable[[Event], None],
    max_bytes: int,
    deadline: Callable[[str], Deadline] = donor_deadline,
    parallel: int = 4,
) -> FetchResult:
    """Get the blob `digest` from `donors` (PeerIDs) into `blobs`; when it returns, `blobs.has(digest)`.

    `max_bytes`: bound on the blob, checked before the first chunk is asked for. `deadline(donor)`: the estimator of
    that donor's seconds per chunk, asked for once; hand out the same object again to remember donors between fetches.
    `parallel`: most calls to one donor at a time. Every call has a deadline and a donor that fails STRIKES times in a
    row is given up, so this ends by itself; it may also be cancelled at any point and called again.

    A donor that sends bytes which do not match the digest is given up at once and counted: `CallFailed(BAD_DIGEST)`.
    Raises BlobUnavailable, BlobError (TOO_LARGE, MALFORMED: the pinned index itself is unusable), StoreError,
    ValueError (not a digest). Fetching one digest twice at the same time is allowed and wasteful.
    """
    require_digest(digest)
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    usable = {donor: _Donor(donor, deadline(donor), parallel) for donor in donors if donor != transport.peer}
    crew = _Crew(digest, usable, parallel, emit)
    index = await blobs.index(digest) or await blobs.partial(digest)
    if index is None:
        index = await _fetch_index(transport, blobs, digest, crew, max_bytes)
    if index.size_bytes > max_bytes:
        raise BlobError(Reason.TOO_LARGE, f"blob {digest[:12]} has {index.size_bytes} bytes, allowed are {max_bytes}")
    missing = await blobs.missing(digest, index)
    pieces = [_chunk_piece(transport, blobs, digest, index, number) for number in missing]
    await crew.pull(pieces, in_flight=max(2, MAX_IN_FLIGHT_BYTES // index.chunk_bytes))
    if missing or not blobs.has(digest):
        await blobs.finish(digest, index)
    return FetchResult(
        donors_used=tuple([donor.peer for donor in usable.values() if donor.chunks]),
        size_bytes=index.size_bytes,
        fetched_bytes=sum([index.chunk_size(number) for number in missing]),
        seconds=loop.time() - began_s,
    )


@dataclass(slots=True, eq=False)
class _Piece:
    """Something to get. Any donor's answer with this digest is as good as any other's."""

    method: str
    digest: str
    size_bytes: int | None  # exact, None for an index
    ask: Callable[[str, float], Awaitable[Reply[Empty]]]  # (donor, timeout in seconds)
    keep: Callable[[bytes], Awaitable[None]]  # called with checked bytes
    attempts: list[_Attempt] = field(default_factory=list)  # those under way, oldest first
    checked: bool = False  # the right bytes are here; they may still be on their way to the disk


async def _fetch_index(transport: Transport, blobs: BlobStore, digest: str, crew: _Crew, max_bytes: int) -> BlobIndex:
    found: list[BlobIndex] = []

    async def ask(donor: str, timeout_s: float) -> Reply[Empty]:
        return await transport.call(donor, INDEX, IndexRequest(digest=digest), timeout_s=timeout_s)

    async def keep(data: bytes) -> None:
        index = BlobIndex.parse(data)
        found.append(index)
        if index.size_bytes <= max_bytes:
            await blobs.begin(digest, index)

    await crew.pull([_Piece(INDEX.name, digest, None, ask, keep)], in_flight=INDEX_CALLS)
    return found[0]


def _chunk_piece(transport: Transport, blobs: BlobStore, digest: str, index: BlobIndex, number: int) -> _Piece:
    size_bytes = index.chunk_size(number)
    method = chunk_method(size_bytes)  # the donor's word on the size does not count

    async def ask(donor: str, timeout_s: float) -> Reply[Empty]:
        return await transport.call(donor, method, ChunkRequest(digest=digest, chunk=number), timeout_s=timeout_s)

    async def keep(data: bytes) -> None:
        await blobs.put_chunk(digest, number, data)

    return _Piece(method.name, index.chunks[number], size_bytes, ask, keep)


@dataclass(slots=True, eq=False)
class _Donor:
    peer: str
    deadline: Deadline
    window: int  # most calls under way: halved by a failure, one more with each success
    busy: int = 0  # calls under way
    strikes: int = 0  # failures since the last success
    struck_s: float = -math.inf  # when the last strike was; loop time, like the next
    rests_until_s: float = -math.inf
    given_up: Reason | None = None
    chunks: int = 0  # that it gave


@dataclass(slots=True, eq=False)
class _Attempt:
    donor: _Donor
    piece: _Piece
    began_s: float
    task: asyncio.Task[bool]


class _Lied(Exception):
    """The donor's bytes do not match the digest."""


# Refusals that another try at the same donor would not change.
_FINAL = (
    Reason.NOT_FOUND,
    Reason.NOT_MEMBER,
    Reason.TOO_LARGE,
    Reason.MALFORMED,
    Reason.UNKNOWN_METHOD,
    Reason.WRONG_RUN,
    Reason.BAD_SIGNATURE,
    Reason.EXPIRED,
)
_SOON_S = 1e-6  # nearer than this is now: timers are not more exact


class _Crew:
    """The donors of one fetch at work. One coordinator starts, ends and judges all calls, in a fixed order."""

    def __init__(self, digest: str, donors: dict[str, _Donor], parallel: int, emit: Callable[[Event], None]) -> None:
        self._digest = digest
        self._donors = donors
        self._parallel = parallel
        self._emit = emit
        self._waiting: deque[_Piece] = deque()
        self._attempts: list[_Attempt] = []  # under way, oldest first
        self._cancelled: list[asyncio.Task[bool]] = []
        # How long a chunk usually takes, whoever gives it: when one takes longer, an idle donor is asked for it too.
        self._patience = Deadline(initial_s=2.0, floor_s=0.1, ceiling_s=30.0, k=3.0)

    async def pull(self, pieces: Sequence[_Piece], *, in_flight: int) -> None:
        """Returns when all pieces were kept. Raises BlobUnavailable when no donor is left, and what `keep` raises."""
        loop = asyncio.get_running_loop()
        self._waiting.extend(pieces)
        left = len(pieces)
        try:
            while left:
                wake_s = self._assign(in_flight, loop.time())
                if self._attempts:
                    timeout_s = None if wake_s is None else wake_s - loop.time()
                    tasks = [attempt.task for attempt in self._attempts]  # each of them ends by its own deadline
                    await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
                elif wake_s is not None:
                    await asyncio.sleep(wake_s - loop.time())
                else:
                    reasons = {donor.peer: donor.given_up for donor in self._donors.values() if donor.given_up}
                    raise BlobUnavailable(self._digest, reasons)
                for attempt in list(self._attempts):
                    if attempt.task.done() and attempt in self._attempts:  # not cancelled by an earlier one's end
                        left -= self._settle(attempt, loop.time())
        finally:
            for attempt in list(self._attempts):
                self._cancel(attempt)
            self._waiting.clear()
            await asyncio.gather(*self._cancelled, return_exceptions=True)
            self._cancelled.clear()

    # --- what to ask whom --------------------------------------------------------------------------------------------
    def _assign(self, in_flight: int, now_s: float) -> float | None:
        """Start all calls that may start. Returns when to look again even if none ends before (loop time), or None."""
        wake_s: list[float] = []
        started = True
        while started:  # one call per donor and pass, so that few pieces are spread over many donors
            started = False
            for donor in self._donors.values():
                if donor.given_up or donor.busy >= donor.window or len(self._attempts) >= in_flight:
                    continue
                due_s = donor.rests_until_s
                piece = self._waiting[0] if self._waiting else None
                if piece is None:
                    piece = self._overdue_piece(donor)
                    if piece is None:
                        continue
                    due_s = max(due_s, piece.attempts[-1].began_s + self._patience.value())
                if due_s > now_s + _SOON_S:
                    wake_s.append(due_s)
                    continue
                if self._waiting:
                    self._waiting.popleft()
                attempt = _Attempt(donor, piece, now_s, asyncio.ensure_future(self._get(donor, piece)))
                donor.busy += 1
                piece.attempts.append(attempt)
                self._attempts.append(attempt)
                started = True
        return min(wake_s, default=None)

    def _overdue_piece(self, donor: _Donor) -> _Piece | None:
        """Of the pieces under way that `donor` was not asked for, the one that was last asked for longest ago."""
        pieces = dict.fromkeys([attempt.piece for attempt in self._attempts if not attempt.piece.checked])
        others = [piece for piece in pieces if all(attempt.donor is not donor for attempt in piece.attempts)]
        return min(others, key=lambda piece: piece.attempts[-1].began_s, default=None)

    async def _get(self, donor: _Donor, piece: _Piece) -> bool:
        """One call, its check, and the storing. True if this call's bytes were kept, False if another's were sooner.

        Raises CallError, _Lied, and what `keep` raises."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        timeout_s = donor.deadline.value()
        try:
            async with asyncio.timeout(timeout_s + 1.0):  # in case the transport does not keep to its own
                reply = await piece.ask(donor.peer, timeout_s)
        except TimeoutError:
            raise Unanswered(Reason.DEADLINE, "no answer in time") from None
        if piece.size_bytes not in (None, len(reply.body)) or sha256_hex(reply.body) != piece.digest:
            raise _Lied
        if piece.size_bytes is not None:
            seconds = loop.time() - began_s
            self._patience.observe(seconds)
            donor.deadline.observe(seconds)
        if piece.checked:
            return False
        piece.checked = True
        await piece.keep(reply.body)
        return True

    # --- what came of it ---------------------------------------------------------------------------------------------
    def _settle(self, attempt: _Attempt, now_s: float) -> bool:
        """Draw the conclusions from a call that ended. True if its piece is now kept."""
        donor, piece = attempt.donor, attempt.piece
        self._remove(attempt)
        try:
            kept = attempt.task.result()
        except _Lied:
            self._emit(CallFailed(donor.peer, piece.method, Reason.BAD_DIGEST))
            self._give_up(donor, Reason.BAD_DIGEST)
        except CallError as error:
            if error.reason is Reason.DEADLINE:
                donor.deadline.expire(now_s - attempt.began_s)
            if error.reason in _FINAL:
                self._give_up(donor, error.reason)
            elif attempt.began_s > donor.struck_s:  # calls that were under way together fail together: one strike
                self._strike(donor, error.reason, now_s)
        else:
            donor.strikes = 0
            donor.window = min(self._parallel, donor.window + 1)
            if kept:
                for other in list(piece.attempts):
                    self._cancel(other)
                if piece.size_bytes is not None:
                    donor.chunks += 1
                    self._emit(ChunkFetched(donor.peer, piece.size_bytes))
            return kept
        self._requeue(piece)
        return False

    def _strike(self, donor: _Donor, reason: Reason, now_s: float) -> None:
        donor.strikes += 1
        donor.struck_s = now_s
        donor.window = max(1, donor.window // 2)
        donor.rests_until_s = now_s + PAUSE_S * 2 ** (donor.strikes - 1)
        if donor.strikes >= STRIKES:
            self._give_up(donor, reason)

    def _give_up(self, donor: _Donor, reason: Reason) -> None:
        """Ask this donor nothing more, and others for what it still owes."""
        donor.given_up = reason
        for attempt in list(self._attempts):
            if attempt.donor is donor and not attempt.piece.checked:
                self._cancel(attempt)
                self._requeue(attempt.piece)

    def _requeue(self, piece: _Piece) -> None:
        if not piece.checked and not piece.attempts and piece not in self._waiting:
            self._waiting.appendleft(piece)

    def _cancel(self, attempt: _Attempt) -> None:
        self._remove(attempt)
        attempt.task.cancel()
        self._cancelled.append(attempt.task)

    def _remove(self, attempt: _Attempt) -> None:
        attempt.donor.busy -= 1
        attempt.piece.attempts.remove(attempt)
        self._attempts.remove(attempt)
