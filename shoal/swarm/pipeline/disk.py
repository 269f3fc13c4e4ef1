"""A store whose failure ends the peer: a full or broken disk must not leave a node that answers and never can help."""

from __future__ import annotations

import asyncio

from shoal.protocol.store import Data, OnCorrupt, Store, StoreError


class WatchedStore:
    """Passes everything on; remembers the first error of the disk and lets one task wait for it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._failed = asyncio.Event()
        self._error: StoreError | None = None

    @property
    def on_corrupt(self) -> OnCorrupt:
        return self._store.on_corrupt

    @on_corrupt.setter
    def on_corrupt(self, callback: OnCorrupt) -> None:
        self._store.on_corrupt = callback

    async def failure(self) -> None:
        """Wait, usually for ever, and raise the StoreError that an operation raised somewhere in this peer."""
        await self._failed.wait()
        assert self._error is not None
        raise self._error

    def _note(self, error: StoreError) -> None:
        self._error = self._error or error
        self._failed.set()

    async def put(self, key: str, data: Data) -> None:
        try:
            await self._store.put(key, data)
        except StoreError as error:
            self._note(error)
            raise

    async def get(self, key: str) -> bytes | None:
        try:
            return await self._store.get(key)
        except StoreError as error:
            self._note(error)
            raise

    async def delete(self, key: str) -> None:
        try:
            await self._store.delete(key)
        except StoreError as error:
            self._note(error)
            raise

    def keys(self, prefix: str = "") -> list[str]:
        return self._store.keys(prefix)

    def size(self, key: str) -> int | None:
        return self._store.size(key)

    async def aclose(self) -> None:
        await self._store.aclose()
