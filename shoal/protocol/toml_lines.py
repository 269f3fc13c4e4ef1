"""Where each key of a TOML text stands: `tomllib` gives the values, this gives their lines."""

from __future__ import annotations

import re
import tomllib

KeyPath = tuple[str | int, ...]


def line_numbers(source: str) -> dict[KeyPath, int]:
    """Key path -> line (from 1) of every table header and key of a *valid* TOML text; list elements have an index."""
    return _Scanner(source).scan()


class _Scanner:
    """Walks over TOML that tomllib has accepted, so it only has to know where things begin and end."""

    def __init__(self, source: str) -> None:
        self._s = source
        self._i = 0
        self._line = 1
        self._lines: dict[KeyPath, int] = {}

    def scan(self) -> dict[KeyPath, int]:
        table: KeyPath = ()
        arrays: dict[KeyPath, int] = {}  # [[name]] -> index of its newest table
        while self._skip("\n"):
            if self._s.startswith("[", self._i):
                double = self._s.startswith("[[", self._i)
                line = self._line
                self._i += 2 if double else 1
                table = ()
                keys = self._key()
                for n, part in enumerate(keys):
                    table = (*table, part)
                    if double and n == len(keys) - 1:
                        arrays[table] = arrays.get(table, -1) + 1
                    if table in arrays:
                        self._lines.setdefault(table, line)
                        table = (*table, arrays[table])
                    self._lines.setdefault(table, line)
                self._i += 2 if double else 1
            else:
                self._pair(table)
        return self._lines

    def _peek(self) -> str:
        return self._s[self._i : self._i + 1]

    def _skip(self, also: str = "") -> bool:
        """Pass blanks and comments (and line ends, if `also` holds them); is anything left?"""
        while self._i < len(self._s):
            char = self._s[self._i]
            if char == "#":
                end = self._s.find("\n", self._i)
                self._i = len(self._s) if end < 0 else end
            elif char in " \t" or char in also:
                self._line += char == "\n"
                self._i += 1
            else:
                return True
        return False

    def _key(self) -> list[str]:
        parts = []
        while True:
            self._skip()
            if self._peek() in ('"', "'"):
                begin = self._i
                self._string()
                parts.append(str(tomllib.loads("k = " + self._s[begin : self._i])["k"]))
            else:
                bare = re.compile(r"[A-Za-z0-9_-]*").match(self._s, self._i)
                assert bare is not None
                parts.append(bare[0])
                self._i = bare.end()
            self._skip()
            if self._peek() != ".":
                return parts
            self._i += 1

    def _pair(self, table: KeyPath) -> None:
        line = self._line
        for part in self._key():
            table = (*table, part)
            self._lines.setdefault(table, line)
        self._i += 1  # '='
        self._skip()
        self._value(table)

    def _value(self, path: KeyPath) -> None:
        char = self._peek()
        if char in ('"', "'"):
            self._string()
        elif char == "[":
            self._i += 1
            index = 0
            while self._skip("\n") and self._peek() != "]":
                self._lines.setdefault((*path, index), self._line)
                self._value((*path, index))
                index += 1
                if self._skip("\n") and self._peek() == ",":
                    self._i += 1
            self._i += 1
        elif char == "{":
            self._i += 1
            while self._skip("\n") and self._peek() != "}":
                self._pair(path)
                if self._skip("\n") and self._peek() == ",":
                    self._i += 1
            self._i += 1
        else:
            scalar = re.compile(r"[^,\]}#\n]*").match(self._s, self._i)
            assert scalar is not None
            # an empty match would stand still; valid TOML has none, but never loop for ever on a surprise
            self._i = max(scalar.end(), self._i + 1)

    def _string(self) -> None:
        quote = self._peek()
        long = self._s.startswith(quote * 3, self._i)
        escape = r"\\.|" if quote == '"' else ""
        body = rf"(?s:{quote * 3}(?:{escape}(?!{quote * 3}).)*{quote * 3}{quote}{{0,2}})" if long else (
            rf"{quote}(?:{escape}[^{quote}])*{quote}"
        )  # fmt: skip
        found = re.compile(body).match(self._s, self._i)
        assert found is not None
        self._line += self._s.count("\n", self._i, found.end())
        self._i = found.end()
