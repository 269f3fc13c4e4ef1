"""An asyncio event loop with a virtual clock: waiting costs nothing and every run replays exactly.

When nothing is ready, the clock jumps to the next timer. With no timer either, all tasks wait for something that will
never come: that is a deadlock in the code under test, and it raises. No threads, no sockets.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
CANCELS = 10


class Deadlock(RuntimeError):
    """Every task waits and no timer is set."""


class _JumpingSelector(selectors.SelectSelector):
    """Waits for nothing: tells its loop how far to jump instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise Deadlock("all tasks wait and no timer is set")
        self.now_s += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """`time()` is virtual seconds since the loop was made."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now_s


def _quiet(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Errors of killed peers' tasks are part of the simulation; `World.check` raises those of live ones."""


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` to its end on a fresh virtual loop."""
    loop = VirtualLoop()
    loop.set_exception_handler(_quiet)
    try:
        return loop.run_until_complete(main)
    finally:
        _end_all(loop)
        loop.close()


def _end_all(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel what still runs, as often as it takes: a cancelled task may start others to clean up."""
    for _ in range(CANCELS):
        left = asyncio.all_tasks(loop)
        if not left:
            return
        for task in left:
            task.cancel()
        for _ in range(CANCELS):
            loop.call_soon(loop.stop)
            loop.run_forever()
    raise RuntimeError(f"tasks that cannot be cancelled: {asyncio.all_tasks(loop)}")
