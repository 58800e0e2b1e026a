"""Vectors of any length."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer.modules import Dense
from torch.nn import Identity

from conftest import WIDTH
from mipic_st import export_truncated, fit_layer_cuts
from mipic_st.numerics import unit_length
from transforms_fixtures import TEXTS


@pytest.mark.parametrize("length", [1e-40, 1e-30, 1e-14, 1e-3, 1e18, 1e30, 3e38])
def test_rows_of_any_length_get_length_1(length):
    """Next to others, which stay what they were to the last bit; zeros stay zeros, what is not finite is not hidden."""
    rows = np.random.default_rng(0).normal(size=(6, 16)).astype(np.float32)
    rows /= np.abs(rows).max(axis=1, keepdims=True)
    given = rows.copy()
    given[1] *= np.float32(length)
    given[2], given[3, 0] = 0, np.nan
    before, found = given.copy(), unit_length(given)
    usual = unit_length(rows)
    np.testing.assert_array_equal(given, before)
    np.testing.assert_allclose(found[1], usual[1], atol=1e-3 if length < 1e-38 else 1e-6)
    np.testing.assert_array_equal(found[[0, 4, 5]], usual[[0, 4, 5]])
    assert not found[2].any()
    assert np.isnan(found[3]).any()
    assert unit_length(np.empty((0, 4))).shape == (0, 4)


@pytest.mark.parametrize("length", [1e-14, 1e-20, 1e19])
def test_a_model_of_other_lengths_is_cut_as_it_is(tiny_model, length):
    """The similarities to keep are those of directions; what the module Normalize cannot scale is not written."""

    def scaled(by):
        dense = Dense(WIDTH, WIDTH, bias=False, activation_function=Identity(), init_weight=by * torch.eye(WIDTH))
        return tiny_model().append(dense).eval()

    options = {"layers": [1], "dims": [8], "max_steps": 0, "word_weights": False}
    (expected,), (found,) = (fit_layer_cuts(scaled(by), TEXTS, **options).report for by in (1, length))
    assert found == pytest.approx(expected, abs=1e-3)
    with pytest.raises(RuntimeError, match="differs from the grid cell"):
        export_truncated(scaled(length), dim=8)
