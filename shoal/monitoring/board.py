"""What the boards have in common: notes with counting, colours of states, and fitting the space they are drawn in."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.text import Text

from shoal.monitoring.wording import duration_text

KILLED = "killed"
STATE_STYLE = {
    "working": "green",
    "paused": "magenta",
    "draining": "magenta",
    "left": "dim",
    KILLED: "not dim bold red",
    "failed": "not dim bold red",
}
NOTES_KEPT = 200


class Board(Protocol):
    def lines(self, now_s: float, width: int, height: int) -> list[RenderableType]:
        """What there is to show at `now_s`, for so many columns and rows."""
        ...


@dataclass(frozen=True, slots=True)
class Fitted:
    """A board at one moment, as a renderable that is built for the columns and lines it gets."""

    board: Board
    now_s: float

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Group(*self.board.lines(self.now_s, options.max_width, options.height or console.size.height))


@dataclass(slots=True)
class Note:
    """One line of the log. `round` is set for notes that count up while that round lasts."""

    at_s: float
    glyph: str
    style: str
    text: str
    round: int | None = None

    def line(self, origin_s: float) -> Text:
        return Text.assemble(
            (f"{duration_text(self.at_s - origin_s):>7} ", "dim"),
            (f"{self.glyph} ", self.style),
            self.text,
            no_wrap=True,
        )

    def plain(self, origin_s: float) -> str:
        return f"[{duration_text(self.at_s - origin_s):>5}] {self.text}"


class Journal:
    """Notes with counting: the same key changes its note instead of adding one."""

    def __init__(self) -> None:
        self.notes: deque[Note] = deque(maxlen=NOTES_KEPT)
        self._by_key: dict[object, Note] = {}
        self._unprinted: list[Note | tuple[float, str]] = []

    def add(self, note: Note, key: object = None) -> None:
        """Add a note; with a key that was seen, replace that note's text."""
        known = self._by_key.get(key) if key is not None else None
        if known:
            known.text = note.text
            return
        if key is not None:
            self._by_key[key] = note
        self.notes.append(note)
        self._unprinted.append(note)

    def print_line(self, at_s: float, line: str) -> None:
        """A line for the plain output only."""
        self._unprinted.append((at_s, line))

    def take_plain(self, origin_s: float, round_: int | None, final: bool) -> list[str]:
        """Lines not taken yet; a note that counts waits until its round is over."""
        lines, waiting = [], []
        for item in self._unprinted:
            if isinstance(item, tuple):
                lines.append(item[1])
            elif final or item.round is None or (round_ is not None and round_ > item.round):
                lines.append(item.plain(origin_s))
            else:
                waiting.append(item)
        self._unprinted = list(waiting)
        return lines
