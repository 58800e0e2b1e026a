"""Inputs and models that would give wrong numbers: empty texts, and models that pool something else."""

from __future__ import annotations

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding, Transformer
from tokenizers import processors

from conftest import (
    DIMS,
    WIDTH,
    all_terms,
    assemble,
    column_features,
    gradients,
    other_output,
    save_encoder,
    scaled,
    sentences,
    tail_dims,
    total,
)
from further_encoders import POST_NORM, PRE_NORM, config_of
from mipic_st import MIPICLoss
from mipic_st.encoder import hidden_states
from mipic_st.losses import pic
from mipic_st.losses.terms import Observers
from training_fixtures import EVERY_TERM

BASES = {
    "plain": losses.MultipleNegativesRankingLoss,
    "cached": lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3),
}


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", list(BASES))
@pytest.mark.parametrize("make", [scaled, other_output])
def test_models_that_pool_something_else_are_refused_at_the_first_batch(transformer_folder, make, base):
    """Not the states that were recorded are served: said before any step, with the way out."""
    model = SentenceTransformer(modules=make(str(transformer_folder())), device="cpu")
    loss = MIPICLoss(model, BASES[base](model), DIMS)
    with pytest.raises(ValueError, match=r"embedding is not its last hidden state, pooled.*Use alpha=1"):
        loss(column_features(model), None)
    assert "forward" not in vars(model)
    total(MIPICLoss(model, BASES[base](model), DIMS, alpha=1)(column_features(model), None)).backward()


def test_a_pooling_that_does_more_is_refused(transformer_folder):
    """Also where the token states are right and only the vector is another."""

    class Doubled(Pooling):
        def forward(self, features, **kwargs):
            tokens = features["token_embeddings"]
            own = "all_layer_embeddings" in features
            features = super().forward(features, **kwargs)
            if own:
                features["sentence_embedding"] = tokens.sum(dim=1)
            return features

    model = SentenceTransformer(modules=[Transformer(str(transformer_folder())), Doubled(WIDTH)], device="cpu")
    with pytest.raises(ValueError, match="embedding is not its last hidden state"):
        MIPICLoss(model, BASES["plain"](model), DIMS)(column_features(model), None)


def test_the_model_is_checked_once_and_left_alone(tiny_model, monkeypatch):
    """A pass of a few tokens once per model, none later; neither modes nor random state are touched."""
    model = tiny_model("bert", tail="labse", training=True)
    loss = MIPICLoss(model, BASES["plain"](model), DIMS)
    calls = []
    model[0].auto_model.encoder.register_forward_hook(lambda *_: calls.append(1))
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    features = column_features(model)
    with torch.no_grad(), loss.record():
        assert torch.equal(state, torch.get_rng_state())
        model(features[0])
        used = torch.get_rng_state()
    assert torch.equal(used, torch.get_rng_state())
    assert not torch.equal(used, state), "dropout of the pass itself"
    assert modes == [module.training for module in model.modules()]
    assert len(calls) == 2
    loss(column_features(model), None)
    assert len(calls) == 4
    monkeypatch.setattr(hidden_states, "require_served_states", lambda *_: pytest.fail("checked again"))
    loss(column_features(model), None)


@pytest.mark.parametrize("base", list(BASES))
@pytest.mark.parametrize("name", list(POST_NORM))
def test_encoders_train_with_dropout_behind_their_last_layer(tmp_path, name, base):
    """XLNet's embedding is its last state after dropout, which is no other state; nothing is drawn for the look."""
    folder = save_encoder(tmp_path / "encoder", lambda layers: config_of(name, POST_NORM[name][1], layers))
    model = assemble(folder, "mean").train()
    features, results = column_features(model), []
    for checked in (False, True):
        loss = MIPICLoss(model, BASES[base](model), DIMS, **EVERY_TERM)
        loss._layers.checked = checked
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            terms = loss([dict(column) for column in features], None)
            results.append([*(term.detach() for term in terms.values()), torch.rand(1)])
        total(terms).backward()
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert all(module.training for module in model.modules())


def test_other_states_are_refused_in_training_too(transformer_folder):
    """With dropout in the encoder as well: it is told apart from a state that is another."""
    for make in (scaled, other_output):
        model = SentenceTransformer(modules=make(str(transformer_folder())), device="cpu").train()
        with pytest.raises(ValueError, match="embedding is not its last hidden state"):
            MIPICLoss(model, BASES["plain"](model), DIMS)(column_features(model), None)
        assert all(module.training for module in model.modules())


def test_layers_are_counted_from_what_the_encoder_shows(tmp_path):
    """Mamba shows no embeddings: layer 1 is the state after its first layer, for the terms too."""
    _, settings = PRE_NORM["Mamba"]
    model = assemble(save_encoder(tmp_path / "encoder", lambda layers: config_of("Mamba", settings, layers)), "mean")
    loss = MIPICLoss(model, BASES["plain"](model), DIMS, **EVERY_TERM)
    outputs = []
    for block in model[0].auto_model.layers:
        block.register_forward_hook(lambda _, inputs, output: outputs.append(output))
    with torch.no_grad(), loss.record() as passes:
        outputs.clear()
        model(column_features(model)[0])
    states = passes[0].hidden_states
    assert set(states) == {1, 2, 3}
    assert torch.equal(states[1], outputs[0])
    assert torch.equal(states[2], outputs[1])
    assert torch.equal(states[3], model[0].auto_model.norm_f(outputs[2]))
    total(loss(column_features(model), None)).backward()


# --- empty texts ------------------------------------------------------------------------------------------------------


def bare(model: SentenceTransformer) -> SentenceTransformer:
    """Take the special tokens away, so that an empty text has no token."""
    model.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    return model


def alignment(loss, features):
    """The alignment terms of one column alone, without a base loss, which cannot bear empty texts."""
    observers = Observers(list(loss.terms.values()), 1 - loss.settings.alpha, loss.record)
    with observers.recording() as passes:
        loss.model(features)
    return observers.reduce([observers.observe(passes[0])])


MODELS = [
    ("bert", "mean", "right", None),
    ("bert", "cls", "right", None),
    ("bert", "max", "right", None),
    ("bert", "weightedmean", "right", None),
    ("qwen3", "lasttoken", "left", None),
    ("t5", "mean", "right", None),
    ("bert", "mean", "right", "stella"),
    ("bert", "mean", "right", "residual"),
    ("bert", "mean", "right", "max, normalized in the middle"),
]


@pytest.mark.parametrize(("architecture", "pooling", "side", "tail"), MODELS)
def test_empty_texts_add_nothing_to_the_terms(tiny_model, architecture, pooling, side, tail):
    """PIC is that of the batch without them, SIA adds zeros for them, and all gradients are finite and the same."""
    model = bare(tiny_model(architecture, pooling, side, tail=tail))
    dims = DIMS if tail is None else tail_dims(tail)
    loss = all_terms(model, BASES["plain"](model), dims, sia_layers=[1, 3], min_k=2)
    texts = sentences(4, shortest=3)
    results = {}
    for name, batch in (("with", [texts[0], "", *texts[1:]]), ("without", texts)):
        features = model.preprocess(batch)
        if name == "with":
            assert features["attention_mask"][1].sum() == 0
        terms = alignment(loss, features)
        loss.zero_grad()
        total(terms).backward()
        # the mean of the attention term is over all sentences
        terms["sia_attention"] = terms["sia_attention"] * len(batch)
        results[name] = ({key: term.item() for key, term in terms.items()}, gradients(loss))
    assert results["with"][0] == pytest.approx(results["without"][0], rel=1e-4)
    assert all(gradient.isfinite().all() for gradient in results["with"][1].values())
    for key, gradient in results["without"][1].items():
        if "mipic_projections" in key:
            scale = 5 / 4 if "sia" in key else 1
            torch.testing.assert_close(scale * results["with"][1][key], gradient, rtol=1e-3, atol=1e-5, msg=key)


def test_only_a_prompt_is_no_text_where_prompts_are_not_pooled(tiny_model):
    """Whether a sentence has a token is asked of the pooling: SIA leaves out the prompt's tokens if nothing follows."""
    model = bare(tiny_model(pooling="max", include_prompt=False))
    loss = all_terms(model, BASES["plain"](model), DIMS)
    found = {}
    for texts in (["", *sentences(3)], sentences(3)):
        terms = alignment(loss, model.preprocess(texts, prompt="the old "))
        loss.zero_grad()
        total(terms).backward()
        assert all(gradient.isfinite().all() for gradient in gradients(loss).values())
        # the mean of the attention term is over all sentences
        terms["sia_attention"] = terms["sia_attention"] * len(texts)
        found[len(texts)] = {name: term.item() for name, term in terms.items()}
    assert found[4] == pytest.approx(found[3], rel=1e-4)


@pytest.mark.parametrize("alpha", [1, 0.5])
@pytest.mark.parametrize(("base", "pooling"), [("plain", "mean"), ("plain", "max"), ("cached", "max")])
def test_where_the_base_loss_cannot_bear_them_they_are_named_at_that_step(tiny_model, pooling, base, alpha):
    """A value or only a gradient of nan: an error in this step, with the texts' places, and nothing has changed."""
    model = bare(tiny_model(pooling=pooling, training=True))
    loss = MIPICLoss(model, BASES[base](model), DIMS, alpha=alpha)
    features = [model.preprocess(sentences(4, seed=seed, shortest=2)) for seed in (0, 1)]
    total(loss([dict(column) for column in features], None)).backward()
    features[1] = model.preprocess([*sentences(2, seed=1, shortest=2), "", ""])
    loss.zero_grad()
    message = r"(not finite|nan).* training batch 2.*no token in text 3 of input column 2, text 4 of input column 2"
    with pytest.raises(FloatingPointError, match=message):
        total(loss([dict(column) for column in features], None)).backward()
    assert all(parameter.isfinite().all() for parameter in loss.parameters())


@pytest.mark.parametrize("alpha", [1, 0.5])
@pytest.mark.parametrize("base", list(BASES))
def test_a_column_of_empty_texts_is_named(tiny_model, base, alpha):
    """The encoder has nothing to run on: the texts' places, not a shape of it."""
    model = bare(tiny_model(training=True))
    loss = MIPICLoss(model, BASES[base](model), DIMS, alpha=alpha)
    features = [model.preprocess(texts) for texts in (sentences(2), ["", "  "])]
    with pytest.raises(ValueError, match=r"no token at all.*no token in text 1 of input column 2, text 2 of input"):
        loss(features, None)


@pytest.mark.parametrize("base", list(BASES))
@pytest.mark.parametrize("dims", [[32], [32, 16], DIMS])
def test_what_does_not_overflow_is_not_refused(tiny_model, dims, base):
    """Refused is what would have put nan into the model: each prefix is normalised from the one before."""
    results = []
    for kind in (losses.MatryoshkaLoss, MIPICLoss):
        model = bare(tiny_model())
        loss = kind(model, BASES[base](model), dims)
        features = [model.preprocess([*sentences(3, seed=seed), ""]) for seed in (0, 1)]
        try:
            value = loss(features, None)
            (total(value) if isinstance(value, dict) else value).backward()
            results.append(all(bool(gradient.isfinite().all()) for gradient in gradients(model).values()))
        except FloatingPointError:
            results.append(False)
    assert results[0] == results[1] == (base == "cached" or dims == [32])


def test_an_empty_text_of_a_static_embedding_is_named(tiny_model):
    """No mask there: the places come from the offsets."""
    tokenizer = bare(tiny_model()).tokenizer.backend_tokenizer
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)], device="cpu")
    loss = MIPICLoss(model, BASES["plain"](model), [16, 8, 4, 2, 1], alpha=1)
    with pytest.raises(FloatingPointError, match="no token in text 2 of input column 1"):
        total(loss([model.preprocess(["dog", ""]), model.preprocess(["dog", "cat"])], None)).backward()


def test_chain_without_some_sentences_is_that_of_the_others():
    """Neither anchors nor negatives; also in one column of several, and with the targets of two devices."""
    generator = torch.Generator().manual_seed(0)
    predicted, target = (torch.randn(5, 8, generator=generator) for _ in range(2))
    valid = torch.tensor([True, False, True, True, False])
    expected = pic.chain_info_nce(predicted[valid], target[valid])
    torch.testing.assert_close(pic.chain_info_nce(predicted, target, valid=valid), expected)
    torch.testing.assert_close(
        pic.chain_info_nce(predicted, target), pic.chain_info_nce(predicted, target, valid=valid | True)
    )
    parts = [
        pic.chain_info_nce(predicted[start : start + 2], target[:4], offset=start, valid=valid[:4]) for start in (0, 2)
    ]
    together = pic.chain_info_nce(predicted[:4], target[:4], valid=valid[:4])
    torch.testing.assert_close((parts[0] * 1 + parts[1] * 2) / 3, together)
    assert pic.chain_info_nce(predicted, target, valid=torch.zeros(5, dtype=torch.bool)) == 0
