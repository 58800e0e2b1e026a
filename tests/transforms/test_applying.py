"""A rotation applied to stored vectors: without torch, row by row the same, as codes that go by saved ranges."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import mipic_st
from mipic_st import codes as coding
from mipic_st.codes import PRECISIONS, Ranges
from mipic_st.transforms.rotation import Rotation
from mipic_st.transforms.rotation_fit import fit_rotation
from transforms_fixtures import DIMS, QUICK, hidden_signal, unit

WIDTH = 32
CODED = [precision for precision in PRECISIONS if "float" not in precision]


@pytest.fixture(scope="module")
def rotation():
    return fit_rotation(*hidden_signal(), dims=DIMS, **QUICK)


def documents(count=200, seed=3):
    return hidden_signal(count, seed=seed)[0]


# --- without torch ----------------------------------------------------------------------------------------------------

APPLIED = """
import os, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "sentence_transformers"):
            raise ImportError(f"{name} is refused")
sys.meta_path.insert(0, Refuse())
import numpy as np
import mipic_st
from mipic_st.transforms.rotation import Rotation
assert mipic_st.Rotation is Rotation
rotation = Rotation.load(sys.argv[1])
vectors = np.load(sys.argv[2])
found = {"plain": rotation(vectors), "cut": rotation(vectors.tolist(), 4)}
from mipic_st.codes import PRECISIONS
for precision in PRECISIONS:
    found[precision] = codes = rotation.encode(vectors, 8, precision)
    found[f"{precision} decoded"] = rotation.decode(codes, 8, precision)
    found[f"{precision} scores"] = rotation.scores(vectors[:3], codes, 8, precision)
rotation.calibrate(vectors, [5]).save(sys.argv[3])
repr(rotation), str(rotation), rotation.fingerprint, rotation.gained, rotation._repr_html_()
folder = f"{sys.argv[3]}-{os.getpid()}"
rotation.save_pretrained(folder)
assert Rotation.from_pretrained(folder).fingerprint == rotation.fingerprint
assert not {"torch", "transformers", "sentence_transformers"} & set(sys.modules)
np.savez(sys.argv[4], **found)
MORE
"""


def applied(tmp_path, more=""):
    """Run a worker that cannot import torch."""
    script = APPLIED.replace("MORE", more)
    files = [str(tmp_path / name) for name in ("rotation", "vectors.npy", "again", "found.npz")]
    source = Path(mipic_st.__file__).parents[1]
    return subprocess.run([sys.executable, "-c", script, *files], cwd=source, capture_output=True, text=True)


def test_a_worker_needs_no_torch(rotation, tmp_path):
    """Load, rotate, code, decode, score, calibrate and save, with the same results; a fit shows that it can fail."""
    vectors = documents(20)
    rotation.save(tmp_path / "rotation")
    np.save(tmp_path / "vectors.npy", vectors)
    done = applied(tmp_path)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "found.npz")
    assert np.array_equal(found["plain"], rotation(vectors))
    assert np.array_equal(found["cut"], rotation(vectors.tolist(), 4))
    for precision in PRECISIONS:
        codes = rotation.encode(vectors, 8, precision)
        assert np.array_equal(found[precision], codes)
        assert np.array_equal(found[f"{precision} decoded"], rotation.decode(codes, 8, precision))
        assert np.array_equal(found[f"{precision} scores"], rotation.scores(vectors[:3], codes, 8, precision))
    assert Rotation.load(tmp_path / "again").encode(vectors, 5).shape == (20, 5)
    refused = applied(tmp_path, "from mipic_st import fit_rotation")
    assert refused.returncode == 1
    assert "torch is refused" in refused.stderr


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [None, 1, 8, 24, 100])
@pytest.mark.parametrize("kind", [np.float32, np.float16, np.float64])
def test_a_row_does_not_depend_on_its_batch(dim, kind):
    """Any slicing of an array gives the bytes of the whole."""
    draw = np.random.default_rng(0)
    rotation = Rotation(np.linalg.qr(draw.normal(size=(100, 100)))[0], (8,))
    vectors = draw.normal(size=(9000, 100)).astype(kind)
    rotation = rotation.calibrate(vectors[:500], [dim or 100])
    whole, coded = rotation(vectors, dim), rotation.encode(vectors, dim)
    for size in (1, 7, 1000, 4097):
        count = 300 if size == 1 else len(vectors)
        parts = [slice(start, min(start + size, count)) for start in range(0, count, size)]
        assert np.array_equal(np.concatenate([rotation(vectors[part], dim) for part in parts]), whole[:count])
        assert np.array_equal(np.concatenate([rotation.encode(vectors[part], dim) for part in parts]), coded[:count])
    assert np.array_equal(rotation(np.asfortranarray(vectors)[::-1], dim)[::-1], whole)
    assert np.array_equal(rotation(vectors[5], dim), whole[5])


def test_arrays_and_tensors_agree(rotation):
    """To rounding; a tensor keeps its gradient."""
    vectors = torch.tensor(documents(), requires_grad=True)
    np.testing.assert_allclose(rotation(vectors, 8).detach(), rotation(vectors.detach().numpy(), 8), atol=1e-6)
    rotation(vectors, 8).sum().backward()
    assert vectors.grad.abs().max() > 0


@pytest.mark.filterwarnings("error")
def test_vectors_without_direction_are_rotated_and_not_coded(rotation):
    """Zeros stay zeros and NaN stays NaN in a call, and touch no other row; codes of them are refused by row."""
    vectors = documents(5000)
    for value, message in (
        (np.nan, "vectors hold NaN or infinite values in row 4500: it has no code"),
        (np.inf, "vectors hold NaN or infinite values in row 4500"),
        (0, "vectors are zero at 8 dims in row 4500: it has no direction"),
    ):
        broken = vectors.copy()
        broken[4500] = value
        others = np.arange(5000) != 4500
        assert np.array_equal(rotation(broken, 8)[others], rotation(vectors, 8)[others])
        assert (rotation(broken, 8)[4500] == 0).all() if value == 0 else np.isnan(rotation(broken, 8)[4500]).all()
        for method, given in ((rotation.encode, 8), (rotation.calibrate, [8])):
            with pytest.raises(ValueError, match=message):
                method(broken, given)
        with pytest.raises(ValueError, match=message.replace("vectors", "queries")):
            rotation.scores(broken, rotation.encode(vectors, 8), 8)


# --- codes ------------------------------------------------------------------------------------------------------------


def test_a_fit_keeps_the_ranges_of_its_documents(rotation):
    """Of each dim and the full width; what was found in the fitted positives, rotated, cut and of unit length."""
    fitted = unit(hidden_signal()[1])
    assert sorted(rotation.ranges) == [*DIMS, WIDTH]
    for dim, ranges in rotation.ranges.items():
        cut = unit((fitted @ rotation.matrix)[:, :dim])
        for part, wanted in zip(ranges.__array__(), Ranges.of(cut).__array__(), strict=True):
            np.testing.assert_allclose(part, wanted, atol=1e-5)
    # scaled to unit length after the cut: one set cannot serve all dims
    assert rotation.ranges[4].high.max() > 1.2 * rotation.ranges[WIDTH].high[:4].max()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dim", [None, 8])
def test_codes_are_those_of_rotated_vectors(rotation, precision, dim):
    """Rotate, cut, scale, code by hand; decoding and scores too."""
    vectors, queries = documents(300), documents(9, seed=5)
    ranges = rotation.ranges[dim or WIDTH]
    by_hand = rotation(vectors, dim or WIDTH)
    codes = rotation.encode(vectors, dim, precision)
    assert np.array_equal(codes, coding.encode(by_hand, precision, ranges))
    assert codes.shape[1] * codes.itemsize == coding.bytes_per_vector(dim or WIDTH, precision)
    decoded = rotation.decode(codes, dim, precision)
    assert decoded.dtype == np.float32
    bound = {"float32": 0, "float16": 1e-3, "int8": 0.01, "uint8": 0.01, "int4": 0.1}.get(precision, 1)
    clipped = np.clip(by_hand, ranges.low, ranges.high) if precision in ("int8", "uint8", "int4") else by_hand
    assert np.abs(decoded - clipped).max() <= bound
    scores = rotation.scores(queries, codes, dim, precision)
    np.testing.assert_allclose(scores, rotation(queries, dim or WIDTH) @ decoded.T, atol=1e-6)


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
def test_codes_are_those_of_sentence_transformers(rotation, precision):
    """quantize_embeddings with the same ranges; of signs, behind the mean."""
    from sentence_transformers.util import quantize_embeddings

    vectors, ranges = documents(), rotation.ranges[8]
    plain = rotation(vectors, 8)
    if "binary" in precision:
        wanted = quantize_embeddings(plain - ranges.mean, precision)
    else:
        wanted = quantize_embeddings(plain, precision, ranges=np.stack([ranges.low, ranges.high]))
    got = rotation.encode(vectors, 8, precision)
    assert got.dtype == wanted.dtype
    assert np.array_equal(got, wanted)


def searched(found, count):
    """What semantic_search_faiss gave, as a matrix of scores."""
    scores = np.full((len(found), count), np.nan)
    for row, hits in enumerate(found):
        for hit in hits:
            scores[row, hit["corpus_id"]] = hit["score"]
    return scores


@pytest.mark.parametrize("dim", [4, 8, WIDTH])
def test_scores_are_those_of_sentence_transformers_search(rotation, dim):
    """uint8 with rescoring: float queries against what the codes stand for, to the last digit of float32."""
    pytest.importorskip("faiss")
    from sentence_transformers.util.quantization import semantic_search_faiss

    vectors, queries, ranges = documents(150), documents(20, seed=5), rotation.ranges[dim]
    codes = rotation.encode(vectors, dim, "uint8")
    found, _ = semantic_search_faiss(
        rotation(queries, dim),
        corpus_embeddings=codes,
        corpus_precision="uint8",
        top_k=len(vectors),
        ranges=np.stack([ranges.low, ranges.high]),
        rescore_multiplier=1,
    )
    wanted = searched(found, len(vectors))
    scores = rotation.scores(queries, codes, dim, "uint8")
    assert np.array_equal(scores, wanted.astype(np.float32))
    assert np.array_equal(scores, rotation.scores(queries, rotation.encode(vectors, dim), dim))


def test_scores_of_signs_rank_as_sentence_transformers_does(rotation):
    """Its rescoring adds up a query's values where a bit is set; ours weighs them by the spread, and adds the mean."""
    pytest.importorskip("faiss")
    from sentence_transformers.util.quantization import semantic_search_faiss

    vectors, queries, ranges = documents(150), documents(20, seed=5), rotation.ranges[WIDTH]
    codes = rotation.encode(vectors, None, "ubinary")
    asked = rotation(queries)
    asked = unit(asked)
    found, _ = semantic_search_faiss(
        asked * (2 * ranges.spread),
        corpus_embeddings=codes,
        corpus_precision="ubinary",
        top_k=len(vectors),
        rescore_multiplier=1,
    )
    constant = asked @ (ranges.mean - ranges.spread)
    scores = rotation.scores(queries, codes, None, "ubinary")
    np.testing.assert_allclose(searched(found, len(vectors)) + constant[:, None], scores, atol=1e-6)
    assert np.array_equal(scores, rotation.scores(queries, rotation.encode(vectors, None, "binary"), None, "binary"))


def test_calibrate_gives_ranges_for_further_dims(rotation):
    """A new rotation; the old one and ranges of other dims stay; without dims, the rotation's own."""
    vectors = documents(500)
    other = rotation.calibrate(vectors, [5])
    assert sorted(other.ranges) == [4, 5, 8, WIDTH]
    assert 5 not in rotation.ranges
    assert other.ranges[8] is rotation.ranges[8]
    np.testing.assert_array_equal(np.asarray(other.ranges[5]), np.asarray(Ranges.of(rotation(vectors, 5))))
    assert (other.dims, other.report, other.chosen) == (rotation.dims, rotation.report, rotation.chosen)
    again = rotation.calibrate(vectors)
    assert sorted(again.ranges) == sorted(rotation.ranges)
    assert not np.array_equal(np.asarray(again.ranges[8]), np.asarray(rotation.ranges[8]))
    assert replace(rotation, ranges=None).calibrate(vectors, [5]).encode(vectors, 5).shape == (500, 5)


def test_calibrate_looks_at_so_many_vectors(rotation, monkeypatch):
    """At equal distances; of many dims at fewer."""
    monkeypatch.setattr("mipic_st.transforms.rotation.CALIBRATED", 100)
    monkeypatch.setattr("mipic_st.transforms.rotation._CALIBRATED_VALUES", 16 * 50)
    vectors = documents(250)
    found = rotation.calibrate(vectors, [8, 16]).ranges
    for dim, step in ((8, 3), (16, 5)):
        wanted = Ranges.of(rotation(vectors[::step], dim))
        assert np.array_equal(np.asarray(found[dim]), np.asarray(wanted))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda r: r.encode(documents(), 5),
            r"ranges for \[4, 8, 32\], and no ranges for 5 dims.*rotation.calibrate\(.*, \[5\]",
        ),
        (lambda r: r.decode(np.zeros((2, 5), np.int8), 5), r"no ranges for 5 dims"),
        (lambda r: r.scores(documents(), np.zeros((2, 5), np.int8), 5), r"no ranges for 5 dims"),
        (lambda r: replace(r, ranges=None).encode(documents(), 4), r"ranges for \[\], and no ranges for 4 dims"),
        (lambda r: r.encode(documents(), 33), r"exceed the model's width of 32"),
        (lambda r: r.encode(documents(), 8, "int2"), r"precision must be one of"),
        (lambda r: r.encode(documents()[:, :16], 8), r"vectors have width 16, this rotation is for 32"),
        (lambda r: r.encode(documents()[0], 8), r"vectors must have the shape \(N, 32\), got \(32,\)"),
        (lambda r: r.decode(np.zeros((2, 4), np.int8), 8), r"int8 codes of 8 dims must have the shape \(N, 8\)"),
        (lambda r: r.decode(np.zeros((2, 4), np.float32), 8, "float32"), r"codes must be of 8 dims, got .* \(2, 4\)"),
        (lambda r: r.decode(np.zeros((2, 8), np.int8), 8, "float16"), r"must be floating numbers, got int8"),
        (lambda r: r.scores(documents(), np.zeros((2, 8), np.uint8), 8), r"be int8, got \(2, 8\) of uint8"),
        (lambda r: r.calibrate(documents(1)), r"two or more to take ranges from, got 1"),
        (lambda r: r.calibrate(documents(), [40]), r"exceed the model's width"),
        (lambda r: r.calibrate(documents(), []), r"dims is empty"),
    ],
)
def test_bad_input_is_named(rotation, call, message):
    """Argument, value and fix."""
    with pytest.raises(ValueError, match=message):
        call(rotation)


def test_no_rows_have_no_codes(rotation):
    """Their shape is that of the precision."""
    for precision in PRECISIONS:
        codes = rotation.encode(documents()[:0], 8, precision)
        assert codes.shape == (0, rotation.encode(documents(), 8, precision).shape[1])
        assert rotation.scores(documents(3), codes, 8, precision).shape == (3, 0)


# --- files ------------------------------------------------------------------------------------------------------------


def test_ranges_survive_saving(rotation, tmp_path):
    """Byte by byte, and so do the codes and the fingerprint."""
    rotation.save(tmp_path / "rotation")
    loaded = Rotation.load(tmp_path / "rotation")
    assert isinstance(loaded.matrix, np.ndarray)
    assert loaded.fingerprint == rotation.fingerprint
    assert list(loaded.ranges) == list(rotation.ranges)
    assert pickle.loads(pickle.dumps(rotation)).fingerprint == rotation.fingerprint
    for precision in PRECISIONS:
        assert np.array_equal(loaded.encode(documents(), 8, precision), rotation.encode(documents(), 8, precision))
    without = replace(rotation, ranges=None)
    without.save(tmp_path / "without")
    assert Rotation.load(tmp_path / "without").ranges is None


def test_the_fingerprint_is_of_matrix_and_ranges(rotation):
    """Whatever codes depend on, and nothing else."""
    names = {
        rotation.fingerprint,
        replace(rotation, report=[], dims=(4,)).fingerprint,
    }
    assert len(names) == 1
    names |= {
        replace(rotation, matrix=rotation.matrix[:, ::-1]).fingerprint,
        replace(rotation, ranges=None).fingerprint,
        rotation.calibrate(documents()).fingerprint,
        rotation.calibrate(documents(), [5]).fingerprint,
    }
    assert len(names) == 5
    assert all(len(name) == 16 and int(name, 16) >= 0 for name in names)


def changed_file(path, change):
    """A file whose ranges were changed, with a checksum that fits."""
    import json

    from safetensors import safe_open

    from mipic_st.transforms.base import _checksum

    arrays = load_file(path)
    with safe_open(path, framework="np") as file:
        notes = json.loads(file.metadata()["transform"])
    change(arrays)
    notes["checksum"] = _checksum(arrays, notes["fields"])
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    save_file(arrays, path, metadata={"transform": json.dumps(notes)})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda a: a.update({"ranges/8": a["ranges/8"][[1, 0, 2, 3]]}), "low end above the high end"),
        (lambda a: a.update({"ranges/8": a["ranges/8"] * np.float32(np.nan)}), "ranges hold NaN or infinite"),
        (lambda a: a.update({"ranges/8": a["ranges/4"]}), "its ranges for 8 of 32 dims are those of 4"),
        (lambda a: a.update({"ranges/8": a["ranges/8"][:3]}), "missing 1 required positional argument"),
        (lambda a: a.update({"ranges/8": a["ranges/8"] * np.float32(9)}), "vectors that are not of unit length"),
        (lambda a: a.update({"ranges/64": np.zeros((4, 64), np.float32)}), "its ranges for 64 of 32 dims"),
    ],
)
def test_damaged_or_foreign_ranges_are_refused(rotation, tmp_path, change, reason):
    """Also where somebody has mended the checksum; without, the checksum says it."""
    path = tmp_path / "rotation"
    rotation.save(path)
    changed_file(path, lambda arrays: None)
    assert Rotation.load(path).fingerprint == rotation.fingerprint
    changed_file(path, change)
    with pytest.raises(ValueError, match=f"is no rotation that Rotation.save wrote, or is damaged: .*{reason}"):
        Rotation.load(path)


def test_the_matrix_is_a_copy():
    """Changes of the caller's array do not reach the rotation, and its own type is float32."""
    given = np.eye(4)[:, [2, 0, 1, 3]]
    rotation = Rotation(given, (2,))
    before = rotation([[1.0, 2.0, 3.0, 4.0]])
    given[:] = np.eye(4)
    assert rotation.matrix.dtype == np.float32
    assert np.array_equal(rotation([[1.0, 2.0, 3.0, 4.0]]), before)
    with pytest.raises(TypeError, match="matrix must hold floating numbers, got int64"):
        Rotation(np.eye(4, dtype=np.int64), (2,))


def test_fits_take_lists_and_columns():
    """The same rotation from all forms of the same vectors."""
    pandas, arrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    vectors = documents(60)
    plain = fit_rotation(vectors, dims=[4], max_steps=2)
    fixed = arrow.FixedSizeListArray.from_arrays(arrow.array(vectors.ravel()), WIDTH)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of arrays that it must not write to
        for form in (pandas.Series(list(vectors)), fixed, list(vectors)):
            assert np.array_equal(fit_rotation(form, dims=[4], max_steps=2).matrix, plain.matrix)
            assert np.array_equal(plain.encode(form, 4), plain.encode(vectors, 4))
            assert np.array_equal(plain(form, 4), plain(vectors, 4))
    assert plain.evaluate(fixed).report == plain.evaluate(vectors).report
