"""Rotate, cut and code inside of faiss: the same as rotating by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mipic_st.transforms.rotation import Rotation
from transforms_fixtures import unit

faiss = pytest.importorskip("faiss")
WIDTH, DIM = 48, 16


@pytest.fixture(scope="module")
def rotation():
    return Rotation(np.linalg.qr(np.random.default_rng(0).normal(size=(WIDTH, WIDTH)))[0], (DIM,))


def vectors(count, seed=1):
    draw = np.random.default_rng(seed)
    return (
        draw.normal(size=(count, 6)) @ draw.normal(size=(6, WIDTH)) + 0.3 * draw.normal(size=(count, WIDTH))
    ).astype(np.float32)


@pytest.mark.parametrize("dim", [None, DIM, 1])
def test_the_transform_is_the_rotation(rotation, dim):
    """Cut, not scaled; faiss takes it as orthonormal, so that it can map back."""
    transform = rotation.to_faiss(dim)
    given = vectors(20)
    expected = rotation(given)[:, :dim]
    np.testing.assert_allclose(transform.apply(given), expected, atol=1e-5)
    assert (transform.d_in, transform.d_out) == (WIDTH, dim or WIDTH)
    assert transform.is_trained
    np.testing.assert_allclose(transform.reverse_transform(expected), expected @ rotation.matrix[:, :dim].T, atol=1e-5)


def by_hand(rotation, factory, documents, queries, k):
    # the first of PQ's four parts has the values 0, 4, 8 and 12
    order = [first + 4 * turn for first in range(4) for turn in range(4)] if "PQ" in factory else range(DIM)
    documents, queries = (np.ascontiguousarray(rotation(side, DIM)[:, list(order)]) for side in (documents, queries))
    index = faiss.index_factory(DIM, factory, faiss.METRIC_INNER_PRODUCT)
    index.train(documents)
    index.add(documents)
    return index.search(queries, k)


@pytest.mark.parametrize("factory", ["Flat", "SQ8", "SQ4", "PQ4x4", "RaBitQ", "IVF4,SQ8"])
def test_an_index_is_rotate_cut_code(rotation, factory):
    """Scores of an index on rotated vectors, and cosines where nothing is coded."""
    if factory == "RaBitQ" and not hasattr(faiss, "IndexRaBitQ"):
        pytest.skip("needs faiss 1.11")
    documents, queries = vectors(600), vectors(30, seed=2)
    index = rotation.faiss_index(DIM, factory, documents)
    assert index.ntotal == 600
    similarities, rows = index.search(queries, 10)
    wanted, expected = by_hand(rotation, factory, documents, queries, 10)
    # a value at the border of two codes may fall to either side
    assert np.mean(rows == expected) > 0.95
    np.testing.assert_allclose(np.sort(similarities), np.sort(wanted), atol=0.02)
    if factory == "Flat":
        cosines = unit(rotation(queries)[:, :DIM]) @ unit(rotation(documents)[:, :DIM]).T
        np.testing.assert_allclose(similarities, np.sort(cosines)[:, ::-1][:, :10], atol=1e-5)


def test_parts_of_a_product_quantizer_share_the_leading_values():
    """Values that say less and less, as behind a rotation: the same bytes find more neighbours than parts in a row."""
    documents = np.random.default_rng(0).normal(size=(2000, 32)) * 0.85 ** np.arange(32)
    documents = unit(documents).astype(np.float32)
    queries, wanted = documents[:200], np.argsort(documents[:200] @ -documents.T, axis=1)[:, :10]
    in_a_row = faiss.index_factory(32, "PQ8x4", faiss.METRIC_INNER_PRODUCT)
    in_a_row.train(documents)
    in_a_row.add(documents)
    shared = Rotation(np.eye(32, dtype=np.float32), (16,)).faiss_index(None, "PQ8x4", documents)
    recalls = [
        np.mean([len({*one} & {*other}) / 10 for one, other in zip(index.search(queries, 10)[1], wanted, strict=True)])
        for index in (shared, in_a_row)
    ]
    assert recalls[0] > recalls[1] + 0.02, recalls


@pytest.mark.parametrize(
    ("length", "kind"), [(1e25, np.float32), (1e-25, np.float32), (1e200, np.float64), (1e-200, np.float64)]
)
def test_vectors_of_any_length_are_held(rotation, length, kind):
    """Directions count, in floats whose squares faiss cannot hold too."""
    documents, queries = vectors(100), vectors(5, seed=2)
    wanted, rows = rotation.faiss_index(DIM, "Flat", documents).search(queries, 3)
    lengths = np.where(np.arange(100) % 2, length, 1)[:, None]
    found = rotation.faiss_index(DIM, "Flat", (documents * lengths).astype(kind)).search(queries, 3)
    np.testing.assert_allclose(found[0], wanted, atol=1e-5)
    np.testing.assert_array_equal(found[1], rows)


def test_an_index_can_be_filled_later_and_written(rotation, tmp_path):
    """Trained and filled by the caller; a file holds the whole way."""
    documents = vectors(300)
    index = rotation.faiss_index(DIM)
    assert not index.is_trained
    index.train(documents)
    index.add(documents)
    wanted = rotation.faiss_index(DIM, vectors=documents.tolist()).search(documents[:5], 3)
    faiss.write_index(index, str(tmp_path / "index"))
    for found in (index, faiss.read_index(str(tmp_path / "index"))):
        for one, other in zip(found.search(documents[:5], 3), wanted, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"factory": "nonsense"}, ValueError, "factory 'nonsense' is none that faiss .* makes of 16 dims"),
        ({"factory": "PQ5"}, ValueError, "factory 'PQ5'"),
        ({"factory": 8}, TypeError, "factory must be a string"),
        ({"dim": 49}, ValueError, "exceed the model's width of 48"),
        ({"factory": "PQ4", "vectors": vectors(10)}, ValueError, "'PQ4' cannot be trained on 10 vectors"),
        ({"factory": "IDMap,SQ8", "vectors": vectors(10)}, ValueError, "'IDMap,SQ8' cannot .*add_with_ids"),
        ({"vectors": np.zeros((5, WIDTH))}, ValueError, "vectors are zero at 16 dims in row 0"),
        ({"vectors": np.ones((5, 3))}, ValueError, "vectors have width 3, this rotation is for 48"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(rotation, change, error, message):
    """Argument, value and fix, in place of faiss's own lines of C++."""
    with pytest.raises(error, match=message):
        rotation.faiss_index(**{"dim": DIM, "factory": "SQ8"} | change)


def test_an_old_faiss_has_no_rabitq(rotation, monkeypatch):
    """Said with the version that has it."""
    monkeypatch.delattr(faiss, "IndexRaBitQ")
    with pytest.raises(ValueError, match=r"factory 'RaBitQ' needs faiss 1\.11 or later"):
        rotation.faiss_index(DIM, "RaBitQ")


def test_without_faiss(rotation, monkeypatch):
    """What to install."""
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ImportError, match=r"indexes need faiss: pip install \"mipic-st\[serve\]\""):
        rotation.to_faiss(DIM)
