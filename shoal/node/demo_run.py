"""The manifest of `shoal demo pipeline`: a small byte-level Llama on the Python standard library's own sources."""

from __future__ import annotations

MICROBATCHES = 8

TEMPLATE = """\
# Written by `shoal demo`. A run like any other: shoal check run.toml, shoal bootstrap run.toml.
name = "demo"
mode = "pipeline"
seed = {seed}

[model]
architecture = "llama"
stages = {stages}
dtype = "float32"

[model.config]
hidden_size = 256
intermediate_size = 640
num_hidden_layers = {layers}
num_attention_heads = 4
num_key_value_heads = 4
vocab_size = 256
max_position_embeddings = 128
tie_word_embeddings = false

[data]
kind = "stdlib"
sequence_length = 128

[batch]
samples = 32
microbatch = 4

[optimizer]
name = "adamw"
learning_rate = 5e-3
warmup_rounds = 3

[schedule]
rounds = {rounds}
snapshot_every = {snapshot_every}

[participation]
servers_per_stage = {servers}
feeders = 2
committee = 3
"""


def demo_manifest(*, rounds: int, stages: int, volunteers: int, seed: int = 0) -> str:
    """The text of run.toml. Four layers, or one for each stage if there are more."""
    return TEMPLATE.format(
        seed=seed,
        stages=stages,
        layers=max(4, stages),
        rounds=rounds,
        snapshot_every=max(2, min(10, rounds // 4)),
        servers=max(1, volunteers // stages),
    )
