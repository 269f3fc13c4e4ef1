"""Live views for a terminal: `SwarmBoard` over many nodes' event streams, `NodeBoard` over one's own.

Both are pure: events and marks go in with their times, a renderable comes out for a given `now_s`. They fit themselves
to the width and height they are drawn in; where stdout is no terminal, `plain_lines()` gives the same story as text,
one line per committed step and per notable thing.
"""

from __future__ import annotations

from shoal.monitoring.node_board import NodeBoard
from shoal.monitoring.swarm_board import SwarmBoard
from shoal.monitoring.wording import (
    bar,
    bytes_text,
    count_text,
    duration_text,
    number_text,
    plain_line,
    rate_text,
    sparkline,
)

__all__ = [
    "NodeBoard",
    "SwarmBoard",
    "bar",
    "bytes_text",
    "count_text",
    "duration_text",
    "number_text",
    "plain_line",
    "rate_text",
    "sparkline",
]
