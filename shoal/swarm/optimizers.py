"""Optimizers by name, over one flat parameter tensor: a closed registry, deterministic, with exact export and import.

A stage's parameters are views of one flat tensor, so one step is a few vectorised passes. Everything here works element
by element (except the 8-bit optimizers, whose quantisation blocks of 256 start at the stage's first value), so a split
of the model does not change the result. Weight decay applies to every parameter; for adamw, adamw8bit and lion8bit it
is decoupled (Loshchilov & Hutter, 2019), for sgd and adam8bit it is added to the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

MIN_8BIT_SIZE = 4096  # bitsandbytes keeps the state of smaller tensors in 32 bits


class OptimizerSettings(Protocol):
    """What is read from `[optimizer]` of the manifest."""

    @property
    def name(self) -> str: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def betas(self) -> tuple[float, float]: ...
    @property
    def eps(self) -> float: ...
    @property
    def momentum(self) -> float: ...
    @property
    def warmup_rounds(self) -> int: ...


@dataclass(frozen=True, slots=True)
class OptimizerSpec:
    """The settings without a manifest: for toys and tests."""

    name: str = "sgd"
    learning_rate: float = 0.1
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    momentum: float = 0.0
    warmup_rounds: int = 0


class OptimizerError(ValueError):
    """The optimizer cannot be used with this run, or a state does not belong to it. The message says what to do."""


def learning_rate(settings: OptimizerSettings, step: int) -> float:
    """Learning rate of step `step` (0-based): linear warm-up over `warmup_rounds`, then constant."""
    warmup = settings.warmup_rounds
    return settings.learning_rate * min(1.0, (step + 1) / warmup) if warmup > 0 else settings.learning_rate


def _eight_bit(name: str) -> Callable[[Tensor, OptimizerSettings], torch.optim.Optimizer]:
    def make(flat: Tensor, s: OptimizerSettings) -> torch.optim.Optimizer:
        if flat.dtype != torch.float32:
            raise OptimizerError(
                f'optimizer "{name.lower()}" needs dtype = "float32", not {str(flat.dtype).removeprefix("torch.")}; '
                'set [model] dtype = "float32" or use "adamw"'
            )
        try:
            import bitsandbytes.optim as bnb
        except ImportError as error:
            raise OptimizerError(
                f'optimizer "{name.lower()}" needs bitsandbytes, which cannot be imported ({error}); install it or use '
                '"adamw"'
            ) from None
        options: dict[str, Any] = {
            "lr": s.learning_rate,
            "betas": tuple(s.betas),
            "weight_decay": s.weight_decay,
            "min_8bit_size": MIN_8BIT_SIZE,
        }
        if name != "Lion8bit":
            options["eps"] = s.eps
        made: torch.optim.Optimizer = getattr(bnb, name)([flat], **options)
        return made

    return make


_REGISTRY: dict[str, Callable[[Tensor, OptimizerSettings], torch.optim.Optimizer]] = {
    "sgd": lambda flat, s: torch.optim.SGD(
        [flat], lr=s.learning_rate, momentum=s.momentum, weight_decay=s.weight_decay, fused=True
    ),
    "adamw": lambda flat, s: torch.optim.AdamW(
        [flat], lr=s.learning_rate, betas=(s.betas[0], s.betas[1]), eps=s.eps, weight_decay=s.weight_decay, fused=True
    ),
    "adam8bit": _eight_bit("Adam8bit"),
    "adamw8bit": _eight_bit("AdamW8bit"),
    "lion8bit": _eight_bit("Lion8bit"),
}
NAMES = tuple(_REGISTRY)


class FlatOptimizer:
    """Steps one flat parameter tensor in place. `flat`: (numel,), contiguous; shared with the stage's module."""

    def __init__(self, settings: OptimizerSettings, flat: Tensor) -> None:
        if settings.name not in _REGISTRY:
            raise OptimizerError(f'optimizer "{settings.name}" is not known; use one of {", ".join(NAMES)}')
        self.settings = settings
        self.steps = 0  # steps taken: part of the state
        self._flat = flat
        self._build()

    def _build(self) -> None:
        self._parameter = torch.nn.Parameter(self._flat.detach())
        self._optimizer = _REGISTRY[self.settings.name](self._parameter, self.settings)

    def step(self, gradient: Tensor) -> None:
        """One step with the mean gradient (numel,), same dtype and device as `flat`. Deterministic."""
        self._optimizer.param_groups[0]["lr"] = learning_rate(self.settings, self.steps)
        self._parameter.grad = gradient
        try:
            self._optimizer.step()
        finally:
            self._parameter.grad = None
        self.steps += 1

    def state(self) -> dict[str, Tensor]:
        """All that the next steps depend on besides the parameters, as copies on the CPU; empty before the first
        step. Everything is a tensor (numbers become 0-dimensional), except for `steps`, which the owner keeps."""
        exported: dict[str, Tensor] = {}
        for key, value in self._optimizer.state.get(self._parameter, {}).items():
            if value is None:  # SGD without momentum
                continue
            if isinstance(value, Tensor):
                exported[key] = value.detach().to("cpu", copy=True).contiguous()
            elif isinstance(value, (int, float)):
                exported[key] = torch.tensor(value)
            else:
                raise OptimizerError(f"cannot export {key} of {self.settings.name}")  # pragma: no cover
        return exported

    def load_state(self, tensors: dict[str, Tensor], steps: int) -> None:
        """Inverse of `state`: the next steps are bit-equal to those of the exporter. Raises OptimizerError without
        effect if the tensors are not a state of this optimizer."""
        expected = self._expected(steps)
        got = {key: (tuple(value.shape), value.dtype) for key, value in tensors.items()}
        if got != expected:
            wrong = sorted(key for key in expected.keys() | got.keys() if expected.get(key) != got.get(key))
            raise OptimizerError(
                f"the state is not one of {self.settings.name} after {steps} steps over {self._flat.numel()} values "
                f"(missing, unknown or misshapen: {', '.join(wrong)})"
            )
        self._build()
        if tensors:
            scratch = self._scratch_state()
            fresh: dict[str, Any] = self._optimizer.state[self._parameter]
            for key, value in tensors.items():
                like = scratch[key]
                fresh[key] = value.to(like.device, copy=True) if isinstance(like, Tensor) else value.item()
        self.steps = steps

    def _expected(self, steps: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        if steps == 0:
            return {}
        shapes = {}
        for key, value in self._scratch_state().items():
            if value is not None:
                tensor = value if isinstance(value, Tensor) else torch.tensor(value)
                shapes[key] = (tuple(tensor.shape), tensor.dtype)
        return shapes

    def _scratch_state(self) -> dict[str, Any]:
        """State that one step of a fresh optimizer over a scratch copy makes: the schema of this optimizer's state."""
        parameter = torch.nn.Parameter(torch.zeros_like(self._flat))
        optimizer = _REGISTRY[self.settings.name](parameter, self.settings)
        parameter.grad = torch.zeros_like(self._flat)
        optimizer.step()
        return dict(optimizer.state.get(parameter, {}))
