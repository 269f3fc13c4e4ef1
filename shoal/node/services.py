"""Calls that a node answers besides those of its mode: the signed manifest, and a status for anybody who asks."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from shoal.protocol.transport import Empty, Message, Method

MAX_MANIFEST_BYTES = 1024 * 1024

MANIFEST: Method[Empty, Empty] = Method("manifest", Empty, Empty, max_reply_bytes=MAX_MANIFEST_BYTES)
"""The reply's body is the signed manifest (`protocol.manifest.SignedManifest`)."""


class Status(Message):
    """What a node says about itself to anybody: nothing that its log entries do not say as well."""

    run: Annotated[str, Field(max_length=64)]
    name: Annotated[str, Field(max_length=64)]
    version: Annotated[str, Field(max_length=32)]
    state: Annotated[str, Field(max_length=16)]
    mode: Annotated[str, Field(max_length=16)]
    round: int
    step: int
    stage: int | None


STATUS: Method[Empty, Status] = Method("status", Empty, Status)
