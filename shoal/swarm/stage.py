"""One stage of the pipeline as pure computation: forward, backward that recomputes, one optimizer step.

This is SWARM's stage server (Ryabinin et al., 2023, section 3.2) without a network: forward keeps nothing, backward
runs forward again and returns the gradients of its input and of its parameters, the latter as one flat tensor that the
caller adds up. Nothing here changes parameters except `apply` and `load_state`. Tensors arrive and leave on the CPU;
the stage computes on its own device. Random layers are seeded per call, and the process's random state is left as it
was. Call from one thread at a time; the number of threads is the caller's choice.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from shoal.protocol.events import Reason
from shoal.protocol.transport import Refused
from shoal.swarm.optimizers import FlatOptimizer, OptimizerError, OptimizerSettings
from shoal.swarm.split import ModelSettings, build_module

Loss = Callable[[Tensor, Tensor], Tensor]  # (output of the last stage, labels) -> scalar: the SUM over samples


class DataShape(Protocol):
    """What is read from `[data]` of the manifest."""

    @property
    def sequence_length(self) -> int: ...


class StageSettings(Protocol):
    """What `build_stage` reads from the manifest."""

    @property
    def seed(self) -> int: ...
    @property
    def model(self) -> ModelSettings: ...
    @property
    def data(self) -> DataShape: ...
    @property
    def optimizer(self) -> OptimizerSettings: ...


class BadState(ValueError):
    """A state does not belong to this stage; nothing was changed. The message says what differs."""


@dataclass(frozen=True, slots=True)
class Backward:
    """What a backward returns. CPU tensors, in the stage's dtype."""

    dx: Tensor | None  # gradient of the input (b, t, h); None at stage 0
    gradient: Tensor  # (numel,): gradient of the parameters, summed over the samples
    losses: float  # loss summed over the samples, nats per token; 0.0 unless this is the last stage


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over samples of the mean over tokens of cross-entropy, in nats. logits (b, t, v), labels int64 (b, t)."""
    total = functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="sum")
    return total / labels.shape[1]


class StageProgram:
    """A module with its flat parameters and optimizer.

    `module`: maps (b, t) or (b, t, h) to (b, t, h) or logits; moved to `device` and owned from now on. Optional method
    `full_name(name) -> str` gives the names used in `state()`. `vocab`, `width`: what ids and hidden states must fit.
    `keep_graphs`: how many forwards run with `keep=True` may be remembered, so that backward need not recompute them;
    results are bit-equal with and without.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        index: int,
        last: bool,
        optimizer: OptimizerSettings,
        loss: Loss = token_loss,
        device: torch.device | str = "cpu",
        vocab: int | None = None,
        width: int | None = None,
        keep_graphs: int = 0,
    ) -> None:
        self.index, self.last = index, last
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.module = module.to(self.device)
        rename = cast(Callable[[str], str], getattr(module, "full_name", str))
        named = [(rename(name), p) for name, p in module.named_parameters()]
        if not named:
            raise ValueError(f"stage {index} has no parameters")
        dtypes = {p.dtype for _, p in named}
        if len(dtypes) > 1:
            raise ValueError(f"stage {index} mixes parameter types {sorted(map(str, dtypes))}")
        self.dtype: torch.dtype = dtypes.pop()
        self.numel = sum(p.numel() for _, p in named)
        self._loss, self._vocab, self._width = loss, vocab, width
        self._parameters = [p for _, p in named]
        self._flat = torch.empty(self.numel, dtype=self.dtype, device=self.device)
        self._views: dict[str, Tensor] = {}
        offset = 0
        for name, p in named:  # parameters become views of the flat tensor: one step is one pass over it
            view = self._flat[offset : offset + p.numel()].view(p.shape)
            view.copy_(p.detach())
            p.data = view
            self._views[name] = view
            offset += p.numel()
        self._optimizer = FlatOptimizer(optimizer, self._flat)
        self._keep = keep_graphs
        self._graphs: OrderedDict[int, tuple[Tensor, Tensor, Tensor]] = OrderedDict()  # seed -> (x, leaf, output)

    @property
    def step(self) -> int:
        """Optimizer steps applied so far."""
        return self._optimizer.steps

    # --- computing ----------------------------------------------------------------------------------------------------
    def forward(self, x: Tensor, *, seed: int, keep: bool = False) -> Tensor:
        """Output of the stage for x: int64 (b, t) at stage 0, else (b, t, h). No effect on what any later call returns.

        Raises Refused: MALFORMED (shape, dtype, id outside of the vocabulary) or NOT_FINITE."""
        self._check_input(x)
        if keep and self._keep > 0:
            try:
                return self._forward_kept(x, seed)
            except torch.OutOfMemoryError:
                self.drop_cache()  # a kept graph only saves time: without any, the forward may still fit
        with torch.no_grad(), _seeded(seed, self.device):
            output = self.module(x.to(self.device))
        _check_finite(output, "the output")
        return cast(Tensor, output.to("cpu"))

    def _forward_kept(self, x: Tensor, seed: int) -> Tensor:
        """Forward that remembers its graph for the backward of the same microbatch; the oldest one is forgotten."""
        while len(self._graphs) >= self._keep:
            self._graphs.popitem(last=False)
        leaf, output = self._run(x, seed)
        _check_finite(output, "the output")
        self._graphs[seed] = (x, leaf, output)
        return output.detach().to("cpu", copy=True)

    def backward(self, x: Tensor, *, seed: int, dy: Tensor | None = None, labels: Tensor | None = None) -> Backward:
        """Recompute forward for x, then the gradients. Last stage: `labels` int64 (b, t); others: `dy` like the output.

        Adds nothing anywhere: the caller keeps the sums. Raises Refused: MALFORMED or NOT_FINITE."""
        self._check_input(x)
        if self.last != (labels is not None) or self.last != (dy is None):
            raise Refused(Reason.MALFORMED, "the last stage takes labels, every other stage takes dy")
        if labels is not None and (labels.dtype != torch.int64 or labels.shape != x.shape[:2]):
            raise Refused(Reason.MALFORMED, f"labels are int64 {tuple(x.shape[:2])}, not {tuple(labels.shape)}")
        if labels is not None:
            self._check_ids(labels)
        kept = self._graphs.pop(seed, None)
        if kept is not None and torch.equal(kept[0], x):
            _, leaf, output = kept
        else:
            leaf, output = self._run(x, seed)
        inputs = self._parameters if not leaf.requires_grad else [leaf, *self._parameters]
        losses = 0.0
        if labels is not None:
            total = self._loss(output, labels.to(self.device))
            losses = float(total.detach())
            if not abs(losses) < float("inf"):
                raise Refused(Reason.NOT_FINITE, "the loss is not finite")
            gradients = torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)
        else:
            assert dy is not None
            if dy.shape != output.shape or dy.dtype != self.dtype:
                raise Refused(Reason.MALFORMED, f"dy is {self.dtype} {tuple(output.shape)}, not {tuple(dy.shape)}")
            gradients = torch.autograd.grad(
                output, inputs, dy.to(self.device), allow_unused=True, materialize_grads=True
            )
        dx: Tensor | None = None
        if leaf.requires_grad:
            dx, gradients = gradients[0], gradients[1:]
            _check_finite(dx, "the gradient of the input")
        flat = torch.cat([g.reshape(-1) for g in gradients])
        _check_finite(flat, "the gradient of the parameters")
        return Backward(None if dx is None else dx.to("cpu"), flat.to("cpu"), losses)

    def apply(self, gradient_sum: Tensor, samples: int) -> None:
        """One optimizer step with the mean gradient_sum / samples; gradient_sum (numel,) is left as it is.

        The sum may be float64 whatever the stage's dtype: float64 sums of float32 gradients are exact but for rare last
        bits, so that the order and grouping of microbatches leave no trace in the parameters.
        Deterministic. Raises Refused without effect: MALFORMED or NOT_FINITE."""
        if gradient_sum.shape != (self.numel,) or gradient_sum.dtype not in (self.dtype, torch.float64) or samples < 1:
            raise Refused(Reason.MALFORMED, f"the gradient of stage {self.index} is {self.dtype} ({self.numel},)")
        mean = (gradient_sum.to(self.device) / samples).to(self.dtype)
        _check_finite(mean, "the mean gradient")
        self.drop_cache()
        self._optimizer.step(mean)

    def drop_cache(self) -> None:
        """Forget kept forwards. Always allowed; later backwards recompute."""
        self._graphs.clear()

    # --- state --------------------------------------------------------------------------------------------------------
    def parameters(self) -> dict[str, Tensor]:
        """Copies of the parameters on the CPU, by their names in the unsplit model."""
        return {name: view.to("cpu", copy=True).contiguous() for name, view in self._views.items()}

    def state(self) -> dict[str, Tensor]:
        """Everything that later steps depend on, as copies on the CPU: `parameter.<name>`, `optimizer.<key>` and `step`
        (int64 scalar)."""
        tensors = {f"parameter.{name}": value for name, value in self.parameters().items()}
        tensors |= {f"optimizer.{key}": value for key, value in self._optimizer.state().items()}
        tensors["step"] = torch.tensor(self.step, dtype=torch.int64)
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of `state`. Raises BadState, without effect, unless names, shapes and types all fit and every
        parameter is finite."""
        parameters = {k.removeprefix("parameter."): v for k, v in tensors.items() if k.startswith("parameter.")}
        optimizer = {k.removeprefix("optimizer."): v for k, v in tensors.items() if k.startswith("optimizer.")}
        step = tensors.get("step")
        if step is None or step.dtype != torch.int64 or step.ndim != 0 or int(step) < 0:
            raise BadState("the state has no step count (int64 scalar)")
        if len(parameters) + len(optimizer) + 1 != len(tensors) or parameters.keys() != self._views.keys():
            wrong = sorted(parameters.keys() ^ self._views.keys())[:4]
            raise BadState(f"not a state of stage {self.index} (differs in {', '.join(wrong) or 'other keys'})")
        for name, view in self._views.items():
            value = parameters[name]
            if value.shape != view.shape or value.dtype != view.dtype:
                found = f"{value.dtype} {tuple(value.shape)}"
                raise BadState(f"{name} should be {view.dtype} {tuple(view.shape)}, is {found}")
            if not _finite(value):
                raise BadState(f"{name} holds NaN or infinity")
        for key, value in optimizer.items():
            if value.is_floating_point() and not _finite(value):
                raise BadState(f"the optimizer's {key} holds NaN or infinity")
        try:
            self._optimizer.load_state(optimizer, int(step))
        except OptimizerError as error:
            raise BadState(str(error)) from None
        self.drop_cache()
        with torch.no_grad():
            for name, view in self._views.items():
                view.copy_(parameters[name])

    def digest(self) -> str:
        """SHA-256 (hex) over the state: names, types, shapes and bytes in name order."""
        return state_digest(self.state())

    # --- inside -------------------------------------------------------------------------------------------------------
    def _run(self, x: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        leaf = x.to(self.device)
        if self.index > 0:
            leaf = leaf.detach().requires_grad_(True)
        with torch.enable_grad(), _seeded(seed, self.device):
            return leaf, self.module(leaf)

    def _check_ids(self, ids: Tensor) -> None:
        if self._vocab is not None and ids.numel():
            low, high = torch.aminmax(ids)
            if int(low) < 0 or int(high) >= self._vocab:
                raise Refused(Reason.MALFORMED, f"a token id lies outside of [0, {self._vocab})")

    def _check_input(self, x: Tensor) -> None:
        if self.index == 0:
            if x.dtype != torch.int64 or x.ndim != 2 or x.numel() == 0:
                raise Refused(Reason.MALFORMED, f"stage 0 takes int64 (b, t), not {x.dtype} {tuple(x.shape)}")
            self._check_ids(x)
        elif (
            x.dtype != self.dtype
            or x.ndim != 3
            or x.numel() == 0
            or (self._width is not None and x.shape[2] != self._width)
        ):
            want = f"{self.dtype} (b, t, {self._width or 'h'})"
            raise Refused(Reason.MALFORMED, f"stage {self.index} takes {want}, not {x.dtype} {tuple(x.shape)}")


def state_digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 (hex) of a state dict, as `StageProgram.digest`."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(cast(Any, value.reshape(-1).view(torch.uint8).numpy()))  # no copy: numpy is a buffer
    return digest.hexdigest()


def build_stage(
    manifest: StageSettings, index: int, *, device: torch.device | str = "cpu", keep_graphs: int = 0
) -> StageProgram:
    """Stage `index` of a manifest's model with its seeded initialisation: the same values on every device.

    Raises UnsupportedModel (shoal.swarm.split) or OptimizerError, each with the fix."""
    module = build_module(
        manifest.model, index, seed=manifest.seed, sequence_length=manifest.data.sequence_length, device=device
    )
    return StageProgram(
        module,
        index=index,
        last=module.last_stage,
        optimizer=manifest.optimizer,
        device=device,
        vocab=module.vocab,
        width=module.hidden,
        keep_graphs=keep_graphs,
    )


def _finite(value: Tensor) -> bool:
    """One pass, no copy: the largest magnitude is NaN or infinite exactly if some element is."""
    return bool(torch.linalg.vector_norm(value, float("inf")) < float("inf")) if value.numel() else True


def _check_finite(value: Tensor, what: str) -> None:
    if not _finite(value.detach()):
        raise Refused(Reason.NOT_FINITE, f"{what} holds NaN or infinity")


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the random layers of one call, and put the process's random state back (torch.random.fork_rng does the same
    in fifty times the time, which a simulated microbatch would notice)."""
    generators: list[Any] = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index])
    saved = [g.get_state() for g in generators]
    for g in generators:
        g.manual_seed(seed)
    try:
        yield
    finally:
        for g, state in zip(generators, saved, strict=True):
            g.set_state(state)
