"""Invariants of the fitted tails: the objective, the rotation on vectors and in models, the least-squares cut.

References are loops over rows and dims in NumPy float64 and take nothing from ``mipic_st``.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from collections import OrderedDict
from functools import partial

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    Dropout,
    Normalize,
    Pooling,
    Router,
    StaticEmbedding,
    Transformer,
)
from torch import nn

from conftest import TAILS, WIDTH, column_features, sentences
from mipic_st import MIPICLoss
from mipic_st.deploy.truncated import export_truncated
from mipic_st.encoder.surgery import put_in_map
from mipic_st.numerics import prefix_cosines
from mipic_st.transforms.cut_fits import cut_objective, fit_cut, refine_cut
from mipic_st.transforms.layer_cut import fit_layer_cuts
from mipic_st.transforms.rotation import Rotation, fit_rotation, rotate_model, rotation_objective

# small enough for tests, on data where every value is reached in a few steps
QUICK = {"batch_size": 64, "max_steps": 30, "learning_rate": 0.03}
DIMS = [4, 8]


def hidden_signal(count=400, width=32, signal=4, seed=0):
    """Pairs whose common part lies in the last values; the first ones are noise of the same size."""
    random = np.random.default_rng(seed)
    common = random.normal(size=(count, signal))
    return [
        np.concatenate(
            [random.normal(size=(count, width - signal)), common + 0.05 * random.normal(size=(count, signal))], axis=1
        ).astype(np.float32)
        for _ in range(2)
    ]


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def reference_objective(anchors, positives, negatives, frame, dims, contrastive, weight, tau_c, tau_s, same):
    """The objective of the module's docstring, row by row."""
    candidates = np.concatenate([positives, negatives])
    count, total = len(anchors), 0.0
    for dim in dims:
        cut = [vectors @ frame[:, :dim] for vectors in (anchors, candidates)]
        for row in range(count):
            cosines = [
                float(cut[0][row] @ other) / np.linalg.norm(cut[0][row]) / np.linalg.norm(other) for other in cut[1]
            ]
            if dim in contrastive:
                allowed = [j for j in range(len(candidates)) if not same[row][j]]
                chances = {j: np.exp(cosines[j] / tau_c) for j in allowed}
                total -= np.log(chances[row] / sum(chances.values())) / count
            else:
                teacher = np.exp([float(anchors[row] @ other) / tau_s for other in positives])
                student = np.exp([cosine / tau_s for cosine in cosines[:count]])
                teacher, student = teacher / teacher.sum(), student / student.sum()
                total += weight * sum(t * np.log(t / s) for t, s in zip(teacher, student, strict=True)) / count
    return total


# --- the objective ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("more", [0, 4])
@pytest.mark.parametrize("contrastive", [[], [2], [2, 6]])
def test_objective_equals_its_formula(repeated, more, contrastive):
    """Values against the row-by-row reference, with and without further negatives and masked ones."""
    random = np.random.default_rng(0)
    anchors, positives, negatives = (unit(random.normal(size=(count, 12))) for count in (7, 7, more))
    frame = np.linalg.qr(random.normal(size=(12, 6)))[0]
    same = np.zeros((7, 7 + more), dtype=bool)
    same[2, 5] = same[5, 2] = repeated
    value = rotation_objective(
        *(torch.tensor(array) for array in (anchors, positives, frame)),
        [2, 6],
        contrastive_dims=contrastive,
        negatives=torch.tensor(negatives) if more else None,
        similarity_weight=0.7,
        contrastive_temperature=0.2,
        similarity_temperature=0.3,
        same=torch.tensor(same) if repeated else None,
    )
    expected = reference_objective(anchors, positives, negatives, frame, [2, 6], contrastive, 0.7, 0.2, 0.3, same)
    assert value.item() == pytest.approx(expected, rel=1e-9)


def test_gradients_of_the_objective():
    """Autograd against finite differences, in float64."""
    generator = torch.Generator().manual_seed(0)
    anchors, positives = (torch.randn(5, 6, generator=generator, dtype=torch.double) for _ in range(2))
    frame = torch.randn(6, 4, generator=generator, dtype=torch.double, requires_grad=True)
    normalize = torch.nn.functional.normalize
    assert torch.autograd.gradcheck(
        lambda frame: rotation_objective(
            normalize(anchors, dim=1), normalize(positives, dim=1), frame, [2, 4], contrastive_dims=[2]
        ),
        (frame,),
    )


def test_prefix_cosines_are_cosines_of_prefixes():
    """Equals cutting, normalising and multiplying."""
    random = np.random.default_rng(1)
    left, right = random.normal(size=(4, 9)), random.normal(size=(6, 9))
    for dim in (2, 5, 9):
        cosines = prefix_cosines(torch.tensor(left), torch.tensor(right), dim)
        np.testing.assert_allclose(cosines.numpy(), unit(left[:, :dim]) @ unit(right[:, :dim]).T, atol=1e-12)


# --- the rotation on vectors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_rotation_is_orthogonal_and_keeps_cosines(pairs, as_tensor):
    """R^T R = I to 1e-5, cosines at full width to 1e-5, for arrays and tensors."""
    anchors, positives = hidden_signal()
    convert = torch.tensor if as_tensor else np.asarray
    rotation = fit_rotation(convert(anchors), convert(positives) if pairs else None, dims=DIMS, **QUICK)
    matrix = rotation.matrix.numpy()
    assert np.abs(matrix.T @ matrix - np.eye(32)).max() < 1e-5
    turned = unit(np.asarray(rotation(convert(anchors))))
    assert np.abs(turned @ turned.T - unit(anchors) @ unit(anchors).T).max() < 1e-5
    assert np.abs(matrix - np.eye(32)).max() > 0.1, "something was learnt"


def test_rotation_finds_the_signal():
    """Pairs that agree in their last four values only: at four dims from chance to nearly all found."""
    anchors, positives = hidden_signal()
    rotation = fit_rotation(anchors, positives, dims=[4], **QUICK | {"max_steps": 150})
    (row,) = rotation.report
    assert row["accuracy_before"] < 0.2
    assert row["accuracy_after"] > 0.8
    fresh = hidden_signal(seed=5)
    first, second = (rotation(vectors, dim=4) for vectors in fresh)
    assert ((first @ second.T).argmax(axis=1) == np.arange(400)).mean() > 0.5
    assert rotation.gained
    assert not rotation.worse_dims


def test_columns_behind_the_largest_dim_follow_their_variance():
    """The completion is ordered, so that a cut beyond the fitted dims loses the least."""
    anchors, positives = hidden_signal()
    anchors *= np.linspace(0.1, 2, 32, dtype=np.float32)
    rotation = fit_rotation(anchors, positives, dims=[4], **QUICK)
    variance = (unit(rotation(anchors))[:, 4:] ** 2).mean(axis=0)
    assert np.corrcoef(_ranks(variance), -np.arange(28))[0, 1] > 0.95
    assert variance[:5].mean() > 2 * variance[-5:].mean()


def test_texts_only_are_passed_over_eight_times_at_most():
    """More steps than that change nothing, fewer do."""
    anchors, _ = hidden_signal(count=100)
    options = {**QUICK, "batch_size": 30, "held_out": 0.1}
    most, more, fewer = (
        fit_rotation(anchors, dims=[4], **options | {"max_steps": steps}).matrix for steps in (24, 500, 12)
    )
    torch.testing.assert_close(most, more, rtol=0, atol=0)
    assert (most - fewer).abs().max() > 1e-4


def test_wide_vectors_solve_no_large_system():
    """Beyond 1,024 values only the frame is kept orthonormal, and the result is as orthogonal."""
    # a signal so strong that a few steps find it
    anchors, positives = (vectors * ([1] * 1096 + [8] * 4) for vectors in hidden_signal(width=1100))
    rotation = fit_rotation(anchors, positives, dims=DIMS, **QUICK | {"max_steps": 12})
    product = rotation.matrix.T @ rotation.matrix
    assert (product - torch.eye(1100)).abs().max() < 1e-5
    assert (rotation.matrix[:, :8] - torch.eye(1100, 8)).abs().max() > 0.01


def test_the_same_seed_gives_the_same_rotation_and_leaves_generators_alone():
    """Bit for bit; another seed differs; nobody else's random numbers move."""
    anchors, positives = hidden_signal()
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, again, other = (fit_rotation(anchors, positives, dims=DIMS, seed=seed, **QUICK) for seed in (0, 0, 1))
    assert torch.equal(first.matrix, again.matrix)
    assert not torch.equal(first.matrix, other.matrix)
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()


@pytest.mark.parametrize(
    "change",
    [
        {"contrastive_dims": [8]},
        {"contrastive_dims": []},
        {"similarity_weight": 5.0},
        {"contrastive_temperature": 0.5},
        {"similarity_temperature": 1.0},
        {"batch_size": 32},
        {"negatives": 64},
        {"max_steps": 5},
        {"learning_rate": 0.001},
        {"held_out": 0.4},
    ],
    ids=str,
)
def test_every_argument_changes_the_fit(change):
    """No dead options."""
    anchors, positives = hidden_signal()
    both_terms = QUICK | {"contrastive_dims": [4]}
    plain = fit_rotation(anchors, positives, dims=DIMS, **both_terms)
    changed = fit_rotation(anchors, positives, dims=DIMS, **both_terms | change)
    assert (plain.matrix - changed.matrix).abs().max() > 1e-4


def test_progress_is_shown_when_asked_for(capsys):
    """A bar over steps, on the error stream."""
    for shown in (True, False):
        fit_rotation(*hidden_signal(100), dims=DIMS, show_progress_bar=shown, **QUICK)
        assert ("Rotation" in capsys.readouterr().err) is shown


def test_the_fit_stops_at_its_best_step():
    """Steps that make the held-out part worse are not kept: a rate far too high leaves no worse objective than none."""
    anchors, positives = hidden_signal(150)
    rotation = fit_rotation(anchors, positives, dims=DIMS, **QUICK | {"learning_rate": 100.0})
    for row in rotation.report:
        assert row["change"] >= -2 * row["error"]


def test_lengths_do_not_count():
    """Vectors of any length give the rotation of their directions."""
    anchors, positives = hidden_signal()
    scale = np.random.default_rng(0).uniform(0.5, 20, size=(400, 1)).astype(np.float32)
    one, other = (fit_rotation(vectors, positives, dims=DIMS, **QUICK) for vectors in (anchors, anchors * scale))
    torch.testing.assert_close(one.matrix[:, :8], other.matrix[:, :8], atol=0.03, rtol=0)
    assert (one.matrix[:, :8] - torch.eye(32, 8)).abs().max() > 0.3


def test_repeated_texts_are_no_negatives_and_never_on_both_sides():
    """A text that comes twice stays on one side of the split, and its copies are masked in a batch."""
    from mipic_st.transforms.rotation import _Pairs

    anchors, positives = hidden_signal(60)
    anchors, positives = (torch.tensor(np.concatenate([vectors, vectors[:30]])) for vectors in (anchors, positives))
    pairs = _Pairs.of(anchors, positives)
    training, test = pairs.split(0.2, torch.Generator().manual_seed(0))
    assert not set(training.ids.flatten().tolist()) & set(test.ids.flatten().tolist())
    first, second, others, same = pairs.batch(torch.tensor([0, 60, 1]), 2)
    assert same.tolist() == [[False, True, False], [True, False, False]]
    assert [len(part) for part in (first, second, others)] == [2, 2, 1]


def test_repeated_rows_of_texts_count_once():
    """Texts only: copies are left out, and no text is its own neighbour."""
    from mipic_st.transforms.rotation import _Pairs

    vectors = torch.tensor(hidden_signal(50)[0])
    pairs = _Pairs.of(torch.cat([vectors, vectors[:10]]), None).with_positives()
    assert len(pairs) == 50
    assert (pairs.ids[:, 0] != pairs.ids[:, 1]).all()
    cosines = unit(vectors.numpy()) @ unit(vectors.numpy()).T
    np.fill_diagonal(cosines, -2)
    np.testing.assert_array_equal(pairs.rows[:, 1].numpy(), cosines.argmax(axis=1))


HARM = {"dim": 8, "accuracy_before": 0.9, "accuracy_after": 0.5, "similarity_before": 0.8, "similarity_after": 0.7,
        "change": -0.4, "error": 0.1}  # fmt: skip


@pytest.mark.parametrize(("error", "warned"), [(0.1, True), (0.3, False)])
def test_a_rotation_that_harms_says_so(caplog, monkeypatch, error, warned):
    """Held-out dims below truncation by two standard errors are named with the figures, smaller changes are not."""
    monkeypatch.setattr("mipic_st.transforms.rotation._held_out_report", lambda *_: [HARM | {"error": error}])
    with caplog.at_level(logging.WARNING, logger="mipic_st.transforms.rotation"):
        rotation = fit_rotation(*hidden_signal(50), dims=[8], **QUICK | {"max_steps": 2})
    assert rotation.worse_dims == ((8,) if warned else ())
    assert not rotation.gained
    assert ("worse than plain truncation at dims [8]" in caplog.text) is warned
    assert ("90.0" in caplog.text and "50.0" in caplog.text) is warned


@pytest.mark.parametrize("switched_off", [torch.no_grad, torch.inference_mode])
def test_the_fit_runs_where_gradients_are_switched_off(switched_off):
    """An encoder is run without gradients, and often the fit with it; vectors may come from there too."""
    anchors, positives = (torch.tensor(vectors) for vectors in hidden_signal(100))
    plain = fit_rotation(anchors, positives, dims=DIMS, **QUICK)
    with switched_off():
        inside = fit_rotation(anchors.clone(), positives.clone(), dims=DIMS, **QUICK)
    assert torch.equal(inside.matrix, plain.matrix)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["reversed", "by column", "mapped from a file", "foreign byte order"])
def test_arrays_of_any_layout(kind, tmp_path):
    """What torch does not take is copied: the same rotation, the same turned vectors."""
    vectors = hidden_signal(100)[0]
    np.save(tmp_path / "vectors.npy", vectors)
    other = {
        "reversed": vectors[::-1].copy()[::-1],
        "by column": np.asfortranarray(vectors),
        "mapped from a file": np.load(tmp_path / "vectors.npy", mmap_mode="r"),
        "foreign byte order": vectors.astype(vectors.dtype.newbyteorder("S")),
    }[kind]
    one, two = (fit_rotation(array, dims=DIMS, **QUICK | {"max_steps": 3}) for array in (vectors, other))
    assert torch.equal(one.matrix, two.matrix)
    np.testing.assert_allclose(one(other), one(vectors), rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"anchors": [[1.0, 2.0]]}, TypeError, "anchors must be a NumPy array or a tensor"),
        ({"anchors": np.ones((50, 32), dtype=np.int8)}, TypeError, "quantised vectors cannot be turned"),
        ({"anchors": np.ones(32, dtype=np.float32)}, ValueError, r"anchors must have the shape \(N, D\)"),
        ({"anchors": np.full((50, 32), np.nan)}, ValueError, "anchors holds NaN or infinite values in 50 of 50 rows"),
        ({"positives": np.zeros((50, 32))}, ValueError, "positives holds 50 zero vectors, the first in row 0"),
        ({"positives": np.ones((49, 32))}, ValueError, "anchors and positives must have one vector for each other"),
        ({"positives": np.ones((50, 16))}, ValueError, "anchors and positives must have one vector for each other"),
        ({"dims": [64]}, ValueError, "exceed the model's width of 32"),
        ({"dims": [32]}, ValueError, "must hold a dimension below the vectors' width of 32"),
        ({"dims": [0]}, ValueError, "dims must be > 0"),
        ({"dims": []}, ValueError, "dims is empty"),
        ({"contrastive_dims": [16]}, ValueError, r"contrastive_dims must be among dims \[4, 8\], got \[16\]"),
        ({"similarity_weight": -1}, ValueError, "similarity_weight must be >= 0"),
        ({"similarity_weight": 0, "contrastive_dims": [4]}, ValueError, r"leaves nothing to fit at dims \[8\]"),
        ({"contrastive_temperature": 0}, ValueError, "contrastive_temperature must be > 0"),
        ({"similarity_temperature": float("nan")}, ValueError, "similarity_temperature must be > 0"),
        ({"negatives": 0}, ValueError, "negatives must be an integer >= 1"),
        ({"batch_size": 1}, ValueError, "batch_size must be an integer >= 2"),
        ({"max_steps": 0}, ValueError, "max_steps must be an integer >= 1"),
        ({"learning_rate": 0}, ValueError, "learning_rate must be > 0"),
        ({"held_out": 0}, ValueError, "held_out must be > 0"),
        ({"held_out": 0.9}, ValueError, "held_out must be .* <= 0.5"),
        ({"seed": -1}, ValueError, "seed must be an integer >= 0"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(change, error, message):
    """Argument, value and fix in the message."""
    anchors, positives = hidden_signal(50)
    arguments = {"anchors": anchors, "positives": positives, "dims": DIMS} | change
    with pytest.raises(error, match=message):
        fit_rotation(arguments.pop("anchors"), arguments.pop("positives"), **arguments)


def test_too_few_texts_are_refused():
    """Fewer distinct texts than the largest dim cannot choose among so many values; copies do not count."""
    vectors = hidden_signal(6)[0]
    for few in (vectors, np.repeat(vectors, 10, axis=0)):
        with pytest.raises(ValueError, match="6 distinct texts cannot say which 8 values to keep"):
            fit_rotation(few, dims=DIMS)


def test_pairs_of_equal_texts_are_refused():
    """Anchors as their own positives hold no information."""
    vectors = hidden_signal(50)[0]
    with pytest.raises(ValueError, match="the same vectors: give anchors only"):
        fit_rotation(vectors, vectors, dims=DIMS)


# --- the object -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rotation():
    return fit_rotation(*hidden_signal(), dims=DIMS, **QUICK)


@pytest.mark.parametrize("dim", [None, 8, 20])
def test_application_to_arrays_tensors_and_single_vectors(rotation, dim):
    """vectors @ R, cut and scaled to unit length with a dim; kind and type stay."""
    vectors = hidden_signal(5, seed=2)[0]
    expected = vectors @ rotation.matrix.numpy()
    if dim is not None:
        expected = unit(expected[:, :dim])
    np.testing.assert_allclose(rotation(vectors, dim), expected, atol=1e-5)
    np.testing.assert_allclose(rotation(vectors[0], dim), expected[0], atol=1e-5)
    got = rotation(torch.tensor(vectors, dtype=torch.bfloat16), dim)
    assert got.dtype == torch.bfloat16
    np.testing.assert_allclose(got.float().numpy(), expected, atol=0.1)
    assert rotation(vectors.astype(np.float64), dim).dtype == np.float64


def test_application_checks_its_vectors(rotation):
    """Another width, or a dim beyond it, is named."""
    with pytest.raises(ValueError, match="vectors have width 16, this rotation is for 32"):
        rotation(np.ones((2, 16)))
    with pytest.raises(ValueError, match="exceed the model's width of 32"):
        rotation(np.ones((2, 32)), dim=33)
    # they would come back as integers, nearly all of them zero
    with pytest.raises(TypeError, match="vectors must hold floating numbers, got int8; quantised"):
        rotation(np.ones((2, 32), dtype=np.int8))
    with pytest.raises(TypeError, match="vectors must be a NumPy array or a tensor of vectors, got list"):
        rotation([[1.0] * 32])


def test_saved_and_loaded(rotation, tmp_path):
    """Matrix, dims and report come back; what is no rotation is refused."""
    rotation.save(tmp_path / "rotation.safetensors")
    loaded = Rotation.load(tmp_path / "rotation.safetensors")
    assert torch.equal(loaded.matrix, rotation.matrix)
    assert (loaded.dims, loaded.report) == (rotation.dims, rotation.report)
    with pytest.raises(FileNotFoundError, match="no file"):
        Rotation.load(tmp_path / "nothing")
    (tmp_path / "broken").write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match="is no rotation"):
        Rotation.load(tmp_path / "broken")


def test_report_is_readable(rotation):
    """One line per dim, as text and as a frame; figures are those of the held-out rows, recomputed here."""
    assert len(str(rotation).splitlines()) == 2 + len(DIMS)
    assert rotation.to_frame()["dim"].tolist() == DIMS
    anchors, positives = (torch.tensor(vectors) for vectors in hidden_signal())
    from mipic_st.transforms.rotation import _Pairs

    _, test = _Pairs.of(anchors, positives).split(0.1, torch.Generator().manual_seed(0))
    first, second = test.anchors[test.rows[:, 0]].numpy(), test.positives[test.rows[:, 1]].numpy()
    for row in rotation.report:
        for when, turn in (("before", lambda v: v), ("after", rotation)):
            cosines = unit(turn(first)[:, : row["dim"]]) @ unit(turn(second)[:, : row["dim"]]).T
            accuracy = (cosines.argmax(axis=1) == np.arange(len(first))).mean()
            assert row[f"accuracy_{when}"] == pytest.approx(accuracy, abs=1e-6)
            assert row[f"similarity_{when}"] == pytest.approx(
                np.corrcoef(*(_ranks(x.ravel()) for x in (cosines, unit(first) @ unit(second).T)))[0, 1], abs=1e-3
            )


def _ranks(values):
    return np.argsort(np.argsort(values))


# --- the cut on vectors -----------------------------------------------------------------------------------------------


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


def cut_reference(states, targets, weight, dims, vector_weight, temperature):
    """The objective of a cut, text by text."""
    vectors, count = states @ weight, len(states)
    total = 0.0
    for dim in sorted({*dims, targets.shape[1]}):
        for row, goal in zip(vectors[:, :dim], targets[:, :dim], strict=True):
            total += vector_weight * ((row / np.linalg.norm(row) - goal / np.linalg.norm(goal)) ** 2).sum() / count

    def shares(rows, i):
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        others = [np.exp(rows[i] @ rows[j] / temperature) for j in range(count) if j != i]
        return np.array(others) / sum(others)

    for dim in dims:
        for i in range(count):
            wanted, found = shares(targets, i), shares(vectors[:, :dim], i)
            total += (wanted * np.log(wanted / found)).sum() / count
    return total


@pytest.mark.parametrize(("dims", "vector_weight"), [([4], 0.0), ([4], 1.0), ([2, 4, 7], 0.6)])
def test_cut_objective_against_numpy(dims, vector_weight):
    """Value against a loop over texts, gradient against finite differences."""
    random = np.random.default_rng(0)
    states, targets, weight = random.normal(size=(6, 5)), unit(random.normal(size=(6, 7))), random.normal(size=(5, 7))
    tensors = [torch.from_numpy(part) for part in (states, targets, weight)]
    expected = cut_reference(states, targets, weight, dims, vector_weight, 0.3)
    objective = partial(cut_objective, dims=dims, vector_weight=vector_weight, temperature=0.3)
    assert objective(*tensors).item() == pytest.approx(expected, rel=1e-6)
    assert torch.autograd.gradcheck(lambda w: objective(*tensors[:2], w), tensors[2].requires_grad_())


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


@pytest.mark.parametrize(
    "changed", [{"batch_size": 64}, {"learning_rate": 1e-2}, {"max_steps": 5}, {"vector_weight": 4.0}]
)
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
        ({"dims": [11]}, "dims"),
        ({"vector_weight": -1}, "vector_weight must be >= 0"),
        ({"max_steps": 0}, "max_steps must be"),
        ({"batch_size": 1}, "batch_size must be"),
        ({"learning_rate": 0}, "learning_rate must be > 0"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_refine_cut_refuses(bent, changed, message):
    """Rows that do not fit each other, and numbers out of range."""
    weight, states, targets, held = bent
    given = {"states": states, "targets": targets, "dims": [4], "held_out": held, "max_steps": 2}
    with pytest.raises(ValueError, match=message):
        refine_cut(weight, **(given | changed))


# --- on models --------------------------------------------------------------------------------------------------------

TEXTS = sentences(300, seed=7, shortest=3)
ROTATE = {"fit_batch_size": 64, "max_steps": 60, "learning_rate": 0.02, "held_out": 0.2}


def rotate_until_gained(model):
    """A random model need not gain with every split of the texts, and is then left as it was."""
    tries = (rotate_model(model, TEXTS, DIMS, **ROTATE, seed=seed) for seed in range(20))
    return next(rotation for rotation in tries if rotation.gained)


def cosines(model, texts=TEXTS[:40], **options):
    vectors = unit(np.asarray(model.encode(texts, show_progress_bar=False, **options), dtype=np.float64))
    return vectors @ vectors.T


def dense_count(model):
    return sum(isinstance(module, Dense) for module in model.modules())


class Doubled(Dense):
    """A Dense whose forward is its own."""

    def forward(self, features):
        features = super().forward(features)
        return features | {"sentence_embedding": 2 * features["sentence_embedding"].abs()}


def test_a_dense_with_a_forward_of_its_own_is_not_folded(tiny_model):
    """What it does to the vectors is not known, so the rotation stands behind it."""
    model = tiny_model()
    model.append(Doubled(WIDTH, WIDTH, bias=False, activation_function=None))
    weight, vectors = model[-1].linear.weight.clone(), model.encode(TEXTS[:5])
    rotation = rotate_until_gained(model)
    assert type(model[-1]) is Dense
    assert torch.equal(model[-2].linear.weight, weight)
    np.testing.assert_allclose(model.encode(TEXTS[:5]), rotation(vectors), atol=1e-5)


@pytest.mark.parametrize("tail", [None, *TAILS])
def test_rotated_model_keeps_full_width_and_gains(tiny_model, tail, tmp_path):
    """Behind every kind of tail: equal cosines, the rotation's vectors, also after saving and loading."""
    model = tiny_model(tail=tail, normalize=tail is None)
    before, vectors = cosines(model), model.encode(TEXTS[:20])
    count = dense_count(model)
    rotation = rotate_until_gained(model)
    assert np.abs(cosines(model) - before).max() < 1e-5
    np.testing.assert_allclose(unit(model.encode(TEXTS[:20])), unit(rotation(vectors)), atol=1e-4)
    folded = tail in ("embeddinggemma", "sentence-t5", "stella", "max, normalized in the middle")
    assert dense_count(model) == count + (not folded)
    assert isinstance(model[-1], Normalize) == (tail in (None, "embeddinggemma", "sentence-t5", "labse"))
    model.save_pretrained(str(tmp_path / "rotated"))
    loaded = SentenceTransformer(str(tmp_path / "rotated"), device="cpu")
    np.testing.assert_allclose(loaded.encode(TEXTS[:20]), model.encode(TEXTS[:20]), atol=1e-6)


def test_autocast_does_not_reach_the_fit():
    """Inside of a bf16 autocast the same rotation comes out, and turns vectors in full precision."""
    vectors = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    plain = fit_rotation(vectors, dims=[4], max_steps=5)
    with torch.autocast("cpu", torch.bfloat16):
        inside = fit_rotation(vectors, dims=[4], max_steps=5)
        turned = inside(vectors)
    torch.testing.assert_close(inside.matrix, plain.matrix)
    torch.testing.assert_close(turned, plain(vectors))
    assert inside.report == plain.report


def test_rotated_folder_loads_without_this_package(tiny_model, tmp_path):
    """Config keys, card and vectors are there in a process that cannot import mipic_st."""
    model = tiny_model(normalize=True)
    rotate_model(model, TEXTS, [*DIMS, WIDTH], **ROTATE)
    model.save_pretrained(str(tmp_path / "rotated"))
    code = (
        "import sys; sys.modules['mipic_st'] = None\n"
        "from sentence_transformers import SentenceTransformer\n"
        f"m = SentenceTransformer({str(tmp_path / 'rotated')!r}, device='cpu', truncate_dim=8)\n"
        "print(','.join(repr(float(x)) for x in m.encode(['the cat sees'])[0]))\n"
        "print(m[0].auto_model.config.is_matryoshka, m[0].auto_model.config.matryoshka_dimensions)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    values, keys = run.stdout.strip().splitlines()[-2:]
    np.testing.assert_allclose(
        [float(x) for x in values.split(",")], model.encode(["the cat sees"], truncate_dim=8)[0], atol=1e-6
    )
    assert keys == "True [4, 8, 32]"
    card = (tmp_path / "rotated" / "README.md").read_text()
    assert "- matryoshka" in card
    assert "Dense" in card


def test_the_card_of_a_loaded_model_says_it(tiny_model, tmp_path):
    """A card that came with the model is kept, and gets the tag and one section, which names the last dims."""
    tiny_model(normalize=True).save_pretrained(str(tmp_path / "plain"))
    model = SentenceTransformer(str(tmp_path / "plain"), device="cpu")
    for dims in ([4], DIMS, DIMS):
        rotate_model(model, TEXTS, dims, **ROTATE)
    model.save_pretrained(str(tmp_path / "rotated"))
    plain, rotated = ((tmp_path / name / "README.md").read_text() for name in ("plain", "rotated"))
    assert rotated.count("## Truncated embeddings") == 1
    assert rotated.count("- matryoshka") == 1
    assert rotated.count("cut to") == rotated.count("cut to 4 or 8 values") == 1
    assert "SentenceTransformer(..., truncate_dim=8)" in rotated
    assert plain.split("# SentenceTransformer")[1].strip() in rotated


def test_a_second_rotation_is_folded(tiny_model, monkeypatch):
    """Rotating a rotated model multiplies into the same Dense; cosines still are the first model's."""
    model = tiny_model(normalize=True)
    before = cosines(model)
    monkeypatch.setattr(Rotation, "gained", True)
    rotate_model(model, TEXTS, [2], **ROTATE | {"max_steps": 30})
    module = next(module for module in model if isinstance(module, Dense))
    weight = module.linear.weight.detach().clone()
    rotate_model(model, TEXTS, [8, 16], **ROTATE)
    assert dense_count(model) == 1
    assert not torch.equal(weight, module.linear.weight)
    assert np.abs(cosines(model) - before).max() < 1e-5


def test_static_embeddings_can_be_rotated_but_not_cut(tiny_model):
    """Token vectors without layers: the rotation works, layers are refused."""
    tokenizer = tiny_model().tokenizer.backend_tokenizer
    # its weights are drawn: with some draws nothing gains, and the model rightly stays as it was
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        static = StaticEmbedding(tokenizer, embedding_dim=16)
    model = SentenceTransformer(modules=[static], device="cpu")
    before = cosines(model)
    assert rotate_model(model, TEXTS, DIMS, **ROTATE).gained
    assert np.abs(cosines(model) - before).max() < 1e-5
    with pytest.raises(TypeError, match="StaticEmbedding"):
        fit_layer_cuts(model, TEXTS, layers=[1])


def test_a_router_is_rotated_behind_its_routes(transformer_folder):
    """One rotation for both routes; texts are encoded by the route of their column."""
    from datasets import Dataset

    def route(pooling):
        return [Transformer(str(transformer_folder())), Pooling(WIDTH, pooling), Normalize()]

    model = SentenceTransformer(
        modules=[Router.for_query_document(route("mean"), route("cls")), Normalize()], device="cpu"
    ).eval()
    data = Dataset.from_dict({"query": TEXTS[:150], "answer": TEXTS[150:]})
    before = [model.encode(TEXTS[:20], task=task) for task in ("query", "document")]
    rotation = rotate_model(model, data, DIMS, router_mapping={"query": "query", "answer": "document"}, **ROTATE)
    assert rotation.gained
    assert isinstance(model[-1], Normalize)
    for task, vectors in zip(("query", "document"), before, strict=True):
        np.testing.assert_allclose(model.encode(TEXTS[:20], task=task), rotation(vectors), atol=1e-5)


def test_half_precision_models(tiny_model):
    """In bfloat16 the Dense has the model's precision; cosines move by its rounding, the matrix is exact."""
    model = tiny_model(normalize=True).to(torch.bfloat16)
    before = cosines(model)
    rotation = rotate_until_gained(model)
    assert next(m for m in model if isinstance(m, Dense)).linear.weight.dtype == torch.bfloat16
    assert np.abs(cosines(model) - before).max() < 3e-2
    assert (rotation.matrix.T @ rotation.matrix - torch.eye(WIDTH)).abs().max() < 1e-5


def test_texts_are_encoded_once_with_their_prompts(tiny_model, monkeypatch):
    """Each distinct text of a column one time, with the prompt of its column."""
    from datasets import Dataset

    model = tiny_model(normalize=True)
    calls = []
    original = model.encode
    monkeypatch.setattr(model, "encode", lambda texts, **kw: calls.append((list(texts), kw)) or original(texts, **kw))
    data = Dataset.from_dict({"anchor": TEXTS[:100] + TEXTS[:100], "positive": TEXTS[100:300]})
    rotate_model(model, data, DIMS, prompts={"anchor": "query: "}, **ROTATE)
    assert [(len(texts), options["prompt"]) for texts, options in calls[:2]] == [(100, "query: "), (200, None)]
    assert all(len(texts) <= 32 for texts, _ in calls[2:]), "afterwards, probes only"


def test_a_text_of_both_columns_is_one_text(tiny_model):
    """Encoded apart, it is padded otherwise, and rounding makes two texts of it, one the other's negative."""
    from datasets import Dataset

    from mipic_st.transforms.rotation import _Pairs

    model = tiny_model(normalize=True)
    columns = {"anchor": TEXTS[:200], "positive": TEXTS[:60] + TEXTS[260:200:-1] + TEXTS[60:140]}
    fitted = []
    with pytest.MonkeyPatch.context() as patch:
        original = _Pairs.of.__func__
        patch.setattr(_Pairs, "of", classmethod(lambda cls, *given: fitted.append(original(cls, *given)) or fitted[-1]))
        rotate_model(model, Dataset.from_dict(columns), DIMS, **ROTATE)
    (pairs,) = fitted
    assert pairs.texts == len({*columns["anchor"], *columns["positive"]})
    assert len(pairs) == sum(one != other for one, other in zip(*columns.values(), strict=True))


@pytest.mark.parametrize("names", [("0", "1", "3"), ("1", "2"), ("0", "2", "3"), ("encoder", "pooling", "normalize")])
@pytest.mark.parametrize("ends", [Normalize, Dropout])
def test_modules_keep_their_places_whatever_their_names(tiny_model, names, ends):
    """Names may have gaps, as after an entry was taken out of modules.json; nothing is overwritten."""
    encoder, pooling = tiny_model()
    modules = OrderedDict(zip(names, [encoder, pooling, ends()], strict=False))
    model = SentenceTransformer(modules=modules, device="cpu").eval()
    kinds = [type(module) for module in model]
    before = cosines(model)
    assert rotate_until_gained(model)
    place = len(kinds) - (kinds[-1] is Normalize)
    assert [type(module) for module in model] == [*kinds[:place], Dense, *kinds[place:]]
    assert np.abs(cosines(model) - before).max() < 1e-5


def test_taking_out_leaves_names_and_modules(tiny_model):
    """A model that resists has afterwards what it had, also where names have gaps."""
    encoder, pooling = tiny_model()
    modules = OrderedDict([("0", encoder), ("1", pooling), ("3", nn.LayerNorm(WIDTH))])
    model = SentenceTransformer(modules=modules, device="cpu")
    children = dict(model.named_children())
    put_in_map(model, torch.eye(WIDTH))()
    assert dict(model.named_children()) == children
    assert list(children) == ["0", "1", "3"]


def test_under_inference_mode_a_model_stays_trainable(tiny_model):
    """What is put into a model, and a cut copy, must not be made of tensors that autograd refuses."""
    model = tiny_model(normalize=True)
    with torch.inference_mode():
        rotate_until_gained(model)
        cuts = fit_layer_cuts(model, TEXTS, layers=[2], dims=[8], max_steps=5)
        cut = export_truncated(model, layer=2, dim=8, cuts=cuts)
    for each in (model, cut):
        loss = each.train()(each.preprocess(["a dog", "the cat"]))["sentence_embedding"].sum()
        loss.backward()
        assert all(parameter.grad is not None for parameter in each[-2].parameters())


def test_generators_of_gpus_are_left_alone(tiny_model, monkeypatch):
    """torch.manual_seed reaches them too, and no fork of the CPU's state brings them back."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a GPU's generator was seeded"))
    fit_rotation(*hidden_signal(60), dims=[4], max_steps=2)
    model = tiny_model()
    MIPICLoss(model, MultipleNegativesRankingLoss(model), [WIDTH, 8], pic_weight=1.0, lift_init="random")


def test_every_route_is_checked(transformer_folder):
    """Routes of two precisions: the Dense fits one of them, and the model is given back as it was."""
    from datasets import Dataset

    tokenizer = Transformer(str(transformer_folder())).tokenizer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        static = StaticEmbedding(tokenizer.backend_tokenizer, embedding_dim=WIDTH)
    halves = [Transformer(str(transformer_folder())).bfloat16(), Pooling(WIDTH, "mean")]
    model = SentenceTransformer(modules=[Router.for_query_document([static], halves)], device="cpu").eval()
    data = Dataset.from_dict({"anchor": TEXTS[:150], "positive": TEXTS[150:]})
    before = [model.encode(TEXTS[:5], task=task, convert_to_tensor=True) for task in ("query", "document")]
    with pytest.raises(RuntimeError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rotation, "gained", True)
        rotate_model(model, data, DIMS, router_mapping={"anchor": "document", "positive": "query"}, **ROTATE)
    for task, vectors in zip(("query", "document"), before, strict=True):
        assert torch.equal(model.encode(TEXTS[:5], task=task, convert_to_tensor=True), vectors)


def test_cuts_of_another_state_of_the_model_are_refused(tiny_model):
    """A rotation turns what the cuts were fitted to; an export would give vectors of the old space."""
    model = tiny_model(normalize=True)
    cuts = fit_layer_cuts(model, TEXTS, layers=[2], dims=[8], max_steps=0)
    export_truncated(model, layer=2, dim=8, cuts=cuts)
    rotate_until_gained(model)
    with pytest.raises(
        ValueError, match="cuts were fitted when the model gave other vectors: it was rotated or trained"
    ):
        export_truncated(model, layer=2, dim=8, cuts=cuts)
    again = fit_layer_cuts(model, TEXTS, layers=[2], dims=[8], max_steps=0)
    export_truncated(model.bfloat16(), layer=2, dim=8, cuts=again)


def test_cuts_are_fitted_as_the_model_encodes(tiny_model):
    """With its default prompt, unless another one is given; an empty one is none."""
    model = tiny_model(normalize=True)
    model.prompts, model.default_prompt_name = {"q": "the old woman "}, "q"
    options = {"layers": [2], "dims": [8], "max_steps": 0}
    default, named, none = (
        fit_layer_cuts(model, TEXTS, prompt=prompt, **options).maps[2] for prompt in (None, "the old woman ", "")
    )
    assert torch.equal(default, named)
    model.default_prompt_name = None
    assert torch.equal(none, fit_layer_cuts(model, TEXTS, **options).maps[2])
    assert (default - none).abs().max() > 1e-3


@pytest.mark.parametrize("word_weights", [False, True])
def test_a_text_of_nothing_is_named(tiny_model, word_weights):
    """It has no states, so it cannot be fitted; the message has the text, not a row of a shuffled part."""
    model = tiny_model(normalize=True)
    model[0].tokenizer.backend_tokenizer.post_processor = None  # no special tokens
    with pytest.raises(ValueError, match="texts holds '', of which the tokenizer leaves nothing: leave it out"):
        fit_layer_cuts(
            model, [*TEXTS, ""], layers=[2], dims=[8], max_steps=int(word_weights), word_weights=word_weights
        )


def test_a_truncated_model_is_rotated_at_full_width(tiny_model):
    """truncate_dim cuts in encode only; the rotation has the model's width, and the cut stays."""
    model = tiny_model(normalize=True)
    model.truncate_dim = 8
    rotation = rotate_model(model, TEXTS, DIMS, **ROTATE)
    assert len(rotation.matrix) == WIDTH
    assert model.encode(["the cat"]).shape == (1, 8)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"anchor": "abc", "positive": "def", "negative": "ghi"}, {"anchor": "abc", "positive": "def"}),
        ({"text": "abc", "label": [0, 1, 2]}, {"text": "abc"}),
        ({"s1": "abc", "s2": "def", "score": [0.0, 0.8, 1.0]}, {"s1": "bc", "s2": "ef"}),
        ({"s1": "abc", "s2": "def", "score": [0.0, 4.2, 5.0]}, {"s1": "bc", "s2": "ef"}),
        ({"s1": "abc", "s2": "def", "label": [1, 0, 1]}, {"s1": "ac", "s2": "df"}),
        ({"id": [1, 2, 3], "s1": "abc", "s2": "def"}, {"s1": "abc", "s2": "def"}),
        ({"s1": "abc", "s2": "def", "labels": [0.0, 1.0, 1.0]}, {"s1": "bc", "s2": "ef"}),
        ({"s1": "abc", "s2": "def", "similarity_score": [0.1, 0.9, 0.3]}, {"s1": "b", "s2": "e"}),
        ({"s1": "abc", "s2": "def", "score": [-1, 1, 1]}, {"s1": "bc", "s2": "ef"}),
        ({"s1": "abc", "s2": "def", "score": [0, 3, 4]}, {"s1": "c", "s2": "f"}),
        ({"s1": "abc", "s2": "def", "s3": "ghi", "label": [0.3, 9.0, 18.2]}, {"s1": "abc", "s2": "def"}),
        ({"s1": "abc", "s2": "def", "label": [[[0.1], [0.2]]] * 3}, {"s1": "abc", "s2": "def"}),
    ],
    ids=str,
)
def test_what_is_taken_of_a_dataset(columns, expected):
    """The first two text columns; of scored pairs those that belong together."""
    from datasets import Dataset

    from mipic_st.transforms.rotation import _text_columns

    got = _text_columns(Dataset.from_dict({name: list(values) for name, values in columns.items()}))
    assert got == {name: list(values) for name, values in expected.items()}


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ({"s1": "abc", "s2": "def", "label": [0, 1, 2]}, ValueError, "which of them says that"),
        ({"s1": "abc", "s2": "def", "labels": [0, 1, 4]}, ValueError, r"'labels' of data holds \[0, 1, 4\], and which"),
        ({"s1": "abc", "s2": "def", "label": ["yes", "no", "yes"]}, ValueError, "'label' of data holds no numbers"),
        ({"s1": "abc", "s2": [None, "e", "f"], "s3": "ghi"}, TypeError, "column 's2' of data .* it holds None"),
        ({"s1": "abc", "s2": "def", "score": [0.1, 0.2, 0.3]}, ValueError, "no row of data has a score of 0.8"),
        ({"s1": "abc", "s2": "def", "score": [0.1, float("nan"), 1.0]}, ValueError, "no finite numbers"),
        ({"number": [1, 2, 3]}, ValueError, "no column of texts"),
        ({"text": []}, ValueError, "data has no rows"),
        ("one text", TypeError, "got one text"),
        (["a", 3], TypeError, "it holds 3"),
        ([], ValueError, "data has no texts"),
        (5, TypeError, "data must be a sequence"),
    ],
    ids=str,
)
def test_unusable_data_is_named(tiny_model, columns, error, message):
    """What is wrong with the data, before anything is encoded."""
    from datasets import Dataset

    data = Dataset.from_dict({k: list(v) for k, v in columns.items()}) if isinstance(columns, dict) else columns
    with pytest.raises(error, match=message):
        rotate_model(tiny_model(), data, DIMS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"prompts": {"Anchor": "query: "}},
            r"prompts names \['Anchor'\], .* its columns are \['anchor', 'positive'\]",
        ),
        ({"router_mapping": {"query": "query"}}, r"router_mapping names \['query'\], which data does not have"),
        ({"prompts": ["query: "]}, r"prompts must be a string or a dict of column names to strings, got \['query: '\]"),
        ({"prompts": {"anchor": 5}}, r"prompts must map column names to strings, got \{'anchor': 5\}"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
    ],
    ids=str,
)
def test_options_that_fit_no_column_are_named(tiny_model, options, message):
    """A name that is spelt otherwise would leave the prompt out and say nothing."""
    from datasets import Dataset

    data = Dataset.from_dict({"anchor": TEXTS[:100], "positive": TEXTS[100:200]})
    with pytest.raises((TypeError, ValueError), match=message):
        rotate_model(tiny_model(), data, DIMS, **options)


def test_the_log_says_what_was_used(tiny_model, caplog):
    """Columns go by their order, whatever they are called, so a user can see which ones were taken."""
    from datasets import Dataset

    data = Dataset.from_dict({"number": list(range(150)), "anchr": TEXTS[:150], "postive": TEXTS[150:]})
    with caplog.at_level(logging.INFO, logger="mipic_st.transforms.rotation"):
        rotate_model(tiny_model(), data, DIMS, **ROTATE)
        rotate_model(tiny_model(), data.remove_columns("postive"), DIMS, **ROTATE)
    assert "fitted on 150 pairs of 'anchr' and 'postive'" in caplog.text
    assert "fitted on 150 texts of 'anchr'" in caplog.text


def test_nothing_gained_nothing_changed(tiny_model, caplog):
    """A fit that improves no dim leaves the model as it was and says so."""
    model = tiny_model(normalize=True)
    modules, before = list(model.children()), model.encode(TEXTS[:5])
    with caplog.at_level(logging.WARNING, logger="mipic_st.transforms.rotation"):
        rotation = rotate_model(model, TEXTS, DIMS, fit_batch_size=64, max_steps=1)
    assert not rotation.gained
    assert "No dim gained on held-out data, so the model was left as it is" in caplog.text
    assert f"fitted on {len(TEXTS)} texts of a list" in caplog.text
    assert list(model.children()) == modules
    np.testing.assert_array_equal(model.encode(TEXTS[:5]), before)
    assert not hasattr(model[0].auto_model.config, "is_matryoshka")


@pytest.mark.parametrize("tail", [None, "stella"])
def test_a_model_that_resists_is_left_as_it_was(tiny_model, tail, monkeypatch):
    """If full-width cosines change, modules and weights are restored and the error says by how much."""
    from mipic_st.transforms import rotation as module

    model = tiny_model(normalize=tail is None, tail=tail)
    modules, names = list(model.children()), [name for name, _ in model.named_children()]
    before = model.encode(TEXTS[:5])
    original = module.put_in_map
    monkeypatch.setattr(module, "put_in_map", lambda model, matrix: original(model, matrix * 1.01 + 0.01))
    with pytest.raises(RuntimeError, match="changed full-width cosines by"):
        rotate_model(model, TEXTS, DIMS, **ROTATE)
    assert list(model.children()) == modules
    assert [name for name, _ in model.named_children()] == names
    np.testing.assert_array_equal(model.encode(TEXTS[:5]), before)


def test_a_rotated_model_trains(tiny_model):
    """MIPICLoss on it sees the rotated space, and the rotation's weight gets a gradient."""
    model = tiny_model(normalize=True, training=True)
    rotate_model(model, TEXTS, DIMS, **ROTATE)
    assert model.training
    assert [name for name, module in model.named_modules() if not module.training] == []
    loss = MIPICLoss(model, MultipleNegativesRankingLoss(model), [WIDTH, *DIMS])
    terms = loss(column_features(model), None)
    torch.stack(list(terms.values())).sum().backward()
    (dense,) = (module for module in model if isinstance(module, Dense))
    assert dense.linear.weight.grad.abs().max() > 0


@pytest.mark.parametrize("after_a_step", [False, True])
@pytest.mark.parametrize("tail", [None, "labse"])
def test_a_loss_that_was_made_before_sees_the_rotation(tiny_model, tail, after_a_step):
    """Its terms are those of a loss that is made afterwards, whether or not it has run already."""

    def make():
        return MIPICLoss(model, MultipleNegativesRankingLoss(model), [WIDTH, *DIMS], detach_teacher=False)

    model = tiny_model(tail=tail, normalize=tail is None)
    loss, features = make(), column_features(model)
    if after_a_step:
        loss(features, None)
    assert rotate_until_gained(model)
    before, after = (each(features, None) for each in (loss, make()))
    assert {name: term.item() for name, term in before.items()} == {name: term.item() for name, term in after.items()}
    model.append(Dense(WIDTH, 16))
    with pytest.raises(ValueError, match=r"made for a model of \(depth, width\) \(3, 32\), which is \(3, 16\) now"):
        loss(features, None)


# --- layer cuts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", [None, "embeddinggemma", "labse", "stella"])
@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_fitted_export_is_the_least_squares_map(tiny_model, architecture, tail, tmp_path):
    """The saved cut model gives pooled states times W, W fitted here by NumPy on the same texts."""
    if tail is not None and architecture != "bert":
        pytest.skip("one architecture is enough for the tails")
    model = tiny_model(architecture, tail=tail, normalize=tail is None)
    cuts = fit_layer_cuts(model, TEXTS, layers=[2], dims=[8], ridge=0.01, max_steps=0)
    export_truncated(model, 2, 8, cuts=cuts).save_pretrained(str(tmp_path / "cut"))
    loaded = SentenceTransformer(str(tmp_path / "cut"), device="cpu")
    assert loaded[0].auto_model.config.get_text_config().num_hidden_layers == 2
    assert [type(module).__name__ for module in loaded] == ["Transformer", "Pooling", "Dense", "Normalize"]
    (dense,) = (module for module in loaded if isinstance(module, Dense))
    assert (dense.in_features, dense.out_features, dense.linear.bias) == (WIDTH, 8, None)

    plain = export_truncated(model, 2)
    pooled = SentenceTransformer(modules=list(plain.children())[:2], device="cpu").eval()
    states, full = (np.asarray(m.encode(TEXTS), dtype=np.float64) for m in (pooled, model))
    order = np.random.default_rng(0).permutation(len(TEXTS))[30:]
    gram = states[order].T @ states[order]
    weight = np.linalg.solve(gram + 0.01 * np.trace(gram) / WIDTH * np.eye(WIDTH), states[order].T @ unit(full)[order])
    np.testing.assert_allclose(loaded.encode(TEXTS[:30]), unit(states[:30] @ weight[:, :8]), atol=1e-4)


def test_grid_reports_every_cell(tiny_model):
    """Figures of plain, fitted and full depth against vectors of models that were really cut."""
    from datasets import Dataset
    from scipy.stats import spearmanr

    model = tiny_model(normalize=True)
    sts = Dataset.from_dict(
        {"sentence1": TEXTS[:40], "sentence2": TEXTS[40:80], "score": np.random.default_rng(0).random(40).tolist()}
    )
    cuts = fit_layer_cuts(model, TEXTS, dims=[8, WIDTH], sts=sts)
    assert [(row["layer"], row["dim"]) for row in cuts.report] == [(1, 8), (1, 32), (2, 8), (2, 32)]
    assert cuts.to_frame().shape == (4, 9)
    held = [TEXTS[i] for i in np.random.default_rng(0).permutation(len(TEXTS))[:30]]
    upper = np.triu_indices(30, 1)
    reference = cosines(model, held)[upper]
    row = cuts.report[2]
    for kind, cut in (
        ("plain", export_truncated(model, 2, 8)),
        ("fitted", export_truncated(model, 2, 8, cuts=cuts)),
        ("full", export_truncated(model, dim=8)),
    ):
        assert row[f"similarity_{kind}"] == pytest.approx(spearmanr(cosines(cut, held)[upper], reference)[0], abs=1e-3)
        first, second = (unit(cut.encode(list(sts[name]))) for name in ("sentence1", "sentence2"))
        assert row[f"sts_{kind}"] == pytest.approx(spearmanr((first * second).sum(1), sts["score"])[0], abs=1e-3)
    ours = unit(export_truncated(model, 2, 8, cuts=cuts).encode(held))
    theirs = unit(model.encode(held)[:, :8])
    assert row["similarity_mixed"] == pytest.approx(spearmanr((ours @ theirs.T)[upper], reference)[0], abs=1e-3)


def test_cuts_are_refined_for_their_dims(tiny_model):
    """By default the map goes on from least squares, and what a dim keeps on held-out texts is not less."""
    model = tiny_model(normalize=True)
    plain, refined = (fit_layer_cuts(model, TEXTS, layers=[1], dims=[8], max_steps=steps) for steps in (0, 400))
    assert not torch.equal(plain.maps[1], refined.maps[1])
    free = fit_layer_cuts(model, TEXTS, layers=[1], dims=[8], vector_weight=0)
    assert not torch.equal(free.maps[1], refined.maps[1])
    assert free.report[0]["similarity_mixed"] < refined.report[0]["similarity_mixed"] - 0.02
    assert torch.equal(refined.maps[1], fit_layer_cuts(model, TEXTS, layers=[1], dims=[8]).maps[1])
    assert refined.report[0]["similarity_fitted"] > plain.report[0]["similarity_fitted"]


def test_cut_of_a_rotated_model_aims_at_the_rotated_space(tiny_model):
    """After a rotation, the fitted cut gives the rotated vectors: at small dims it follows the full depth."""
    model = tiny_model(normalize=True)
    rotate_model(model, TEXTS, DIMS, **ROTATE)
    cuts = fit_layer_cuts(model, TEXTS, layers=[2], dims=[8], vector_weight=10)
    small = export_truncated(model, 2, 8, cuts=cuts)
    full = model.encode(TEXTS[:50], truncate_dim=8, normalize_embeddings=True)
    assert (small.encode(TEXTS[:50]) * full).sum(axis=1).mean() > 0.8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 8, "texts": TEXTS}, "give a layer below 3"),
        ({"layer": 3, "dim": 8, "texts": TEXTS}, "give a layer below 3"),
        ({"layer": 1, "dim": 8, "texts": TEXTS[:20]}, "20 texts are too few for a map from 32 values: give 38 or more"),
    ],
)
def test_fits_that_make_no_sense_are_refused(tiny_model, arguments, message):
    """No layer to bridge, or too few texts."""
    with pytest.raises(ValueError, match=message):
        export_truncated(tiny_model(), **arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"texts": "one text"}, TypeError, "texts must be a list of texts, got one text"),
        ({"texts": [1, 2]}, TypeError, "texts must be a list of texts, it holds 1"),
        ({"texts": []}, ValueError, "texts has no texts"),
        ({"dims": [64]}, ValueError, "exceed the model's width of 32"),
        ({"batch_size": 0}, ValueError, "batch_size must be an integer >= 1, got 0"),
        ({"vector_weight": -1}, ValueError, "vector_weight must be >= 0 and finite, got -1"),
        ({"max_steps": -1}, ValueError, "max_steps must be an integer >= 0, got -1"),
        ({"sts": (["a"], ["b"], [1.0])}, ValueError, "sts must hold as many first texts"),
        ({"sts": (["a", "b"], ["b", "c"], [1.0, float("nan")])}, ValueError, "sts holds scores that are no finite"),
    ],
    ids=str,
)
def test_bad_arguments_of_cuts_are_named(tiny_model, change, error, message):
    """Argument, value and fix in the message."""
    arguments = {"texts": TEXTS, "layers": [1], "dims": [8]} | change
    with pytest.raises(error, match=message):
        fit_layer_cuts(tiny_model(), arguments.pop("texts"), **arguments)


@pytest.mark.parametrize("layer", [None, 2])
@pytest.mark.parametrize("tail", TAILS)
def test_tails_are_cut_to_their_first_values(tiny_model, tail, layer, tmp_path):
    """Saved and loaded, an export without a fit gives the first values of what the model's own tail gives."""
    from mipic_st.encoder.encoding import encode_layers

    model = tiny_model(tail=tail)
    export_truncated(model, layer, 8).save_pretrained(str(tmp_path / "cut"))
    loaded = SentenceTransformer(str(tmp_path / "cut"), device="cpu")
    wanted = encode_layers(model, TEXTS[:10], [layer or 3])[:, 0]
    np.testing.assert_allclose(loaded.encode(TEXTS[:10]), unit(wanted[:, :8]), atol=1e-5)


def test_cuts_of_another_layer_are_refused(tiny_model):
    """A grid serves the layers it was fitted for."""
    model = tiny_model()
    cuts = fit_layer_cuts(model, TEXTS, layers=[1], dims=[8])
    with pytest.raises(ValueError, match=r"cuts hold layers \[1\], not 2"):
        export_truncated(model, 2, 8, cuts=cuts)
    with pytest.raises(ValueError, match="both given"):
        export_truncated(model, 1, 8, cuts=cuts, texts=TEXTS)
    for layers in ([0], [3]):
        with pytest.raises(ValueError, match="layers must be from 1 to 2"):
            fit_layer_cuts(model, TEXTS, layers=layers)


def test_nothing_to_cut_and_nothing_to_keep(tiny_model):
    """A model of one layer has none to cut after; texts that are all one to the tokenizer have no similarities."""
    with pytest.raises(ValueError, match="the model has one layer, below which nothing can be cut"):
        fit_layer_cuts(tiny_model(layers=1), TEXTS)
    unknown = [f"unknown{number}" for number in range(60)]
    with pytest.raises(ValueError, match="all texts have the same vector"):
        fit_layer_cuts(tiny_model(), unknown, layers=[1], dims=[8], max_steps=5)


# --- the real model ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_minilm_on_its_own_texts(minilm, data_folder):
    """2,000 Banking77 texts: topics at 16 dims gain, STS13 stays within half a point, cosines within 1e-5."""
    import pandas as pd
    from scipy.stats import spearmanr

    train, test, sts = (
        pd.read_csv(data_folder / name, keep_default_na=False)
        for name in ("banking77_train.csv", "banking77_test.csv", "sts13_test.csv")
    )
    train = train.sample(2000, random_state=0)
    test = test.sample(1000, random_state=0)

    def figures():
        first, second, fitted, fresh = (
            minilm.encode(list(texts), truncate_dim=16, normalize_embeddings=True, batch_size=64)
            for texts in (sts.sentence1, sts.sentence2, train.text, test.text)
        )
        found = train.label.to_numpy()[(fresh @ fitted.T).argmax(axis=1)] == test.label.to_numpy()
        return spearmanr((first * second).sum(axis=1), sts.score)[0], found.mean()

    before = figures()
    rotation = rotate_model(minilm, list(train.text), [128, 64, 32, 16, 8], max_steps=100)
    after = figures()
    assert rotation.gained
    assert after[0] > before[0] - 0.005
    assert after[1] > before[1] + 0.04
    cuts = fit_layer_cuts(minilm, list(train.text), layers=[3], dims=[64, 16])
    assert all(row["similarity_fitted"] > row["similarity_plain"] + 0.1 for row in cuts.report)
