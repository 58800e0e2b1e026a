"""Adapters of PEFT in what is written: loaded again, the folder gives the model's vectors, or nothing is written."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense

from conftest import WIDTH, assemble, save_encoder, sentences
from mipic_st import export_truncated, save_for_tei

peft = pytest.importorskip("peft", reason="needs peft")

TEXTS = sentences(9)
KINDS = {
    "lora": {},
    "whole embeddings": {"modules_to_save": ["word_embeddings"]},
    "whole norms": {"modules_to_save": ["LayerNorm"]},
    "some tokens": {"trainable_token_indices": {"word_embeddings": [5, 6, 7]}},
    "dora": {"use_dora": True},
}


def adapted(tmp_path, way, kind, seed=0):
    """A model with adapters of a kind, of random values, and its vectors without them."""
    model = assemble(save_encoder(tmp_path / "encoder"))
    plain = model.encode(TEXTS)
    config = peft.LoraConfig(r=4, target_modules=["query", "value"], **KINDS[kind])
    if way == "wrapped":
        model[0].model = peft.get_peft_model(model[0].model, config)
    else:
        peft.inject_adapter_in_model(config, model[0].auto_model)
        model[0].auto_model._hf_peft_config_loaded = True
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        if any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens_delta")):
            torch.nn.init.normal_(value, std=0.3, generator=generator)
    return model.eval(), plain


def written_by(write, model, folder):
    """What one of the writers wrote, loaded again."""
    if write == "tei":
        save_for_tei(model, folder)
    else:
        export_truncated(model, layer=3, normalize=False).save_pretrained(str(folder))
    return SentenceTransformer(str(folder), device="cpu").encode(TEXTS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("way", "write"), [("wrapped", "tei"), ("injected", "truncated")])
def test_every_kind_of_adapter_is_in_what_was_written(tmp_path, way, kind, write):
    """Also modules that are saved whole, whose weights a plain model would look for under other names."""
    model, plain = adapted(tmp_path, way, kind)
    own = model.encode(TEXTS)
    assert np.abs(own - plain).max() > 0.05
    np.testing.assert_allclose(written_by(write, model, tmp_path / "new"), own, atol=1e-4)
    np.testing.assert_array_equal(model.encode(TEXTS), own)


@pytest.mark.parametrize("kind", ["lora", "whole norms", "some tokens"])
@pytest.mark.parametrize(("way", "write"), [("wrapped", "truncated"), ("injected", "tei")])
def test_adapters_that_are_switched_off_are_not_merged(tmp_path, way, kind, write):
    """The model gives the vectors without them."""
    model, plain = adapted(tmp_path, way, kind)
    for module in model.modules():
        if type(module).__module__.startswith("peft.") and hasattr(type(module), "enable_adapters"):
            module.enable_adapters(False)
    np.testing.assert_allclose(model.encode(TEXTS), plain, atol=1e-5)
    np.testing.assert_allclose(written_by(write, model, tmp_path / "new"), plain, atol=1e-4)


@pytest.mark.parametrize("write", ["tei", "truncated"])
def test_adapters_where_nobody_looks_are_refused(tmp_path, write):
    """In a Dense: what is written would have random weights. Nothing stays behind."""
    model = assemble(save_encoder(tmp_path / "encoder"))
    model.append(Dense(WIDTH, WIDTH, bias=False, activation_function=torch.nn.Identity()))
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["linear"]), model[-1])
    with pytest.raises(RuntimeError, match=r"once it is saved and loaded again|cannot be loaded again"):
        written_by(write, model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
