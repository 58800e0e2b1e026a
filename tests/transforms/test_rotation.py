"""Invariants of the rotation on vectors: the fit and the object."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from conftest import WIDTH
from mipic_st import MIPICLoss
from mipic_st.transforms.rotation import Rotation
from mipic_st.transforms.rotation_fit import fit_rotation
from transforms_fixtures import DIMS, QUICK, hidden_signal, unit


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_rotation_is_orthogonal_and_keeps_cosines(pairs, as_tensor):
    """R^T R = I to 1e-5, cosines at full width to 1e-5, for arrays and tensors."""
    anchors, positives = hidden_signal()
    convert = torch.tensor if as_tensor else np.asarray
    rotation = fit_rotation(convert(anchors), convert(positives) if pairs else None, dims=DIMS, **QUICK)
    matrix = rotation.matrix
    assert np.abs(matrix.T @ matrix - np.eye(32)).max() < 1e-5
    rotated = unit(np.asarray(rotation(convert(anchors))))
    assert np.abs(rotated @ rotated.T - unit(anchors) @ unit(anchors).T).max() < 1e-5
    assert np.abs(matrix - np.eye(32)).max() > 0.1, "something was learnt"


def test_rotation_finds_the_signal():
    """Pairs that agree in their last four values only: at four dims from chance to nearly all found."""
    anchors, positives = hidden_signal()
    rotation = fit_rotation(anchors, positives, dims=[4])
    (row,) = rotation.report
    assert (rotation.measure, rotation.chosen[:21]) == ("nDCG@10", "rotation of the pairs")
    assert row["truncated"] < 0.2
    assert row["rotated"] > 0.8
    fresh = hidden_signal(seed=5)
    first, second = (rotation(vectors, dim=4) for vectors in fresh)
    assert ((first @ second.T).argmax(axis=1) == np.arange(400)).mean() > 0.5
    assert rotation.gained
    assert not rotation.worse_dims


def test_columns_behind_the_largest_dim_follow_their_variance():
    """The completion is ordered, so that a cut beyond the fitted dims loses the least."""
    anchors, positives = hidden_signal()
    for vectors in (anchors, positives):
        vectors *= np.linspace(0.1, 2, 32, dtype=np.float32)
    rotation = fit_rotation(anchors, positives, dims=[4], **QUICK)
    variance = (unit(rotation(positives))[:, 4:] ** 2).mean(axis=0)
    assert np.corrcoef(variance.argsort().argsort(), -np.arange(28))[0, 1] > 0.95
    assert variance[:5].mean() > 2 * variance[-5:].mean()


def test_wide_vectors_solve_no_large_system():
    """Beyond 1,024 values only the frame is kept orthonormal, and the result is as orthogonal."""
    # a signal so strong that a few steps find it
    anchors, positives = (vectors * ([1] * 1096 + [8] * 4) for vectors in hidden_signal(width=1100))
    rotation = fit_rotation(anchors, positives, dims=DIMS, **QUICK | {"max_steps": 12})
    product = rotation.matrix.T @ rotation.matrix
    assert np.abs(product - np.eye(1100)).max() < 1e-5
    assert np.abs(rotation.matrix[:, :8] - np.eye(1100, 8)).max() > 0.01


def test_the_same_seed_gives_the_same_rotation_and_leaves_generators_alone():
    """Bit for bit; another seed differs; nobody else's random numbers move."""
    anchors, positives = hidden_signal()
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, again, other = (fit_rotation(anchors, positives, dims=DIMS, seed=seed, **QUICK) for seed in (0, 0, 1))
    assert np.array_equal(first.matrix, again.matrix)
    assert not np.array_equal(first.matrix, other.matrix)
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()


@pytest.mark.parametrize("change", [{"max_steps": 5}, {"held_out": 0.4}, {"seed": 1}], ids=str)
def test_every_argument_changes_the_fit(change):
    """No dead options."""
    anchors, positives = hidden_signal()
    plain, changed = (fit_rotation(anchors, positives, dims=DIMS, **QUICK | options) for options in ({}, change))
    assert np.abs(plain.matrix - changed.matrix).max() > 1e-4


def test_progress_is_shown_when_asked_for(capsys):
    """A bar over steps, on the error stream."""
    for shown in (True, False):
        fit_rotation(*hidden_signal(100), dims=DIMS, show_progress_bar=shown, **QUICK)
        assert ("Rotation" in capsys.readouterr().err) is shown


def test_lengths_do_not_count():
    """Vectors of any length give the rotation of their directions."""
    anchors, positives = hidden_signal()
    scale = np.random.default_rng(0).uniform(0.5, 20, size=(400, 1)).astype(np.float32)
    one, other = (fit_rotation(vectors, positives, dims=DIMS, **QUICK) for vectors in (anchors, anchors * scale))
    np.testing.assert_allclose(one.matrix[:, :8], other.matrix[:, :8], atol=0.15, rtol=0)
    assert np.abs(one.matrix[:, :8] - np.eye(32, 8)).max() > 0.3


# float16, bfloat16, float32 and float64 to their ends; subnormal numbers of float32 have few digits
LENGTHS = [
    (np.float32, 1e19),
    (np.float32, 1e37),
    (np.float32, 1e-20),
    (np.float32, 1e-36),
    (np.float64, 1e60),
    (np.float64, 1e300),
    (np.float64, 1e-300),
    (np.float16, 1e3),
    (np.float32, 1e-14),
]


@pytest.mark.parametrize(("kind", "length"), LENGTHS)
def test_vectors_of_any_length_are_rotated(rotation, kind, length):
    """Unit length with a dim, their own without; nothing overflows or vanishes."""
    vectors = hidden_signal(6, seed=3)[0].astype(np.float64)
    given = (length * vectors).astype(kind)
    exact = vectors @ rotation.matrix.astype(np.float64)
    tolerance = 2e-3 if kind is np.float16 else 2e-6
    np.testing.assert_allclose(rotation(given, 8), unit(exact[:, :8]), atol=tolerance)
    rotated = rotation(given)
    assert rotated.dtype == kind
    np.testing.assert_allclose(rotated.astype(np.float64) / length, exact, atol=5 * tolerance)
    np.testing.assert_allclose(rotation(given[0], 8), unit(exact[:, :8])[0], atol=tolerance)
    assert (rotation(np.zeros((2, 32), dtype=kind), 8) == 0).all()


@pytest.mark.parametrize(("kind", "length"), LENGTHS)
def test_a_fit_does_not_depend_on_lengths(rotation, kind, length):
    """The same rotation, but for the rounding of the given vectors."""
    given = [(length * vectors.astype(np.float64)).astype(kind) for vectors in hidden_signal()]
    assert np.abs(fit_rotation(*given, dims=DIMS, **QUICK).matrix - rotation.matrix)[:, :8].max() < 0.15
    powers = [vectors * np.float32(2.0**-60) for vectors in hidden_signal()]
    assert np.array_equal(fit_rotation(*powers, dims=DIMS, **QUICK).matrix, rotation.matrix)


@pytest.mark.parametrize("switched_off", [torch.no_grad, torch.inference_mode])
def test_the_fit_runs_where_gradients_are_switched_off(switched_off):
    """An encoder is run without gradients, and often the fit with it; vectors may come from there too."""
    anchors, positives = (torch.tensor(vectors) for vectors in hidden_signal(100))
    plain = fit_rotation(anchors, positives, dims=DIMS, **QUICK)
    with switched_off():
        inside = fit_rotation(anchors.clone(), positives.clone(), dims=DIMS, **QUICK)
    assert np.array_equal(inside.matrix, plain.matrix)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["reversed", "by column", "mapped from a file", "foreign byte order"])
def test_arrays_of_any_layout(kind, tmp_path):
    """What torch does not take is copied: the same rotation, the same rotated vectors."""
    vectors = hidden_signal(100)[0]
    np.save(tmp_path / "vectors.npy", vectors)
    other = {
        "reversed": vectors[::-1].copy()[::-1],
        "by column": np.asfortranarray(vectors),
        "mapped from a file": np.load(tmp_path / "vectors.npy", mmap_mode="r"),
        "foreign byte order": vectors.astype(vectors.dtype.newbyteorder("S")),
    }[kind]
    one, two = (fit_rotation(array, dims=DIMS, **QUICK | {"max_steps": 3}) for array in (vectors, other))
    assert np.array_equal(one.matrix, two.matrix)
    np.testing.assert_allclose(one(other), one(vectors), rtol=1e-6)


def test_autocast_does_not_reach_the_fit():
    """Inside of a bf16 autocast the same rotation comes out, and rotates vectors in full precision."""
    vectors = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    plain = fit_rotation(vectors, dims=[4], max_steps=5)
    with torch.autocast("cpu", torch.bfloat16):
        inside = fit_rotation(vectors, dims=[4], max_steps=5)
        rotated = inside(vectors)
    np.testing.assert_allclose(inside.matrix, plain.matrix, atol=1e-6)
    torch.testing.assert_close(rotated, plain(vectors))
    assert inside.report == plain.report


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"anchors": {"a": [1.0, 2.0]}}, TypeError, "anchors must be an array of vectors, or a list of them, got dict"),
        ({"anchors": [[1.0, 2.0], [1.0]]}, ValueError, "anchors must be vectors of one width: row 1 has shape"),
        ({"anchors": np.ones((50, 32), dtype=np.int8)}, TypeError, "quantised vectors cannot be mapped"),
        ({"anchors": np.ones(32, dtype=np.float32)}, ValueError, r"anchors must have the shape \(N, D\)"),
        ({"anchors": np.full((50, 32), np.nan)}, ValueError, "anchors holds NaN or infinite values in 50 of 50 rows"),
        ({"positives": np.zeros((50, 32))}, ValueError, "positives holds 50 zero vectors, the first in row 0"),
        ({"positives": np.ones((49, 32))}, ValueError, "anchors and positives must have one vector for each other"),
        ({"positives": np.ones((50, 16))}, ValueError, "positives have width 16, anchors 32"),
        ({"dims": [64]}, ValueError, "exceed the model's width of 32"),
        ({"dims": [32]}, ValueError, "must hold a dimension below the vectors' width of 32"),
        ({"dims": [0]}, ValueError, "dims must be > 0"),
        ({"dims": []}, ValueError, "dims is empty"),
        ({"documents": np.ones((50, 16))}, ValueError, "documents have width 16, anchors 32"),
        ({"documents": np.zeros((50, 32))}, ValueError, "documents holds 50 zero vectors"),
        ({"queries": np.ones((0, 32))}, ValueError, "queries must have the shape"),
        ({"queries": np.full((5, 32), np.inf)}, ValueError, "queries holds NaN or infinite values in 5 of 5 rows"),
        ({"max_steps": 0}, ValueError, "max_steps must be an integer >= 1"),
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


@pytest.mark.parametrize("count", [1, 6, 11])
def test_too_few_documents_are_refused(count):
    """Among so few, ten neighbours are found whatever is done; copies do not count, nor do empty arrays pass."""
    vectors = hidden_signal(count)[0]
    for few in (vectors, np.repeat(vectors, 10, axis=0)):
        with pytest.raises(ValueError, match=f"{count} distinct documents are too few"):
            fit_rotation(few, dims=DIMS)
    with pytest.raises(ValueError, match=r"anchors must have the shape \(N, D\)"):
        fit_rotation(vectors[:0], dims=DIMS)


def test_fewer_documents_than_the_largest_dim():
    """The PCA is completed, and the map is as orthogonal."""
    rotation = fit_rotation(hidden_signal(20)[0], dims=[4, 30], **QUICK)
    assert np.abs(rotation.matrix.T @ rotation.matrix - np.eye(32)).max() < 1e-5


def test_pairs_of_equal_texts_are_refused():
    """Anchors as their own positives hold no information."""
    vectors = hidden_signal(50)[0]
    with pytest.raises(ValueError, match="the same vectors: give anchors only"):
        fit_rotation(vectors, vectors, dims=DIMS)


@pytest.fixture(scope="module")
def rotation():
    return fit_rotation(*hidden_signal(), dims=DIMS, **QUICK)


@pytest.mark.parametrize("dim", [None, 8, 20])
def test_application_to_arrays_tensors_and_single_vectors(rotation, dim):
    """vectors @ R, cut and scaled to unit length with a dim; kind and type stay."""
    vectors = hidden_signal(5, seed=2)[0]
    expected = vectors @ rotation.matrix
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
    with pytest.raises(TypeError, match="vectors must be an array of vectors, or a list of them, got str"):
        rotation("a text")


def test_report_is_readable(rotation):
    """One line per dim and a verdict, as text; a frame and a table for notebooks; one short line for a prompt."""
    lines = str(rotation).splitlines()
    assert len(lines) == 3 + len(DIMS)
    assert lines[0].startswith("nDCG@10 of queries that no step has seen")
    assert lines[1].split()[:6] == ["dim", "truncated", "PCA", "rotated", "change", "error"]
    assert lines[-1] == rotation.verdict
    assert rotation.to_frame()["dim"].tolist() == DIMS
    assert {"MRR@10_rotated", "recall@10_pca", "similarity_truncated"} <= set(rotation.to_frame())
    assert rotation._repr_html_().count("<tr>") == 1 + len(DIMS)
    assert repr(rotation) == f"Rotation(32 values, dims [4, 8], {rotation.chosen})"


def test_the_report_survives_saving(rotation, tmp_path):
    """Also what was chosen, and by which measure."""
    rotation.save(tmp_path / "rotation.safetensors")
    loaded = Rotation.load(tmp_path / "rotation.safetensors")
    assert str(loaded) == str(rotation)
    assert (loaded.chosen, loaded.measure) == (rotation.chosen, rotation.measure)


def test_evaluate_is_a_report_of_other_vectors(rotation, caplog):
    """The signal lies elsewhere: worse than truncation, said in the log; queries may be given."""
    strange = hidden_signal(300, seed=4)[0][:, ::-1] * np.linspace(3, 0.2, 32, dtype=np.float32)
    judged = rotation.evaluate(strange)
    assert judged.measure == "recall@10"
    assert np.array_equal(judged.matrix, rotation.matrix)
    assert judged.worse_dims == tuple(DIMS)
    assert not judged.gained
    assert "On these vectors the rotation is worse than plain truncation at dims [4, 8]" in caplog.text
    assert "LESS than truncation at 4, 8" in judged.verdict
    for row, matrix in (("truncated", np.eye(32)), ("rotated", rotation.matrix)):
        found = [_nearest(unit(vectors)) for vectors in (strange, (strange @ matrix)[:, :4])]
        by_hand = np.mean([len(set(one) & set(other)) / 10 for one, other in zip(*found, strict=True)])
        assert judged.report[0][row] == pytest.approx(by_hand, abs=1e-6)
    asked = rotation.evaluate(strange, queries=strange[:40])
    assert asked.report[0]["rotated"] != judged.report[0]["rotated"]
    with pytest.raises(ValueError, match="vectors have width 16, this rotation is for 32"):
        rotation.evaluate(strange[:, :16])


def _nearest(vectors):
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -2)
    return np.argsort(-cosines, axis=1)[:, :10]


def test_generators_of_gpus_are_left_alone(tiny_model, monkeypatch):
    """torch.manual_seed reaches them too, and no fork of the CPU's state brings them back."""
    model = tiny_model()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a GPU's generator was seeded"))
    fit_rotation(*hidden_signal(60), dims=[4], max_steps=2)
    MIPICLoss(model, MultipleNegativesRankingLoss(model), [WIDTH, 8], pic_weight=1.0, lift_init="random")


def test_the_plot_shows_the_report(rotation, tmp_path):
    """A curve for each way, over the dims; PNG and SVG; nothing to draw without a report."""
    pytest.importorskip("matplotlib", reason="needs the eval extra").use("Agg")
    figure = rotation.plot(tmp_path / "kept")
    assert {path.name for path in tmp_path.iterdir()} == {"kept.png", "kept.svg"}
    (axes,) = figure.axes
    assert axes.get_ylabel() == f"{rotation.measure} (x 100)"
    drawn = {line.get_label(): line.get_xydata() for line in axes.lines}
    assert list(drawn) == ["truncated", "PCA", "rotated"]
    for way, points in drawn.items():
        np.testing.assert_allclose(points, [(row["dim"], 100 * row[way.lower()]) for row in rotation.report])
    with pytest.raises(ValueError, match="the rotation has no report, so there is nothing to draw"):
        Rotation(rotation.matrix, (4,)).plot()
