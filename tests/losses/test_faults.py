"""When something goes wrong in a step: a clear error, nothing left patched, nothing lost."""

from __future__ import annotations

import logging

import pytest
import torch
from sentence_transformers.sentence_transformer import losses
from torch import nn
from transformers import TrainerCallback

from conftest import DIMS, column_features, total
from mipic_st import MIPICCallback, MIPICLoss
from training_fixtures import make_loss, make_trainer, pairs, parameters


class Failing(nn.Module):
    """A base loss that fails in its n-th call."""

    def __init__(self, model, error, call):
        super().__init__()
        self.model = model
        self.inner = losses.MultipleNegativesRankingLoss(model)
        self.error, self.left = error, call

    def forward(self, features, labels):
        value = self.inner(features, labels)
        self.left -= 1
        if self.left == 0:
            raise self.error
        return value


def assert_clean(model):
    """Nothing of ours is left on the model."""
    forward = vars(model).get("forward")
    assert forward is None or "mipic" not in getattr(forward, "__module__", "")
    assert model[0].auto_model.config.output_hidden_states is False
    states = model(column_features(model)[0])
    assert "all_layer_embeddings" not in states


@pytest.mark.parametrize("error", [ValueError("bad base"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_training_goes_on_in_the_same_process_after_an_exception(tiny_model, tmp_path, error):
    """Interrupted within a step, between two dims; then train() runs again, and all is clean between."""
    model = tiny_model(training=True)
    loss = make_loss(model, Failing(model, error, 2 * len(DIMS) + 2))
    trainer = make_trainer(model, loss, tmp_path, max_steps=4, callbacks=[MIPICCallback(loss)])
    with pytest.raises(type(error)):
        trainer.train()
    assert trainer.state.global_step == 2
    assert_clean(model)
    before = parameters(loss)
    trainer.train()
    assert trainer.state.global_step == 4
    after = parameters(loss)
    assert [n for n in before if "mipic_projections" in n and torch.equal(before[n], after[n])] == []
    assert_clean(model)


def test_an_interrupt_in_backward(tiny_model, tmp_path):
    """Also in the second embedding of a cached loss, with the stand-in at work."""
    model = tiny_model(training=True)
    base = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3)
    loss = make_loss(model, base)
    names = set(vars(base))
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt

    handle = model[0].auto_model.encoder.layer[1].register_forward_hook(interrupt)
    trainer = make_trainer(model, loss, tmp_path, max_steps=2)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    handle.remove()
    assert len(calls) == 9
    assert set(vars(base)) == names
    assert_clean(model)
    trainer.train()
    assert trainer.state.global_step == 2


def test_an_exception_in_the_collator(tiny_model, tmp_path):
    """It comes through as it is, and training can start again."""
    model = tiny_model(training=True)
    loss = make_loss(model)
    trainer = make_trainer(model, loss, tmp_path, max_steps=3)
    collate, calls = trainer.data_collator, []

    def failing(rows):
        calls.append(1)
        if len(calls) == 2:
            raise OSError("disk gone")
        return collate(rows)

    failing.valid_label_columns = collate.valid_label_columns
    trainer.data_collator = failing
    with pytest.raises(OSError, match="disk gone"):
        trainer.train()
    assert_clean(model)
    trainer.train()
    assert trainer.state.global_step == 3


def test_fp16_without_a_gpu(tiny_model, tmp_path):
    """fp16=True on a machine without CUDA is accelerate's clear error (or runs); nothing of ours is left."""
    model = tiny_model(training=True)
    loss = make_loss(model)
    try:
        make_trainer(model, loss, tmp_path, fp16=True, max_steps=2, callbacks=[MIPICCallback(loss)]).train()
    except (ValueError, RuntimeError) as error:
        assert "fp16" in str(error).lower() or "half" in str(error).lower()  # noqa: PT017
    assert_clean(model)
    total(loss(column_features(model), None)).backward()


def scored_loss(model):
    """A loss whose labels are numbers."""
    return MIPICLoss(model, losses.CosineSimilarityLoss(model), DIMS, alpha=0.4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_label_names_term_and_step(tiny_model, tmp_path, value):
    """nan or inf in the labels: the error names term, value and step, and no parameter has been touched by it."""
    model = tiny_model(training=True)
    loss = scored_loss(model)
    data = pairs(40).add_column("score", [0.5] * 40)
    states = {}

    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            states[state.global_step] = parameters(loss)

    trainer = make_trainer(model, loss, tmp_path, train=data, max_steps=5, callbacks=[MIPICCallback(loss), Spoil()])
    forward = loss.forward

    def spoiled(features, labels):
        return forward(features, labels * value if len(states) == 3 else labels)

    loss.forward = spoiled
    with pytest.raises(FloatingPointError, match=rf"matryoshka = {value} at step 3 \(training batch 3 of this loss\)"):
        trainer.train()
    del loss.forward
    assert all(torch.equal(states[2][name], current) for name, current in parameters(loss).items())
    assert_clean(model)


@pytest.mark.parametrize(
    ("spoil", "term"),
    [
        (lambda loss: loss.mipic_projections.get_parameter("sia.1.8"), "sia_attention"),
        (lambda loss: loss.mipic_projections.get_parameter("pic.0.0.weight"), "pic"),
    ],
)
@pytest.mark.parametrize("cached", [False, True])
def test_the_bad_term_is_named(tiny_model, spoil, term, cached):
    """A head that holds nan: its term is named, the others are not."""
    model = tiny_model()
    base = losses.CachedMultipleNegativesRankingLoss(model) if cached else losses.MultipleNegativesRankingLoss(model)
    loss = make_loss(model, base)
    with torch.no_grad():
        spoil(loss).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=f"MIPICLoss: {term} = nan at training batch 0 of this loss"):
        loss(column_features(model), None)


def test_evaluation_reports_a_bad_value(tiny_model):
    """Without gradients nothing can be spoilt: the value is returned as it is."""
    model = tiny_model()
    loss = scored_loss(model)
    with torch.no_grad():
        terms = loss(column_features(model), torch.full((6,), float("nan")))
    assert terms["matryoshka"].isnan()
    assert terms["sia_cka"].isfinite()


def test_where_a_gradient_scaler_skips_it_is_a_warning(tiny_model, caplog):
    """fp16: the loss is passed on, so that the scaler sees it, lowers its scale and skips the step."""
    model = tiny_model()
    loss = scored_loss(model)
    loss.skips_nonfinite = True
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = parameters(loss)
    with caplog.at_level(logging.WARNING):
        terms = loss(column_features(model), torch.full((6,), float("nan")))
    assert "matryoshka = nan" in caplog.text
    assert "The gradient scaler will skip this step" in caplog.text
    scaler.scale(total(terms)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512
    assert all(torch.equal(before[name], value) for name, value in parameters(loss).items())


def test_gradients_that_overflow_are_left_to_the_scaler(tiny_model):
    """A finite loss whose scaled gradients overflow is no error: the scaler lowers its scale until they do not."""
    model = tiny_model()
    loss = make_loss(model)
    optimizer = torch.optim.SGD(loss.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38, growth_interval=10_000)
    before = parameters(loss)
    scales = []
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(total(loss(column_features(model, seed=step), None))).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    assert scales[0] < 1e38
    assert all(torch.isfinite(value).all() for value in parameters(loss).values())
    assert before.keys() == parameters(loss).keys()
