"""Export: a directory that stock transformers opens, whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol.manifest import Manifest
from shoal.swarm.export import ExportError, byte_tokenizer, export_hf
from shoal.swarm.reference import parameters_of
from shoal.swarm.stage import build_stage


def manifest(architecture: str = "llama", dtype: str = "float32") -> Manifest:
    config = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "tie_word_embeddings": False,
    }
    return Manifest.model_validate(
        {
            "name": "tiny",
            "model": {"architecture": architecture, "stages": 2, "dtype": dtype, "config": config},
            "data": {"sequence_length": 16},
            "optimizer": {"name": "sgd", "learning_rate": 0.1},
        }
    )


def states(settings_: Manifest) -> list[dict[str, torch.Tensor]]:
    return [build_stage(settings_, i).state() for i in range(2)]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_export_opens_in_transformers_with_the_same_bits(tmp_path: Path, architecture: str, dtype: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings_ = manifest(architecture, dtype)
    stages = states(settings_)
    where = export_hf(settings_, stages, tmp_path / "new" / "model")
    model, info = AutoModelForCausalLM.from_pretrained(where, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    loaded = dict(model.named_parameters())
    expected = parameters_of(stages)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[n].detach(), expected[n]) and loaded[n].dtype == expected[n].dtype for n in expected)
    tokenizer = AutoTokenizer.from_pretrained(where)
    text = "def ä(): 漢\n"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    ids = torch.tensor([list(b"import")])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 10)
    assert not list(tmp_path.glob("new/.*"))


@settings(max_examples=60)
@given(text=st.text())
def test_token_ids_are_byte_values_and_decoding_is_exact(text: str) -> None:
    encoded = TOKENIZER.encode(text)
    assert encoded.ids == list(text.encode())
    assert TOKENIZER.decode(encoded.ids) == text


TOKENIZER = byte_tokenizer()


def test_our_own_export_is_replaced_and_a_foreign_directory_is_refused(tmp_path: Path) -> None:
    settings_ = manifest()
    target = tmp_path / "model"
    target.mkdir()  # empty is fine
    export_hf(settings_, states(settings_), target)
    (target / "stray").write_text("x")
    export_hf(settings_, states(settings_), target)
    assert not (target / "stray").exists() and (target / "config.json").exists()
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "cat.jpg").write_text("meow")
    with pytest.raises(ExportError, match="name another directory"):
        export_hf(settings_, states(settings_), foreign)
    with pytest.raises(ExportError, match="not a directory"):
        export_hf(settings_, states(settings_), foreign / "cat.jpg")
    assert [p.name for p in foreign.iterdir()] == ["cat.jpg"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "photos"]


@pytest.mark.parametrize("when", ["write", "flush", "rename"])
def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    settings_ = manifest()
    target = tmp_path / "model"
    export_hf(settings_, states(settings_), target)
    (target / "mark").write_text("the old one")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if when == "write":
        from transformers import LlamaForCausalLM

        monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    elif when == "flush":
        monkeypatch.setattr(os, "fsync", full)
    else:
        real = Path.rename
        monkeypatch.setattr(Path, "rename", lambda self, to: full() if ".partial-" in self.name else real(self, to))
    with pytest.raises(ExportError, match="no space left"):
        export_hf(settings_, states(settings_), target)
    assert (target / "mark").read_text() == "the old one"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_states_that_do_not_make_the_model_are_refused(tmp_path: Path) -> None:
    settings_ = manifest()
    stages = states(settings_)
    with pytest.raises(ExportError, match="every stage"):
        export_hf(settings_, stages[:1], tmp_path / "model")
    with pytest.raises(ExportError, match="different steps"):
        export_hf(settings_, [stages[0], {**stages[1], "step": torch.tensor(3)}], tmp_path / "model")
    assert not list(tmp_path.iterdir())
