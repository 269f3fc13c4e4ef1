"""Training data by global sample id: the same id is the same bytes on every machine, for ever.

A corpus is bytes; the vocabulary is the 256 byte values. Cut at stride T it holds N sequences of T + 1 bytes (inputs
`[:-1]`, labels `[1:]`; neighbours share one byte). Global sample id g counts through epochs: epoch g // N, position
perm_{seed, epoch}(g % N). The permutation is a keyed Feistel network with cycle walking over 64-bit integers (Black &
Rogaway, "Ciphers with Arbitrary Finite Domains", 2002): no stored table, any id in O(1), and only integer operations,
so it does not depend on device, numpy or Python version.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

VOCABULARY = 256
STDLIB_CAP_BYTES = 8 * 2**20
TEXT_SUFFIXES = (".txt", ".md")
_FEISTEL_ROUNDS = 8
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "site-packages", "dist-packages", "__pycache__"}
)
_SKIPPED_FILES = ("sitecustomize.py", "usercustomize.py", "_sysconfigdata")  # these differ from machine to machine

Uint64s = npt.NDArray[np.uint64]


class DataError(Exception):
    """The training data cannot be used. The message names the file (and line) and says what to do."""


class DataSettings(Protocol):
    """What `load_corpus` reads from `[data]` of the manifest."""

    @property
    def kind(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def field(self) -> str: ...


# --- the permutation -------------------------------------------------------------------------------------------------
def _mix(x: Uint64s) -> Uint64s:
    """The splitmix64 finaliser: a bijection on 64-bit integers that scatters every input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int) -> tuple[np.uint64, ...]:
    text = f"shoal data permutation {seed} {epoch}".encode()
    raw = b"".join(hashlib.blake2b(text + bytes([half]), digest_size=_FEISTEL_ROUNDS * 4).digest() for half in range(2))
    return tuple(np.uint64(int.from_bytes(raw[8 * i : 8 * i + 8], "little")) for i in range(_FEISTEL_ROUNDS))


def permute(positions: npt.ArrayLike, size: int, *, seed: int, epoch: int) -> Uint64s:
    """perm_{seed, epoch} of range(size), applied to `positions` (any shape, ints in [0, size)) -> uint64, same shape.

    Raises ValueError for a position outside of the range."""
    values = np.asarray(positions, dtype=np.uint64)
    if size < 1 or (values.size and int(values.max()) >= size):
        raise ValueError(f"positions must lie in [0, {size})")
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = _round_keys(seed, epoch)

    def encrypt(x: Uint64s) -> Uint64s:
        left, right = x >> half, x & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        return (left << half) | right

    flat = values.reshape(-1)
    with np.errstate(over="ignore"):
        out = encrypt(flat)
        outside = np.flatnonzero(out >= size)
        while outside.size:  # cycle walking: the domain is less than 4 × size, so this ends quickly
            out[outside] = encrypt(out[outside])
            outside = outside[out[outside] >= size]
    return out.reshape(values.shape)


# --- the corpus ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Corpus:
    """Bytes to train on."""

    data: bytes

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def unigram_entropy(self) -> float:
        """Entropy of one byte drawn from the corpus, in nats per byte: the loss of the best context-free guesser."""
        counts = np.bincount(np.frombuffer(self.data, dtype=np.uint8), minlength=VOCABULARY).astype(np.float64)
        p = counts[counts > 0] / counts.sum()
        return float(-(p * np.log(p)).sum())

    def sequences(self, sequence_length: int, *, seed: int = 0) -> Sequences:
        """Samples of `sequence_length` inputs and as many labels. Raises DataError if not even one fits."""
        return Sequences(self, sequence_length, seed)


class Sequences:
    """The samples of a corpus, by global sample id. `len` is N, the number of samples of one epoch."""

    def __init__(self, corpus: Corpus, sequence_length: int, seed: int) -> None:
        if sequence_length < 1:
            raise ValueError(f"sequence_length must be at least 1, not {sequence_length}")
        self.corpus, self.sequence_length, self.seed = corpus, sequence_length, seed
        self._bytes = np.frombuffer(corpus.data, dtype=np.uint8)
        self._count = max(0, len(corpus.data) - 1) // sequence_length
        if self._count == 0:
            raise DataError(
                f"the corpus has {len(corpus.data)} bytes, but one sample of sequence_length = {sequence_length} needs "
                f"{sequence_length + 1}; use more data or a shorter sequence_length"
            )

    def __len__(self) -> int:
        return self._count

    def positions(self, ids: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Which sequence of the corpus each global sample id is: int64 (b,), in [0, N)."""
        wanted = np.asarray(ids, dtype=np.int64).reshape(-1)
        if wanted.size and int(wanted.min()) < 0:
            raise ValueError("sample ids are not negative")
        epochs, offsets = np.divmod(wanted, self._count)
        out = np.empty(wanted.shape, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            out[here] = permute(offsets[here], self._count, seed=self.seed, epoch=int(epoch)).astype(np.int64)
        return out

    def batch(self, ids: Sequence[int] | npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """ids (b,) -> inputs int64 (b, T), labels int64 (b, T)."""
        length = self.sequence_length
        starts = self.positions(ids) * length
        window = self._bytes[starts[:, None] + np.arange(length + 1)].astype(np.int64)
        samples = torch.from_numpy(window)
        return samples[:, :-1].contiguous(), samples[:, 1:].contiguous()


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where the run stands in its data: the first global sample id that no committed round holds yet."""

    next_sample: int = 0

    def take(self, samples: int) -> tuple[range, Cursor]:
        """The ids of the next `samples` samples, and the cursor after them."""
        end = self.next_sample + samples
        return range(self.next_sample, end), Cursor(end)

    def microbatch(self, index: int, size: int) -> range:
        """The ids of microbatch `index` of the round that starts here."""
        return range(self.next_sample + index * size, self.next_sample + (index + 1) * size)


def microbatch_seed(run_seed: int, step: int, microbatch: int) -> int:
    """Seed of every random layer for one microbatch, in [0, 2**63). `step` is the number of committed rounds before."""
    digest = hashlib.blake2b(f"shoal microbatch {run_seed} {step} {microbatch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


# --- reading ---------------------------------------------------------------------------------------------------------
def load_corpus(settings: DataSettings, base: Path | str = ".") -> Corpus:
    """Read the corpus that `[data]` names; relative paths count from `base` (the folder of run.toml).

    Raises DataError for data that is missing, unreadable, empty or malformed."""
    if settings.kind == "stdlib":
        return stdlib_corpus()
    if not settings.path:
        raise DataError(f'[data] kind = "{settings.kind}" needs path = "…" (a file or a folder)')
    path = Path(base) / settings.path
    if settings.kind == "text":
        return text_corpus(path)
    if settings.kind == "jsonl":
        return jsonl_corpus(path, settings.field)
    raise DataError(f'[data] kind = "{settings.kind}" is not known; use "stdlib", "text" or "jsonl"')


@lru_cache(maxsize=1)
def stdlib_corpus(folder: str = "", cap_bytes: int = STDLIB_CAP_BYTES) -> Corpus:
    """The first `cap_bytes` of the Python standard library's own sources, files in the order of a keyed hash of their
    relative paths (so that the text is varied from the first byte on). `folder` empty: this interpreter's library."""
    root = Path(folder or sysconfig.get_path("stdlib"))

    def key(relative: str) -> bytes:
        return hashlib.blake2b(relative.encode(), key=b"shoal stdlib order", digest_size=16).digest()

    names = sorted((p.relative_to(root).as_posix() for p in _stdlib_files(root)), key=key)
    parts: list[bytes] = []
    size = 0
    for name in names:
        part = _read(root / name) + b"\n"
        parts.append(part[: cap_bytes - size])
        size += len(parts[-1])
        if size >= cap_bytes:
            break
    return _corpus(parts, root, 'install a Python with its library sources, or use kind = "text"')


def _stdlib_files(root: Path) -> Iterator[Path]:
    stack = [root]
    while stack:
        try:
            entries = list(stack.pop().iterdir())
        except OSError:
            continue
        for entry in entries:
            if entry.suffix == ".py" and not entry.name.startswith(_SKIPPED_FILES):
                yield entry
            elif _wanted_folder(entry):
                stack.append(entry)


def _wanted_folder(path: Path) -> bool:
    named = not path.suffix and path.name not in _SKIPPED_FOLDERS and not path.name.startswith("config-")
    return named and path.is_dir() and not path.is_symlink()


def text_corpus(path: Path) -> Corpus:
    """One file of any name, or every .txt and .md file below a folder in the order of their relative paths. Bytes are
    taken as they are: any encoding will do."""
    if path.is_dir():
        files = sorted((f for f in path.rglob("*") if f.suffix in TEXT_SUFFIXES), key=lambda f: f.as_posix())
        if not files:
            raise DataError(f"{path}: the folder holds no .txt or .md file; put some there or name a file")
    else:
        files = [path]
    return _corpus((_read(file) + b"\n" for file in files), path, "use a file with text in it")


def jsonl_corpus(path: Path, field: str) -> Corpus:
    """The string under `field` of every line's JSON object, UTF-8, one newline after each. Empty lines are skipped."""

    def parts() -> Iterator[bytes]:
        for number, line in enumerate(_read(path).splitlines(), start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}:{number}: not valid JSON ({error}); correct or remove the line") from None
            if not isinstance(record, dict):
                raise DataError(f'{path}:{number}: expected a JSON object with a field "{field}"')
            if field not in record:
                known = ", ".join(map(str, record)) or "none"
                raise DataError(f'{path}:{number}: no field "{field}" (fields: {known}); set [data] field')
            value = record[field]
            if not isinstance(value, str):
                raise DataError(f'{path}:{number}: field "{field}" is not a string; name a field that holds text')
            yield value.encode("utf-8", "surrogatepass") + b"\n"

    return _corpus(parts(), path, f'use a file whose lines have text under "{field}"')


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; correct [data] path (it counts from the folder of run.toml)") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder; name a file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions") from None


def _corpus(parts: Iterator[bytes] | Sequence[bytes], path: Path, fix: str) -> Corpus:
    data = b"".join(parts)
    if not data.strip():
        raise DataError(f"{path}: no text found; {fix}")
    return Corpus(data)
