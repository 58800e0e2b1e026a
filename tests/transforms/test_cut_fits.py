"""Invariants of the linear map behind an early layer, on arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mipic_st.transforms.cut_fits import fit_cut, refine_cut
from transforms_fixtures import unit


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.5])
def test_cut_is_ridge_regression(ridge):
    """Against the normal equations solved by NumPy's least squares on augmented rows."""
    random = np.random.default_rng(0)
    states, targets = random.normal(size=(300, 12)), random.normal(size=(300, 7))
    size = np.sqrt(ridge * np.trace(states.T @ states) / 12)
    augmented = np.concatenate([states, size * np.eye(12)]), np.concatenate([targets, np.zeros((12, 7))])
    expected = np.linalg.lstsq(*augmented, rcond=None)[0]
    np.testing.assert_allclose(fit_cut(states, targets, ridge=ridge).numpy(), expected, atol=1e-5)


def test_cuts_are_nested():
    """The first columns are the fit for the first values alone."""
    random = np.random.default_rng(0)
    states, targets = random.normal(size=(100, 12)), random.normal(size=(100, 7))
    torch.testing.assert_close(fit_cut(states, targets)[:, :3], fit_cut(states, targets[:, :3]))


@pytest.mark.parametrize(
    ("states", "targets", "ridge", "message"),
    [
        (np.ones((5, 12)), np.ones((5, 3)), 0.1, "5 texts are too few for a map from 12 values"),
        (np.ones((50, 12)), np.ones((49, 3)), 0.1, "one row for each text, got 50 and 49"),
        (np.ones((50, 12)), np.ones((50, 3)), -1, "ridge must be >= 0"),
        (np.full((50, 12), np.inf), np.ones((50, 3)), 0.1, "states holds NaN or infinite values"),
    ],
)
def test_bad_cuts_are_named(states, targets, ridge, message):
    """Rows, ridge and values."""
    with pytest.raises(ValueError, match=message):
        fit_cut(states, targets, ridge=ridge)


@pytest.fixture(scope="module")
def bent():
    """States whose targets no linear map reaches: least squares, and what a cut is refined on."""
    random = np.random.default_rng(0)
    states = random.normal(size=(900, 12)).astype(np.float32)
    targets = unit(np.tanh(2 * states @ random.normal(size=(12, 10)))).astype(np.float32)
    weight = fit_cut(states[100:], targets[100:])
    return weight, states[100:], targets[100:], (states[:100], targets[:100])


def test_refined_cuts_keep_similarities_better(bent):
    """On rows that no step saw, cosines at the dims follow the full width better than after least squares alone."""
    from scipy.stats import spearmanr

    weight, states, targets, held = bent
    refined = refine_cut(weight, states, targets, [2, 4], held_out=held)
    upper = np.triu_indices(100, 1)
    reference = (held[1] @ held[1].T)[upper]
    for dim in (2, 4):
        before, after = (
            spearmanr((cut @ cut.T)[upper], reference)[0]
            for cut in (unit(held[0] @ w.numpy()[:, :dim]) for w in (weight, refined))
        )
        assert after > before + 0.005
    vectors = states @ refined.numpy()
    # lengths stay those of the targets
    assert (vectors * targets).sum() / (vectors**2).sum() == pytest.approx(1, abs=1e-4)


def test_a_high_vector_weight_keeps_the_space(bent):
    """Vectors of the cut stay comparable with the full model's at small dims, the more the higher the weight."""
    weight, states, targets, held = bent
    near = []
    for vector_weight in (0.0, 10.0):
        refined = refine_cut(weight, states, targets, [2], held_out=held, vector_weight=vector_weight).numpy()
        near.append((unit((held[0] @ refined)[:, :2]) * unit(held[1][:, :2])).sum(axis=1).mean())
    assert near[0] < near[1] - 0.005
    least_squares = (unit((held[0] @ weight.numpy())[:, :2]) * unit(held[1][:, :2])).sum(axis=1).mean()
    assert near[1] > least_squares - 0.002


def test_refined_cuts_are_repeatable(bent):
    """The same with the same seed, another with another; states of any length; global generators are left alone."""
    weight, states, targets, held = bent
    state = torch.get_rng_state()
    first, again, other = (
        refine_cut(weight, states, targets, [4], held_out=held, max_steps=20, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())
    longer = refine_cut(weight / 8, states * 8, targets, [4], held_out=(held[0] * 8, held[1]), max_steps=20)
    torch.testing.assert_close(8 * longer, first, rtol=1e-3, atol=1e-4)


def test_a_refinement_that_harms_is_dropped(bent):
    """If no step is better on held-out rows, least squares stays, up to its length."""
    weight, states, targets, held = bent
    kept = refine_cut(weight, states, targets, [4], held_out=held, max_steps=10, learning_rate=50.0)
    torch.testing.assert_close(kept / kept.norm(), weight / weight.norm())


@pytest.mark.parametrize("changed", [{"learning_rate": 1e-2}, {"max_steps": 5}, {"vector_weight": 4.0}])
def test_every_argument_of_refine_cut_counts(bent, changed):
    """Another value gives another map."""
    weight, states, targets, held = bent
    options = {"held_out": held, "max_steps": 10}
    usual = refine_cut(weight, states, targets, [4], **options)
    assert not torch.equal(usual, refine_cut(weight, states, targets, [4], **(options | changed)))


@pytest.mark.parametrize("shown", [True, False])
def test_refine_cut_shows_a_bar(bent, capsys, shown):
    """If it is asked to."""
    weight, states, targets, held = bent
    refine_cut(weight, states, targets, [4], held_out=held, max_steps=2, show_progress_bar=shown)
    assert ("Layer cut: 100%" in capsys.readouterr().err) is shown


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"states": np.ones((800, 11), dtype=np.float32)}, r"maps states \(N, 12\).*got \(800, 11\)"),
        ({"targets": np.ones((799, 10), dtype=np.float32)}, r"got \(800, 12\) and \(799, 10\)"),
        ({"states": np.full((800, 12), np.nan, dtype=np.float32)}, "states holds NaN"),
        ({"held_out": (np.zeros((3, 12), dtype=np.float32), np.ones((3, 10), dtype=np.float32))}, "3 zero vectors"),
        ({"weight": torch.full((12, 10), float("nan"))}, "weight holds NaN"),
        ({"dims": [11]}, "dims"),
        ({"vector_weight": -1}, "vector_weight must be >= 0"),
        ({"max_steps": 0}, "max_steps must be"),
        ({"learning_rate": 0}, "learning_rate must be > 0"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_refine_cut_refuses(bent, changed, message):
    """Rows that do not fit each other, and numbers out of range."""
    weight, states, targets, held = bent
    given = {"weight": weight, "states": states, "targets": targets, "dims": [4], "held_out": held, "max_steps": 2}
    with pytest.raises(ValueError, match=message):
        refine_cut(**(given | changed))


@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e30])
def test_refine_cut_starts_anywhere(bent, size):
    """A start of any length, zeros too, ends in a finite map; zeros may stay the best on the held-out part."""
    weight, states, targets, held = bent
    refined = refine_cut(size * weight, states, targets, [4], held_out=held, max_steps=40)
    assert bool(refined.isfinite().all())
    cosine = F.cosine_similarity(torch.as_tensor(states) @ refined, torch.as_tensor(targets))
    assert cosine.mean() > (0.3 if size else -1e-6)
