"""What a coordinator does before a run: check the file, pin the data, sign the manifest."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.node.exit_codes import ExitCode, ShoalError
from shoal.node.files import replace_file
from shoal.node.settings import NodeSettings
from shoal.protocol.identity import Identity
from shoal.protocol.manifest import Manifest, SignedManifest, load_manifest
from shoal.protocol.toml_lines import line_numbers
from shoal.protocol.transport import Refused

OLDER_MODEL_KEYS = frozenset({"rope_theta", "rope_scaling", "torch_dtype"})  # transformers still understands them


@dataclass(frozen=True, slots=True)
class Examination:
    """What `shoal check` found. Costs are per stage."""

    manifest: Manifest
    parameters: tuple[int, ...]
    samples_in_data: int
    unigram_entropy: float
    data_sha256: str

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.manifest.name,
            "mode": self.manifest.mode,
            "parameters_per_stage": list(self.parameters),
            "samples_in_data": self.samples_in_data,
            "unigram_entropy": self.unigram_entropy,
            "data_sha256": self.data_sha256,
        }

    def text(self) -> str:
        m = self.manifest
        total = sum(self.parameters)
        stages = ", ".join(f"{n / 1e6:.2f}M" for n in self.parameters)
        epochs = m.schedule.rounds * m.batch.samples / max(1, self.samples_in_data)
        lines = [
            f"{m.name}: good",
            f"  model   {m.model.architecture or 'from config file'}, {total / 1e6:.2f}M parameters; stages: {stages}",
            f"  data    {self.samples_in_data} samples of {m.data.sequence_length} bytes, "
            f"unigram entropy {self.unigram_entropy:.3f} nats per byte",
            f"  rounds  {m.schedule.rounds or 'no end'}, {m.batch.samples} samples each ({epochs:.2f} epochs), "
            f"microbatches of {m.batch.microbatch}",
            f"  peers   starts with {m.participation.servers_per_stage} servers for each of {m.model.stages} stages",
            "next: shoal bootstrap run.toml",
        ]
        return "\n".join(lines)


def examine(path: Path) -> Examination:
    """Check a run.toml as deeply as this machine can. Raises ManifestError, DataError, UnsupportedModel, …"""
    import torch

    from shoal.swarm.stage import build_stage

    manifest, corpus = _load(path)
    sequences = corpus.sequences(manifest.data.sequence_length, seed=manifest.seed)
    with torch.device("cpu"):
        parameters = tuple(build_stage(manifest, s).numel for s in range(manifest.model.stages))
    return Examination(manifest, parameters, len(sequences), corpus.unigram_entropy, corpus.sha256)


def _load(path: Path) -> tuple[Manifest, Any]:
    from shoal.swarm.data import load_corpus

    if not path.exists():
        raise ShoalError(ExitCode.BAD_MANIFEST, f"{path}: no such file", "name the run's file, or write one: README.md")
    manifest = load_manifest(path)
    _check_model_keys(path, manifest)
    corpus = load_corpus(manifest.data, path.parent)
    if manifest.data.sha256 and manifest.data.sha256 != corpus.sha256:
        raise ShoalError(
            ExitCode.DATA_MISMATCH,
            f"{path}: data.sha256 names another corpus than the one that is here ({corpus.sha256[:16]}…)",
            "restore the data, or remove the key to pin what is here now",
        )
    return manifest.with_data_sha256(corpus.sha256), corpus


def _check_model_keys(path: Path, manifest: Manifest) -> None:
    """transformers takes any key in silence: one that its config does not have is a mistake. Raises ShoalError."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if manifest.model.architecture not in CONFIG_MAPPING:
        return  # told, with the nearest one, when the stages are built
    known = AutoConfig.for_model(manifest.model.architecture)
    for where, line in line_numbers(path.read_text("utf-8")).items():
        if len(where) != 3 or where[:2] != ("model", "config"):
            continue
        key = str(where[2])
        if hasattr(known, key) or key in type(known).attribute_map or key in OLDER_MODEL_KEYS:
            continue
        close = difflib.get_close_matches(key, [*known.to_dict(), *type(known).attribute_map], n=1)
        raise ShoalError(
            ExitCode.BAD_MANIFEST,
            f"{path}: line {line}: model.config.{key}: no such key in a config of {manifest.model.architecture}"
            + (f" (did you mean {close[0]}?)" if close else ""),
        )


def prepare(path: Path, settings: NodeSettings) -> SignedManifest:
    """The signed manifest of a run, made on the first start and kept; a changed run.toml is another run.

    Raises the errors of `examine`, and ShoalError when the directory belongs to another run."""
    manifest, _ = _load(path)
    settings.prepare()
    identity = Identity.load_or_create(settings.identity)
    kept = settings.directory / "manifest.signed"
    if kept.exists():
        try:
            signed = SignedManifest.open(kept.read_bytes(), expected_coordinator=identity.peer)
        except Refused as error:
            raise ShoalError(
                ExitCode.MANIFEST_REFUSED,
                f"{kept}: {error.detail}",
                "the directory is damaged or of another identity: choose another one with --dir",
            ) from None
        if signed.manifest.run_id != manifest.run_id:
            raise ShoalError(
                ExitCode.BAD_MANIFEST,
                f"{settings.directory} holds the run {signed.manifest.name!r}, and {path} differs from it",
                "a changed file is a new run: give it a directory of its own with --dir, or restore the file",
            )
        return signed
    signed = SignedManifest.sign(manifest, identity)
    replace_file(kept, signed.to_bytes())
    return signed
