"""The seam for terms: one of a user's own, with plain and with cached base losses."""

from __future__ import annotations

import pytest
import torch
from sentence_transformers.sentence_transformer import losses
from torch import nn

from conftest import DIMS, column_features, gradients, total
from mipic_st import MIPICCallback, MIPICLoss
from training_fixtures import logs, make_trainer, parameters


class Spread(nn.Module):
    """A term of ten lines: a learned direction of layer 2, along which the sentences of a column are to differ."""

    name = "spread"

    def __init__(self):
        super().__init__()
        self.direction = nn.Linear(32, 1)

    def observe(self, recorded):
        return self.direction(recorded.vectors(layer=2))

    def reduce(self, columns):
        return {"spread": -3 * torch.stack([column.var(dim=0).mean() for column in columns]).mean()}


BASES = {
    "plain": losses.MultipleNegativesRankingLoss,
    "cached": lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=4),
}


def with_spread(model, base="plain", **settings):
    loss = MIPICLoss(model, BASES[base](model), DIMS, **settings)
    torch.manual_seed(0)
    loss.add_term(Spread())
    return loss


@pytest.mark.parametrize("settings", [{}, {"attention_weight": 0, "cka_weight": 0}], ids=["with SIA", "alone"])
def test_a_term_of_ones_own(tiny_model, settings):
    """By hand: (1 - alpha) times what reduce gives; values and gradients of the cached loss are the same."""
    model = tiny_model()
    features = column_features(model, 3, rows=7)
    results = {}
    for base in BASES:
        loss = with_spread(model, base, alpha=0.7, **settings)
        loss.zero_grad()
        terms = loss([dict(column) for column in features], None)
        total(terms).backward()
        results[base] = ({name: term.item() for name, term in terms.items()}, gradients(loss))
    assert set(results["plain"][0]) == {"matryoshka", "spread"} | (set() if settings else {"sia_attention", "sia_cka"})
    assert results["cached"][0] == pytest.approx(results["plain"][0], rel=1e-5)
    assert results["cached"][1].keys() == results["plain"][1].keys()
    for name, gradient in results["plain"][1].items():
        torch.testing.assert_close(results["cached"][1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)

    head, spread = loss.terms["spread"].direction, []
    for column in features:
        states = (
            model[0]
            .auto_model(**{key: column[key] for key in ("input_ids", "attention_mask")}, output_hidden_states=True)
            .hidden_states[2]
        )
        mask = column["attention_mask"][:, :, None]
        spread.append(head((states * mask).sum(1) / mask.sum(1)).var())
    assert results["plain"][0]["spread"] == pytest.approx(0.3 * -3 * torch.stack(spread).mean().item(), rel=1e-5)


def test_its_parameters_train_and_are_saved(tiny_model, tmp_path):
    """Under the prefix of the projections, so optimizer, learning_rate_mapping and callback have them."""
    model = tiny_model(training=True)
    loss = with_spread(model)
    before = parameters(loss)
    assert "mipic_projections.spread.direction.weight" in before
    trainer = make_trainer(model, loss, tmp_path, max_steps=2, callbacks=[callback := MIPICCallback(loss)])
    trainer.train()
    assert len(logs(trainer, "spread")) == 2
    assert not torch.equal(before["mipic_projections.spread.direction.weight"], loss.terms["spread"].direction.weight)
    assert "mipic_projections.spread.direction.weight" in callback.projections()


def test_terms_that_cannot_be_added(tiny_model):
    """Two of one name, and one without any weight."""
    model = tiny_model()
    with pytest.raises(ValueError, match="'spread' cannot be added: alpha=1"):
        with_spread(model, alpha=1)
    with pytest.raises(ValueError, match="'spread' cannot be added: there is one of that name"):
        with_spread(model).add_term(Spread())
