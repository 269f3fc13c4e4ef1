"""Ways into a run: the invite's addresses, peers met before, and the manifest that one of them must give."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from shoal.node.exit_codes import ExitCode, ShoalError
from shoal.node.services import MANIFEST
from shoal.protocol.identity import readable_name
from shoal.protocol.invite import Invite
from shoal.protocol.manifest import SignedManifest
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
        """Remember these; the newest first, at most MAX_KNOWN."""
        known = {**met, **{peer: maddrs for peer, maddrs in self.read().items() if peer not in met}}
        known.pop(self.me, None)
        aside = self.path.with_suffix(".new")
        with contextlib.suppress(OSError):
            aside.write_text(json.dumps({peer: list(known[peer]) for peer in list(known)[:MAX_KNOWN]}))
            aside.replace(self.path)


def invited_peers(invite: Invite | None) -> tuple[str, ...]:
    """PeerIDs at the invite's addresses, and its coordinator."""
    if invite is None:
        return ()
    return tuple(dict.fromkeys((invite.coordinator, *(maddr.rsplit("/p2p/", 1)[1] for maddr in invite.maddrs))))


def initial_addresses(invite: Invite | None, known: Addresses) -> tuple[str, ...]:
    """Where libp2p may connect first, with /p2p suffixes. A coordinator has no invite and starts alone."""
    if invite is None:
        return ()
    met = (f"{maddr}/p2p/{peer}" for peer, maddrs in known.items() for maddr in maddrs)
    return tuple(dict.fromkeys((*invite.maddrs, *met)))


async def fetch_manifest(transport: Transport, invite: Invite, peers: Iterable[str]) -> tuple[SignedManifest, bytes]:
    """The signed manifest from the first of `peers` that gives it, and its bytes. It must be the one of the invite.

    Raises ShoalError: MANIFEST_REFUSED when it is not, BOOTSTRAP_UNREACHABLE when nobody gives one."""
    failure: CallError | None = None
    for peer in dict.fromkeys(peers):
        try:
            reply = await transport.call(peer, MANIFEST, Empty(), timeout_s=MANIFEST_TIMEOUT_S)
        except CallError as error:
            failure = failure or error
            continue
        try:
            signed = SignedManifest.open(reply.body, expected_run=invite.run, expected_coordinator=invite.coordinator)
        except Refused as error:
            raise ShoalError(
                ExitCode.MANIFEST_REFUSED,
                f"the manifest that {readable_name(peer)} gave is not the one of the invite: {error.detail}",
            ) from None
        return signed, reply.body
    raise ShoalError(ExitCode.BOOTSTRAP_UNREACHABLE, f"no peer of the invite gave the manifest ({failure})")
