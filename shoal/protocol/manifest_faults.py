"""What is wrong with a manifest, in the words of someone who edits run.toml.

Checks yield `Found`; inside pydantic's validators they raise `Inconsistent`; `explain` turns one error of pydantic into
the same form, with what is allowed and the nearest valid key.
"""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from shoal.protocol.toml_lines import KeyPath

Found = tuple[KeyPath, str, str]  # key path, message, suggestion

_ALIASES = {
    "lr": "learning_rate", "batch_size": "samples", "micro_batch": "microbatch", "microbatch_size": "microbatch",
    "seq_len": "sequence_length", "seq_length": "sequence_length", "context": "sequence_length",
    "optimiser": "optimizer", "grad_clip": "clip_norm", "warmup": "warmup_rounds", "num_stages": "stages",
    "max_rounds": "rounds", "steps": "rounds", "epochs": "rounds", "config_path": "config_file",
}  # fmt: skip


class Inconsistent(ValueError):
    """Raised inside validators; carries key paths and suggestions past pydantic."""

    def __init__(self, problems: list[Found]) -> None:
        path, message, _ = problems[0]
        super().__init__(f"{dotted(path)}: {message}")
        self.problems = problems


def dotted(path: KeyPath) -> str:
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += ("." if text else "") + (part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else json.dumps(part[:60]))
    return text


def shown(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return json.dumps(value if len(value) <= 60 else value[:57] + "...")
        case int() | float():
            return repr(value) if isinstance(value, float) or abs(value) < 10**30 else "a huge number"
        case dict():
            return "a table"
        case list() | tuple():
            return "a list"
        case None:
            return "nothing"
        case _:
            return f"a {type(value).__name__}"


_EXPECTED = {
    "int_type": "an integer", "int_from_float": "an integer", "float_type": "a number", "string_type": "a text",
    "bool_type": "true or false", "model_type": "a table", "model_attributes_type": "a table",
    "dict_type": "a table", "tuple_type": "a list", "is_instance_of": "a table", "finite_number": "a finite number",
}  # fmt: skip
_BOUNDS = {
    "greater_than": ("gt", "greater than"), "greater_than_equal": ("ge", "at least"), "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}  # fmt: skip
_PATTERNS: dict[KeyPath, str] = {
    ("name",): "1 to 64 letters, digits, '.', '_' or '-'",
    ("model", "architecture"): "a transformers model_type such as llama",
    ("data", "sha256"): "64 lowercase hex digits, or empty",
}


def explain(detail: Any, schema: type[BaseModel]) -> Iterator[Found]:
    """One pydantic error about `schema` (the manifest) in the words of someone who edits run.toml."""
    path: KeyPath = detail["loc"]
    kind: str = detail["type"]
    context = detail.get("ctx", {})
    value = detail["input"]
    if isinstance(context.get("error"), Inconsistent):
        yield from context["error"].problems
    elif kind == "extra_forbidden":
        yield path, *_unknown_key(path, schema)
    elif kind == "missing" and path == ("model", "architecture"):
        yield path, "is missing", 'name one, such as architecture = "llama", or a config_file with a model_type'
    elif kind == "missing" and isinstance(path[-1], str):
        default = "[model]" if path == ("model",) else f"{path[-1]} = …"
        yield path, "is missing", f"add {default}"
    elif kind == "literal_error":
        allowed = typing.get_args(_annotation(path, schema))
        choices = ", ".join(shown(one) for one in allowed)
        close = difflib.get_close_matches(str(value), [str(one) for one in allowed], n=1, cutoff=0.5)
        yield path, f"must be one of {choices}; got {shown(value)}", f'did you mean "{close[0]}"?' if close else ""
    elif kind in _EXPECTED:
        fix = ""
        number = kind in ("int_type", "float_type") and isinstance(value, str)
        if number and re.fullmatch(r"[-+]?[0-9.]+(e-?[0-9]+)?", value):
            fix = f"write {value} without quotes"
        elif path == ("model", "config") and isinstance(value, str):
            fix = "the path of a JSON file goes into config_file"
        yield path, f"must be {_EXPECTED[kind]}; got {shown(value)}", fix
    elif kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        yield path, f"must be {words} {context[name]:.12g}; got {shown(value)}", ""
    elif kind == "string_pattern_mismatch":
        yield path, f"must be {_PATTERNS.get(path, 'a text without control characters')}; got {shown(value)}", ""
    elif path[:2] == ("optimizer", "betas"):
        yield path[:2], "must be a list of two numbers", "such as betas = [0.9, 0.95]"
    elif kind == "value_error":
        yield path, f"{context['error']}; got {shown(value)}", ""
    else:
        yield path, f"{detail['msg'][:1].lower()}{detail['msg'][1:]}; got {shown(value)}", ""


def _unknown_key(path: KeyPath, schema: type[BaseModel]) -> tuple[str, str]:
    key = str(path[-1])
    section = _section(path[:-1], schema)
    here = _keys(section, path[:-1])
    wanted = _ALIASES.get(key.lower(), key.lower())
    everywhere = {name: where for where, names in _all_keys(schema) for name in names}
    if wanted in here:
        return "unknown key", f"did you mean {wanted}?"
    if wanted in everywhere:
        return "unknown key", _belongs(wanted, everywhere[wanted], schema)
    close = difflib.get_close_matches(wanted, here, n=1, cutoff=0.5)
    if close:
        return "unknown key", f"did you mean {close[0]}?"
    close = difflib.get_close_matches(wanted, everywhere, n=1, cutoff=0.75)
    if close:
        return "unknown key", _belongs(close[0], everywhere[close[0]], schema)
    nearest = difflib.get_close_matches(wanted, here, n=1, cutoff=0.0)
    return f"unknown key; valid here: {', '.join(here)}", f"the nearest is {nearest[0]}"


def _belongs(key: str, section: str, schema: type[BaseModel]) -> str:
    if section:
        return f"{key} belongs into [{section}]"
    annotation = schema.model_fields[key].annotation
    table = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return f"{key} is a table: [{key}]" if table else f"{key} belongs above the first [table]"


def _annotation(path: KeyPath, schema: type[BaseModel]) -> Any:
    model = _section(path[:-1], schema)
    return model.model_fields[str(path[-1])].annotation


def _section(path: KeyPath, schema: type[BaseModel]) -> type[BaseModel]:
    model = schema
    for part in path:
        annotation = model.model_fields[str(part)].annotation
        assert isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias)
        model = annotation
    return model


def _keys(model: type[BaseModel], path: KeyPath) -> list[str]:
    return [*model.model_fields, *(["config_file"] if path == ("model",) else [])]


def _all_keys(schema: type[BaseModel]) -> Iterator[tuple[str, list[str]]]:
    for name, info in schema.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield name, _keys(info.annotation, (name,))
    yield "", list(schema.model_fields)  # last: a name at the top wins over the same name in a table
