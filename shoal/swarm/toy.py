"""A small float64 pipeline, for simulation and tests: thousands of microbatches in seconds, exact enough for 1e-9.

Embedding at stage 0, one tanh layer on every stage, a linear head and cross-entropy on the last.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shoal.swarm.initialise import normal
from shoal.swarm.optimizers import OptimizerSettings, OptimizerSpec
from shoal.swarm.stage import StageProgram


class ToyModule(nn.Module):
    """int64 (b, t) at stage 0, else float64 (b, t, width) -> float64 (b, t, width), or (b, t, vocab) at the last."""

    def __init__(self, seed: int, index: int, stages: int, width: int, vocab: int) -> None:
        super().__init__()

        def parameter(name: str, *shape: int, std: float) -> nn.Parameter:
            return nn.Parameter(normal(f"{name}.{index}", shape, seed=seed, std=std, dtype=torch.float64))

        self.embedding = parameter("embedding", vocab, width, std=1.0) if index == 0 else None
        self.weight = parameter("weight", width, width, std=width**-0.5)
        self.head = parameter("head", width, vocab, std=width**-0.5) if index == stages - 1 else None
        self.index = index

    def full_name(self, name: str) -> str:
        """Parameter names are unique over the stages."""
        return f"stages.{self.index}.{name}"

    def forward(self, x: Tensor) -> Tensor:
        hidden = x if self.embedding is None else self.embedding[x]
        hidden = torch.tanh(hidden @ self.weight)
        return hidden if self.head is None else hidden @ self.head


def toy_stage(
    seed: int,
    index: int,
    stages: int,
    width: int = 8,
    vocab: int = 16,
    optimizer: OptimizerSettings | None = None,
    keep_graphs: int = 0,
) -> StageProgram:
    """Stage `index` of the toy pipeline, float64 on the CPU. Default optimizer: SGD with learning rate 0.1."""
    return StageProgram(
        ToyModule(seed, index, stages, width, vocab),
        index=index,
        last=index == stages - 1,
        optimizer=optimizer or OptimizerSpec(),
        vocab=vocab,
        width=width,
        keep_graphs=keep_graphs,
    )
