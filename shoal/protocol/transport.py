"""The seam between decisions and the network: authenticated request/response calls between peers.

Two implementations pass one conformance suite: `protocol.p2p` (hivemind's p2pd, real) and `swarm.simulation.network`
(virtual clock, labelled simulated). A call carries a small schema-checked header (a pydantic model, JSON on the wire)
and an opaque body. The transport guarantees: the caller's identity is the connection's; header and body arrive whole,
verified by length and SHA-256 digest, or not at all; sizes are bounded before allocation; the reply acknowledges the
request. It does not guarantee that a request without a reply had no effect.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict

from shoal.protocol.events import Reason


class Message(BaseModel):
    """Base of every header: unknown fields are refused, values are not coerced, instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Empty(Message):
    """A header that says nothing."""


class CallError(Exception):
    """A call did not succeed. `reason` is typed; `detail` is for people and carries no secrets."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else str(reason))
        self.reason = reason
        self.detail = detail


class Refused(CallError):
    """The other side (or this side's handler) refused, without effect."""


class Unanswered(CallError):
    """No usable answer: UNREACHABLE, DEADLINE, TORN_STREAM, BAD_DIGEST. The request may or may not have had effect."""


H = TypeVar("H", bound=Message)
Q = TypeVar("Q", bound=Message)
A = TypeVar("A", bound=Message)


@dataclass(frozen=True, slots=True)
class Request(Generic[H]):
    """What a handler gets. `sender` is authenticated by the connection (PeerID, base58)."""

    sender: str
    header: H
    body: bytes


@dataclass(frozen=True, slots=True)
class Reply(Generic[H]):
    """What a handler returns and a caller receives."""

    header: H
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Method(Generic[Q, A]):
    """One call of the protocol: its name on the wire, header schemas, and bounds on both bodies (bytes)."""

    name: str
    request: type[Q]
    reply: type[A]
    max_request_bytes: int = 0
    max_reply_bytes: int = 0


Handler = Callable[[Request[Any]], Awaitable[Reply[Any]]]


class Transport(Protocol):
    """Calls to and from other peers. All methods may be used from one event loop only."""

    @property
    def peer(self) -> str:
        """This node's PeerID (base58)."""
        ...

    def serve(self, method: Method[Q, A], handler: Handler) -> None:
        """Answer `method` with `handler` from now on. A `Refused` raised by it travels to the caller typed; any other
        exception becomes INTERNAL without details."""
        ...

    async def call(
        self, peer: str, method: Method[Q, A], header: Q, body: bytes = b"", *, timeout_s: float
    ) -> Reply[A]:
        """Call a peer and wait for its reply. Calling one's own PeerID is allowed and stays local.

        Raises Refused or Unanswered; never anything else except cancellation."""
        ...

    def learn_address(self, peer: str, maddrs: tuple[str, ...]) -> None:
        """Remember where a peer listens (multiaddrs without /p2p suffix), so that `call` can dial it directly."""
        ...
