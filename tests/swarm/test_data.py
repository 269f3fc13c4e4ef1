"""Data by global sample id: deterministic, a permutation in every epoch, resumable; bad files give one clear line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.swarm.data import Corpus, Cursor, DataError, load_corpus, microbatch_seed, permute, stdlib_corpus


def data(kind: str, path: object = "", field: str = "text") -> SimpleNamespace:
    return SimpleNamespace(kind=kind, path=str(path), field=field)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**6))
def test_every_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    image = permute(np.arange(size), size, seed=seed, epoch=epoch)
    assert np.array_equal(np.sort(image), np.arange(size, dtype=np.uint64))


def test_permutation_golden_vectors() -> None:
    """A change here changes what every existing run trains on."""
    assert permute(range(8), 8, seed=0, epoch=0).tolist() == GOLDEN_8
    assert permute(range(5), 1000, seed=1, epoch=2).tolist() == GOLDEN_1000
    assert permute([0, 1, 10**12], 10**12 + 1, seed=7, epoch=0).tolist() == GOLDEN_LARGE
    everything = permute(np.arange(65536), 65536, seed=3, epoch=9).astype("<u8").tobytes()
    assert hashlib.sha256(everything).hexdigest()[:16] == GOLDEN_DIGEST


GOLDEN_8 = [1, 6, 7, 5, 2, 3, 0, 4]
GOLDEN_1000 = [512, 66, 540, 556, 470]
GOLDEN_LARGE = [639943776910, 480390874722, 643962317930]
GOLDEN_DIGEST = "1ceedc6f25884cd2"


@settings(max_examples=30)
@given(size=st.integers(1, 2**40), seed=st.integers(0, 2**63), epoch=st.integers(0, 9), data=st.data())
def test_permutation_equals_its_definition_in_plain_integers(
    size: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    """The same network written again without numpy: nothing hangs on machine words."""
    position = data.draw(st.integers(0, size - 1))
    text = f"shoal data permutation {seed} {epoch}".encode()
    raw = b"".join(hashlib.blake2b(text + bytes([i]), digest_size=32).digest() for i in range(2))
    keys = [int.from_bytes(raw[i : i + 8], "little") for i in range(0, 64, 8)]
    half = max(1, ((size - 1).bit_length() + 1) // 2)

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    value = position
    while True:
        left, right = value >> half, value % 2**half
        for key in keys:
            left, right = right, left ^ (mix((right + key) % 2**64) % 2**half)
        value = (left << half) | right
        if value < size:
            break
    assert permute([position], size, seed=seed, epoch=epoch).tolist() == [value]


def test_permutation_refuses_positions_outside_of_the_epoch() -> None:
    with pytest.raises(ValueError, match="must lie in"):
        permute([5], 5, seed=0, epoch=0)


def test_permutation_mixes_and_depends_on_seed_and_epoch() -> None:
    size = 4096
    images = {key: permute(np.arange(size), size, seed=key[0], epoch=key[1]) for key in [(0, 0), (0, 1), (1, 0)]}
    for a, b in [((0, 0), (0, 1)), ((0, 0), (1, 0)), ((0, 1), (1, 0))]:
        assert np.count_nonzero(images[a] == images[b]) < 12  # a fixed point per pair is expected by chance
    steps = np.abs(np.diff(images[0, 0].astype(np.int64)))
    assert 0.28 * size < steps.mean() < 0.38 * size  # a third of the range, as of a random order


def test_batch_is_the_bytes_of_the_corpus_and_labels_are_shifted() -> None:
    corpus = Corpus(bytes(np.random.default_rng(0).integers(0, 256, 1001, dtype=np.uint8)))
    sequences = corpus.sequences(10, seed=5)
    assert len(sequences) == 100
    ids = [0, 7, 99, 100, 250]  # three epochs in one batch
    x, labels = sequences.batch(ids)
    assert x.dtype == labels.dtype == torch.int64 and x.shape == labels.shape == (5, 10)
    for row, position in enumerate(sequences.positions(ids)):
        expected = corpus.data[position * 10 : position * 10 + 11]
        assert bytes(x[row].tolist()) == expected[:-1] and bytes(labels[row].tolist()) == expected[1:]


def test_an_epoch_covers_every_sequence_once_however_it_is_cut() -> None:
    sequences = Corpus(bytes(range(256)) * 4).sequences(7, seed=1)
    size = len(sequences)
    seen = np.concatenate([sequences.positions(range(i, min(i + 9, size))) for i in range(0, size, 9)])
    assert sorted(seen) == list(range(size))
    with pytest.raises(ValueError, match="not negative"):
        sequences.batch([-1])


def test_cursor_resumes_where_it_stopped() -> None:
    cursor = Cursor()
    first, cursor = cursor.take(32)
    assert [i for m in range(4) for i in Cursor(32).microbatch(m, 8)] == list(range(32, 64))
    resumed = Cursor(cursor.next_sample)
    assert first == range(32) and resumed == cursor and resumed.take(8)[0] == range(32, 40)


def test_microbatch_seeds_are_pinned_and_distinct() -> None:
    assert microbatch_seed(0, 0, 0) == GOLDEN_SEED
    seeds = {microbatch_seed(r, s, m) for r in range(3) for s in range(20) for m in range(20)}
    assert len(seeds) == 1200 and all(0 <= s < 2**63 for s in seeds)


GOLDEN_SEED = 6053313223519354897


def test_unigram_entropy_of_known_distributions() -> None:
    assert Corpus(bytes(range(256)) * 3).unigram_entropy == pytest.approx(np.log(256))
    assert Corpus(b"aaaa").unigram_entropy == 0.0
    assert Corpus(b"aabb").unigram_entropy == pytest.approx(np.log(2))


def test_stdlib_corpus_is_large_varied_and_the_same_every_time() -> None:
    corpus = stdlib_corpus()
    stdlib_corpus.cache_clear()
    assert stdlib_corpus().sha256 == corpus.sha256 == hashlib.sha256(corpus.data).hexdigest()
    assert 2**20 < len(corpus.data) <= 8 * 2**20
    assert 2.5 < corpus.unigram_entropy < 4.0


def test_stdlib_corpus_skips_tests_and_installed_packages(tmp_path: Path) -> None:
    skipped = ("test/no.py", "site-packages/no.py", "b/__pycache__/no.py", "b/tests/no.py", "x.txt")
    for name in ("a.py", "b/c.py", *skipped):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"<{name}>")
    assert sorted(stdlib_corpus(str(tmp_path)).data.split()) == [b"<a.py>", b"<b/c.py>"]
    assert len(stdlib_corpus(str(tmp_path), cap_bytes=9).data) == 9


def test_text_takes_a_file_or_a_folder_and_any_encoding(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.md").write_bytes(b"two")
    (tmp_path / "a.txt").write_bytes(b"one \xff\xfe not utf-8")
    (tmp_path / "sub" / "c.txt").write_bytes(b"three")
    (tmp_path / "no.py").write_bytes(b"code")
    assert load_corpus(data("text", "."), tmp_path).data == b"one \xff\xfe not utf-8\ntwo\nthree\n"
    assert load_corpus(data("text", "no.py"), tmp_path).data == b"code\n"


def test_jsonl_takes_the_field_of_every_line(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "ä b", "n": 1}\n\n{"text": "c"}\n', encoding="utf-8")
    assert load_corpus(data("jsonl", "d.jsonl"), tmp_path).data == "ä b\nc\n".encode()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{broken", "bad.jsonl:2: not valid JSON"),
        ("[1]", "bad.jsonl:2: expected a JSON object"),
        (json.dumps({"body": "x"}), 'bad.jsonl:2: no field "text" (fields: body)'),
        (json.dumps({"text": 3}), 'bad.jsonl:2: field "text" is not a string'),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError) as error:
        load_corpus(data("jsonl", "bad.jsonl"), tmp_path)
    assert says in str(error.value)


def test_missing_empty_and_unknown_data_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "folder").mkdir()
    for settings_, says in [
        (data("text", "nowhere.txt"), "no such file"),
        (data("text", "empty.txt"), "no text found"),
        (data("text", "folder"), "no .txt or .md"),
        (data("text"), "needs path"),
        (data("jsonl", "folder"), "is a folder"),
        (data("parquet", "x"), "is not known"),
    ]:
        with pytest.raises(DataError, match=says):
            load_corpus(settings_, tmp_path)
    with pytest.raises(DataError, match="needs 101"):
        Corpus(b"short").sequences(100)
