"""What a model is made of: depth, widths, pooling, tail, routes and final norm are found, the rest refused by name."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    Dropout,
    LayerNorm,
    Normalize,
    Pooling,
    Router,
    StaticEmbedding,
    Transformer,
    WeightedLayerPooling,
    WordWeights,
)
from torch import nn

from conftest import DEPTH, TAILS, WIDTH, sentences
from mipic_st.encoder import final_norm as final_norm_module
from mipic_st.encoder.final_norm import final_norm
from mipic_st.encoder.modules import is_linear, push_vectors
from mipic_st.encoder.structure import backbone_of, describe, embedding_width, tail_of


def identity_dense(*sizes: int, **options) -> Dense:
    return Dense(*sizes, activation_function=nn.Identity(), **{"bias": False, **options})


class OwnForward(Dense):
    """A Dense that is none."""

    def forward(self, features):
        return super().forward(features)


# --- the description --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TAILS)
def test_models_with_tails_are_described(tiny_model, name):
    """The width is the tail's; Dropout and what only normalises at the end are no steps of the terms."""
    model = tiny_model(tail=name)
    description = describe(model)
    assert (description.depth, description.hidden_width, description.width) == (DEPTH, WIDTH, TAILS[name].width)
    assert description.pooling is model[1]
    assert list(description.tail) == tail_of(model) == list(model)[2:]
    assert not description.obstacle
    kinds = [type(module).__name__ for module in description.steps]
    assert "Dropout" not in kinds
    assert kinds[-1] != "Normalize"
    assert (
        kinds
        == [type(module).__name__ for module in model if isinstance(module, (Dense, LayerNorm)) or "middle" in name][
            -len(kinds) :
        ]
    )
    assert embedding_width(model) == model.encode(["a"]).shape[1] == TAILS[name].width


def test_what_has_no_layers_is_described_as_far_as_it_goes(tiny_model):
    """Width and tail of a StaticEmbedding are known; only the loss refuses it."""
    static = StaticEmbedding(tiny_model().tokenizer.backend_tokenizer, embedding_dim=8)
    model = SentenceTransformer(modules=[static, identity_dense(8, 4), Normalize()])
    description = describe(model)
    assert (description.depth, description.hidden_width, description.pooling) == (None, None, None)
    assert description.width == 4
    assert list(description.tail) == tail_of(model) == list(model)[1:]
    with pytest.raises(ValueError, match="begins with StaticEmbedding"):
        backbone_of(model)


def router(routes: list[list], *behind: nn.Module) -> SentenceTransformer:
    return SentenceTransformer(modules=[Router.for_query_document(*routes), *behind])


def test_routers_are_described(transformer_folder, tiny_model):
    """Routes of one shape share a description, with the tail behind the Router; others are distinguished by name."""

    def route(pooling: str = "mean", *behind) -> list:
        return [Transformer(str(transformer_folder())), Pooling(WIDTH, pooling), *behind]

    shared = identity_dense(WIDTH, 16)
    equal = router([route(), route()], shared, Normalize())
    assert (describe(equal).depth, describe(equal).width) == (DEPTH, 16)
    assert tail_of(equal) == list(equal)[1:]
    assert backbone_of(equal).steps == (shared,)
    assert set(describe(equal).routes) == {"query", "document"}

    same_module = router([route("mean", shared), route("mean", shared)])
    assert backbone_of(same_module).steps == (shared,)
    own = router([route("mean", identity_dense(WIDTH, 16)), route("mean", identity_dense(WIDTH, 16))])
    with pytest.raises(ValueError, match=r"tails of their own.*put it behind the Router"):
        backbone_of(own)
    assert describe(own).width == 16

    unequal = router([route("mean"), route("cls")])
    with pytest.raises(ValueError, match="routes of one shape"):
        backbone_of(unequal)

    static = [StaticEmbedding(tiny_model().tokenizer.backend_tokenizer, embedding_dim=WIDTH)]
    mixed = describe(router([static, route()], Normalize()))
    assert (mixed.depth, mixed.width) == (None, WIDTH)
    assert mixed.routes["document"].depth == DEPTH
    assert "begins with StaticEmbedding" in mixed.obstacle


@pytest.mark.parametrize(
    ("behind", "message"),
    [
        (lambda: [OwnForward(WIDTH, 16)], "has OwnForward, a Dense with a forward of its own"),
        (lambda: [Dense(WIDTH, 16, module_output_name="other")], "has a Dense that reads 'sentence_embedding' and wri"),
        (lambda: [Normalize("token_embeddings")], "has a Normalize that reads 'token_embeddings'"),
        (lambda: [WordWeights(["a"], {"a": 1.0})], "has WordWeights, which is none of Dense, Normalize, LayerNorm"),
        (lambda: [Router({"a": [Dense(WIDTH, 16)]}, default_route="a")], "has Router, which is none of"),
    ],
)
def test_unknown_modules_behind_the_pooling_are_named(tiny_model, behind, message):
    """The loss says what is in the way; the width is known all the same."""
    model = SentenceTransformer(modules=[*tiny_model(), *behind()])
    with pytest.raises(ValueError, match=message):
        backbone_of(model)
    assert describe(model).depth == DEPTH


def test_poolings_that_the_loss_cannot_follow_are_refused(tiny_model, transformer_folder):
    """Several modes, none, two of them, or something between encoder and pooling."""
    transformer = Transformer(str(transformer_folder()))
    two_modes = SentenceTransformer(modules=[transformer, Pooling(WIDTH, ("cls", "mean")), identity_dense(64, 32)])
    with pytest.raises(ValueError, match="64 values from hidden states of 32"):
        backbone_of(two_modes)
    between = SentenceTransformer(modules=[transformer, WeightedLayerPooling(WIDTH, DEPTH, 1), Pooling(WIDTH)])
    with pytest.raises(ValueError, match=r"right after the Transformer.*WeightedLayerPooling"):
        backbone_of(between)
    twice = SentenceTransformer(modules=[transformer, Pooling(WIDTH), Pooling(WIDTH)])
    with pytest.raises(ValueError, match="right after the Transformer, and only one"):
        backbone_of(twice)
    with pytest.raises(TypeError, match="must be a SentenceTransformer"):
        describe(torch.nn.Linear(2, 2))


def test_embedding_width_ignores_truncate_dim(tiny_model):
    """truncate_dim is for encode; training has the full width."""
    model = tiny_model()
    model.truncate_dim = 8
    assert embedding_width(model) == WIDTH


# --- the tail ---------------------------------------------------------------------------------------------------------


def test_is_linear():
    """A map that takes another one into its weight, and nothing else."""
    assert is_linear(identity_dense(4, 3))
    assert is_linear(Dense(4, 3, bias=False, activation_function=None))
    assert is_linear(identity_dense(4, 3, bias=True))
    others = [
        Dense(4, 3, bias=False),
        identity_dense(4, 4, use_residual=True),
        identity_dense(4, 4, module_input_name="token_embeddings"),
        OwnForward(4, 4, bias=False, activation_function=nn.Identity()),
        Normalize(),
        LayerNorm(4),
        Dropout(),
        nn.Linear(4, 3, bias=False),
    ]
    assert not any(is_linear(module) for module in others)


@pytest.mark.parametrize("name", TAILS)
def test_pushed_vectors_are_the_models_own(tiny_model, name):
    """Pooled states, pushed through the tail, are the embedding; tokens go through one by one."""
    model = tiny_model(tail=name)
    features = model.preprocess(sentences(4))
    pooled = model[1](model[0](dict(features)))
    vectors = pooled["sentence_embedding"]
    assert torch.equal(push_vectors(tail_of(model), vectors), model(dict(features))["sentence_embedding"])
    tokens = pooled["token_embeddings"]
    pushed = push_vectors(tail_of(model), tokens)
    assert pushed.shape == (*tokens.shape[:2], TAILS[name].width)
    torch.testing.assert_close(pushed[1, 2], push_vectors(tail_of(model), tokens[1, 2]))


# --- the final norm ---------------------------------------------------------------------------------------------------


def test_finding_the_final_norm_leaves_the_model_alone(tiny_model):
    """Modes (also mixed ones), hooks, config and random state are as before."""
    model = tiny_model("modernbert", training=True)
    encoder = model[0].auto_model
    encoder.layers[1].eval()
    modes = [module.training for module in encoder.modules()]
    # transformers leaves hooks of its own at the first request for hidden states
    with torch.no_grad():
        encoder(input_ids=torch.ones(1, 2, dtype=torch.long), output_hidden_states=True)
    hooks = [len(module._forward_hooks) for module in encoder.modules()]
    config, state = copy.deepcopy(encoder.config.to_dict()), torch.get_rng_state()
    assert final_norm(encoder) is encoder.final_norm
    assert modes == [module.training for module in encoder.modules()]
    assert len(set(modes)) == 2
    assert hooks == [len(module._forward_hooks) for module in encoder.modules()]
    assert config == encoder.config.to_dict()
    assert torch.equal(state, torch.get_rng_state())


def test_it_is_found_once_and_again_after_a_change(tiny_model, monkeypatch):
    """One probe per model; a module that was replaced, a new one. No model is kept alive."""
    probes, original = [], final_norm_module._probe
    monkeypatch.setattr(final_norm_module, "_probe", lambda encoder: probes.append(1) or original(encoder))
    encoder = tiny_model("qwen3").eval()[0].auto_model
    assert final_norm(encoder) is final_norm(encoder) is encoder.norm
    assert len(probes) == 1
    encoder.norm = nn.Identity()
    assert final_norm(encoder) is None
    assert len(probes) == 2
    alive = weakref.ref(encoder)
    del encoder
    gc.collect()
    assert alive() is None


def test_an_ending_that_no_module_explains_is_refused(tiny_model):
    """Something is done to the last state that cannot be done to the others."""
    encoder = tiny_model("qwen3")[0].auto_model

    def scaled(*args, forward=encoder.forward, **kwargs):
        output = forward(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state * 2
        output.hidden_states = (*output.hidden_states[:-1], output.last_hidden_state)
        return output

    encoder.forward = scaled
    with pytest.raises(TypeError, match="final norm of Qwen3Model, but no module was seen"):
        final_norm(encoder)
