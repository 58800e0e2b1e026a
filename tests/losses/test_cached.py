"""Gradient-cached base losses: the same terms and gradients as without caching, and nothing left on the base loss."""

from __future__ import annotations

import copy

import pytest
import torch
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn

from conftest import DIMS, column_features, gradients, total
from mipic_st import MIPICLoss
from mipic_st.encoder.final_norm import final_norm

EVERY_TERM = {
    "alpha": 0.4,
    "attention_weight": 1.0,
    "pic_weight": 1.0,
    "sia_layers": [1, 3],
    "lift_init": "orthogonal",
    "min_k": 2,
}

# name: (cached, uncached, columns)
PAIRS = {
    "ranking": (
        lambda m, size: losses.CachedMultipleNegativesRankingLoss(m, mini_batch_size=size),
        lambda m: losses.MultipleNegativesRankingLoss(m),
        3,
    ),
    "symmetric": (
        lambda m, size: losses.CachedMultipleNegativesSymmetricRankingLoss(m, mini_batch_size=size),
        lambda m: losses.MultipleNegativesSymmetricRankingLoss(m),
        2,
    ),
    "gist": (
        lambda m, size: losses.CachedGISTEmbedLoss(m, guide_of(m), mini_batch_size=size),
        lambda m: losses.GISTEmbedLoss(m, guide_of(m)),
        3,
    ),
    "mega-batch": (
        lambda m, size: losses.MegaBatchMarginLoss(m, mini_batch_size=size),
        lambda m: losses.MegaBatchMarginLoss(m, use_mini_batched_version=False),
        2,
    ),
}


def guide_of(model):
    """A frozen guide that ranks as the model did when it was made."""
    return copy.deepcopy(model).eval()


def step(loss, features, divisors=(1,)):
    """Backward of one batch per divisor, gradients accumulated; the terms of the last and all gradients."""
    loss.zero_grad(set_to_none=True)
    for divisor, columns in zip(divisors, features, strict=True):
        terms = loss([dict(column) for column in columns], None)
        (total(terms) / divisor).backward()
    # shared parameters appear once
    return {name: term.item() for name, term in terms.items()}, gradients(loss)


def assert_same_gradients(got, expected):
    """Equal up to 1e-4 of each parameter's largest gradient, model and projections, none missing.

    The floor is for key biases, whose gradient is zero but for rounding.
    """
    assert got.keys() == expected.keys()
    assert any("mipic_projections.sia" in name for name in got)
    assert any("mipic_projections.pic" in name for name in got)
    for name, gradient in expected.items():
        difference = (got[name] - gradient).abs().max().item()
        assert difference <= 1e-4 * gradient.abs().max().item() + 1e-7, name


@pytest.mark.parametrize("size", [1, 5, 100])
@pytest.mark.parametrize("base", list(PAIRS))
def test_same_terms_and_gradients_as_uncached(tiny_model, base, size):
    """For every cached loss and any mini-batch size: values to 1e-5, gradients of model and projections to 1e-4."""
    make_cached, make_plain, columns = PAIRS[base]
    model = tiny_model()
    features = [column_features(model, columns, rows=7)]
    expected, expected_gradients = step(MIPICLoss(model, make_plain(model), DIMS, **EVERY_TERM), features)
    got, got_gradients = step(MIPICLoss(model, make_cached(model, size), DIMS, **EVERY_TERM), features)
    assert got == pytest.approx(expected, rel=1e-5)
    assert set(got) == {"matryoshka", "sia_attention", "sia_cka", "pic"}
    assert all(value > 0 for value in got.values())
    assert_same_gradients(got_gradients, expected_gradients)


@pytest.mark.parametrize("base", list(PAIRS))
def test_gradient_accumulation(tiny_model, base):
    """Batches whose losses are divided, each by its own number, add up to the same gradients, projections included."""
    make_cached, make_plain, columns = PAIRS[base]
    model = tiny_model()
    features = [column_features(model, columns, rows=5, seed=10 * batch) for batch in range(2)]
    divisors = (2, 3)
    _, expected = step(MIPICLoss(model, make_plain(model), DIMS, **EVERY_TERM), features, divisors)
    _, got = step(MIPICLoss(model, make_cached(model, 3), DIMS, **EVERY_TERM), features, divisors)
    assert_same_gradients(got, expected)


def test_a_scale_on_the_loss_reaches_model_and_projections(tiny_model):
    """As a gradient scaler does it: gradients of the scaled loss are the scaled gradients."""
    model = tiny_model()
    features = [column_features(model, 2, rows=8)]
    loss = MIPICLoss(model, losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3), DIMS, **EVERY_TERM)
    _, plain = step(loss, features)
    _, scaled = step(loss, features, (1 / 1024,))
    assert_same_gradients({name: gradient / 1024 for name, gradient in scaled.items()}, plain)


@pytest.mark.parametrize(
    "options",
    [
        {"architecture": "qwen3", "pooling": "lasttoken", "padding_side": "left"},
        {"architecture": "modernbert", "pooling": "cls"},
        {"architecture": "bert", "normalize": True},
    ],
    ids=str,
)
def test_other_models(tiny_model, options):
    """Left padding, other pooling, Normalize."""
    model = tiny_model(**options)
    features = [column_features(model, 2, rows=9)]
    make_cached, make_plain, _ = PAIRS["ranking"]
    expected, expected_gradients = step(MIPICLoss(model, make_plain(model), DIMS, **EVERY_TERM), features)
    got, got_gradients = step(MIPICLoss(model, make_cached(model, 4), DIMS, **EVERY_TERM), features)
    assert got == pytest.approx(expected, rel=1e-5)
    assert_same_gradients(got_gradients, expected_gradients)


@pytest.mark.parametrize("importance", ["similarity", "attention"])
def test_token_importance(tiny_model, importance):
    """Attention maps are recorded per mini-batch too."""
    model = tiny_model()
    features = [column_features(model, 2, rows=9)]
    make_cached, make_plain, _ = PAIRS["ranking"]
    options = {**EVERY_TERM, "token_importance": importance}
    expected, expected_gradients = step(MIPICLoss(model, make_plain(model), DIMS, **options), features)
    got, got_gradients = step(MIPICLoss(model, make_cached(model, 4), DIMS, **options), features)
    assert got == pytest.approx(expected, rel=1e-5)
    assert_same_gradients(got_gradients, expected_gradients)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_prompts_left_out_of_pooling(tiny_model, monkeypatch, padding_side):
    """Pooling without the prompt may clear mask entries in place; the second embedding must not see that."""
    if exclude := getattr(Pooling, "_exclude_prompt_from_mask", None):  # before 6.2 all versions did
        in_place = lambda mask, length: mask.copy_(exclude(mask, length))  # noqa: E731
        monkeypatch.setattr(Pooling, "_exclude_prompt_from_mask", staticmethod(in_place))
    model = tiny_model(include_prompt=False, padding_side=padding_side)
    features = column_features(model, 2, rows=9)
    for column in features:
        column["prompt_length"] = 2
    make_cached, make_plain, _ = PAIRS["ranking"]
    before = [column["attention_mask"].clone() for column in features]
    got, got_gradients = step(MIPICLoss(model, make_cached(model, 4), DIMS, **EVERY_TERM), [features])
    assert all(torch.equal(mask, column["attention_mask"]) for mask, column in zip(before, features, strict=True))
    expected, expected_gradients = step(MIPICLoss(model, make_plain(model), DIMS, **EVERY_TERM), [features])
    assert got == pytest.approx(expected, rel=1e-5)
    assert_same_gradients(got_gradients, expected_gradients)


def test_mini_batches_by_tokens(tiny_model):
    """mini_batch_num_tokens works too."""
    model = tiny_model()
    features = [column_features(model, 2, rows=9)]
    expected, expected_gradients = step(
        MIPICLoss(model, losses.MultipleNegativesRankingLoss(model), DIMS, **EVERY_TERM), features
    )
    base = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_num_tokens=20)
    got, got_gradients = step(MIPICLoss(model, base, DIMS, **EVERY_TERM), features)
    assert got == pytest.approx(expected, rel=1e-5)
    assert_same_gradients(got_gradients, expected_gradients)


def test_dropout_is_replayed(tiny_model):
    """With dropout the gradients belong to the values: a small step along them lowers the loss as they predict.

    Both embeddings of a mini-batch must draw the same masks. Without constants (PIC's targets, the detached teacher),
    so that the gradient is the derivative.
    """
    model = tiny_model(training=True)
    features = column_features(model, 2, rows=9)
    base = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=4)
    options = {**EVERY_TERM, "pic_weight": 0, "detach_full_width": False}
    loss = MIPICLoss(model, base, DIMS, **options).double()

    def value():
        torch.manual_seed(5)
        return total(loss([dict(column) for column in features], None))

    start = value()
    start.backward()
    parameters = [p for p in loss.parameters() if p.grad is not None]
    slope = sum(p.grad.square().sum() for p in parameters).item()
    rate = 1e-6  # terms are float32
    for parameter in parameters:
        parameter.data.sub_(parameter.grad, alpha=rate)
    assert (start.item() - value().item()) / rate == pytest.approx(slope, rel=1e-2)


@pytest.mark.parametrize("base", list(PAIRS))
def test_alpha_1_is_matryoshka_loss_bit_for_bit(tiny_model, base):
    """Value and gradients are those of MatryoshkaLoss around a cached loss."""
    make_cached, _, columns = PAIRS[base]
    model = tiny_model()
    features = column_features(model, columns, rows=9)
    weights = [1, 0.5, 2, 0.25]
    reference = losses.MatryoshkaLoss(model, make_cached(model, 4), DIMS, weights)
    expected = reference([dict(column) for column in features], None)
    model.zero_grad()
    expected.backward()
    expected_gradients = gradients(model)
    got, _ = step(loss := MIPICLoss(model, make_cached(model, 4), DIMS, weights, alpha=1), [features])
    got_gradients = gradients(loss.model)
    assert got == {"matryoshka": expected.item()}
    assert got_gradients.keys() == expected_gradients.keys()
    assert all(torch.equal(got_gradients[name], gradient) for name, gradient in expected_gradients.items())


@pytest.mark.parametrize("base", list(PAIRS))
def test_the_base_loss_stays_clean(tiny_model, base):
    """Nothing is left on base loss or model, after a step as after an exception, and the base alone is as before."""
    make_cached, _, columns = PAIRS[base]
    model = tiny_model()
    inner = make_cached(model, 4)
    features = column_features(model, columns, rows=9)

    def alone():
        return inner([dict(column) for column in features], None).item()

    names, value = set(vars(inner)), alone()
    loss = MIPICLoss(model, inner, DIMS, **EVERY_TERM)
    again = MIPICLoss(model, inner, DIMS, **EVERY_TERM)
    first, _ = step(loss, [features])
    assert set(vars(inner)) == names
    assert "forward" not in vars(model)
    assert model[0].auto_model.config.output_hidden_states is False
    assert alone() == value
    assert step(again, [features])[0] == first

    handle = model[0].auto_model.encoder.layer[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss([dict(column) for column in features], None)
    terms = None
    handle.remove()
    terms = loss([dict(column) for column in features], None)
    handle = model[0].auto_model.encoder.layer[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        total(terms).backward()
    handle.remove()
    assert set(vars(inner)) == names
    assert "forward" not in vars(model)
    assert model[0].auto_model.config.output_hidden_states is False
    assert alone() == value


def test_evaluation_without_gradients(tiny_model):
    """Same terms, no graph."""
    model = tiny_model()
    features = [column_features(model, 2, rows=9)]
    loss = MIPICLoss(model, losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=4), DIMS, **EVERY_TERM)
    expected, _ = step(loss, features)
    with torch.no_grad():
        terms = loss([dict(column) for column in features[0]], None)
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, rel=1e-6)
    assert not any(term.requires_grad for term in terms.values())


def test_activations_of_one_mini_batch_at_a_time(tiny_model):
    """What caching is for: between the two embeddings no graph is alive, of the encoder or of the projections."""
    model = tiny_model()
    final_norm(model[0].auto_model)  # a pass of a few tokens, made once per model
    alive = []
    model[0].auto_model.encoder.layer[1].register_forward_hook(
        lambda module, inputs, output: alive.append((output[0] if isinstance(output, tuple) else output).requires_grad)
    )
    loss = MIPICLoss(model, losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=4), DIMS, **EVERY_TERM)
    observe, observed = loss.terms["pic"].observe, []

    def noted(recorded):
        sides = observe(recorded)
        observed.append(sides.requires_grad)
        return sides

    loss.terms["pic"].observe = noted
    terms = loss(column_features(model, 2, rows=8), None)
    assert alive == observed == [False] * 4
    total(terms).backward()
    assert alive == observed == [False] * 4 + [True] * 4


class _Summed(nn.Module):
    """A base loss that hides a cached one."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.inner = losses.CachedMultipleNegativesRankingLoss(model)

    def forward(self, features, labels):
        return 2 * self.inner(features, labels)


class _OwnCache(nn.Module):
    """Caches gradients in a way of its own."""

    uses_gradient_cache = True

    def __init__(self, model):
        super().__init__()
        self.model = model


def _patched(model):
    base = losses.CachedMultipleNegativesRankingLoss(model)
    losses.MatryoshkaLoss(model, base, DIMS)
    return base


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_Summed, "_Summed holds CachedMultipleNegativesRankingLoss, which embeds in its backward pass"),
        (_OwnCache, "_OwnCache caches gradients but has no embed_minibatch and no calculate_loss"),
        (_patched, "was wrapped before: its calculate_loss was replaced by CachedLossDecorator"),
    ],
)
def test_unsupported_ones_are_refused_at_construction(tiny_model, make, message):
    """Before any training."""
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        MIPICLoss(model, make(model), DIMS)


def test_a_base_loss_with_its_own_model_is_refused(tiny_model):
    """Nothing can be recorded: an error, not a smaller loss."""
    model = tiny_model()
    loss = MIPICLoss(model, losses.CachedMultipleNegativesRankingLoss(tiny_model(), mini_batch_size=4), DIMS)
    with pytest.raises(RuntimeError, match="recorded 0 forward passes for one mini-batch"):
        loss(column_features(model), None)
