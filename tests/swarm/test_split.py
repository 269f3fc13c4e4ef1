"""Cutting a model: chained stages are the whole model, bit for bit where it counts, in every family and split."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.swarm.initialise import normal, normals
from shoal.swarm.split import (
    Stage,
    UnsupportedModel,
    attention,
    build_module,
    counted_costs,
    find_family,
    model_config,
    plan_stages,
    skeleton,
    split_points,
)

LLAMA_LIKE = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 3}
HEADS = {"num_key_value_heads": 1, "head_dim": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA_LIKE, "num_key_value_heads": 1},
    "mistral": {**LLAMA_LIKE, **HEADS, "sliding_window": 4},
    "qwen2": {
        **LLAMA_LIKE,
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "max_window_layers": 1,
        "sliding_window": 4,
    },
    "qwen3": {**LLAMA_LIKE, **HEADS},
    "gemma2": {**LLAMA_LIKE, **HEADS, "sliding_window": 4},
    "phi3": {**LLAMA_LIKE, "num_key_value_heads": 2},
    "olmo2": {**LLAMA_LIKE, "num_key_value_heads": 2},
    "gpt2": {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32},
    "gpt_neox": {**LLAMA_LIKE},
    "opt": {**LLAMA_LIKE, "ffn_dim": 24, "word_embed_proj_dim": 8},
    "phi": {**LLAMA_LIKE},
}


def model(architecture: str, stages: int, dtype: str = "float64", **changes: Any) -> SimpleNamespace:
    config = {**CONFIGS[architecture], "tie_word_embeddings": False, **changes}
    return SimpleNamespace(architecture=architecture, stages=stages, dtype=dtype, config=config)


def stages_of(settings_: SimpleNamespace, seed: int = 3) -> list[Stage]:
    return [build_module(settings_, i, seed=seed, sequence_length=12).eval() for i in range(settings_.stages)]


def named(stages: list[Stage]) -> dict[str, torch.Tensor]:
    pairs = [(stage.full_name(n), p.detach()) for stage in stages for n, p in stage.named_parameters()]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def whole(settings_: SimpleNamespace, parameters: dict[str, torch.Tensor]) -> Any:
    """The unsplit model as transformers itself builds it, with these parameters."""
    from transformers import AutoModelForCausalLM

    config = model_config(settings_)
    full = AutoModelForCausalLM.from_config(
        config, dtype=getattr(torch, settings_.dtype), attn_implementation=attention(config)
    )
    missing, unexpected = full.load_state_dict(parameters, strict=False)
    assert not unexpected and not set(missing) & {n for n, _ in full.named_parameters()}
    return full.eval()


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_chained_stages_equal_the_whole_model(architecture: str, dtype: str) -> None:
    x = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
    reference: dict[str, torch.Tensor] | None = None
    for count in (1, 2, 3):
        settings_ = model(architecture, count, dtype)
        stages = stages_of(settings_)
        parameters = named(stages)
        with torch.no_grad():
            hidden = x
            for stage in stages:
                hidden = stage(hidden)
            expected = whole(settings_, parameters)(x, use_cache=False).logits
        assert hidden.shape == (2, 12, 256) and hidden.dtype == getattr(torch, dtype)
        assert (hidden - expected).abs().max() <= (1e-5 if dtype == "float32" else 1e-10)
        assert float(expected.std()) > 1e-3  # not a comparison of zeros
        if reference is None:
            reference = parameters
        else:  # the initialisation does not know the split
            assert parameters.keys() == reference.keys()
            assert all(torch.equal(parameters[n], reference[n]) for n in reference)


def test_a_layer_type_that_differs_between_layers_moves_with_its_layer() -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    settings_ = model("gemma2", 3, layer_types=kinds)
    assert [stage.model.config.layer_types for stage in stages_of(settings_)] == [[kind] for kind in kinds]


def test_a_stage_holds_no_memory_of_the_others() -> None:
    stages = stages_of(model("llama", 3))
    total = sum(p.numel() for p in named(stages_of(model("llama", 1))).values())
    sizes = [sum(p.numel() for p in stage.parameters()) for stage in stages]
    assert sum(sizes) == total and max(sizes) < total / 2
    assert not any(t.is_meta for stage in stages for t in (*stage.parameters(), *stage.buffers()))
    assert not any("lm_head" in n for n, _ in stages[0].named_parameters())
    assert not any("embed" in n for n, _ in stages[2].named_parameters())


def test_tied_embeddings_are_refused_with_the_fix() -> None:
    with pytest.raises(UnsupportedModel, match="tie_word_embeddings = false"):
        model_config(model("llama", 2, tie_word_embeddings=True))
    with pytest.raises(UnsupportedModel, match="tie_word_embeddings = false"):
        model_config(SimpleNamespace(architecture="gpt2", stages=1, dtype="float32", config={}))


@pytest.mark.parametrize(
    ("architecture", "config", "says"),
    [
        ("lama", {}, 'did you mean "llama"'),
        ("no such model", {}, "is not known to transformers"),
        ("llama", {"num_attention_heads": 0}, "cannot be|refused|cannot build"),
        ("llama", {"vocab_size": 100}, "too small for bytes"),
        ("bloom", {"hidden_size": 16, "n_layer": 3, "n_head": 2}, "has no"),
        ("vit", {}, "cannot build a causal LM"),
        ("granite", {**LLAMA_LIKE, "num_key_value_heads": 2, "embedding_multiplier": 2.0}, "outside of its layers"),
        ("llama", {**LLAMA_LIKE, "num_key_value_heads": 2, "max_position_embeddings": 4}, "max_position_embeddings"),
    ],
)
def test_what_cannot_be_cut_is_refused_and_named(architecture: str, config: dict[str, Any], says: str) -> None:
    settings_ = SimpleNamespace(
        architecture=architecture, stages=2, dtype="float32", config={**config, "tie_word_embeddings": False}
    )
    with pytest.raises(UnsupportedModel, match=says):
        build_module(settings_, 0, seed=0, sequence_length=12)


def test_more_stages_than_layers_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="3 layers cannot be cut into 4"):
        plan_stages(model("llama", 4), 12)


@settings(max_examples=150)
@given(costs=st.lists(st.integers(0, 20), min_size=1, max_size=9), data=st.data())
def test_split_minimises_the_dearest_stage(costs: list[int], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(costs)))

    def dearest(bounds: tuple[int, ...]) -> int:
        return max(sum(costs[a:b]) for a, b in itertools.pairwise(bounds))

    bounds = split_points(costs, stages)
    assert bounds[0] == 0 and bounds[-1] == len(costs) and all(a < b for a, b in itertools.pairwise(bounds))
    every = [(0, *cut, len(costs)) for cut in itertools.combinations(range(1, len(costs)), stages - 1)]
    assert dearest(bounds) == min(map(dearest, every))


def test_counted_and_measured_costs_move_the_cut() -> None:
    assert plan_stages(model("llama", 2, num_hidden_layers=6), 12) in {(0, 3, 6), (0, 4, 6)}
    heavy_head = model("llama", 2, num_hidden_layers=6, vocab_size=20000)
    assert plan_stages(heavy_head, 12) == (0, 5, 6)
    assert plan_stages(heavy_head, 12, measured=[9, 1, 1, 1, 1, 1]) == (0, 1, 6)
    with pytest.raises(ValueError, match="costs for"):
        plan_stages(heavy_head, 12, measured=[1.0])


def test_counted_cost_of_a_layer_is_two_flops_a_weight_plus_attention() -> None:
    settings_ = model("gpt2", 1)
    costs = counted_costs(skeleton(model_config(settings_), torch.float32), 12)
    layer = 2 * 12 * 16 * 16 + 2 * 12 * 16  # 12 h² weights a block
    assert costs == [layer, layer, layer + 2 * 16 * 256]


def test_the_family_table_names_what_is_missing() -> None:
    with pytest.raises(UnsupportedModel, match=r"Linear has no .*lm_head"):
        find_family(torch.nn.Linear(2, 2))


# --- initialisation ---------------------------------------------------------------------------------------------------
def test_normals_are_pinned() -> None:
    """A change here changes every run's first parameters."""
    values = normals(0, "model.embed_tokens.weight", 4)
    assert values.tolist() == GOLDEN_NORMALS


GOLDEN_NORMALS = [-0.6669604449490804, -0.8698387152947671, 0.095384183110205, -1.1433394049142518]


def test_normals_have_the_moments_of_a_normal_and_are_independent_of_length() -> None:
    values = normals(1, "w", 200_000)
    assert abs(values.mean()) < 0.01 and abs(values.std() - 1) < 0.01
    assert abs((values**3).mean()) < 0.03 and 2.7 < (values**4).mean() < 3.0
    assert normals(1, "w", 70_000).tolist() == values[:70_000].tolist()
    assert abs((values * normals(2, "w", 200_000)).mean()) < 0.01
    assert abs((values * normals(1, "v", 200_000)).mean()) < 0.01


def test_parameters_start_as_transformers_would_start_them() -> None:
    parameters = named(stages_of(model("gemma2", 2)))
    assert all(bool((p == 0).all()) for n, p in parameters.items() if "norm" in n)  # Gemma's norms are 1 + weight
    parameters = named(stages_of(model("gpt2", 2)))
    assert all(bool((p == 1).all()) for n, p in parameters.items() if n.endswith(("ln_1.weight", "ln_f.weight")))
    assert all(bool((p == 0).all()) for n, p in parameters.items() if n.endswith(".bias"))
    assert float(parameters["transformer.wte.weight"].std()) == pytest.approx(0.02, rel=0.1)
    expected = normal("lm_head.weight", (256, 16), seed=3, std=0.02, dtype=torch.float64)
    assert torch.equal(parameters["lm_head.weight"], expected)
