"""Vectors of intermediate layers are those of a model that was really cut there, or are refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer, WeightedLayerPooling
from torch import nn

from conftest import (
    DEPTH,
    TAILS,
    WIDTH,
    add_lora,
    assemble,
    other_output,
    save_encoder,
    scaled,
    sentences,
)
from further_encoders import POST_NORM, PRE_NORM, config_of
from mipic_st.encoder.encoding import encode_layers
from mipic_st.encoder.final_norm import final_norm
from mipic_st.encoder.modules import push_vectors
from mipic_st.encoder.structure import tail_of

TEXTS = sentences(6, shortest=2)


def cut(model: SentenceTransformer, name: str, settings: dict, layer: int) -> SentenceTransformer:
    """The same model, built with fewer layers from the same weights."""
    encoder = model[0].auto_model
    fewer = type(encoder)(config_of(name, settings, layer))
    weights = encoder.state_dict()
    # ESM's contact head reads all layers' attentions; nothing of it reaches the embedding
    wanted = {key: weights[key] for key in fewer.state_dict() if not key.startswith("contact_head")}
    missing, _ = fewer.load_state_dict(wanted, strict=False)
    assert all(key.startswith("contact_head") for key in missing)
    modules = [copy.deepcopy(module, {id(encoder): fewer}) for module in model]
    return SentenceTransformer(modules=modules, device="cpu").eval()


@pytest.mark.parametrize("name", [*PRE_NORM, *POST_NORM])
def test_cells_are_the_models_really_cut(tmp_path, name):
    """At every layer, for pre-norm and post-norm encoders; the final norm is found where the sources have it."""
    expected, settings = {**PRE_NORM, **POST_NORM}[name]
    folder = save_encoder(tmp_path / "encoder", lambda layers: config_of(name, settings, layers))
    model = assemble(folder, "mean")
    encoder = model[0].auto_model
    assert final_norm(encoder) is (None if expected is None else encoder.get_submodule(expected))
    layers = [1, 2, DEPTH]
    cells = encode_layers(model, TEXTS, layers)
    for column, layer in enumerate(layers):
        own = cut(model, name, settings, layer).encode(TEXTS)
        np.testing.assert_allclose(cells[:, column], own, rtol=0, atol=1e-4 * max(1, np.abs(own).max()))
    if expected is not None:
        before, after = final_states(model, expected)
        assert np.abs(before - after).max() > 1e-2, "a forgotten norm would not show"


def final_states(model: SentenceTransformer, name: str) -> list[np.ndarray]:
    """What the final norm gets and gives."""
    seen = []
    norm = model[0].auto_model.get_submodule(name)
    handle = norm.register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0], output]))
    model.encode(TEXTS[:2])
    handle.remove()
    return [state.numpy() for state in seen[:2]]


def test_mamba_shows_no_embeddings(tmp_path):
    """Its states begin after the first layer: layer 0 is refused, not another layer given in its place."""
    _, settings = PRE_NORM["Mamba"]
    model = assemble(save_encoder(tmp_path / "encoder", lambda layers: config_of("Mamba", settings, layers)), "mean")
    with pytest.raises(TypeError, match=r"layers \[0\] are not among what the encoder shows"):
        encode_layers(model, TEXTS, [0, 2])


def test_the_default_prompt_stands_before_the_texts(tiny_model):
    """As in encode; an empty prompt is none, and another one is that one."""
    model = tiny_model()
    model.prompts, model.default_prompt_name = {"query": "the dog eats "}, "query"
    for given in (None, "", "a book "):
        np.testing.assert_allclose(
            encode_layers(model, TEXTS, [DEPTH], prompt=given)[:, 0], model.encode(TEXTS, prompt=given), atol=1e-5
        )
    bare, prompted = (encode_layers(model, TEXTS, [1], prompt=given) for given in ("", None))
    assert np.abs(bare - prompted).max() > 1e-3


@pytest.mark.parametrize("name", TAILS)
def test_tails_follow_each_layer(tiny_model, name):
    """Every cell goes through the model's tail; without it, the pooled states are given at their own width."""
    model = tiny_model(tail=name)
    cells, pooled = (encode_layers(model, TEXTS, [1, DEPTH], tail=tail) for tail in (True, False))
    assert cells.shape == (6, 2, TAILS[name].width)
    assert pooled.shape == (6, 2, WIDTH)
    np.testing.assert_allclose(cells[:, 1], model.encode(TEXTS), rtol=0, atol=1e-5)
    with torch.no_grad():
        pushed = push_vectors(tail_of(model), torch.as_tensor(pooled))
    np.testing.assert_allclose(cells, pushed, rtol=0, atol=1e-5)
    assert np.abs(cells[:, 0] - cells[:, 1]).max() > 0.01
    assert [encode_layers(model, [], [1, 2], tail=tail).shape for tail in (True, False)] == [
        (0, 2, TAILS[name].width),
        (0, 2, WIDTH),
    ]


# --- what is not the last hidden state --------------------------------------------------------------------------------


def layer_pooling(folder):
    """Mixes layers, where hidden states are on."""
    transformer = Transformer(folder)
    transformer.auto_model.config.output_hidden_states = True
    return [transformer, WeightedLayerPooling(WIDTH, DEPTH, 1), Pooling(WIDTH)]


@pytest.mark.parametrize("make", [scaled, other_output, layer_pooling])
def test_models_that_pool_something_else_are_refused(transformer_folder, make):
    """The grid says so at first use instead of scoring what is not served."""
    model = SentenceTransformer(modules=make(str(transformer_folder())), device="cpu")
    with pytest.raises(ValueError, match=r"embedding is not its last hidden state.*Leave layers out"):
        encode_layers(model, TEXTS, [1, 2])


def test_a_model_without_pooled_token_states_is_refused(transformer_folder):
    """A Transformer that gives sentence embeddings itself has no layers to pool."""

    class Direct(Transformer):
        def forward(self, features, **kwargs):
            features = super().forward(features, **kwargs)
            features["sentence_embedding"] = features["token_embeddings"][:, 0]
            return features

    model = SentenceTransformer(modules=[Direct(str(transformer_folder())), Normalize()], device="cpu")
    with pytest.raises(TypeError, match="something else reads 'sentence_embedding'"):
        encode_layers(model, TEXTS, [1, 2])


def test_the_check_is_made_once_and_changes_nothing(tiny_model):
    """Passes of the encoder: two more at the first call, none later. Modes and random state stay."""
    model = tiny_model(training=True)
    model[1].eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    final_norm(model[0].auto_model)
    calls = []
    model[0].auto_model.encoder.register_forward_hook(lambda *_: calls.append(1))
    first = encode_layers(model, TEXTS, [1, 2])
    assert len(calls) == 3
    second = encode_layers(model, TEXTS, [1, 2])
    assert len(calls) == 4
    assert np.array_equal(first, second)
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(state, torch.get_rng_state())
    model.append(nn.Identity())
    encode_layers(model, TEXTS, [1, 2])
    assert len(calls) == 7, "another model by now"


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="needs torch 2.6")
@pytest.mark.parametrize("whole", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_compiled_encoders_and_adapters(tiny_model, whole):
    """The final norm is found in an encoder that was compiled as a whole or layer by layer, and with LoRA in it."""
    model = tiny_model("qwen3", "lasttoken", "left")
    expected = encode_layers(model, TEXTS, [1, 2])
    add_lora(model, target_modules=["q_proj", "v_proj"])
    encoder = model[0].auto_model
    for module in [encoder] if whole else encoder.layers:
        module.compile(backend="eager")
    model.encode(TEXTS)
    np.testing.assert_allclose(encode_layers(model, TEXTS, [1, 2]), expected, rtol=0, atol=1e-5)
    assert final_norm(encoder) is encoder.norm
