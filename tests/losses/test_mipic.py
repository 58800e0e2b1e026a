"""MIPICLoss: exactly MatryoshkaLoss where it must be, its own terms where it may, clear refusals elsewhere."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import random

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses import column_merging_disabled
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, StaticEmbedding, Transformer
from torch import nn

import mipic_st.losses.mipic as loss_module
from conftest import (
    ARCHITECTURES,
    DEPTH,
    DIMS,
    WIDTH,
    all_terms,
    column_features,
    gradients,
    needs_eager_switch,
    sentences,
    total,
)
from mipic_st import MIPICLoss
from mipic_st.encoder import hidden_states
from mipic_st.encoder.structure import Backbone, backbone_of
from mipic_st.losses import matryoshka, presets

TERMS = ["matryoshka", "sia_attention", "sia_cka", "pic"]


class TwoPartLoss(nn.Module):
    """A dict-valued base loss."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, sentence_features, labels):
        first, second = (self.model(features)["sentence_embedding"] for features in sentence_features)
        return {"pull": 1 - (first * second).sum(dim=-1).mean(), "spread": first.var(dim=0).mean()}


class SummedTwoPartLoss(TwoPartLoss):
    """The same as a tensor, for MatryoshkaLoss, which takes no dicts."""

    def forward(self, sentence_features, labels):
        return sum(super().forward(sentence_features, labels).values())


def base_cases():
    """Name, base loss, number of columns, labels."""
    scores, classes = torch.linspace(0, 1, 6), torch.tensor([0, 1, 2, 0, 1, 2])
    return {
        "mnrl-2": (lambda m: losses.MultipleNegativesRankingLoss(m), 2, None),
        "mnrl-4": (lambda m: losses.MultipleNegativesRankingLoss(m), 4, None),
        "cosent": (lambda m: losses.CoSENTLoss(m), 2, scores),
        "angle": (lambda m: losses.AnglELoss(m), 2, scores),
        "cosine": (lambda m: losses.CosineSimilarityLoss(m), 2, scores),
        "triplet": (lambda m: losses.TripletLoss(m), 3, None),
        "gist": (lambda m: losses.GISTEmbedLoss(m, copy.deepcopy(m)), 3, None),
        "batch-triplet": (lambda m: losses.BatchAllTripletLoss(m), 1, classes % 2),
        "mse": (lambda m: losses.MSELoss(m), 1, torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(1))),
    }


BASES = list(base_cases())


def make_base(name, model):
    make, columns, labels = base_cases()[name]
    return make(model), columns, labels


def run(loss, model, columns=2, labels=None, seed=0):
    """Forward and backward of one step; the terms as floats and the gradients by name."""
    loss.zero_grad(set_to_none=True)
    model.zero_grad(set_to_none=True)
    value = loss(column_features(model, columns, seed=seed), labels)
    (total(value) if isinstance(value, dict) else value).backward()
    terms = {k: v.item() for k, v in value.items()} if isinstance(value, dict) else value.item()
    return terms, gradients(model)


# --- exactness --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("off", [{"alpha": 1.0}, {"attention_weight": 0, "cka_weight": 0, "pic_weight": 0}])
@pytest.mark.parametrize("base", BASES)
def test_without_alignment_it_is_matryoshka_loss_bit_for_bit(tiny_model, base, off, monkeypatch):
    """alpha=1, or no term: same value, same gradient of every parameter, and no hidden states are asked for."""
    model = tiny_model()
    loss, columns, labels = make_base(base, model)
    weights = [1, 0.5, 2, 0.25]
    expected, expected_gradients = run(losses.MatryoshkaLoss(model, loss, DIMS, weights), model, columns, labels)
    monkeypatch.setattr(loss_module, "record_states", lambda *_: pytest.fail("hidden states were requested"))
    ours, our_gradients = run(all_terms(model, loss, DIMS, weights, **off), model, columns, labels)
    assert ours == {"matryoshka": expected}
    assert our_gradients.keys() == expected_gradients.keys()
    assert len(our_gradients) > 10
    for name, gradient in expected_gradients.items():
        assert torch.equal(our_gradients[name], gradient), name


def test_bit_for_bit_in_training_mode_too(tiny_model):
    """Same dropout masks: the loss draws nothing from the global generator."""
    model = tiny_model(training=True)
    base = losses.MultipleNegativesRankingLoss(model)
    torch.manual_seed(3)
    expected, expected_gradients = run(losses.MatryoshkaLoss(model, base, DIMS), model)
    torch.manual_seed(3)
    ours, our_gradients = run(all_terms(model, base, DIMS, alpha=1), model)
    assert ours["matryoshka"] == expected
    assert all(torch.equal(our_gradients[name], gradient) for name, gradient in expected_gradients.items())


@pytest.mark.parametrize("base", BASES)
def test_base_term_is_matryoshka_loss_times_alpha(tiny_model, base):
    """Recording does not change the base term."""
    model = tiny_model()
    loss, columns, labels = make_base(base, model)
    expected, _ = run(losses.MatryoshkaLoss(model, loss, DIMS), model, columns, labels)
    ours, _ = run(all_terms(model, loss, DIMS, alpha=0.25), model, columns, labels)
    assert ours["matryoshka"] == pytest.approx(0.25 * expected, rel=1e-6)
    assert set(ours) == set(TERMS)


def test_softmax_loss_keeps_its_classifier(tiny_model):
    """SoftmaxLoss needs the full width at every dim; with the full width alone it is exact, otherwise the base's error.

    MatryoshkaLoss behaves the same; nothing may stay patched after the error.
    """
    model = tiny_model()
    base = losses.SoftmaxLoss(model, WIDTH, num_labels=3)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    expected, _ = run(losses.MatryoshkaLoss(model, base, [WIDTH]), model, 2, labels)
    ours, _ = run(all_terms(model, base, [WIDTH], pic_chain=[(8, 1), (WIDTH, 3)]), model, 2, labels)
    assert ours["matryoshka"] == pytest.approx(0.8 * expected)
    assert set(ours) == {"matryoshka", "pic"}
    model = tiny_model()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        all_terms(model, losses.SoftmaxLoss(model, WIDTH, num_labels=3), DIMS)(column_features(model), labels)
    assert "forward" not in vars(model)
    assert model[0].auto_model.config.output_hidden_states is False


def test_dict_valued_base_loss(tiny_model):
    """Each key is summed over dims on its own; together they are what MatryoshkaLoss gives for the sum."""
    model = tiny_model()
    expected, expected_gradients = run(losses.MatryoshkaLoss(model, SummedTwoPartLoss(model), DIMS), model)
    ours, our_gradients = run(all_terms(model, TwoPartLoss(model), DIMS, alpha=1), model)
    assert set(ours) == {"matryoshka_pull", "matryoshka_spread"}
    assert sum(ours.values()) == pytest.approx(expected, rel=1e-5)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-4, atol=1e-6)
    aligned, _ = run(all_terms(model, TwoPartLoss(model), DIMS), model)
    assert set(aligned) == {"matryoshka_pull", "matryoshka_spread", "sia_attention", "sia_cka", "pic"}


# --- n_dims_per_step --------------------------------------------------------------------------------------------


class Seen(losses.MultipleNegativesRankingLoss):
    """Notes the dims that it is applied to, in each batch."""

    def forward(self, sentence_features, labels):
        embeddings = [self.model(features)["sentence_embedding"] for features in sentence_features]
        self.dims = [*getattr(self, "dims", []), embeddings[0].shape[1]]
        return self.compute_loss_from_embeddings(embeddings, labels)


def drawn_dims(loss, model, steps):
    """Dims that the base loss was called with, per step."""
    drawn = []
    for step in range(steps):
        loss.loss.dims = []
        loss(column_features(model, seed=step), None)
        drawn.append(loss.loss.dims)
    return drawn


def test_drawn_dims_come_from_seed_and_batch(tiny_model):
    """Same seed, same draws (so every rank agrees); another seed, others; the global generators are not touched."""
    model = tiny_model().train()
    base = Seen(model)

    def make(seed):
        return all_terms(model, base, DIMS, None, 2, alpha=1, seed=seed)

    random.seed(0)
    state = random.getstate()
    first, again, other = (drawn_dims(make(seed), model, 6) for seed in (0, 0, 1))
    assert random.getstate() == state
    assert first == again != other
    assert all(len(set(dims)) == 2 and dims == sorted(dims, reverse=True) for dims in first)
    assert len({tuple(dims) for dims in first}) > 2, "draws differ between steps"


def test_evaluation_uses_all_dims(tiny_model):
    """With the model in eval mode the draw is off, and it does not advance the training draws."""
    model = tiny_model().train()
    base = Seen(model)
    loss = all_terms(model, base, DIMS, None, 1, alpha=1)
    model.eval()
    assert drawn_dims(loss, model, 2) == [DIMS, DIMS]
    model.train()
    assert drawn_dims(loss, model, 4) == drawn_dims(all_terms(model, base, DIMS, None, 1, alpha=1), model, 4)


@pytest.mark.parametrize("base", [Seen, losses.CachedMultipleNegativesRankingLoss])
def test_drawn_dims_follow_the_step(tiny_model, base, monkeypatch):
    """From seed, step and batch within the step alone: a run that begins at a later step draws what it would have.

    Evaluation between two batches and a generator that others moved make no difference.
    """
    model = tiny_model().train()
    drawn = []
    monkeypatch.setattr(loss_module, "drawn", lambda *given: drawn.append(matryoshka.drawn(*given)) or drawn[-1])

    def run_steps(steps, evaluate=False):
        drawn.clear()
        loss = all_terms(model, base(model), DIMS, None, 2, alpha=1)
        for step in steps:
            loss.begin_step(step)
            for _ in range(2):
                loss(column_features(model), None)
                if evaluate:
                    random.random()
                    model.eval()
                    loss(column_features(model), None)
                    model.train()
        return [tuple(dim for dim, _ in dims) for dims in drawn]

    whole = run_steps(range(6))
    assert len(whole) == 12
    assert len(set(whole)) > 3
    assert run_steps(range(3, 6), evaluate=True) == whole[6:]


# --- sharing, columns, wrappers ---------------------------------------------------------------------------------


def test_base_losses_can_be_shared_and_stay_usable_alone(tiny_model):
    """Before, between and after two MIPICLoss objects around it, the base loss gives the same value."""
    model = tiny_model()
    base = losses.MultipleNegativesRankingLoss(model)
    before = dict(vars(base)), run(base, model)[0]
    one, two = all_terms(model, base, DIMS), all_terms(model, base, [32, 8], alpha=0.3)
    values = [run(one, model)[0], run(base, model)[0], run(two, model)[0], run(base, model)[0], run(one, model)[0]]
    assert values[0] == values[4]
    assert values[1] == values[3] == before[1]
    assert vars(base).keys() == before[0].keys()


@pytest.mark.parametrize("base", ["mnrl-4", "triplet"])
def test_merged_columns_give_the_same_terms(tiny_model, base):
    """Columns embedded in one pass or one by one: same terms, same gradients."""
    model = tiny_model()
    base_loss, columns, labels = make_base(base, model)
    loss = all_terms(model, base_loss, DIMS, alpha=0.5)
    merged, merged_gradients = run(loss, model, columns, labels)
    projections = gradients(loss.mipic_projections)
    with column_merging_disabled():
        separate, separate_gradients = run(loss, model, columns, labels)
    assert merged == pytest.approx(separate, rel=1e-5)
    for name, gradient in gradients(loss.mipic_projections).items():
        torch.testing.assert_close(projections[name], gradient, rtol=1e-4, atol=1e-6)
    for name, gradient in separate_gradients.items():
        torch.testing.assert_close(merged_gradients[name], gradient, rtol=1e-4, atol=1e-5)


def test_distributed_and_compiled_wrappers_are_seen_through(tiny_model):
    """A wrapper with `.module` that returns another dict, as DistributedDataParallel does, gives the same terms."""

    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, features):
            return self.module(dict(features))

    model = tiny_model()
    base = losses.MultipleNegativesRankingLoss(model)
    loss = all_terms(model, base, DIMS)
    expected, expected_gradients = run(loss, model)
    wrapped = Wrapper(model)
    loss.model = base.model = wrapped
    features = column_features(model)
    model.zero_grad()
    terms = loss(features, None)
    total(terms).backward()
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected)
    assert "forward" not in vars(wrapped)
    assert "forward" not in vars(model)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected_gradients[name])


# --- architectures, numerics ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["cls", "mean", "max", "lasttoken"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("importance", ["similarity", "attention"])
def test_every_architecture_and_pooling_trains(tiny_model, architecture, pooling, importance):
    """All terms are finite and positive; every layer below a SIA layer or checkpoint and every head get gradients."""
    if importance == "attention":
        needs_eager_switch(architecture)
    side = "left" if architecture == "qwen3" else "right"
    model = tiny_model(architecture, pooling, side, normalize=True, training=True)
    loss = all_terms(
        model,
        losses.MultipleNegativesRankingLoss(model),
        DIMS,
        sia_layers=[1, 3],
        min_k=2,
        token_importance=importance,
    )
    terms = loss(column_features(model), None)
    assert list(terms) == TERMS
    total(terms).backward()
    for term in terms.values():
        assert term.shape == ()
        assert term.dtype == torch.float32
        assert torch.isfinite(term)
        assert term > 0
    for name, parameter in loss.mipic_projections.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert name.startswith("pic") or parameter.grad.abs().max() > 0, name
    found = gradients(model)
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    assert len(found) >= 20


@pytest.mark.parametrize("architecture", ["bert", "qwen3", "modernbert"])
def test_terms_do_not_depend_on_padding(tiny_model, architecture):
    """More padding on the tokenizer's side changes nothing (relative positions or masked absolute ones)."""
    side = "left" if architecture == "qwen3" else "right"
    pooling = "lasttoken" if architecture == "qwen3" else "mean"
    model = tiny_model(architecture, pooling, side)
    loss = all_terms(model, losses.MultipleNegativesRankingLoss(model), DIMS, min_k=3, sia_layers=[1, 2, 3])
    features = column_features(model)
    before = loss([dict(column) for column in features], None)
    pad = (9, 0) if side == "left" else (0, 9)
    wider = [
        {
            key: nn.functional.pad(value, pad) if isinstance(value, torch.Tensor) and value.ndim == 2 else value
            for key, value in column.items()
        }
        for column in features
    ]
    after = loss(wider, None)
    for name in TERMS:
        torch.testing.assert_close(after[name], before[name], rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize(
    "texts",
    [["dog", "cat"], ["", "a dog plays"], ["the old man"], ["a dog"] * 4, ["dog dog dog dog"] * 3],
    ids=["three-tokens", "empty", "batch-of-one", "all-equal", "repeated"],
)
def test_degenerate_batches_are_finite(tiny_model, texts):
    """Shortest sentences, a batch of one, all-equal sentences: finite terms and gradients."""
    model = tiny_model()
    loss = all_terms(model, losses.MultipleNegativesRankingLoss(model), DIMS, sia_layers=[1, 2, 3])
    terms = loss([model.preprocess(texts), model.preprocess(texts)], None)
    total(terms).backward()
    assert all(torch.isfinite(term) for term in terms.values())
    assert all(
        torch.isfinite(g).all() for g in (*gradients(model).values(), *gradients(loss.mipic_projections).values())
    )


@pytest.mark.parametrize("length", [1, 2])
def test_one_and_two_token_sentences(tiny_model, length):
    """Sentences without special tokens: CKA of one token is undefined and of two is one, so both add zero."""
    model = tiny_model()
    loss = all_terms(model, losses.MultipleNegativesRankingLoss(model), DIMS)
    features = [model.preprocess(sentences(4, seed=seed, longest=1)) for seed in (0, 1)]
    for column in features:
        for key, value in column.items():
            if isinstance(value, torch.Tensor) and value.ndim == 2:
                column[key] = value[:, :length].contiguous()
    assert features[0]["attention_mask"].sum(dim=1).tolist() == [length] * 4
    terms = loss(features, None)
    total(terms).backward()
    assert terms["sia_cka"].item() == pytest.approx(0, abs=1e-5)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())


def test_terms_are_float32_under_autocast_and_for_bf16_models(tiny_model):
    """Autocast leaves SIA and PIC in float32; a bf16 model gives float32 terms near the float32 model's."""
    model = tiny_model()
    base = losses.MultipleNegativesRankingLoss(model)
    loss = all_terms(model, base, DIMS, alpha=0.5)
    features = column_features(model)
    expected = loss([dict(column) for column in features], None)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = loss([dict(column) for column in features], None)
    model.bfloat16()
    low = loss([dict(column) for column in features], None)
    total(low).backward()
    for terms in (mixed, low):
        for name in TERMS:
            assert terms[name].dtype == torch.float32
            assert terms[name].item() == pytest.approx(expected[name].item(), rel=0.2, abs=0.02)


def test_evaluation_builds_no_graph(tiny_model):
    """Under no_grad the terms are the same numbers without gradient."""
    model = tiny_model()
    loss = all_terms(model, losses.MultipleNegativesRankingLoss(model), DIMS)
    expected, _ = run(loss, model)
    with torch.no_grad():
        terms = loss(column_features(model), None)
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected)
    assert not any(term.requires_grad for term in terms.values())


# --- arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "changed"),
    [
        ({"alpha": 0.3}, TERMS),
        ({"attention_weight": 3.0}, ["sia_attention"]),
        ({"cka_weight": 3.0}, ["sia_cka"]),
        ({"pic_weight": 3.0}, ["pic"]),
        ({"sia_layers": [1, 2]}, ["sia_attention", "sia_cka"]),
        ({"pic_chain": [(4, 1), (32, 3)]}, ["pic"]),
        ({"gammas": [0.1, 0.2, 0.9]}, ["sia_cka"]),
        ({"min_k": 7}, ["sia_cka"]),
        ({"attention_temperature": 0.2}, ["sia_attention"]),
        ({"chain_temperature": 0.5}, ["pic"]),
        ({"aggregation": "mean"}, ["sia_attention", "sia_cka", "pic"]),
        ({"kl_direction": "full_prefix"}, ["sia_attention"]),
        ({"lift_init": "orthogonal"}, ["sia_attention"]),
        ({"lift_init": "random"}, ["sia_attention"]),
        ({"token_importance": "attention"}, ["sia_attention", "sia_cka"]),
        ({"seed": 5}, ["pic"]),
        ({"matryoshka_weights": [1, 2, 3, 4]}, ["matryoshka"]),
    ],
    ids=str,
)
def test_each_argument_changes_its_term_and_no_other(tiny_model, option, changed):
    """No dead options, no side effects."""
    model = tiny_model()
    base = losses.MultipleNegativesRankingLoss(model)
    standard, _ = run(all_terms(model, base, DIMS, min_k=2), model)
    option = {"min_k": 2, **option}
    other, _ = run(all_terms(model, base, DIMS, **option), model)
    differing = [name for name in TERMS if other[name] != pytest.approx(standard[name], rel=1e-4)]
    assert differing == changed


def test_detached_teacher_gets_no_gradient(tiny_model):
    """With SIA alone on the last layer, the columns of the last layer norm beyond the widest prefix stay untouched."""
    model = tiny_model("bert")
    base = losses.MultipleNegativesRankingLoss(model)
    name = "0.model.encoder.layer.2.output.LayerNorm.bias"
    for detach in (True, False):
        loss = all_terms(model, base, [32, 8], pic_weight=0, alpha=0.5, detach_full_width=detach, min_k=3)
        terms = loss(column_features(model), None)
        model.zero_grad()
        (terms["sia_attention"] + terms["sia_cka"]).backward()
        gradient = gradients(model)[name]
        assert gradient[:8].abs().max() > 0
        assert (gradient[8:].abs().max() > 1e-9) is not detach


def test_default_terms(tiny_model):
    """Without further arguments: SIA of the last layer, constant teacher, a small attention term, and no parameters."""
    model = tiny_model()
    loss = MIPICLoss(model, losses.MultipleNegativesRankingLoss(model), DIMS)
    terms, _ = run(loss, model)
    assert not list(loss.mipic_projections.parameters())
    assert set(terms) == {"matryoshka", "sia_attention", "sia_cka"}
    explicit = all_terms(
        model,
        losses.MultipleNegativesRankingLoss(model),
        DIMS,
        alpha=0.8,
        attention_weight=0.1,
        cka_weight=1,
        pic_weight=0,
        lift_init="frozen",
        sia_layers=[DEPTH],
        detach_full_width=True,
    )
    assert run(explicit, model)[0] == terms


def test_weights_scale_terms(tiny_model):
    """Terms come out weighted: (1 - alpha) times the weight of each."""
    model = tiny_model()
    base = losses.MultipleNegativesRankingLoss(model)
    one, _ = run(all_terms(model, base, DIMS, alpha=0.5, pic_weight=1), model)
    two, _ = run(all_terms(model, base, DIMS, alpha=0.75, attention_weight=2, cka_weight=3, pic_weight=4), model)
    for name, factor in zip(TERMS, (1.5, 1, 1.5, 2), strict=True):
        assert two[name] == pytest.approx(factor * one[name], rel=1e-5)


def test_terms_that_are_off_are_absent(tiny_model):
    """A weight of zero drops the term, its parameters and, for SIA's attention, its lifts."""
    model = tiny_model()
    base = losses.MultipleNegativesRankingLoss(model)
    for off, term in (("attention_weight", "sia_attention"), ("cka_weight", "sia_cka"), ("pic_weight", "pic")):
        loss = all_terms(model, base, DIMS, **{off: 0})
        assert list(run(loss, model)[0]) == [name for name in TERMS if name != term]
        for name, parameter in loss.mipic_projections.named_parameters():
            assert parameter.grad is not None, f"{name} is not used"
    assert not list(all_terms(model, base, DIMS, alpha=1).mipic_projections.parameters())


def test_order_of_dims_has_no_effect(tiny_model):
    """Weights go with their dims."""
    model = tiny_model()
    base = losses.MultipleNegativesRankingLoss(model)
    sorted_terms, _ = run(all_terms(model, base, [32, 16, 8, 4], [4, 3, 2, 1]), model)
    shuffled, _ = run(all_terms(model, base, [8, 32, 4, 16], [2, 4, 1, 3]), model)
    assert sorted_terms == shuffled


def test_projections_are_seeded_and_the_global_generator_is_left_alone(tiny_model):
    """Same seed, same projections on every rank; constructing the loss does not change the user's random numbers."""
    model = tiny_model()
    base = losses.MultipleNegativesRankingLoss(model)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    one = all_terms(model, base, DIMS, lift_init="random")
    assert torch.equal(torch.rand(3), expected)
    two, other = (all_terms(model, base, DIMS, lift_init="random", seed=seed) for seed in (0, 1))
    for (name, a), b, c in zip(
        one.mipic_projections.named_parameters(),
        two.mipic_projections.parameters(),
        other.mipic_projections.parameters(),
        strict=True,
    ):
        assert torch.equal(a, b), name
        assert not torch.equal(a, c), name


def test_own_parameters_share_one_prefix(tiny_model):
    """learning_rate_mapping can name them: everything of ours, and nothing else, begins with mipic_projections."""
    model = tiny_model()
    loss = all_terms(model, losses.MultipleNegativesRankingLoss(model), DIMS, sia_layers=[2, 3])
    own = {name for name, _ in loss.named_parameters() if not name.startswith(("model.", "loss."))}
    assert own
    assert all(name.startswith("mipic_projections.") for name in own)
    assert "mipic_projections.sia.3.16" in own


def test_lifts_start_at_plain_truncation(tiny_model):
    """The identity lift makes the student's score the truncated dot product."""
    model = tiny_model()
    loss = all_terms(model, losses.MultipleNegativesRankingLoss(model), DIMS)
    for dim in (4, 8, 16):
        assert torch.equal(loss.mipic_projections.get_parameter(f"sia.3.{dim}"), torch.eye(WIDTH)[:dim])


def test_config_and_citation(tiny_model):
    """What the model card prints: every setting, JSON-ready, and the paper."""
    model = tiny_model()
    loss = all_terms(model, losses.MultipleNegativesRankingLoss(model), DIMS)
    config = loss.get_config_dict()
    json.dumps(config)
    assert set(config) == set(inspect.signature(MIPICLoss).parameters) - {"model"}
    assert config["loss"] == "MultipleNegativesRankingLoss"
    assert config["sia_layers"] == (3,)
    assert config["pic_chain"] == ((4, 1), (16, 2), (32, 3))
    assert "2604.24374" in loss.citation


def test_signature_begins_as_matryoshka_loss():
    """Drop-in: the same first arguments, order and defaults; everything of ours is keyword-only."""
    theirs = list(inspect.signature(losses.MatryoshkaLoss).parameters.values())
    ours = list(inspect.signature(MIPICLoss).parameters.values())
    for their, our in zip(theirs, ours, strict=False):
        assert (our.name, our.default, our.kind) == (their.name, their.default, their.kind)
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in ours[len(theirs) :])


# --- presets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", presets.RECIPES.values(), ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("by", ["name", "shape"])
def test_published_backbones_get_the_published_tables(tiny_model, monkeypatch, recipe, by):
    """Table 7 and App. A.5, by name or by shape."""
    model = tiny_model()
    backbone = Backbone(recipe.depth, recipe.width, Pooling(recipe.width))
    for module in (loss_module, hidden_states):
        monkeypatch.setattr(module, "backbone_of", lambda _: backbone)
    monkeypatch.setattr(loss_module, "embedding_width", lambda _: recipe.width)
    base = losses.MultipleNegativesRankingLoss(model)
    loss = MIPICLoss.from_preset(model, base, preset=recipe.name if by == "name" else "paper")
    assert loss.matryoshka_dims == (recipe.width, 512, 256, 128, 64, 32, 16)
    assert loss.settings.alpha == recipe.alpha
    assert loss.sia_layers == recipe.sia_layers
    assert loss.pic_chain == recipe.pic_chain
    settings = loss.get_config_dict()
    assert settings["gammas"] == (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    assert settings["attention_temperature"] == settings["chain_temperature"] == 0.05
    assert (settings["aggregation"], settings["detach_full_width"], settings["lift_init"]) == ("sum", False, "random")


def test_presets_can_be_overridden_and_are_checked(tiny_model):
    """Overrides win; unknown presets and arguments, and a backbone of another shape, are refused."""
    model = tiny_model()
    base = losses.MultipleNegativesRankingLoss(model)
    loss = MIPICLoss.from_preset(model, base, "paper", DIMS, alpha=0.9, sia_layers=[2])
    assert (loss.settings.alpha, loss.sia_layers, loss.settings.lift_init) == (0.9, (2,), "random")
    assert (
        MIPICLoss.from_preset(model, base, "default", DIMS).get_config_dict()
        == MIPICLoss(model, base, DIMS).get_config_dict()
    )
    with pytest.raises(ValueError, match=r"preset must be one of .*got 'best'"):
        MIPICLoss.from_preset(model, base, "best", DIMS)
    with pytest.raises(ValueError, match="published for 12 layers of width 768, the model has 3 of width 32"):
        MIPICLoss.from_preset(model, base, "bert-base", DIMS)
    with pytest.raises(TypeError, match="tau"):
        MIPICLoss.from_preset(model, base, "paper", DIMS, tau=1)


def test_the_released_run_is_a_preset(tiny_model, monkeypatch):
    """The authors' own settings on BERT-base; thirds of the depth and three of the dims elsewhere."""
    model = tiny_model()
    base = losses.MultipleNegativesRankingLoss(model)
    loss = MIPICLoss.from_preset(model, base, "released", DIMS)
    settings = loss.settings
    assert (settings.alpha, settings.attention_weight, settings.chain_temperature) == (0.6, 0, 0.07)
    assert settings.detach_full_width is False
    assert loss.pic_chain == ((4, 1), (16, 2), (32, 3))
    backbone = Backbone(12, 768, Pooling(768))
    for module in (loss_module, hidden_states):
        monkeypatch.setattr(module, "backbone_of", lambda _: backbone)
    monkeypatch.setattr(loss_module, "embedding_width", lambda _: 768)
    assert MIPICLoss.from_preset(model, base, "released").pic_chain == ((16, 4), (128, 8), (768, 12))


@pytest.mark.parametrize("detach_full_width", [True, False])
def test_frozen_lifts_are_identity_lifts_without_parameters(tiny_model, detach_full_width):
    """Value and gradients of the model are those of the first step with trained identity lifts."""
    grads = []
    for lift_init in ("identity", "frozen"):
        model = tiny_model()
        base = losses.MultipleNegativesRankingLoss(model)
        loss = MIPICLoss(model, base, DIMS, pic_weight=0, lift_init=lift_init, detach_full_width=detach_full_width)
        terms = loss(column_features(model), None)
        total(terms).backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        grads[-1]["terms"] = torch.stack([terms["sia_attention"], terms["sia_cka"]])
        assert bool(list(loss.mipic_projections.parameters())) == (lift_init == "identity")
    assert grads[0].keys() == grads[1].keys()
    for name, gradient in grads[0].items():
        torch.testing.assert_close(gradient, grads[1][name], msg=name)


@pytest.mark.parametrize("preset", ["paper", "released", "default"])
def test_presets_without_alignment_take_any_model(tiny_model, preset):
    """alpha=1 trains a model of several pooling modes, whose tail gives the dims; with alignment it is refused."""
    model = tiny_model()
    model[1] = Pooling(WIDTH, ("cls", "mean"))
    model.append(Dense(2 * WIDTH, 24))
    base = losses.MultipleNegativesRankingLoss(model)
    loss = MIPICLoss.from_preset(model, base, preset=preset, alpha=1)
    assert loss.matryoshka_dims == (24, 16)
    total(loss(column_features(model), None)).backward()
    with pytest.raises(ValueError, match="needs one pooling mode"):
        MIPICLoss.from_preset(model, base, preset=preset, alpha=0.5)


# --- bad input --------------------------------------------------------------------------------------------------

BAD = [
    ({"matryoshka_dims": []}, ValueError, "matryoshka_dims is empty"),
    ({"matryoshka_dims": "32"}, TypeError, "matryoshka_dims must be a sequence"),
    ({"matryoshka_dims": 32}, TypeError, "matryoshka_dims must be a sequence"),
    ({"matryoshka_weights": 2}, TypeError, "matryoshka_weights must be a sequence"),
    ({"gammas": 0.5}, TypeError, "gammas must be a sequence"),
    (
        {"matryoshka_dims": [32, 8.0]},
        TypeError,
        r"matryoshka_dims must be integers, e\.g\. \[384, 64, 16\], got \[8.0\]",
    ),
    ({"matryoshka_dims": [32, True]}, TypeError, "matryoshka_dims must be integers"),
    ({"matryoshka_dims": [32, 0]}, ValueError, r"matryoshka_dims must be > 0, got \[0\]"),
    ({"matryoshka_dims": [32, -4]}, ValueError, r"matryoshka_dims must be > 0, got \[-4\]"),
    ({"matryoshka_dims": [32, 8, 8]}, ValueError, "matryoshka_dims has duplicates"),
    ({"matryoshka_dims": [64, 32]}, ValueError, r"\[64\] exceed the model's width of 32"),
    ({"matryoshka_weights": [1, 2]}, ValueError, "4 dims, 2 weights"),
    ({"matryoshka_weights": [1, 1, 1, -1]}, ValueError, r"matryoshka_weights must be finite and >= 0, got \[-1\]"),
    ({"matryoshka_weights": [1, 1, 1, float("nan")]}, ValueError, "matryoshka_weights must be finite"),
    ({"n_dims_per_step": 0}, ValueError, "n_dims_per_step must be -1"),
    ({"n_dims_per_step": 5}, ValueError, "exceeds the number of matryoshka_dims, 4"),
    ({"n_dims_per_step": 1.5}, ValueError, "n_dims_per_step must be -1"),
    ({"alpha": -0.1}, ValueError, "alpha must be >= 0 and <= 1, got -0.1"),
    ({"alpha": 1.1}, ValueError, "alpha must be >= 0 and <= 1, got 1.1"),
    ({"alpha": float("nan")}, ValueError, "alpha must be"),
    ({"alpha": "0.5"}, TypeError, "alpha must be a number"),
    ({"attention_weight": -1}, ValueError, "attention_weight must be >= 0"),
    ({"cka_weight": float("inf")}, ValueError, "cka_weight must be >= 0 and finite"),
    ({"pic_weight": None}, TypeError, "pic_weight must be a number"),
    ({"distill_weight": -0.5}, ValueError, "distill_weight must be >= 0"),
    ({"distill_temperature": 0}, ValueError, "distill_temperature must be > 0"),
    ({"attention_temperature": 0}, ValueError, "attention_temperature must be > 0"),
    ({"chain_temperature": -1}, ValueError, "chain_temperature must be > 0"),
    ({"min_k": 0}, ValueError, "min_k must be an integer >= 1"),
    ({"seed": -1}, ValueError, "seed must be an integer >= 0"),
    ({"sia_layers": []}, ValueError, "sia_layers is empty"),
    ({"sia_layers": [0]}, ValueError, r"from 1 to the model's depth of 3, got \[0\]"),
    ({"sia_layers": [4]}, ValueError, r"from 1 to the model's depth of 3, got \[4\]"),
    ({"sia_layers": [2, 2]}, ValueError, "sia_layers has duplicates"),
    ({"pic_chain": [(8, 1)]}, ValueError, "at least two"),
    ({"pic_chain": [8, 16]}, TypeError, r"must be \(dim, layer\) pairs"),
    ({"pic_chain": [(8, 1), (32, 4)]}, ValueError, "layer 4 of .* from 1 to the model's depth of 3"),
    ({"pic_chain": [(8, 1), (64, 3)]}, ValueError, "dim 64 of .* from 1 to the model's width of 32"),
    ({"pic_chain": [(8, 2), (32, 1)]}, ValueError, r"\(32, 1\) follows \(8, 2\)"),
    ({"pic_chain": [(16, 1), (8, 3)]}, ValueError, r"\(8, 3\) follows \(16, 1\)"),
    ({"pic_chain": [(8, 1), (8, 1)]}, ValueError, "follows"),
    ({"gammas": [0.5]}, ValueError, "3 prefixes, 1 gammas"),
    ({"gammas": [0.5, 0.6, 1.5]}, ValueError, r"in \(0, 1\], got \[1.5\]"),
    ({"gammas": [0.5, 0.4, 0.6]}, ValueError, "gammas must ascend"),
    ({"sia_layers": "12"}, TypeError, "sia_layers must be a sequence"),
    ({"sia_layers": [1.0]}, ValueError, r"from 1 to the model's depth of 3, got \[1.0\]"),
    ({"detach_full_width": "no"}, TypeError, "detach_full_width must be True or False, got 'no'"),
    ({"gather_across_devices": 1}, TypeError, "gather_across_devices must be True or False, got 1"),
    ({"aggregation": "max"}, ValueError, "aggregation must be one of"),
    ({"kl_direction": "both"}, ValueError, "kl_direction must be one of"),
    ({"lift_init": "zeros"}, ValueError, "lift_init must be one of"),
    ({"token_importance": "norm"}, ValueError, "token_importance must be one of"),
    ({"loss": "mnrl"}, TypeError, "loss must be a sentence-transformers loss"),
    ({"model": nn.Linear(2, 2)}, TypeError, "model must be a SentenceTransformer"),
]


@pytest.mark.parametrize(("bad", "error", "message"), BAD, ids=[str(case[0])[:60] for case in BAD])
def test_bad_arguments_are_refused_at_construction(tiny_model, bad, error, message):
    """The message names the argument, what is allowed and what was given; nothing is left patched."""
    model = tiny_model()
    arguments = {
        "model": model,
        "loss": losses.MultipleNegativesRankingLoss(model),
        "matryoshka_dims": DIMS,
        **bad,
    }
    with pytest.raises(error, match=message):
        all_terms(**arguments)
    assert "forward" not in vars(model)


@pytest.mark.parametrize("wrapper", [losses.MatryoshkaLoss, losses.Matryoshka2dLoss, MIPICLoss])
def test_losses_that_repeat_their_base_loss_are_refused(tiny_model, wrapper):
    """MIPICLoss stands in their place, not around them."""
    model = tiny_model()
    inner = wrapper(model, losses.MultipleNegativesRankingLoss(model), DIMS)
    with pytest.raises(TypeError, match="give MIPICLoss the base loss itself"):
        all_terms(model, inner, DIMS)


def test_numpy_and_tensor_arguments_are_numbers(tiny_model):
    """Arrays, tensors and their scalars mean the same as lists, and the card's settings stay JSON."""
    model = tiny_model()
    base = losses.MultipleNegativesRankingLoss(model)
    plain = all_terms(
        model, base, [32, 8, 4], [1.0, 2.0, 0.5], alpha=0.5, sia_layers=[1, 3], gammas=[0.25, 0.5],
        pic_chain=[(8, 1), (32, 3)], min_k=2,
    )  # fmt: skip
    arrays = all_terms(
        model, base, np.array([32, 8, 4]), torch.tensor([1.0, 2.0, 0.5]), alpha=np.float32(0.5),
        sia_layers=np.array([1, 3]), gammas=np.array([0.25, 0.5]), pic_chain=np.array([(8, 1), (32, 3)]),
        min_k=np.int64(2), seed=np.int64(0), n_dims_per_step=np.int64(-1), detach_full_width=np.bool_(False),
    )  # fmt: skip
    tensors = all_terms(
        model, base, [torch.tensor(32), np.int32(8), 4], torch.tensor([1.0, 2.0, 0.5]), alpha=torch.tensor(0.5),
        sia_layers=torch.tensor([1, 3]), gammas=torch.tensor([0.25, 0.5]),
        pic_chain=torch.tensor([(8, 1), (32, 3)]), min_k=torch.tensor(2), n_dims_per_step=torch.tensor(-1),
    )  # fmt: skip
    assert json.dumps(tensors.get_config_dict()) == json.dumps(plain.get_config_dict())
    assert json.dumps(arrays.get_config_dict()) == json.dumps(plain.get_config_dict())
    assert run(arrays, model)[0] == run(plain, model)[0]


@pytest.mark.parametrize("alpha", [0.5, 1])
def test_features_that_are_no_list_of_dicts_are_refused(tiny_model, alpha):
    """One column of inputs alone, or texts, instead of a list of columns."""
    model = tiny_model()
    loss = all_terms(model, losses.MultipleNegativesRankingLoss(model), DIMS, alpha=alpha)
    (column,) = column_features(model, columns=1)
    for wrong, got in ((column, f"{type(column).__name__} of str"), (["a text"], "list of str")):
        with pytest.raises(TypeError, match=f"sentence_features must be a list with one dict .* got {got}"):
            loss(wrong, None)


def test_static_embedding_model_is_refused(tiny_model):
    """No layers to align: said at construction; alpha=1 still trains."""
    tokenizer = tiny_model().tokenizer.backend_tokenizer
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)], device="cpu")
    base = losses.MultipleNegativesRankingLoss(model)
    with pytest.raises(ValueError, match="begins with StaticEmbedding"):
        all_terms(model, base, [16, 8])
    texts = sentences(4)
    loss = all_terms(model, base, [16, 8], alpha=1)
    total(loss([model.preprocess(texts), model.preprocess(texts)], None)).backward()


def test_model_loaded_with_truncate_dim_trains_at_full_width(transformer_folder):
    """truncate_dim cuts in encode only, so the dims may go up to the full width (MatryoshkaLoss refuses them)."""
    transformer = Transformer(str(transformer_folder()))
    model = SentenceTransformer(modules=[transformer, Pooling(WIDTH)], truncate_dim=8, device="cpu").eval()
    base = losses.MultipleNegativesRankingLoss(model)
    with pytest.raises(ValueError, match="cannot exceed"):
        losses.MatryoshkaLoss(model, base, DIMS)
    cut, _ = run(all_terms(model, base, DIMS), model)
    model.truncate_dim = None
    assert run(all_terms(model, base, DIMS), model)[0] == cut


def test_a_base_loss_with_its_own_model_is_refused(tiny_model):
    """Nothing recorded is an error, not a smaller loss."""
    model, other = tiny_model(), tiny_model()
    loss = all_terms(model, losses.MultipleNegativesRankingLoss(other), DIMS)
    with pytest.raises(RuntimeError, match="did not call the model that MIPICLoss holds"):
        loss(column_features(model), None)
    assert "forward" not in vars(model)


def test_missing_full_width_warns(tiny_model, caplog):
    """As MatryoshkaLoss does."""
    model = tiny_model()
    with caplog.at_level(logging.WARNING):
        all_terms(model, losses.MultipleNegativesRankingLoss(model), [16, 8])
    assert "full width 32 is not among matryoshka_dims" in caplog.text


def test_full_width_alone_has_nothing_to_align(tiny_model, caplog):
    """One dim, the full one: a warning, and MatryoshkaLoss's value."""
    model = tiny_model()
    base = losses.MultipleNegativesRankingLoss(model)
    ours, _ = run(all_terms(model, base, [WIDTH]), model)
    assert "SIA and PIC are off" in caplog.text
    assert ours == {"matryoshka": run(losses.MatryoshkaLoss(model, base, [WIDTH]), model)[0]}


def test_an_exception_in_the_base_loss_leaves_nothing_behind(tiny_model):
    """An exception in the base loss leaves the model as it was; the next call works."""
    model = tiny_model()

    class Failing(losses.MultipleNegativesRankingLoss):
        fail = True

        def forward(self, sentence_features, labels):
            super().forward(sentence_features, labels)
            if self.fail:
                raise FloatingPointError("boom")
            return super().forward(sentence_features, labels)

    base = Failing(model)
    loss = all_terms(model, base, DIMS)
    with pytest.raises(FloatingPointError, match="boom"):
        loss(column_features(model), None)
    assert "forward" not in vars(model)
    assert model[0].auto_model.config.output_hidden_states is False
    base.fail = False
    expected, _ = run(all_terms(model, losses.MultipleNegativesRankingLoss(model), DIMS), model)
    assert run(loss, model)[0].keys() == expected.keys()


def test_depth_is_the_models(tiny_model):
    """Guard: the tiny models have the depth that the tests assume."""
    assert backbone_of(tiny_model()).depth == DEPTH
