"""The ONNX file: token states behind the tail, from which a runtime pools the model's vectors."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling
from torch import nn
from transformers import LongformerConfig

from conftest import WIDTH, assemble, save_encoder
from mipic_st import export_onnx
from mipic_st.deploy.onnx import linear_tail

TEXTS = ["the old man plays guitar", "a dog", "two small children see the red house near the river"]


def with_pooling(model, mode):
    """The model with another pooling."""
    model[1] = Pooling(WIDTH, mode)
    return model


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("tail", "pooling"),
    [
        ("embeddinggemma", "mean"),
        pytest.param("sentence-t5", "cls", marks=pytest.mark.slow),
        pytest.param(None, "lasttoken", marks=pytest.mark.slow),
    ],
)
def test_onnx_states_are_behind_the_tail(tiny_model, tmp_path, tail, pooling):
    """ONNX Runtime, pooling by hand, a cut and its normalization give the model's vectors at every dim."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the serve extra")
    pytest.importorskip("onnxscript", reason="needs the serve extra")
    model = with_pooling(tiny_model(tail=tail, normalize=tail is None), pooling)
    file = export_onnx(model, tmp_path / "onnx")
    session = onnxruntime.InferenceSession(str(file))
    given = model[0].tokenizer(TEXTS, padding=True, return_tensors="np")
    inputs = {each.name: given[each.name].astype(np.int64) for each in session.get_inputs()}
    (states,) = session.run(None, inputs)
    mask = given["attention_mask"]
    pooled = {
        "mean": (states * mask[:, :, None]).sum(axis=1) / mask.sum(axis=1)[:, None],
        "cls": states[:, 0],
        "lasttoken": states[np.arange(len(TEXTS)), mask.sum(axis=1) - 1],
    }[pooling]
    own = model.encode(TEXTS)
    for dim in (own.shape[1], 8):
        np.testing.assert_allclose(unit(pooled[:, :dim]), unit(own[:, :dim]), atol=1e-4)
    assert json.loads((tmp_path / "onnx" / "1_Pooling" / "config.json").read_text())["pooling_mode"] == pooling


def test_onnx_of_models_in_half_precision(tiny_model, tmp_path):
    """float16 as it is, with the tail in float32 behind it; bfloat16 is refused before anything is written."""
    pytest.importorskip("onnxruntime", reason="needs the serve extra")
    pytest.importorskip("onnxscript", reason="needs the serve extra")
    model = tiny_model(tail="sentence-t5")
    with pytest.raises(ValueError, match=r"the model is in bfloat16, .* model\.float\(\) it"):
        export_onnx(model.bfloat16(), tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()
    assert export_onnx(model.half(), tmp_path / "onnx").is_file()


def test_onnx_of_a_model_with_a_low_limit(tiny_model, tmp_path):
    """The file is checked with texts that are cut where the model cuts them; the model's mode stays.

    A pooling without the prompt is no obstacle where there are no prompts.
    """
    pytest.importorskip("onnxruntime", reason="needs the serve extra")
    pytest.importorskip("onnxscript", reason="needs the serve extra")
    model = with_pooling(tiny_model(), ("cls", "mean")).train()
    model.max_seq_length = 5
    model[1].include_prompt, model.prompts = False, {}
    assert export_onnx(model, tmp_path / "onnx").is_file()
    assert model.training
    written = json.loads((tmp_path / "onnx" / "1_Pooling" / "config.json").read_text())
    assert written["embedding_dimension"] == WIDTH


@pytest.mark.parametrize(
    ("tail", "pooling", "message"),
    [
        ("labse", "cls", "a Dense that is no bias-free linear map"),
        ("stella", "mean", "a Dense that is no bias-free linear map"),
        ("embeddinggemma", "max", "max pooling does not commute"),
        ("embeddinggemma", ("cls", "mean"), "pooling does not commute"),
    ],
)
def test_tails_that_do_not_commute_are_refused(tiny_model, tail, pooling, message):
    """An activation, a bias, and the maximum over tokens."""
    with pytest.raises(ValueError, match=message):
        linear_tail(with_pooling(tiny_model(tail=tail), pooling))


def test_onnx_says_that_a_default_prompt_is_not_in_it(tiny_model, tmp_path, monkeypatch, caplog):
    """The runtime's vectors of bare texts are others than encode's; said before the export, which is left out here."""
    pytest.importorskip("onnxscript", reason="needs the serve extra")
    model = tiny_model()
    model.prompts, model.default_prompt_name = {"all": "book "}, "all"
    monkeypatch.delattr(torch.onnx, "export")
    with pytest.raises(RuntimeError, match="cannot be written"):
        export_onnx(model, tmp_path / "onnx")
    assert "default prompt 'book ' is not in the exported files" in caplog.text


def test_a_normalize_in_front_of_a_linear_dense_is_folded(tiny_model):
    """It changes the length of a vector only, which the runtime sets anyway."""
    model = tiny_model()
    dense = Dense(WIDTH, 8, bias=False, activation_function=nn.Identity())
    model.extend([Normalize(), dense])
    np.testing.assert_allclose(linear_tail(model).numpy(), dense.linear.weight.detach().T.numpy(), atol=1e-7)


@pytest.mark.parametrize("error", [RuntimeError("cannot \x1b[96mbe traced"), KeyError("x"), NotImplementedError()])
def test_architectures_that_cannot_be_written_are_named(tiny_model, tmp_path, monkeypatch, error):
    """T5, Longformer and others fail in torch's exporter, with kinds of its own and a thousand lines."""
    pytest.importorskip("onnxscript", reason="needs the serve extra")

    def stop(*_, **__):
        raise error

    monkeypatch.setattr(torch.onnx, "export", stop)
    with pytest.raises(RuntimeError, match=r"BertModel cannot be written as ONNX with torch .*save_for_tei") as caught:
        export_onnx(tiny_model(), tmp_path / "onnx")
    assert str(caught.value).isprintable()
    assert not (tmp_path / "onnx").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["t5", "longformer"])
def test_architectures_that_torch_cannot_trace(tmp_path, kind):
    """The real ones: whole or named."""
    sizes = {"num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 70, "pad_token_id": 0}

    def longformer(layers):
        return LongformerConfig(hidden_size=WIDTH, num_hidden_layers=layers, attention_window=4, **sizes)

    model = assemble(save_encoder(tmp_path / "encoder", longformer if kind == "longformer" else kind))
    message = ""
    try:
        export_onnx(model, tmp_path / "onnx")
    except RuntimeError as error:
        message = str(error)
    assert "cannot be written as ONNX" in message or not message
    assert (tmp_path / "onnx").exists() == (not message)
