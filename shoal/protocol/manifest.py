"""The manifest: run.toml, checked to the line; its canonical bytes are the run's identity.

`load_manifest` is for the coordinator's file: every problem names the line, the dotted key, what is allowed and the
nearest valid key. `Manifest.from_canonical` and `SignedManifest.open` are for bytes from the network: same models, same
bounds, typed refusals. The manifest is data: nothing in it names code (`architecture` is looked up in transformers'
closed table), and every number that sizes something is bounded here.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic_core
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from shoal.protocol.events import Reason
from shoal.protocol.identity import Identity, RunKeyCertificate, Sealed, malformed
from shoal.protocol.manifest_faults import Found, Inconsistent, dotted, explain, shown
from shoal.protocol.runlog import MAX_MEMBERS
from shoal.protocol.toml_lines import KeyPath, line_numbers
from shoal.protocol.transport import Message, Refused

DOMAIN = "shoal/manifest/v1"
MAX_FILE_BYTES = 1 << 20
MAX_CANONICAL_BYTES = 128 * 1024
MAX_SIGNED_BYTES = 2 * MAX_CANONICAL_BYTES + 8 * 1024  # quotes in the payload are escaped
MAX_CONFIG_ITEMS = 4096
MAX_CONFIG_DEPTH = 5
MAX_PARAMETERS = 10**12

# Keys of transformers configs that size memory or work, with what we accept.
_CONFIG_BOUNDS: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("vocab_size",), (256, 1 << 20)),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "word_embed_proj_dim"), (1, 1 << 16)),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "moe_intermediate_size"), (1, 1 << 18)),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), (1, 1024)),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "n_heads"), (1, 1024)),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), (1, 1024)),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), (1, 1 << 22)),
    "head_dim": (1, 1 << 13),
}
_REFUSED_CONFIG = {
    "auto_map": "it names code to run",
    "trust_remote_code": "it runs code from elsewhere",
    "quantization_config": "shoal trains unquantised weights",
}


# --- the models ------------------------------------------------------------------------------------------------------
MAX_MICROBATCHES = 8192  # in a round: a server's ledger must fit into one message


class Section(Message):
    """Base of all tables: unknown keys, coercion and non-finite numbers are refused; frozen."""

    model_config = ConfigDict(allow_inf_nan=False)


def _pair(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _whole(value: object) -> object:
    if isinstance(value, bool | float):  # Literal[1] would take True and 1.0
        raise ValueError("must be an integer")
    return value


def _available_mode(mode: str) -> str:
    if mode != "pipeline":
        raise Inconsistent([(("mode",), f"{shown(mode)} is not available yet", 'use mode = "pipeline"')])
    return mode


def _no_clipping(norm: float) -> float:
    if norm:
        why = "clipping by norm is not available in pipeline mode: the norm would span all stages"
        raise Inconsistent([(("optimizer", "clip_norm"), why, "use clip_norm = 0.0")])
    return norm


def _open_only(value: bool) -> bool:
    if not value:
        raise Inconsistent([(("admission", "open"), "closed runs are not available yet", "use open = true")])
    return value


def _bounded_config(config: dict[str, Any]) -> dict[str, Any]:
    problems = list(_check_config(config))
    if problems:
        raise Inconsistent(problems)
    return config


Unit = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]


class ModelSection(Section):
    """A transformers causal LM. `config` overrides the architecture's defaults (JSON values, bounded)."""

    architecture: Annotated[str, Field(pattern=r"\A[a-z0-9][a-z0-9_.-]{0,63}\z")]  # a transformers model_type
    stages: Annotated[int, Field(ge=1, le=256)] = 2
    dtype: Literal["float32", "float64"] = "float32"
    config: Annotated[dict[str, Any], AfterValidator(_bounded_config)] = Field(default_factory=dict)


class DataSection(Section):
    kind: Literal["stdlib", "text", "jsonl"] = "stdlib"
    path: Annotated[str, Field(max_length=1024, pattern=r"\A[^\x00-\x1f]*\z")] = ""  # the coordinator's copy
    field: Annotated[str, Field(min_length=1, max_length=128, pattern=r"\A[^\x00-\x1f]*\z")] = "text"
    sequence_length: Annotated[int, Field(ge=1, le=1 << 16)] = 128  # tokens (bytes of text)
    sha256: Annotated[str, Field(pattern=r"\A([0-9a-f]{64})?\z")] = ""  # of the corpus bytes


class BatchSection(Section):
    samples: Annotated[int, Field(ge=1, le=1 << 20)] = 64  # per round
    microbatch: Annotated[int, Field(ge=1, le=1 << 12)] = 8  # samples per microbatch


class OptimizerSection(Section):
    name: Literal["sgd", "adamw", "adam8bit", "adamw8bit", "lion8bit"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0, le=100)] = 3e-3
    weight_decay: Annotated[float, Field(ge=0, le=100)] = 0.0
    betas: Annotated[tuple[Unit, Unit], BeforeValidator(_pair)] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    momentum: Unit = 0.0  # sgd
    warmup_rounds: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    clip_norm: Annotated[float, Field(ge=0, le=1e6), AfterValidator(_no_clipping)] = 0.0


class ScheduleSection(Section):
    rounds: Annotated[int, Field(ge=0, le=10**9)] = 40  # 0 = never ends
    snapshot_every: Count = 10  # rounds


class ParticipationSection(Section):
    servers_per_stage: Annotated[int, Field(ge=1, le=256)] = 2
    feeders: Annotated[int, Field(ge=1, le=256)] = 2
    committee: Annotated[Literal[1, 3, 5], BeforeValidator(_whole)] = 3


class CodecSection(Section):
    activations: Literal["none", "fp16", "blockwise8"] = "none"
    gradients: Literal["none", "fp16", "blockwise8"] = "none"


class AdmissionSection(Section):
    open: Annotated[bool, AfterValidator(_open_only)] = True


class LimitsSection(Section):
    max_peers: Annotated[int, Field(ge=1, le=MAX_MEMBERS)] = 64
    max_message_mib: Annotated[int, Field(ge=1, le=1024)] = 64


class Manifest(Section):
    """A whole run. Construct with `load_manifest`, `parse_manifest`, `from_canonical` or `model_validate`."""

    name: Annotated[str, Field(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\z")]
    mode: Annotated[Literal["pipeline", "experts", "replicas", "zeroth"], AfterValidator(_available_mode)] = "pipeline"
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    model: ModelSection
    data: DataSection = DataSection()
    batch: BatchSection = BatchSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    participation: ParticipationSection = ParticipationSection()
    codec: CodecSection = CodecSection()
    admission: AdmissionSection = AdmissionSection()
    limits: LimitsSection = LimitsSection()

    @model_validator(mode="after")
    def _hangs_together(self) -> Manifest:
        problems = list(_cross_checks(self))
        if problems:
            raise Inconsistent(problems)
        return self

    def canonical(self) -> bytes:
        """The one encoding of this manifest: compact ASCII JSON, sorted keys, every key present, floats as repr."""
        return _canonical_json(self.model_dump(mode="python"))

    @property
    def run_id(self) -> str:
        """SHA-256 (hex) of `canonical()`."""
        return hashlib.sha256(self.canonical()).hexdigest()

    def with_data_sha256(self, digest: str) -> Manifest:
        """The same run with the digest of its corpus filled in (hex)."""
        return Manifest.model_validate(
            {**self.model_dump(mode="python"), "data": {**self.data.model_dump(mode="python"), "sha256": digest}}
        )

    @staticmethod
    def from_canonical(data: bytes) -> Manifest:
        """Raises Refused(TOO_LARGE, or MALFORMED: also for valid content in another encoding)."""
        if len(data) > MAX_CANONICAL_BYTES:
            raise Refused(Reason.TOO_LARGE, f"a manifest has at most {MAX_CANONICAL_BYTES} bytes")
        try:
            manifest = Manifest.model_validate_json(data)
        except ValidationError as error:
            raise malformed(error) from None
        if manifest.canonical() != data:
            raise Refused(Reason.MALFORMED, "the manifest is not in canonical form")
        return manifest


@dataclass(frozen=True, slots=True)
class SignedManifest:
    """A manifest as the coordinator hands it out. `coordinator`: the PeerID that the certificate belongs to."""

    manifest: Manifest
    coordinator: str
    certificate: RunKeyCertificate
    signature: bytes

    @staticmethod
    def sign(manifest: Manifest, identity: Identity) -> SignedManifest:
        sealed = identity.seal(DOMAIN, manifest.canonical().decode())
        return SignedManifest(manifest, identity.peer, sealed.certificate, sealed.signature)

    def to_bytes(self) -> bytes:
        return Sealed(self.manifest.canonical().decode(), self.certificate, self.signature).to_bytes()

    @staticmethod
    def open(
        data: bytes, *, expected_run: str | None = None, expected_coordinator: str | None = None
    ) -> SignedManifest:
        """Checks size, form, certificate, signature, bounds; and, if given, what the invite promised.

        Raises Refused and nothing else: TOO_LARGE, MALFORMED, BAD_SIGNATURE (also: another coordinator), WRONG_RUN."""
        sealed = Sealed.from_bytes(data, max_bytes=MAX_SIGNED_BYTES)
        coordinator, _ = sealed.verify(DOMAIN)
        if expected_coordinator is not None and coordinator != expected_coordinator:
            raise Refused(Reason.BAD_SIGNATURE, "the manifest is signed by another coordinator than expected")
        manifest = Manifest.from_canonical(sealed.payload.encode())
        if expected_run is not None and manifest.run_id != expected_run:
            raise Refused(Reason.WRONG_RUN, "the manifest is not the one of the expected run")
        return SignedManifest(manifest, coordinator, sealed.certificate, sealed.signature)


def _canonical_json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True).encode()


# --- checks across fields --------------------------------------------------------------------------------------------
def _cross_checks(m: Manifest) -> Iterator[Found]:
    if m.batch.samples > MAX_MICROBATCHES * m.batch.microbatch:
        yield (
            ("batch", "microbatch"),
            f"a round has at most {MAX_MICROBATCHES} microbatches: this one would have "
            f"{m.batch.samples // m.batch.microbatch}",
            f"use microbatch = {-(-m.batch.samples // MAX_MICROBATCHES)} or more",
        )
    if m.batch.samples % m.batch.microbatch:
        fits = next(n for n in range(m.batch.microbatch, 0, -1) if m.batch.samples % n == 0)
        yield (
            ("batch", "microbatch"),
            f"must divide batch.samples: {m.batch.samples} samples cannot be cut into microbatches of "
            f"{m.batch.microbatch}",
            f"use microbatch = {fits}",
        )
    if m.data.kind != "stdlib" and not m.data.path:
        yield ("data", "path"), f'data of kind "{m.data.kind}" needs the path of a file or folder', "set data.path"
    if m.optimizer.name.endswith("8bit") and m.model.dtype != "float32":
        yield ("optimizer", "name"), f"{m.optimizer.name} works on float32 only", 'use dtype = "float32" or adamw'
    need = m.model.stages * m.participation.servers_per_stage
    if need > m.limits.max_peers:
        yield (
            ("limits", "max_peers"),
            f"the first round needs {m.model.stages} stages x {m.participation.servers_per_stage} servers = {need} "
            f"peers, but at most {m.limits.max_peers} may join",
            f"use max_peers = {need} or more",
        )
    yield from _check_sizes(m)


def _check_config(config: dict[str, Any]) -> Iterator[Found]:
    where: KeyPath = ("model", "config")
    fault = _check_json(config, where)
    if fault is not None:
        yield fault
        return
    if config.get("tie_word_embeddings"):
        yield (
            (*where, "tie_word_embeddings"),
            "tied embeddings would put one matrix into the first and the last stage",
            "use tie_word_embeddings = false",
        )
    for key, why in _REFUSED_CONFIG.items():
        if config.get(key) is not None:
            yield (*where, key), f"is refused: {why}", f"remove {key}"
    for key, (low, high) in _CONFIG_BOUNDS.items():
        value = config.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            yield (*where, key), f"must be an integer from {low} to {high}; got {shown(value)}", ""


def _check_json(config: dict[str, Any], where: KeyPath) -> Found | None:
    """First value that is not plain, small, finite JSON. Iterative, so depth cannot hurt."""
    todo: list[tuple[KeyPath, Any]] = [(where, config)]
    items = 0
    while todo:
        path, value = todo.pop()
        items += 1
        if items > MAX_CONFIG_ITEMS:
            return where, f"holds more than {MAX_CONFIG_ITEMS} values", "shorten it"
        if len(path) - len(where) > MAX_CONFIG_DEPTH:
            return path, f"is nested deeper than {MAX_CONFIG_DEPTH} levels", "flatten it"
        match value:
            case None | bool():
                pass
            case int():
                if not -(1 << 31) <= value < 1 << 31:
                    return path, "must be an integer that fits in 32 bits", ""
            case float():
                if not math.isfinite(value):
                    return path, "must be a finite number", ""
            case str():
                if len(value) > 1024 or not _is_text(value):
                    return path, "must be a text of at most 1024 characters", ""
            case list():
                todo.extend(((*path, i), v) for i, v in enumerate(value[: MAX_CONFIG_ITEMS + 1]))
            case dict():
                for key, v in value.items():
                    if not isinstance(key, str) or not 1 <= len(key) <= 128 or not _is_text(key):
                        return path, "has a key that is no text of 1 to 128 characters", ""
                    todo.append(((*path, key), v))
            case _:
                return path, f"must be a number, text, true, false, list or table; got {shown(value)}", ""
    return None


def _is_text(text: str) -> bool:
    """Without lone surrogates, which no other JSON reader would accept."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _check_sizes(m: Manifest) -> Iterator[Found]:
    config = m.model.config

    def size(*names: str) -> tuple[str, int] | None:
        return next(((name, config[name]) for name in names if config.get(name) is not None), None)

    positions = size("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
    if positions is not None and m.data.sequence_length > positions[1]:
        yield (
            ("data", "sequence_length"),
            f"the model takes at most {positions[1]} tokens (model.config.{positions[0]})",
            f"use sequence_length = {positions[1]}, or raise {positions[0]}",
        )
    hidden = size("hidden_size", "n_embd", "d_model")
    if hidden is None:
        return
    layers = size("num_hidden_layers", "n_layer", "num_layers", "n_layers")
    inner = size("intermediate_size", "n_inner", "ffn_dim")
    vocabulary = size("vocab_size")
    width, depth = hidden[1], layers[1] if layers else 1
    parameters = depth * width * (4 * width + 3 * (inner[1] if inner else 4 * width))
    parameters += 2 * width * (vocabulary[1] if vocabulary else 256)
    if parameters > MAX_PARAMETERS:
        yield ("model", "config", hidden[0]), f"makes a model of about {parameters:.1e} parameters", "make it smaller"
    # Deliberately per raw element: codecs change the size of a message by little (none) or to our advantage.
    element = {"none": 8 if m.model.dtype == "float64" else 4, "fp16": 2, "blockwise8": 2}[m.codec.activations]
    mib = m.batch.microbatch * m.data.sequence_length * width * element / 2**20
    if m.model.stages > 1 and mib + 1 > m.limits.max_message_mib:
        yield (
            ("limits", "max_message_mib"),
            f"the activations of one microbatch ({m.batch.microbatch} x {m.data.sequence_length} x {width}) have "
            f"{mib:.1f} MiB, a message may have {m.limits.max_message_mib}",
            f"use max_message_mib = {math.ceil(mib) + 1} or a smaller batch.microbatch",
        )


# --- run.toml --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong. line: in run.toml, from 1 (None: the file as a whole); key: dotted."""

    line: int | None
    key: str
    message: str
    suggestion: str = ""

    def __str__(self) -> str:
        place = "" if self.line is None else f"line {self.line}: "
        return f"{place}{self.key + ': ' if self.key else ''}{self.message}" + (
            f" ({self.suggestion})" if self.suggestion else ""
        )


class ManifestError(Exception):
    """run.toml cannot be used. `problems`: all that were found, in the order of the file; one line each in the text."""

    def __init__(self, problems: list[Problem], path: str = "run.toml") -> None:
        super().__init__("\n".join(f"{path}: {problem}" for problem in problems))
        self.problems = problems
        self.path = path


def load_manifest(path: Path | str) -> Manifest:
    """Read a run.toml; `[model] config_file` (relative to it) is read and inlined. Raises ManifestError."""
    path = Path(path)
    try:
        data = _read_bounded(path)
    except (OSError, ValueError) as error:
        raise ManifestError([Problem(None, "", f"cannot be read: {_why(error)}")], str(path)) from None
    return parse_manifest(data, folder=path.parent, path=str(path))


def parse_manifest(text: str | bytes, *, folder: Path | None = None, path: str = "run.toml") -> Manifest:
    """The text of a run.toml. `folder`: where a relative config_file is looked up (None: config_file is refused)."""
    data = text.encode() if isinstance(text, str) else text
    if len(data) > MAX_FILE_BYTES:
        raise ManifestError([Problem(None, "", f"is larger than {MAX_FILE_BYTES} bytes")], path)
    try:
        source = data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ManifestError([Problem(line, "", "is not UTF-8 text", "save the file as UTF-8")], path) from None
    try:
        table = tomllib.loads(source)
    except tomllib.TOMLDecodeError as error:
        raise ManifestError([_syntax_problem(str(error), source)], path) from None
    except (RecursionError, ValueError):
        problem = Problem(None, "", "is not a usable TOML file: nested too deep, or a number too long")
        raise ManifestError([problem], path) from None
    lines = line_numbers(source)
    problems: list[Problem] = []
    from_file: dict[str, str] = {}  # keys of model.config that come from config_file -> its name
    fault: Found | None = None
    if isinstance(table.get("model"), dict):
        fault = _inline_config(table["model"], folder, from_file)
        if fault is not None:
            problems.append(_located(fault, lines, {}))
    try:
        manifest = Manifest.model_validate(table)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            found = explain(detail, Manifest)
            # where the config file could not be read, that the architecture is missing is its consequence
            found = (one for one in found if not (fault and one[0] == ("model", "architecture")))
            problems.extend(_located(one, lines, from_file) for one in found)
    if problems:
        problems = list(dict.fromkeys(problems))
        raise ManifestError(sorted(problems, key=lambda p: (p.line is None, p.line or 0)), path)
    if len(manifest.canonical()) > MAX_CANONICAL_BYTES:
        problem = Problem(None, "model.config", f"makes a manifest of more than {MAX_CANONICAL_BYTES} bytes")
        raise ManifestError([problem], path)
    return manifest


def _read_bounded(path: Path) -> bytes:
    with open(path, "rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"it is larger than {MAX_FILE_BYTES} bytes")
    return data


def _why(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _inline_config(model: dict[str, Any], folder: Path | None, from_file: dict[str, str]) -> Found | None:
    """Replace config_file by its content; keys of [model.config] win; model_type becomes the architecture."""
    where = ("model", "config_file")
    name = model.pop("config_file", None)
    config = model.get("config", {})
    if not isinstance(config, dict):
        if name is None:
            return None  # the schema says it better
        return ("model", "config"), "must be a table: [model.config]", "the path of a JSON file goes into config_file"
    if name is not None:
        if not isinstance(name, str) or not name or "\0" in name:
            return where, f"must be the path of a JSON file; got {shown(name)}", ""
        if folder is None:
            return where, "cannot be read from here", "put its values into [model.config]"
        try:
            base = pydantic_core.from_json(_read_bounded(folder / name), allow_inf_nan=False)
        except (OSError, ValueError) as error:
            return where, f"cannot read {name}: {_why(error)}", "name a transformers config.json"
        if not isinstance(base, dict):
            return where, f"{name} is not a JSON object", "name a transformers config.json"
        from_file.update((key, name) for key in base if key not in config)
        config = {**base, **config}
    if "model_type" in config:
        config = dict(config)
        kind = config.pop("model_type")
        if model.setdefault("architecture", kind) != kind:
            return (
                ("model", "architecture"),
                f"is {shown(model['architecture'])}, but the config's model_type is {shown(kind)}",
                "keep one of the two",
            )
    if config or "config" in model:
        model["config"] = config
    return None


def _syntax_problem(text: str, source: str) -> Problem:
    place = re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)$", text)
    if place is None:
        return Problem(None, "", f"is not valid TOML: {text}")
    message = text[: place.start()]
    line = int(place[1]) if place[1] else max(1, len(source.rstrip("\n").split("\n")))
    message = f"is not valid TOML: {message[:1].lower()}{message[1:]}"
    twice = "overwrite" in message or "twice" in message
    return Problem(line, "", message, "each key and table only once" if twice else "texts need quotes, lists need [ ]")


def _located(found: Found, lines: Mapping[KeyPath, int], from_file: Mapping[str, str]) -> Problem:
    path, message, suggestion = found
    if len(path) > 2 and path[:2] == ("model", "config") and path[2] in from_file:
        message = f"{message} [in {from_file[str(path[2])]}]"
        suggestion = f"{suggestion}, here or under [model.config]" if suggestion else ""
        return Problem(lines.get(("model", "config_file")), dotted(path), message, suggestion)
    line = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)
    return Problem(line, dotted(path), message, suggestion)
