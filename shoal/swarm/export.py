"""Export: the parameters of all stages as a Hugging Face directory that `from_pretrained` opens.

Written aside, flushed to disk, renamed: the directory is there whole or not at all. With it goes a byte tokenizer that
stock transformers loads without code: token ids are the byte values of UTF-8 text.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from shoal.swarm.data import VOCABULARY
from shoal.swarm.reference import parameters_of
from shoal.swarm.split import DTYPES, ModelSettings, materialise_buffers, model_config, skeleton
from shoal.swarm.stage import DataShape

MARKER = "shoal.json"  # tells our own exports, which may be replaced, from other people's directories


class ExportError(Exception):
    """The export was not made; nothing is left half-written. The message says what to do."""


class ExportSettings(Protocol):
    """What `export_hf` reads from the manifest."""

    @property
    def name(self) -> str: ...
    @property
    def model(self) -> ModelSettings: ...
    @property
    def data(self) -> DataShape: ...
    @property
    def run_id(self) -> str: ...


def byte_tokenizer() -> Any:
    """A `tokenizers.Tokenizer` over 256 tokens: ids are byte values, decoding is exact for any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = _byte_alphabet()
    tokenizer = Tokenizer(models.BPE(vocab={character: byte for byte, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in byte-level tokenizers (GPT-2's table, by byte value)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(VOCABULARY) if byte not in table)
    table |= {byte: chr(0x100 + i) for i, byte in enumerate(others)}
    return [table[byte] for byte in range(VOCABULARY)]


def export_hf(
    manifest: ExportSettings,
    stage_states: Sequence[dict[str, Tensor]],
    directory: Path | str,
    *,
    tokenizer: bool = True,
) -> Path:
    """Write config.json, generation_config.json, model.safetensors and the byte tokenizer into `directory`.

    `stage_states`: `StageProgram.state()` of every stage, in any order. An earlier export of ours at `directory` is
    replaced; anything else that is not empty is refused. Raises ExportError with nothing half-written."""
    target = Path(directory).absolute()
    _check_target(target)
    model = _assemble(manifest, parameters_of(stage_states))
    steps = {int(state["step"]) for state in stage_states}
    if len(steps) != 1:
        raise ExportError(f"the stages are at different steps ({sorted(steps)}); export states of one round")
    aside = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir()
        model.save_pretrained(aside)
        if tokenizer:
            from transformers import PreTrainedTokenizerFast

            wrapped = PreTrainedTokenizerFast(
                tokenizer_object=byte_tokenizer(),
                clean_up_tokenization_spaces=False,
                model_max_length=manifest.data.sequence_length,
            )
            wrapped.save_pretrained(aside)
        about = {"name": manifest.name, "run": manifest.run_id, "step": steps.pop()}
        (aside / MARKER).write_text(json.dumps(about, indent=1) + "\n")
        for path in (*aside.iterdir(), aside):
            _flush(path)
        _swap(aside, target)
    except OSError as error:
        raise _export_error(target, error) from None
    except Exception as error:  # safetensors reports a full disk as an exception type of its own
        raise ExportError(
            f"{target}: the export failed ({type(error).__name__}: {str(error)[:200]}); check space and permissions"
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def _assemble(manifest: ExportSettings, parameters: dict[str, Tensor]) -> Any:
    """The whole model with these parameters (no copy). Raises ExportError unless names and shapes are exactly its."""
    config = model_config(manifest.model)
    model = skeleton(config, DTYPES[manifest.model.dtype])
    expected = {name: p.shape for name, p in model.named_parameters()}
    wrong = sorted(
        name
        for name in expected.keys() | parameters.keys()
        if name not in parameters or name not in expected or parameters[name].shape != expected[name]
    )
    if wrong:
        raise ExportError(
            f"the states do not make a whole model: {len(wrong)} parameters are missing, unknown or misshapen "
            f"({', '.join(wrong[:3])}); export needs the state of every stage of this run"
        )
    materialise_buffers(model, torch.device("cpu"))
    model.load_state_dict(parameters, strict=False, assign=True)
    model.config.use_cache = True  # training ran without; generation wants it
    model.generation_config.use_cache = True
    return model.eval()


def _check_target(target: Path) -> None:
    if target.is_dir():
        if any(target.iterdir()) and not (target / MARKER).is_file():
            raise ExportError(f"{target}: holds files that are no export of shoal; name another directory or empty it")
    elif target.exists() or target.is_symlink():
        raise ExportError(f"{target}: is not a directory; name another place")


def _swap(aside: Path, target: Path) -> None:
    """Put `aside` where `target` is; what was there goes only after the new one is in place."""
    old = target.with_name(f".{target.name}.old-{secrets.token_hex(4)}")
    had = target.exists()
    if had:
        target.rename(old)
    try:
        aside.rename(target)
    except OSError:
        if had:
            old.rename(target)
        raise
    _flush(target.parent)
    if had:
        shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _export_error(target: Path, error: OSError) -> ExportError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ExportError(f"{target}: no space left for the export; free some or name a directory on another disk")
    return ExportError(f"{target}: cannot be written ({error.strerror}); check the path and its permissions")
