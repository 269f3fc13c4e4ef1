"""Cutting a transformers causal LM into stages of contiguous layers, without ever holding the other stages' memory.

The whole model is laid out on the meta device (no memory), then everything that belongs to other stages is taken out:
the layer list is sliced, the input embedding is left out of later stages, the final norm and head out of earlier ones.
What remains runs the model's *own* forward, so rotary embeddings, masks and per-layer variants stay transformers'
business. Families are found by structure (where the embedding, layer list, norm and head sit), not by model name; a
probe with zero layers then proves that the cut does nothing of its own to the hidden states, and refuses otherwise.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from shoal.swarm.data import VOCABULARY
from shoal.swarm.initialise import normal

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "float64": torch.float64}


class UnsupportedModel(ValueError):
    """This model cannot be cut into stages. The message names what is missing or wrong, and what to do."""


class ModelSettings(Protocol):
    """What is read from `[model]` of the manifest."""

    @property
    def architecture(self) -> str: ...
    @property
    def stages(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def config(self) -> Mapping[str, Any]: ...


# --- where to cut ----------------------------------------------------------------------------------------------------
def split_points(costs: Sequence[float], stages: int) -> tuple[int, ...]:
    """Bounds (stages + 1 rising layer indices from 0 to len(costs)) of the contiguous split whose dearest stage costs
    least, by exact dynamic programming; ties go to the more even split.

    Every stage gets at least one layer. Raises UnsupportedModel if there are fewer layers than stages."""
    layers = len(costs)
    if not 1 <= stages <= layers:
        raise UnsupportedModel(f"{layers} layers cannot be cut into {stages} stages; set [model] stages to 1..{layers}")
    prefix = [0.0, *accumulate(float(c) for c in costs)]
    Key = tuple[float, float]  # (dearest stage, sum of squares)
    best: list[dict[int, tuple[Key, int]]] = [{0: ((0.0, 0.0), 0)}]  # per count of stages: end -> (key, start)
    for stage in range(1, stages + 1):
        row: dict[int, tuple[Key, int]] = {}
        for end in range(stage, layers - (stages - stage) + 1):
            options = (
                ((max(key[0], prefix[end] - prefix[start]), key[1] + (prefix[end] - prefix[start]) ** 2), start)
                for start, (key, _) in best[-1].items()
                if start < end
            )
            row[end] = min(options)
        best.append(row)
    bounds = [layers]
    for row in reversed(best[1:]):
        bounds.append(row[bounds[-1]][1])
    return tuple(reversed(bounds))


# --- families --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Family:
    """Where a family of models keeps its parts. Paths are dotted attribute names."""

    base: str  # from the causal LM to the module whose forward runs the layers
    layers: str  # from base
    embedding: str  # from base
    head: str  # from the causal LM
    after: tuple[str, ...]  # from base: what follows the last layer
    positions: tuple[str, ...] = ()  # from base: learned position tables, added to the embedding
    before: tuple[str, ...] = ()  # from base: what else follows the embedding
    after_call: str = ""  # from the causal LM to the module to call on a stage without head; empty: base


FAMILIES: tuple[Family, ...] = (
    Family("model", "layers", "embed_tokens", "lm_head", ("norm",)),  # llama, mistral, qwen, phi3, olmo, gemma, …
    Family("transformer", "h", "wte", "lm_head", ("ln_f",), positions=("wpe",), before=("drop",)),  # gpt2
    Family("gpt_neox", "layers", "embed_in", "embed_out", ("final_layer_norm",), before=("emb_dropout",)),
    Family("gpt_neox", "layers", "embed_in", "lm_head", ("final_layer_norm",), before=("emb_dropout",)),
    Family(
        "model.decoder",
        "layers",
        "embed_tokens",
        "lm_head",
        ("final_layer_norm", "project_out"),
        positions=("embed_positions",),
        before=("project_in",),
    ),  # opt
    Family("model", "layers", "embed_tokens", "lm_head", ("final_layernorm",), before=("embed_dropout",)),  # phi
)


def _has(module: nn.Module, path: str) -> bool:
    for part in path.split("."):
        if not hasattr(module, part):
            return False
        module = getattr(module, part)
    return True


def _replace(module: nn.Module, path: str, new: nn.Module | None) -> None:
    *parents, name = path.split(".")
    owner = module.get_submodule(".".join(parents))
    if getattr(owner, name, None) is not None:
        setattr(owner, name, new)


def find_family(model: nn.Module) -> Family:
    """The family whose parts the model has. Raises UnsupportedModel, naming what the nearest family misses."""
    misses: list[tuple[int, Family, list[str]]] = []
    for family in FAMILIES:
        paths = [family.base, family.head]
        paths += [f"{family.base}.{p}" for p in (family.layers, family.embedding, *family.after, *family.positions)]
        missing = [path for path in paths if not _has(model, path)]
        if not missing:
            return family
        misses.append((len(missing), family, missing))
    _, nearest, missing = min(misses, key=lambda m: m[0])
    raise UnsupportedModel(
        f"{type(model).__name__} has no {', '.join(missing)} (its nearest known layout keeps its layers in "
        f"{nearest.base}.{nearest.layers}); use a llama-like, gpt2, gpt_neox, opt or phi architecture, or add a Family "
        "to shoal/swarm/split.py"
    )


class NoPositions(nn.Module):
    """Stands for a learned position table on later stages: positions are in the hidden states already."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, first: Tensor, *args: object, **kwargs: object) -> Tensor:
        """first (b, t) of any dtype -> zeros (1, t, h); adding zero changes no bit of a finite number."""
        return torch.zeros(1, first.shape[-1], self.hidden, device=first.device)


# --- building --------------------------------------------------------------------------------------------------------
def model_config(settings: ModelSettings) -> Any:
    """The transformers config of a manifest. Unset: 256 byte tokens, no special tokens, no KV cache.

    Raises UnsupportedModel for an unknown architecture, keys that do not fit, or tied embeddings."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if settings.architecture not in CONFIG_MAPPING:
        close = difflib.get_close_matches(settings.architecture, list(CONFIG_MAPPING.keys()), n=1)
        raise UnsupportedModel(
            f'[model] architecture = "{settings.architecture}" is not known to transformers; '
            + (f'did you mean "{close[0]}"?' if close else 'name a model_type such as "llama"')
        )
    options: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **{key: value for key, value in settings.config.items() if key != "model_type"},
    }
    options["use_cache"] = False
    options.pop("torch_dtype", None)
    options["dtype"] = settings.dtype
    if settings.dtype not in DTYPES:
        raise UnsupportedModel(f'[model] dtype = "{settings.dtype}" is not known; use one of {", ".join(DTYPES)}')
    try:
        config = AutoConfig.for_model(settings.architecture, **options)
    except Exception as error:  # transformers raises many types here; all mean that the table does not fit
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnsupportedModel(
            f'[model] architecture = "{settings.architecture}" with this [model.config] is refused by transformers: '
            f"{first[:300]}"
        ) from None
    if config.vocab_size < VOCABULARY:
        raise UnsupportedModel(f"vocab_size = {config.vocab_size} is too small for bytes; set it to {VOCABULARY}")
    if getattr(config, "tie_word_embeddings", False):
        raise UnsupportedModel(
            "the model ties its input embedding to its output head, and the two live on different stages; set "
            "tie_word_embeddings = false in [model.config]"
        )
    if getattr(config, "layerdrop", 0.0):
        raise UnsupportedModel("layerdrop skips whole layers at random; set layerdrop = 0.0 in [model.config]")
    return config


def skeleton(config: Any, dtype: torch.dtype) -> Any:
    """The whole causal LM on the meta device: shapes without memory."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=dtype, attn_implementation=attention(config)
            )
    except UnsupportedModel:
        raise
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnsupportedModel(
            f"transformers cannot build a causal LM from this [model]: {type(error).__name__}: {first[:300]}"
        ) from None
    shared = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    if len(shared) != len(list(model.named_parameters())):
        raise UnsupportedModel("the model shares parameters between modules; set tie_word_embeddings = false")
    return model


def attention(config: Any) -> str:
    """sdpa: deterministic and the fastest on CPU; eager where a model has no sdpa."""
    from transformers import AutoModelForCausalLM

    cls = AutoModelForCausalLM._model_mapping[type(config)]
    cls = cls[0] if isinstance(cls, (tuple, list)) else cls
    return "sdpa" if getattr(cls, "_supports_sdpa", False) else "eager"


def counted_costs(model: nn.Module, sequence_length: int) -> list[float]:
    """Forward FLOPs per token of each layer, from shapes: 2 per weight of a matrix (experts by the share that is
    active) and attention's two T × T products under a causal mask. The head counts with the last layer; an embedding
    lookup costs nothing worth counting."""
    family = find_family(model)
    config = cast(Any, model).config
    base = model.get_submodule(family.base)
    experts = max(getattr(config, "num_local_experts", 0) or 0, getattr(config, "num_experts", 0) or 0)
    active = (getattr(config, "num_experts_per_tok", 0) or 0) / experts if experts else 1.0
    attention_flops = 2.0 * sequence_length * config.hidden_size

    def matrices(module: nn.Module) -> float:
        return sum(
            2.0 * p.numel() * (active if ".experts." in f".{name}" else 1.0)
            for name, p in module.named_parameters()
            if p.ndim >= 2
        )

    costs = [matrices(layer) + attention_flops for layer in cast(nn.ModuleList, base.get_submodule(family.layers))]
    costs[-1] += matrices(model.get_submodule(family.head))
    return costs


class Stage(nn.Module):
    """Layers [first, last) of a causal LM, run by the model's own forward.

    Input: int64 (b, t) token ids at stage 0, else hidden states (b, t, h). Output: logits (b, t, vocab) at the last
    stage, else hidden states (b, t, h). `full_names` maps parameter names of this module to those of the unsplit one.
    """

    def __init__(self, model: Any, family: Family, index: int, bounds: tuple[int, ...]) -> None:
        super().__init__()
        self.model = model
        self.index = index
        self.first_stage = index == 0
        self.last_stage = index == len(bounds) - 2
        self.bounds = bounds
        self.vocab: int = model.config.vocab_size
        self.hidden: int = model.config.hidden_size
        base: Any = model.get_submodule(family.base)
        layers = f"{family.base}.{family.layers}"
        first, end = bounds[index], bounds[index + 1]
        sliced = _slice_config(model.config, first, end)
        model.config = sliced
        for module in (model.get_submodule(path) for path in _prefixes(family.base)):
            module.config = sliced
        _replace(base, family.layers, nn.ModuleList(list(base.get_submodule(family.layers))[first:end]))
        if not self.first_stage:
            _replace(base, family.embedding, nn.Identity())
            for path in family.positions:
                _replace(base, path, NoPositions(self.hidden))
            for path in family.before:
                _replace(base, path, None if path.startswith("project") else nn.Identity())
        if not self.last_stage:
            _replace(model, family.head, nn.Identity())
            for path in family.after:
                _replace(base, path, None if path.startswith("project") else nn.Identity())
        self._run = model if self.last_stage else base
        self._prefix, self._first = f"{layers}.", first

    def full_name(self, name: str) -> str:
        """Name in the unsplit model of parameter `name` of this module."""
        name = name.removeprefix("model.")
        if not name.startswith(self._prefix):
            return name
        number, rest = name.removeprefix(self._prefix).split(".", 1)
        return f"{self._prefix}{int(number) + self._first}.{rest}"

    def forward(self, x: Tensor) -> Tensor:
        inputs = {"input_ids": x} if self.first_stage else {"inputs_embeds": x}
        output = self._run(**inputs, use_cache=False)
        return cast(Tensor, output.logits if self.last_stage else output.last_hidden_state)


def _prefixes(path: str) -> Iterator[str]:
    parts = path.split(".")
    for end in range(1, len(parts) + 1):
        yield ".".join(parts[:end])


def _slice_config(config: Any, first: int, end: int) -> Any:
    """The config with only layers [first, end): the count, and every per-layer list, such as layer_types."""
    layers = config.num_hidden_layers
    sliced = copy.deepcopy(config)
    for key, value in vars(config).items():
        if isinstance(value, (list, tuple)) and len(value) == layers and layers > 1 and key == "layer_types":
            setattr(sliced, key, type(value)(value[first:end]))
    sliced.num_hidden_layers = end - first
    return sliced


def _probe(model: Any, family: Family, config: Any) -> None:
    """Proof that a middle stage is nothing but its layers: with zero layers it must return its input, bit for bit."""
    empty = Stage(copy.deepcopy(model), family, 1, (0, 0, 0, config.num_hidden_layers))
    dtype = next(model.parameters()).dtype
    materialise_buffers(empty.model, torch.device("cpu"))
    x = torch.linspace(-3, 3, 2 * config.hidden_size, dtype=dtype).reshape(1, 2, config.hidden_size)
    try:
        with torch.no_grad():
            same = torch.equal(empty(x), x)
        problem = "changes hidden states outside of its layers"
    except Exception as error:
        same, problem = False, f"cannot run from hidden states ({type(error).__name__}: {str(error)[:200]})"
    if not same:
        raise UnsupportedModel(
            f'architecture "{config.model_type}" {problem}, so it cannot be cut into stages; use stages = 1 or another '
            "architecture"
        )


def materialise_buffers(model: Any, device: torch.device) -> None:
    """Give every remaining module its buffers (rotary frequencies, …) the way transformers itself refills them.

    To be called while the parameters are still on the meta device: transformers fills those of the same module too."""
    holders = []
    for module in model.modules():
        names = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in names:
            old = getattr(module, name)
            new = torch.empty(old.shape, dtype=old.dtype, device=device)
            new.fill_(float("nan") if old.dtype.is_floating_point else (0 if old.dtype == torch.bool else -(2**6)))
            setattr(module, name, new)
        if names:
            holders.append((module, names))
    for module, names in holders:
        with torch.no_grad():
            model._init_weights(module)
        for name in names:
            buffer = getattr(module, name)
            if buffer.dtype.is_floating_point and bool(torch.isnan(buffer).any()):
                raise UnsupportedModel(f"the buffer {name} of {type(module).__name__} cannot be recomputed")


def _initialise(stage: Stage, *, seed: int, std: float, dtype: torch.dtype, device: torch.device) -> None:
    """Materialise and fill every parameter of the stage; a pure function of (seed, full name, config)."""
    constant: dict[int, Tensor] = {}
    model = stage.model
    for module in list(model.modules()):
        own = dict(module.named_parameters(recurse=False))
        if own and all(p.ndim <= 1 for p in own.values()) and type(module).__name__.endswith(("Norm", "LayerNorm")):
            for name, p in own.items():  # norms: the constants of transformers itself (Gemma's are zeros, others ones)
                setattr(module, name, nn.Parameter(torch.full(p.shape, float("nan"), dtype=dtype)))
            with torch.no_grad():
                model._init_weights(module)
            for name in own:
                p = getattr(module, name)
                if bool(((p == 0) | (p == 1)).all()):
                    constant[id(p)] = p
    for name, p in list(stage.named_parameters()):
        if id(p) in constant:
            value = p.detach()
        elif p.ndim <= 1 and name.endswith("bias"):
            value = torch.zeros(p.shape, dtype=dtype)
        else:
            value = normal(stage.full_name(name), tuple(p.shape), seed=seed, std=std, dtype=dtype)
        owner, _, leaf = name.rpartition(".")
        setattr(stage.get_submodule(owner), leaf, nn.Parameter(value.to(device)))


def plan_stages(
    settings: ModelSettings, sequence_length: int, measured: Sequence[float] | None = None
) -> tuple[int, ...]:
    """Bounds of the stages of a manifest's model, by counted FLOPs, or by `measured` costs (one per layer) instead."""
    config = model_config(settings)
    if measured is None:
        costs = counted_costs(skeleton(config, DTYPES[settings.dtype]), sequence_length)
    else:
        costs = list(measured)
    if len(costs) != config.num_hidden_layers:
        raise ValueError(f"{len(costs)} costs for {config.num_hidden_layers} layers")
    return split_points(costs, settings.stages)


def build_module(
    settings: ModelSettings,
    index: int,
    *,
    seed: int,
    sequence_length: int,
    device: torch.device | str = "cpu",
    measured: Sequence[float] | None = None,
) -> Stage:
    """Stage `index` of the model, initialised, in training mode. Only this stage's parameters are ever allocated.

    Raises UnsupportedModel with the fix if the model cannot be cut."""
    config = model_config(settings)
    dtype = DTYPES[settings.dtype]
    where = torch.device(device)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and limit < sequence_length:
        raise UnsupportedModel(
            f"sequence_length = {sequence_length} is longer than max_position_embeddings = {limit}; raise it in "
            "[model.config] or shorten [data] sequence_length"
        )
    model = skeleton(config, dtype)
    family = find_family(model)
    costs = measured if measured is not None else counted_costs(model, sequence_length)
    bounds = split_points(costs, settings.stages)
    if not 0 <= index < settings.stages:
        raise ValueError(f"stage {index} of a model with {settings.stages} stages")
    if settings.stages > 1:
        _probe(model, family, config)
    stage = Stage(model, family, index, bounds)
    std = getattr(config, "initializer_range", None) or getattr(config, "init_std", None) or 0.02
    materialise_buffers(model, where)
    _initialise(stage, seed=seed, std=float(std), dtype=dtype, device=where)
    left = [name for name, t in (*stage.named_parameters(), *stage.named_buffers()) if t.is_meta]
    if left:
        raise UnsupportedModel(f"{', '.join(left)} could not be given memory")
    return stage.train()
