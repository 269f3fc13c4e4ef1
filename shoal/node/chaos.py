"""Fault injection for tests: SHOAL_CHAOS="kill EVENT [COUNT] [field=value …]" kills this process at an event.

The same points as in the simulator, on real processes: a node is killed synchronously when it emits the COUNT-th event
of that kind. Not for production; a node that runs with it says so.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping

from shoal.protocol.events import EVENT_TYPES, Event, Sink, Stamped

VARIABLE = "SHOAL_CHAOS"


def injection(environment: Mapping[str, str]) -> Sink | None:
    """The sink that the environment asks for. Raises ValueError for one that cannot be understood."""
    text = environment.get(VARIABLE, "").split()
    if not text:
        return None
    if len(text) < 2 or text[0] != "kill" or text[1] not in EVENT_TYPES:
        raise ValueError(f'{VARIABLE} is "kill EVENT [COUNT] [field=value …]", not "{" ".join(text)}"')
    kind = EVENT_TYPES[text[1]]
    rest = text[2:]
    left = int(rest.pop(0)) if rest and rest[0].isdigit() else 1
    wanted = dict(item.split("=", 1) for item in rest)

    def sink(stamped: Stamped) -> None:
        nonlocal left
        if not _matches(stamped.event, kind, wanted):
            return
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return sink


def _matches(event: Event, kind: type[Event], wanted: Mapping[str, str]) -> bool:
    return isinstance(event, kind) and all(str(getattr(event, name)) == value for name, value in wanted.items())
