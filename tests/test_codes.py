"""Codes are sentence-transformers' own where it has them, and come back within a step where it has none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mipic_st import codes
from mipic_st.codes import PRECISIONS, Ranges, bytes_per_vector, decode, encode, scores


def vectors(count=500, dim=12, seed=0):
    """Unit vectors with a mean that is not zero, so that signs with and without it differ."""
    values = np.random.RandomState(seed).randn(count, dim).astype(np.float32) + np.linspace(
        -1, 1, dim, dtype=np.float32
    )
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("precision", ["int8", "uint8"])
@pytest.mark.parametrize("quantiles", [(0.0, 1.0), (0.003, 0.997)])
def test_bytes_are_those_of_sentence_transformers(precision, quantiles):
    """To the last bit, for the same ranges, values outside of them too; decoding as its rescoring does."""
    from sentence_transformers.util.quantization import _dequantize_embeddings, quantize_embeddings

    fitted, others = vectors(), vectors(300, seed=1) * 1.5
    ranges = Ranges.of(fitted, quantiles)
    pair = np.stack([ranges.low, ranges.high])
    if quantiles == (0.0, 1.0):
        assert np.array_equal(pair, np.stack([fitted.min(axis=0), fitted.max(axis=0)]))
    wanted = quantize_embeddings(others, precision, ranges=pair)
    got = encode(others, precision, ranges)
    assert got.dtype == wanted.dtype
    assert np.array_equal(got, wanted)
    np.testing.assert_allclose(
        decode(got, precision, ranges), _dequantize_embeddings(wanted, precision, pair), atol=1e-6
    )


@pytest.mark.parametrize("precision", ["binary", "ubinary"])
@pytest.mark.parametrize("dim", [12, 16])
def test_bits_are_those_of_sentence_transformers_behind_the_mean(precision, dim):
    """Signs of the centred vectors; without centring some would differ."""
    from sentence_transformers.util import quantize_embeddings

    given = vectors(dim=dim)
    ranges = Ranges.of(given)
    got = encode(given, precision, ranges)
    assert np.array_equal(got, quantize_embeddings(given - ranges.mean, precision))
    assert not np.array_equal(got, quantize_embeddings(given, precision))
    assert got.shape[1] == bytes_per_vector(dim, precision)
    decoded = decode(got, precision, ranges)
    assert np.array_equal(decoded > ranges.mean, given > ranges.mean)
    np.testing.assert_allclose(np.abs(decoded - ranges.mean), np.broadcast_to(ranges.spread, decoded.shape), atol=1e-6)


@pytest.mark.parametrize("dim", [1, 7, 12])
def test_int4_comes_back_within_half_a_step(dim):
    """Inside of the range; two values to a byte, the even one in the low four bits."""
    given = vectors(dim=dim) if dim > 1 else np.random.RandomState(0).randn(50, 1).astype(np.float32)
    ranges = Ranges.of(given, (0.0, 1.0))
    got = encode(given, "int4", ranges)
    assert got.shape == (len(given), (dim + 1) // 2)
    assert got.dtype == np.uint8
    step = (ranges.high - ranges.low) / 15
    assert (np.abs(decode(got, "int4", ranges) - given) <= step / 2 + 1e-6).all()
    for row in range(5):  # by hand
        for value in range(dim):
            nibble = got[row, value // 2] >> (4 if value % 2 else 0) & 15
            assert nibble == round(float((given[row, value] - ranges.low[value]) / step[value]))
    if dim % 2:
        assert (got[:, -1] >> 4 == 0).all()


def test_asymmetric_scores_are_dot_products_with_what_is_decoded(monkeypatch):
    """In blocks too, and better than code against code."""
    given, queries = vectors(900, 32), vectors(60, 32, seed=2)
    ranges = Ranges.of(given)
    monkeypatch.setattr(codes, "_BLOCK", 128)
    exact = queries @ given.T
    for precision in PRECISIONS:
        coded = encode(given, precision, ranges)
        found = scores(queries, coded, precision, ranges)
        np.testing.assert_allclose(found, queries @ decode(coded, precision, ranges).T, rtol=0, atol=1e-5)
        both = decode(encode(queries, precision, ranges), precision, ranges) @ decode(coded, precision, ranges).T
        if precision in ("int4", "binary", "ubinary"):
            correlations = [np.corrcoef(each.ravel(), exact.ravel())[0, 1] for each in (both, found)]
            assert correlations[0] < correlations[1]


def test_a_value_that_never_changes_has_a_code():
    """Its range is empty; nothing is divided by zero."""
    given = vectors()
    given[:, 3] = 0.25
    ranges = Ranges.of(given)
    for precision in ("int8", "uint8", "int4"):
        assert np.allclose(decode(encode(given, precision, ranges), precision, ranges)[:, 3], 0.25)


def test_no_rows_have_no_codes():
    """The shape is that of the precision."""
    ranges = Ranges.of(vectors())
    for precision in PRECISIONS:
        coded = encode(np.empty((0, 12), dtype=np.float32), precision, ranges)
        assert len(coded) == 0
        assert decode(coded, precision, ranges).shape == (0, 12)


RANGES = Ranges.of(vectors())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: encode(vectors(), "int2", RANGES), r"precision must be one of .*'int2'"),
        (lambda: encode(vectors(), "int8"), r"need ranges: Ranges\.of"),
        (lambda: encode(vectors(dim=8), "int8", RANGES), r"ranges are for 12 dims, the vectors have 8"),
        (lambda: encode(vectors()[0], "int8", RANGES), r"shape \(N, d\), got \(12,\)"),
        (lambda: encode(np.full((3, 12), np.nan), "int4", RANGES), r"NaN or infinite values, first in row 0"),
        (lambda: decode(np.zeros((2, 5), np.uint8), "int4", RANGES), r"shape \(N, 6\) and be uint8, got \(2, 5\)"),
        (lambda: decode(np.zeros((2, 12), np.uint8), "int8", RANGES), r"be int8, got \(2, 12\) of uint8"),
        (lambda: scores(vectors(2, 8), encode(vectors(), "int8", RANGES), "int8", RANGES), r"queries have 8 dims"),
        (lambda: Ranges.of(vectors(1)), r"two vectors or more"),
        (lambda: Ranges.of(np.full((3, 2), np.inf)), r"NaN or infinite"),
        (lambda: Ranges(RANGES.high, RANGES.low, RANGES.mean, RANGES.spread), r"low end above the high end"),
        (lambda: Ranges(RANGES.low, RANGES.high[:5], RANGES.mean, RANGES.spread), r"four arrays of one width"),
        (lambda: Ranges(RANGES.low, RANGES.high, RANGES.mean * np.nan, RANGES.spread), r"NaN or infinite values"),
        (lambda: bytes_per_vector(0, "int8"), r"dim must be an integer >= 1"),
    ],
)
def test_bad_input_is_named(call, message):
    """Argument, value and what is allowed."""
    with pytest.raises(ValueError, match=message):
        call()


def test_no_torch_is_needed():
    """Workers that apply codes need NumPy only; the second part shows that the check can fail."""
    script = "import sys; sys.modules['torch'] = None; import mipic_st.codes; {}"
    source = Path(codes.__file__).parents[1]
    for more, code in (("", 0), ("import mipic_st.numerics", 1)):
        done = subprocess.run([sys.executable, "-c", script.format(more)], cwd=source, capture_output=True)
        assert done.returncode == code
