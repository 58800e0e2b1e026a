"""The rotation of pairs: which of its steps is kept."""

from __future__ import annotations

import pytest
import torch

from mipic_st.transforms import pair_fit
from mipic_st.transforms.pairs import Pairs
from transforms_fixtures import hidden_signal


@pytest.mark.parametrize("every", [10, 1000])
def test_the_last_step_is_looked_at_too(monkeypatch, every):
    """However few there are between two looks at the held-out pairs, the start is left if the fit is better."""
    monkeypatch.setattr(pair_fit, "_CHECK_EVERY", every)
    training, test = Pairs.of(*map(torch.tensor, hidden_signal(400))).split(0.2, torch.Generator().manual_seed(0))
    options = {"generator": torch.Generator().manual_seed(0), "show_progress_bar": False}
    matrix = pair_fit.fit_pairs(training, test, torch.eye(32), [4], max_steps=60, **options)
    found = matrix[-4:, :4].square().sum() / 4
    assert found > 0.05, "of the values that pairs share, which are the last"
