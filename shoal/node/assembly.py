"""Putting a pipeline peer together from a signed manifest and the node's own parts. Imports torch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from shoal.protocol.blobs import BlobStore
from shoal.protocol.events import Event
from shoal.protocol.identity import Identity, verify
from shoal.protocol.manifest import SignedManifest
from shoal.protocol.runlog import Entry, Member
from shoal.protocol.store import Store
from shoal.protocol.transport import Transport
from shoal.swarm.pipeline.context import Context, Patience, genesis
from shoal.swarm.pipeline.messages import Methods
from shoal.swarm.pipeline.spec import spec_of


@dataclass(frozen=True, slots=True)
class RunKeySigner:
    """The identity's run key, as the pipeline wants it."""

    identity: Identity

    @property
    def public_key(self) -> str:
        return self.identity.public_key.hex()

    def sign(self, domain: str, payload: bytes) -> bytes:
        return self.identity.sign(domain, payload)


def verify_hex(public_key: str, domain: str, payload: bytes, signature: bytes) -> bool:
    try:
        return verify(bytes.fromhex(public_key), domain, payload, signature)
    except ValueError:
        return False


def make_context(
    signed: SignedManifest,
    *,
    transport: Transport,
    store: Store,
    identity: Identity,
    emit: Callable[[Event], None],
    pool: Executor,
) -> Context:
    """What a peer or an observer of this run works with. Compute runs in `pool`."""
    spec = spec_of(signed.manifest, signed.coordinator)

    async def run_in_thread(function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(pool, function, *args)

    return Context(
        spec=spec,
        transport=transport,
        store=store,
        blobs=BlobStore(store),
        emit=emit,
        run_in_thread=run_in_thread,
        signer=RunKeySigner(identity),
        verify=verify_hex,
        calls=Methods(spec.max_body_bytes),
        patience=Patience(),
    )


def first_entry(signed: SignedManifest) -> Entry:
    """Entry 0 of the run: everybody who has the manifest computes the same."""
    coordinator = Member(peer=signed.coordinator, public_key=signed.certificate.run_key.hex())
    return genesis(signed.manifest.run_id, coordinator)
