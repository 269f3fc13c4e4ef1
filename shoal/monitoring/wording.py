"""Words and numbers for a terminal: durations, bytes, counts, sparklines, progress bars, one step as one line."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from rich.text import Text

UNITS = ("B", "kB", "MB", "GB", "TB")
BLOCKS = "▁▂▃▄▅▆▇█"


def duration_text(seconds: float) -> str:
    """0:07, 12:04, 1:02:33."""
    whole = max(0, int(seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def bytes_text(count: float) -> str:
    """Eight columns with the unit in the last two: ' 12.3 MB', '   512 B'. Decimal units."""
    if count < 1000:
        return f"{count:>6.0f} B"
    power = 1
    while count >= 999.95 * 1000**power and power < len(UNITS) - 1:
        power += 1
    return f"{count / 1000**power:>5.1f} {UNITS[power]}"


def count_text(count: int) -> str:
    """At most six columns: 9,999 then 10.0k, 1.2M."""
    if count < 10_000:
        return f"{count:,}"
    return f"{count / 1000:.1f}k" if count < 999_950 else f"{count / 1e6:.1f}M"


def number_text(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def rate_text(samples_per_s: float) -> str:
    return f"{samples_per_s:,.1f}" if samples_per_s < 100 else f"{samples_per_s:,.0f}"


def sparkline(values: Sequence[float], width: int) -> str:
    """The values as block characters, oldest left, at most `width` of them (each the mean of its share)."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite or width < 1:
        return ""
    columns = min(width, len(finite))
    edges = [round(i * len(finite) / columns) for i in range(columns + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)


def bar(done: int, total: int, width: int) -> Text:
    """A progress bar `width` columns wide."""
    halves = min(2 * width, round(2 * width * done / total)) if total > 0 else 0
    filled = "━" * (halves // 2) + ("╸" if halves % 2 else "")
    return Text.assemble((filled, "green"), ("─" * (width - len(filled)), "bright_black"))


def plain_line(
    *, step: int, rounds: int, loss: float, samples_per_s: float, elapsed_s: float, left_s: float | None, peers: int
) -> str:
    """One committed step as one line of text, columns aligned over a run."""
    width = len(str(rounds)) if rounds else 5
    of = f"/{rounds}" if rounds else ""
    left = f"  {duration_text(left_s)} to go" if left_s is not None else ""
    return (
        f"[{duration_text(elapsed_s):>5}] step {step:>{width}}{of}  loss {number_text(loss):>6}  "
        f"{rate_text(samples_per_s):>6} samples/s  {peers} peers{left}"
    )


def plural(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}{'es' if what.endswith(('ch', 's')) else 's'}"


def columns(left: Text, right: Text, width: int) -> Text:
    """`left` and `right` at the two ends of one line; the left one gives way."""
    left.truncate(max(0, width - right.cell_len - 1), overflow="ellipsis")
    return Text.assemble(left, " " * max(0, width - left.cell_len - right.cell_len), right, no_wrap=True)
