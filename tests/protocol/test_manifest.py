"""run.toml is checked to the line; a manifest from the network is checked as strictly."""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from shoal.protocol.events import Reason
from shoal.protocol.identity import Identity, Sealed
from shoal.protocol.manifest import (
    DOMAIN,
    MAX_CANONICAL_BYTES,
    MAX_FILE_BYTES,
    MAX_SIGNED_BYTES,
    Manifest,
    ManifestError,
    Problem,
    SignedManifest,
    load_manifest,
    parse_manifest,
)
from shoal.protocol.toml_lines import line_numbers
from shoal.protocol.transport import Refused

FULL = """\
name = "stdlib-tiny"
mode = "pipeline"
seed = 0

[model]
architecture = "llama"
stages = 2
dtype = "float32"

[model.config]                 # overrides
hidden_size = 192
num_hidden_layers = 4
rope_parameters = { rope_type = "default", rope_theta = 10000.0 }

[data]
kind = "stdlib"
path = ""
field = "text"
sequence_length = 128
sha256 = ""

[batch]
samples = 64
microbatch = 8

[optimizer]
name = "adamw"
learning_rate = 3e-3
weight_decay = 0.0
betas = [0.9, 0.95]
eps = 1e-8
momentum = 0.0
warmup_rounds = 0
clip_norm = 0.0

[schedule]
rounds = 40
snapshot_every = 10

[participation]
servers_per_stage = 2
feeders = 2
committee = 3

[codec]
activations = "none"
gradients = "none"

[admission]
open = true

[limits]
max_peers = 64
max_message_mib = 64
"""
SMALL = 'name = "x"\n[model]\narchitecture = "llama"\n'


@pytest.fixture(scope="module")
def alice(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return Identity.create(tmp_path_factory.mktemp("a") / "k")


@pytest.fixture(scope="module")
def bob(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return Identity.create(tmp_path_factory.mktemp("b") / "k")


def problems(text: str, folder: Path | None = None) -> list[Problem]:
    with pytest.raises(ManifestError) as caught:
        parse_manifest(text, folder=folder)
    found = caught.value.problems
    assert len(str(caught.value).splitlines()) == len(found) == len(set(found))
    return found


def line_of(text: str, start: str) -> int:
    return next(n for n, line in enumerate(text.splitlines(), 1) if line.startswith(start))


# --- good files ------------------------------------------------------------------------------------------------------
def test_the_full_example_loads_and_its_values_are_the_defaults() -> None:
    full = parse_manifest(FULL)
    bare = parse_manifest('name = "stdlib-tiny"\n[model]\narchitecture = "llama"\n')
    config = {"rope_type": "default", "rope_theta": 10000.0}
    assert full.model.config == {"hidden_size": 192, "num_hidden_layers": 4, "rope_parameters": config}
    assert bare.model_copy(update={"model": full.model}) == full
    assert (full.batch.samples, full.optimizer.betas) == (64, (0.9, 0.95))


def test_whole_numbers_serve_as_floats_and_make_the_same_run() -> None:
    assert parse_manifest(SMALL + "[optimizer]\nlearning_rate = 1\n").run_id == (
        parse_manifest(SMALL + "[optimizer]\nlearning_rate = 1.0\n").run_id
    )


def test_layout_comments_and_order_do_not_change_the_run_but_every_value_does() -> None:
    manifest = parse_manifest(FULL)
    assert parse_manifest(FULL.replace("\n", "\r\n").replace(" = ", "=")).run_id == manifest.run_id
    assert parse_manifest(FULL.replace('name = "stdlib-tiny"\nmode', 'mode') .replace(
        "seed = 0", 'seed = 0\nname = "stdlib-tiny"')).run_id == manifest.run_id  # fmt: skip
    for old, new in [("seed = 0", "seed = 1"), ("3e-3", "3.01e-3"), ("0.95]", "0.96]"), ("= 192", "= 96")]:
        assert parse_manifest(FULL.replace(old, new)).run_id != manifest.run_id


def test_the_run_id_of_the_example_is_pinned() -> None:
    """A change here changes every run's identity: old invites and checkpoints stop matching."""
    assert parse_manifest(FULL).run_id == "eeac6f2ea34337314ede3f8885c6fd8bf3798e7f73dfe05fec574ef127b93ee0"


def test_canonical_reads_back_to_the_same_manifest() -> None:
    manifest = parse_manifest(FULL)
    again = Manifest.from_canonical(manifest.canonical())
    assert again == manifest and again.run_id == manifest.run_id


def test_the_digest_of_the_data_can_be_filled_in_and_is_checked() -> None:
    manifest = parse_manifest(FULL)
    filled = manifest.with_data_sha256("0a" * 32)
    assert filled.data.sha256 == "0a" * 32 and filled.run_id != manifest.run_id
    with pytest.raises(ValidationError):
        manifest.with_data_sha256("XYZ")


# --- files with mistakes ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("old", "new", "key", "words"),
    [
        ("learning_rate = 3e-3", "learning_rat = 3e-3", "optimizer.learning_rat", "did you mean learning_rate?"),
        ("learning_rate = 3e-3", "lr = 3e-3", "optimizer.lr", "did you mean learning_rate?"),
        ("stages = 2", "stage = 2", "model.stage", "did you mean stages?"),
        ("[schedule]", "[shedule]", "shedule", "did you mean schedule?"),
        ("rounds = 40", "zzz = 40", "schedule.zzz", "the nearest is"),
        ("field = \"text\"", "seed = 3", "data.seed", "seed belongs above the first [table]"),
        ("field = \"text\"", "samples = 3", "data.samples", "samples belongs into [batch]"),
        ("seed = 0", "committee = 3", "committee", "committee belongs into [participation]"),
        ("dtype = \"float32\"", "dtype = \"float23\"", "model.dtype", 'did you mean "float32"?'),
        ("mode = \"pipeline\"", "mode = \"pipelin\"", "mode", 'did you mean "pipeline"?'),
        ("mode = \"pipeline\"", "mode = \"zeroth\"", "mode", "not available yet"),
        ("mode = \"pipeline\"", "mode = 3", "mode", "must be one of"),
        ("samples = 64", "samples = \"64\"", "batch.samples", "write 64 without quotes"),
        ("samples = 64", "samples = 64.0", "batch.samples", "must be an integer"),
        ("samples = 64", "samples = true", "batch.samples", "must be an integer"),
        ("samples = 64", "samples = 0", "batch.samples", "must be at least 1"),
        ("samples = 64", "samples = 100000000000", "batch.samples", "must be at most"),
        ("microbatch = 8", "microbatch = 7", "batch.microbatch", "use microbatch = 4"),
        ("kind = \"stdlib\"", "kind = \"text\"", "data.path", "needs the path"),
        ("kind = \"stdlib\"", "kind = \"jsonl\"", "data.path", "needs the path"),
        ("sequence_length = 128", "sequence_length = 0", "data.sequence_length", "at least 1"),
        ("sha256 = \"\"", "sha256 = \"abc\"", "data.sha256", "64 lowercase hex digits"),
        ("name = \"stdlib-tiny\"", "name = \"a/../b\"", "name", "letters, digits"),
        ("architecture = \"llama\"", "architecture = \"../x\"", "model.architecture", "model_type such as llama"),
        ("architecture = \"llama\"", "", "model.architecture", 'architecture = "llama"'),
        ("learning_rate = 3e-3", "learning_rate = nan", "optimizer.learning_rate", "finite"),
        ("learning_rate = 3e-3", "learning_rate = inf", "optimizer.learning_rate", "finite"),
        ("learning_rate = 3e-3", "learning_rate = 0.0", "optimizer.learning_rate", "greater than 0"),
        ("learning_rate = 3e-3", "learning_rate = true", "optimizer.learning_rate", "must be a number"),
        ("betas = [0.9, 0.95]", "betas = [0.9]", "optimizer.betas", "list of two numbers"),
        ("betas = [0.9, 0.95]", "betas = [0.9, 0.9, 0.9]", "optimizer.betas", "list of two numbers"),
        ("betas = [0.9, 0.95]", "betas = 0.9", "optimizer.betas", "must be a list"),
        ("betas = [0.9, 0.95]", "betas = [0.9, 1.0]", "optimizer.betas[1]", "less than 1"),
        ("clip_norm = 0.0", "clip_norm = 1.0", "optimizer.clip_norm", "not available in pipeline mode"),
        ("name = \"adamw\"", "name = \"adamv\"", "optimizer.name", 'did you mean "adamw"?'),
        ("committee = 3", "committee = 2", "participation.committee", "must be one of 1, 3, 5"),
        ("committee = 3", "committee = true", "participation.committee", "integer"),
        ("committee = 3", "committee = 3.0", "participation.committee", "must be an integer; got 3.0"),
        ("open = true", "open = false", "admission.open", "not available yet"),
        ("open = true", "open = 1", "admission.open", "true or false"),
        ("max_peers = 64", "max_peers = 3", "limits.max_peers", "use max_peers = 4"),
        ("max_peers = 64", "max_peers = 513", "limits.max_peers", "512"),
        ("max_message_mib = 64", "max_message_mib = 1", "limits.max_message_mib", "use max_message_mib = 2"),
        ("hidden_size = 192", "hidden_size = 10000000", "model.config.hidden_size", "from 1 to 65536"),
        ("hidden_size = 192", "hidden_size = \"x\"", "model.config.hidden_size", "must be an integer"),
        ("hidden_size = 192", "hidden_size = 1979-05-27", "model.config.hidden_size", "got a date"),
        ("hidden_size = 192", "x = nan", "model.config.x", "finite"),
        ("hidden_size = 192", "x = 99999999999", "model.config.x", "32 bits"),
        ("hidden_size = 192", "vocab_size = 100", "model.config.vocab_size", "from 256"),
        ("hidden_size = 192", "max_position_embeddings = 64", "data.sequence_length", "at most 64 tokens"),
        ("hidden_size = 192", "tie_word_embeddings = true", "model.config.tie_word_embeddings", "= false"),
        ("hidden_size = 192", "auto_map = {AutoConfig = \"x.Y\"}", "model.config.auto_map", "names code"),
        ("hidden_size = 192", "a.b.c.d.e.f = 1", "model.config.a.b.c.d.e.f", "nested deeper"),
        ("hidden_size = 192", "model_type = \"gpt2\"", "model.architecture", "keep one of the two"),
        ("hidden_size = 192", "num_hidden_layers = 1024", None, "cannot overwrite"),
    ],
)  # fmt: skip
def test_one_mistake_gives_one_problem_with_its_line_key_and_fix(old: str, new: str, key: str, words: str) -> None:
    assert FULL.count(old) == 1 or FULL.index(old) >= 0
    text = FULL.replace(old, new, 1)
    found = problems(text)
    assert len(found) == 1, [str(one) for one in found]
    problem = found[0]
    assert words in str(problem)
    if key is None:
        assert problem.line == line_of(FULL, "num_hidden_layers")
        return
    assert problem.key == key
    if new and key.split(".")[-1].split("[")[0] in new:
        assert problem.line == line_of(text, new)
    else:  # the key that must change stands elsewhere, or the key is missing from its table
        parts = key.split(".")
        header = f"[{'.'.join(parts[:-1])}]"
        here = [n for n, line in enumerate(text.splitlines(), 1) if line.startswith((f"{parts[-1]} =", header))]
        assert problem.line in here


def test_all_mistakes_are_reported_at_once_in_the_order_of_the_file() -> None:
    text = 'name = "x"\nseeed = 1\n[model]\narchitecture = "llama"\nstages = 0\n'
    text += "[batch]\nmicrobach = 8\n[codec]\ngradients = 8\n"
    found = problems(text)
    assert [(one.line, one.key) for one in found] == [
        (2, "seeed"), (5, "model.stages"), (7, "batch.microbach"), (9, "codec.gradients"),
    ]  # fmt: skip
    assert str(found[0]) == "line 2: seeed: unknown key (did you mean seed?)"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("name = x\n", 1), ('name = "x"\n\nseed == 3\n', 3), ('name = "x\nseed = 3', 1), ('a = 1\n[b\nc = 2\n', 2),
        ('a = """\nx\ny', 3), ("a = 1\na = 2\n", 2), ("a = [1,\n2,\n", 2), ("[a]\nx=1\n[a]\n", 3),
    ],
)  # fmt: skip
def test_a_syntax_error_names_its_line(text: str, line: int) -> None:
    (problem,) = problems(text)
    assert problem.line == line and problem.message.startswith("is not valid TOML: ")


@pytest.mark.parametrize("text", ["x = " + "[" * 5000, "x = " + "9" * 6000, "x = " + "{a=" * 3000])
def test_hostile_toml_is_a_manifest_error(text: str) -> None:
    assert "not a usable TOML file" in problems(text)[0].message


def test_text_in_another_encoding_names_its_line() -> None:
    with pytest.raises(ManifestError, match="line 2: is not UTF-8"):
        parse_manifest(b'seed = 1\nname = "caf\xe9"\n')


@pytest.mark.parametrize("kind", ["absent", "folder", "large"])
def test_an_unreadable_file_is_one_clear_line(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "run.toml"
    if kind == "folder":
        path.mkdir()
    elif kind == "large":
        path.write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(ManifestError) as caught:
        load_manifest(path)
    assert str(caught.value).startswith(f"{path}: cannot be read: ") and "\n" not in str(caught.value)


# --- config_file -----------------------------------------------------------------------------------------------------
CONFIG = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "pad_token_id": None, "auto": [1, 2.5]}


def with_file(folder: Path, config: Any, table: str = "") -> Manifest:
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    (folder / "run.toml").write_text('name = "x"\n[model]\nconfig_file = "config.json"\n' + table)
    return load_manifest(folder / "run.toml")


def test_a_config_file_is_inlined_and_the_table_overrides_it(tmp_path: Path) -> None:
    manifest = with_file(tmp_path, CONFIG, "[model.config]\nhidden_size = 32\n")
    assert manifest.model.architecture == "llama"
    assert manifest.model.config == {"hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": None, "auto": [1, 2.5]}
    assert Manifest.from_canonical(manifest.canonical()) == manifest


@pytest.mark.parametrize(
    ("config", "line", "key", "words"),
    [
        ({**CONFIG, "tie_word_embeddings": True}, 3, "model.config.tie_word_embeddings", "under [model.config]"),
        ({**CONFIG, "hidden_size": 0}, 3, "model.config.hidden_size", "[in config.json]"),
        ({"hidden_size": 64}, 2, "model.architecture", "is missing"),
        ("[1]", 3, "model.config_file", "is not a JSON object"),
        ("{", 3, "model.config_file", "cannot read config.json"),
        ("[" * 100_000, 3, "model.config_file", "cannot read config.json"),
        ('{"x": NaN}', 3, "model.config_file", "cannot read config.json"),
        ('{"x": "\\ud800"}', 3, "model.config_file", "cannot read config.json"),
        (" " * (MAX_FILE_BYTES + 1), 3, "model.config_file", "larger than"),
        ({"model_type": "llama", "x": list(range(5000))}, 3, "model.config", "more than 4096 values"),
    ],
    ids=["tied", "size", "no-type", "list", "torn", "deep", "nan", "surrogate", "large", "many"],
)  # fmt: skip
def test_a_bad_config_file_is_named(tmp_path: Path, config: Any, line: int, key: str, words: str) -> None:
    with pytest.raises(ManifestError) as caught:
        with_file(tmp_path, config)
    (problem,) = caught.value.problems
    assert (problem.line in (line, 2), problem.key) == (True, key) and words in str(problem)


def test_a_tied_config_file_can_be_untied_in_run_toml(tmp_path: Path) -> None:
    untied = with_file(tmp_path, {**CONFIG, "tie_word_embeddings": True}, "config = {tie_word_embeddings = false}\n")
    assert untied.model.config["tie_word_embeddings"] is False


def test_an_absent_config_file_and_a_path_in_the_wrong_key_are_explained(tmp_path: Path) -> None:
    (absent,) = problems('name="x"\n[model]\nconfig_file = "no.json"\n', tmp_path)
    assert (absent.line, absent.key) == (3, "model.config_file") and "No such file" in absent.message
    (wrong,) = problems(SMALL + 'config = "config.json"\n', tmp_path)
    assert (wrong.line, wrong.key) == (4, "model.config") and "config_file" in wrong.suggestion


def test_a_config_file_is_not_read_on_behalf_of_the_network() -> None:
    data = json.loads(parse_manifest(SMALL).canonical())
    data["model"]["config_file"] = "/etc/hostname"
    with pytest.raises(Refused) as caught:
        Manifest.from_canonical(json.dumps(data, sort_keys=True, separators=(",", ":")).encode())
    assert caught.value.reason is Reason.MALFORMED


# --- lines -----------------------------------------------------------------------------------------------------------
def test_lines_are_right_in_awkward_toml() -> None:
    text = """\
# comment with = and [brackets]
"quoted key" = 'a # b'
a . "b.c" = 1  # dotted

[ t.'x y' ] # header
long = @@@
k = 1 \\@@@ not the end
[fake]
@@@""
raw = '''
fake = 2
'''
list = [ # comment ]
  1, "]",
  { in = 2, more = [
    3 ] },
]
inline = { p = 1, q.r = "}" }
when = 1979-05-27 07:32:00
[[arr]]
x = 1
[[arr]]
x = 2
[arr.sub]
y = 3
last = true""".replace("@@@", '"' * 3)
    lines = line_numbers(text)
    expected = {
        ("quoted key",): 2, ("a",): 3, ("a", "b.c"): 3, ("t",): 5, ("t", "x y"): 5, ("t", "x y", "long"): 6,
        ("t", "x y", "raw"): 10, ("t", "x y", "list"): 13, ("t", "x y", "list", 0): 14, ("t", "x y", "list", 1): 14,
        ("t", "x y", "list", 2): 15, ("t", "x y", "list", 2, "in"): 15, ("t", "x y", "list", 2, "more"): 15,
        ("t", "x y", "list", 2, "more", 0): 16, ("t", "x y", "inline"): 18, ("t", "x y", "inline", "p"): 18,
        ("t", "x y", "inline", "q"): 18, ("t", "x y", "inline", "q", "r"): 18, ("t", "x y", "when"): 19,
        ("arr",): 20, ("arr", 0): 20, ("arr", 0, "x"): 21, ("arr", 1): 22, ("arr", 1, "x"): 23,
        ("arr", 1, "sub"): 24, ("arr", 1, "sub", "y"): 25, ("arr", 1, "sub", "last"): 26,
    }  # fmt: skip
    assert lines == expected
    assert set(_paths(tomllib.loads(text))) == set(expected)


def _paths(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [p for k, v in pairs for p in ((*path, k), *_paths(v, (*path, k)))]


keys = st.one_of(st.text("abc-_1", min_size=1, max_size=3), st.text("a.\"'#=[] \\é\t", max_size=3).map(json.dumps))
scalars = st.sampled_from([
    "1", "-2.5e3", "true", "nan", '"x # ] } = \\" \\\\"', "'\\'", '@\n"x\n@'.replace("@", 3 * '"'), "'''\n'\n'''",
    "07:32:00", '""', 6 * '"',
])  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda v: "[ # [\n" + ",\n".join(v) + "\n]"),
        st.dictionaries(keys, inner, max_size=3).map(
            lambda d: "{ " + ", ".join(f"{k} = {v}" for k, v in d.items() if "\n" not in v or v[0] in "\"'[") + " }"
        ),
    ),
    max_leaves=6,
)


@settings(max_examples=80, deadline=None, database=None)
@given(st.lists(st.tuples(st.sampled_from(["", "[{}]", "[[{}]]"]), keys, values), max_size=5))
def test_the_scanner_finds_exactly_the_keys_that_tomllib_finds(items: list[tuple[str, str, str]]) -> None:
    text = "\n".join(f"{header.format(key)}\n\n  {key} = {value} # c" for header, key, value in items)
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return
    lines = line_numbers(text)
    assert set(lines) == set(_paths(table))
    source = text.split("\n")
    for path, line in lines.items():
        if isinstance(path[-1], str) and path[-1].isalnum() and path[-1].isascii():
            assert path[-1] in source[line - 1]


# --- from the network ------------------------------------------------------------------------------------------------
def reason_of(data: bytes, **expected: Any) -> Reason:
    with pytest.raises(Refused) as caught:
        SignedManifest.open(data, **expected)
    assert "\n" not in caught.value.detail
    return caught.value.reason


def test_a_signed_manifest_opens_to_what_was_signed(alice: Identity) -> None:
    signed = SignedManifest.sign(parse_manifest(FULL), alice)
    opened = SignedManifest.open(
        signed.to_bytes(), expected_run=signed.manifest.run_id, expected_coordinator=alice.peer
    )
    assert opened == signed and opened.coordinator == alice.peer


def test_another_coordinator_or_run_than_the_invite_s_is_refused(alice: Identity, bob: Identity) -> None:
    data = SignedManifest.sign(parse_manifest(FULL), alice).to_bytes()
    assert reason_of(data, expected_coordinator=bob.peer) is Reason.BAD_SIGNATURE
    assert reason_of(data, expected_run="00" * 32) is Reason.WRONG_RUN


def test_a_changed_manifest_or_a_borrowed_certificate_is_refused(alice: Identity, bob: Identity) -> None:
    signed = SignedManifest.sign(parse_manifest(FULL), alice)
    changed = parse_manifest(FULL.replace("rounds = 40", "rounds = 41"))
    forgeries = [
        Sealed(changed.canonical().decode(), signed.certificate, signed.signature),
        Sealed(signed.manifest.canonical().decode(), bob.certificate, signed.signature),
        alice.seal("shoal/other/v1", signed.manifest.canonical().decode()),
    ]
    for forgery in forgeries:
        assert reason_of(forgery.to_bytes()) is Reason.BAD_SIGNATURE


@pytest.mark.parametrize("at", ["batch.microbatch", "limits.max_peers", "model.config", "betas", "extra", "text"])
def test_a_hostile_manifest_is_malformed_however_well_it_is_signed(alice: Identity, at: str) -> None:
    data = json.loads(parse_manifest(FULL).canonical())
    match at:
        case "batch.microbatch":
            data["batch"]["microbatch"] = 7
        case "limits.max_peers":
            data["limits"]["max_peers"] = 10**9
        case "model.config":
            data["model"]["config"] = {"hidden_size": 10**9}
        case "betas":
            data["optimizer"]["betas"] = [0.9, math.nan]
        case "extra":
            data["\x1b[31m\n" * 50] = 1
    text = json.dumps(data, sort_keys=True, separators=(",", ":")) + (" " if at == "text" else "")
    assert reason_of(alice.seal(DOMAIN, text).to_bytes()) is Reason.MALFORMED


def test_sizes_are_checked_first(alice: Identity) -> None:
    assert reason_of(b"{" * (MAX_SIGNED_BYTES + 1)) is Reason.TOO_LARGE
    assert reason_of(alice.seal(DOMAIN, "x" * (MAX_CANONICAL_BYTES + 1)).to_bytes()) is Reason.TOO_LARGE
    with pytest.raises(Refused):
        Manifest.from_canonical(b"[" * MAX_CANONICAL_BYTES)


@settings(max_examples=60, deadline=None, database=None)
@given(noise=st.binary(max_size=300), at=st.integers(0, 1500), bit=st.integers(0, 7))
def test_noise_and_flipped_bits_raise_nothing_but_refused(alice: Identity, noise: bytes, at: int, bit: int) -> None:
    good = bytearray(SignedManifest.sign(parse_manifest(FULL), alice).to_bytes())
    good[at] ^= 1 << bit
    for data in (noise, bytes(good), alice.seal(DOMAIN, noise.decode("latin-1")).to_bytes()):
        reason_of(data)


def test_a_round_of_more_microbatches_than_a_ledger_can_report_is_refused() -> None:
    text = 'name = "x"\n[model]\narchitecture = "llama"\n[batch]\nsamples = 16384\nmicrobatch = 1\n'
    with pytest.raises(ManifestError, match="at most 8192 microbatches") as caught:
        parse_manifest(text)
    assert "use microbatch = 2" in str(caught.value)
