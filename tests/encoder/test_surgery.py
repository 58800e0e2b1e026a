"""Invariants of what is put into models: where it goes, what it is multiplied into, and that it comes out again."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling
from torch import nn

from conftest import TAILS, WIDTH, make_tail, sentences
from mipic_st.encoder.surgery import cut_layers, identity_dense, linear_end, put_in, with_map, word_weights_module

TEXTS = sentences(9)


def state(model):
    """Modules with their names, and weights."""
    return list(model.named_children()), {name: value.clone() for name, value in model.state_dict().items()}


def weighed(model, width=WIDTH, normalize=False):
    """A model with word weights: Dense on token states, WordWeights, Pooling."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(len(model[0].tokenizer), generator=generator) + 0.2
    dense = identity_dense(torch.randn(WIDTH, width, generator=generator), features="token_embeddings")
    modules = with_map(list(model)[:2], [dense, word_weights_module(model, weights)])
    return SentenceTransformer(modules=[*modules, *([Normalize()] if normalize else [])], device="cpu").eval()


@pytest.mark.parametrize("width", [None, 8])
@pytest.mark.parametrize("tail", [None, *TAILS, "word weights"])
def test_put_in_and_taken_out(tiny_model, tail, width):
    """Vectors times the matrix, wherever it went; afterwards modules, names and weights are what they were."""
    model = weighed(tiny_model()) if tail == "word weights" else tiny_model(tail=tail)
    normalized = isinstance(model[-1], Normalize)
    plain, before = model.encode(TEXTS), state(model)
    own = model.get_embedding_dimension()
    widths = [module.out_features for module in model if isinstance(module, Dense)]
    matrix = torch.randn(own, width or own, generator=torch.Generator().manual_seed(1))
    take_out = put_in(model, [identity_dense(matrix)])
    expected = plain @ matrix.numpy()
    if normalized:
        expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(model.encode(TEXTS), expected, atol=1e-4)
    folded = tail in ("embeddinggemma", "sentence-t5", "stella", "max, normalized in the middle", "word weights")
    assert len(list(model)) == len(before[0]) + (not folded)
    take_out()
    after = state(model)
    assert after[0] == before[0]
    assert all(torch.equal(value, after[1][name]) for name, value in before[1].items())
    assert model.get_embedding_dimension() == own
    assert [module.out_features for module in model if isinstance(module, Dense)] == widths
    np.testing.assert_array_equal(model.encode(TEXTS), plain)


def test_names_with_gaps_come_back(tiny_model):
    """A model that resists has afterwards what it had."""
    encoder, pooling = tiny_model()
    modules = OrderedDict([("0", encoder), ("1", pooling), ("3", nn.LayerNorm(WIDTH)), ("7", Normalize())])
    model = SentenceTransformer(modules=modules, device="cpu")
    before, _ = state(model)
    take_out = put_in(model, [identity_dense(torch.eye(WIDTH))])
    assert [name for name, _ in model.named_children()] == ["0", "1", "3", "4", "5"]
    take_out()
    assert list(model.named_children()) == before


def test_at_the_end_is_behind_a_normalize(tiny_model):
    """What a model without a last Normalize needs when it is truncated."""
    model = tiny_model(normalize=True)
    plain = model.encode(TEXTS)
    put_in(model, [identity_dense(torch.eye(WIDTH, 8))], at_the_end=True)
    np.testing.assert_allclose(model.encode(TEXTS), plain[:, :8], atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tail", ["sentence-t5", "stella"])
def test_maps_with_a_bias_are_multiplied_in(tiny_model, tail, bias):
    """The map's own bias is added, also where the Dense had none."""
    model = tiny_model(tail=tail)
    model.pop(-1) if tail == "sentence-t5" else None
    plain, before = model.encode(TEXTS), state(model)
    new = Dense(plain.shape[1], plain.shape[1], bias=bias, activation_function=None)
    with torch.no_grad():
        expected = new.linear(torch.from_numpy(plain)).numpy()
    take_out = put_in(model, [new])
    np.testing.assert_allclose(model.encode(TEXTS), expected, atol=1e-4)
    assert [name for name, _ in model.named_children()] == [name for name, _ in before[0]]
    take_out()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before[1].items())


def test_maps_of_token_states_need_a_pooling():
    """Without one there is no place for them."""
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(TypeError, match="works on token states"):
        put_in(model, [identity_dense(torch.eye(4), features="token_embeddings")])


@pytest.mark.parametrize("change", ["activation", "residual", "pooling", "names"])
def test_what_does_not_commute_with_the_mean_gets_a_dense_behind_it(tiny_model, change):
    """A map is put in front only where it is the same there."""
    modules = list(weighed(tiny_model()))
    assert linear_end(modules) is modules[1]
    if change == "activation":
        modules[1].activation_function = torch.nn.Tanh()
    elif change == "residual":
        modules[1].use_residual = True
    elif change == "pooling":
        modules[-1] = Pooling(WIDTH, "max")
    else:
        modules[1].module_output_name = "others"
    assert linear_end(modules) is None
    assert len(with_map(modules, [identity_dense(torch.eye(WIDTH, 8))])) == len(modules) + 1


def test_a_bias_in_front_of_the_mean_is_mapped_with_the_weight(tiny_model):
    """Weights of a mean add up to 1, so a bias before it is one behind it."""
    modules = list(weighed(tiny_model(), width=16))
    modules[1].linear.bias = torch.nn.Parameter(torch.randn(16, generator=torch.Generator().manual_seed(0)))
    matrix = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    own = SentenceTransformer(modules=modules, device="cpu").eval().encode(TEXTS)
    mapped = SentenceTransformer(modules=with_map(modules, [identity_dense(matrix)]), device="cpu").eval().encode(TEXTS)
    np.testing.assert_allclose(mapped, own @ matrix.numpy(), atol=1e-4)


def test_a_parametrized_linear_is_left_alone():
    """Its weight is computed, so nothing can be written into it."""
    tail = make_tail("sentence-t5")[:1]
    torch.nn.utils.parametrizations.weight_norm(tail[0].linear)
    assert linear_end(tail) is None


@pytest.mark.parametrize("architecture", ["bert", "qwen3"])
def test_a_cut_backbone_has_copies_of_weights_and_buffers(tiny_model, architecture):
    """The model's own, also where its config would make others."""
    encoder = tiny_model(architecture)[0].auto_model
    for buffer in encoder.buffers():
        buffer.add_(1)
    cut = cut_layers(encoder, 2)
    for own, copies in (
        (encoder.named_parameters(), cut.named_parameters()),
        (encoder.named_buffers(), cut.named_buffers()),
    ):
        own, copies = dict(own), dict(copies)
        assert copies
        for name, value in copies.items():
            assert torch.equal(value, own[name]), name
            assert value.data_ptr() != own[name].data_ptr(), name
