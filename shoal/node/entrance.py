"""Ways into a run: the invite's addresses, peers met before, and the manifest that one of them must give."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from shoal.node.exit_codes import ExitCode, ShoalError
from shoal.node.files import replace_file
from shoal.node.services import MANIFEST
from shoal.protocol.identity import readable_name
from shoal.protocol.invite import Invite, Maddr
from shoal.protocol.manifest import SignedManifest
from shoal.protocol.runlog import Member
from shoal.protocol.transport import CallError, Empty, Refused, Transport

MAX_KNOWN = 64
MANIFEST_TIMEOUT_S = 15.0
Addresses = Mapping[str, tuple[str, ...]]  # PeerID -> multiaddrs without the /p2p suffix


@dataclass(frozen=True, slots=True)
class KnownPeers:
    """Peers that this node met, on disk: how it finds the run again when the bootstrap peer is gone. Only a hint: a
    file that cannot be read or written is as good as none."""

    path: Path
    me: str

    def read(self) -> dict[str, tuple[str, ...]]:
        try:
            raw = json.loads(self.path.read_text())
            return {str(peer): tuple(map(str, maddrs)) for peer, maddrs in raw.items() if peer != self.me}
        except (OSError, ValueError, AttributeError, TypeError):
            return {}

    def add(self, met: Addresses) -> None:
        """Remember these, the first ones first, then who was known before; at most MAX_KNOWN."""
        known = {**met, **{peer: maddrs for peer, maddrs in self.read().items() if peer not in met}}
        known.pop(self.me, None)
        with contextlib.suppress(OSError):
            replace_file(self.path, json.dumps({peer: list(known[peer]) for peer in list(known)[:MAX_KNOWN]}).encode())


def invited_peers(invite: Invite | None) -> tuple[str, ...]:
    """PeerIDs at the invite's addresses, and its coordinator."""
    if invite is None:
        return ()
    return tuple(dict.fromkeys((invite.coordinator, *(maddr.rsplit("/p2p/", 1)[1] for maddr in invite.maddrs))))


def invited_addresses(invite: Invite | None) -> dict[str, tuple[str, ...]]:
    """Where the invite says that its peers listen. The log cannot say it of the coordinator: genesis is the same for
    everybody, wherever the coordinator is."""
    found: dict[str, tuple[str, ...]] = {}
    for address in map(Maddr.parse, invite.maddrs if invite is not None else ()):
        if address.peer is not None:
            found[address.peer] = (*found.get(address.peer, ()), address.dialable)
    return found


def merged(*sources: Addresses) -> dict[str, tuple[str, ...]]:
    """All addresses of all sources; of one peer, those of the first source first."""
    peers = dict.fromkeys(peer for source in sources for peer in source)
    return {p: tuple(dict.fromkeys(maddr for source in sources for maddr in source.get(p, ()))) for p in peers}


def ways_back(members: Iterable[Member], found: Addresses, me: str) -> dict[str, tuple[str, ...]]:
    """Addresses worth keeping: of members first, whom the log names, then of whoever else the DHT shows (`found`), so
    that strangers cannot push members out. Of a member, what the log says; if it says nothing, what the DHT says."""
    named = {m.peer: m.maddrs or found.get(m.peer, ()) for m in members}
    met = {**named, **{peer: maddrs for peer, maddrs in found.items() if peer not in named}}
    return {peer: maddrs for peer, maddrs in met.items() if maddrs and peer != me}


def initial_addresses(invite: Invite | None, known: Addresses) -> tuple[str, ...]:
    """Where libp2p may connect first, with /p2p suffixes. A coordinator has no invite and starts alone."""
    if invite is None:
        return ()
    met = (f"{maddr}/p2p/{peer}" for peer, maddrs in known.items() for maddr in maddrs)
    return tuple(dict.fromkeys((*invite.maddrs, *met)))


async def fetch_manifest(transport: Transport, invite: Invite, peers: Iterable[str]) -> tuple[SignedManifest, bytes]:
    """The manifest of the invite, from the first of `peers` that gives it, and its bytes. One liar stops nobody.

    Raises ShoalError: MANIFEST_REFUSED when some gave another one and nobody the right one, BOOTSTRAP_UNREACHABLE when
    nobody gave any."""
    failure: CallError | None = None
    forged: ShoalError | None = None
    for peer in dict.fromkeys(peers):
        try:
            reply = await transport.call(peer, MANIFEST, Empty(), timeout_s=MANIFEST_TIMEOUT_S)
        except CallError as error:
            failure = failure or error
            continue
        try:
            signed = SignedManifest.open(reply.body, expected_run=invite.run, expected_coordinator=invite.coordinator)
        except Refused as error:
            forged = forged or ShoalError(
                ExitCode.MANIFEST_REFUSED,
                f"the manifest that {readable_name(peer)} gave is not the one of the invite: {error.detail}",
            )
            continue
        return signed, reply.body
    raise forged or ShoalError(ExitCode.BOOTSTRAP_UNREACHABLE, f"no peer of the invite gave the manifest ({failure})")
