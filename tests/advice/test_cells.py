"""Cells against a slow reference: every query, document, dim and precision in loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mipic_st.advice.cells import cell_keys, gain_on_unseen, paired_intervals, values_by_cell
from mipic_st.transforms.search import Search
from transforms_fixtures import unit

WIDTH = 16
DIMS, PRECISIONS = [3, 12, WIDTH], ["float32", "float16", "int8", "int4", "binary"]


def case(relevant, seed=0):
    """A search by three of the documents and four other queries, and the rows of the documents that were fitted."""
    random = np.random.default_rng(seed)
    documents = unit(random.normal(size=(40, WIDTH)) + random.normal(size=WIDTH)).astype(np.float32)
    queries = np.concatenate([documents[5:8], unit(random.normal(size=(4, WIDTH)))]).astype(np.float32)
    own = torch.tensor([5, 6, 7, -1, -1, -1, -1])
    answers = [torch.tensor([number, 30 - number]) for number in range(len(queries))] if relevant else None
    return Search(torch.tensor(documents), torch.tensor(queries), own, answers), torch.arange(10, 40)


def coded(vector, columns, precision):
    """What a vector's code stands for, value by value; ``columns`` are the values of the fitted rows."""
    if precision == "float32":
        return [float(value) for value in vector]
    if precision == "float16":
        return [float(np.float16(value)) for value in vector]
    stored = []
    for value, column in zip(vector, columns, strict=True):
        if precision == "binary":
            mean = sum(column) / len(column)
            spread = sum(abs(other - mean) for other in column) / len(column)
            stored.append(mean + spread if value > mean else mean - spread)
            continue
        low, high = np.quantile(column, [0.003, 0.997])
        levels = 256 if precision == "int8" else 16
        step = (high - low) / (levels - 1)
        level = (value - low) / step
        level = math.floor(level) if precision == "int8" else round(level)
        stored.append(low + step * min(max(level, 0), levels - 1))
    return stored


def best(query, stored, own, count=10):
    scores = [-math.inf if row == own else sum(map(float.__mul__, query, vector)) for row, vector in enumerate(stored)]
    return sorted(range(len(stored)), key=lambda row: -scores[row])[:count]


def small(vector, matrix, dim):
    values = [sum(float(a) * float(b) for a, b in zip(vector, column, strict=True)) for column in matrix.T[:dim]]
    length = math.sqrt(sum(value * value for value in values))
    return [value / length for value in values]


def slow_values(search, rows, matrix, dim, precision):
    """Each measure of each query."""
    documents = [small(document, matrix, dim) for document in search.documents]
    columns = list(zip(*[documents[row] for row in rows], strict=True))
    stored = [coded(document, columns, precision) for document in documents]
    full = [[float(value) for value in document] for document in search.documents]
    found = {"3-recall@10": [], "recall@10": [], "nDCG@10": []}
    for number, query in enumerate(search.queries):
        own = int(search.own[number])
        first = best(small(query, matrix, dim), stored, own)
        wanted = best([float(value) for value in query], full, own)
        found["recall@10"].append(len(set(first) & set(wanted)) / 10)
        found["3-recall@10"].append(len(set(first) & set(wanted[:3])) / 3)
        if search.relevant is not None:
            answers = set(search.relevant[number].tolist())
            gained = sum(1 / math.log2(place + 2) for place, row in enumerate(first) if row in answers)
            found["nDCG@10"].append(gained / sum(1 / math.log2(place + 2) for place in range(len(answers))))
    unlike = len({tuple(vector) for vector in stored}) == len(stored)
    return {measure: values for measure, values in found.items() if values}, unlike


@pytest.mark.parametrize("relevant", [False, True])
def test_every_cell_is_what_loops_give(relevant):
    """Truncated and rotated, at every dim and precision, with and without known answers."""
    search, rows = case(relevant)
    matrix = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1))).Q
    found = dict(values_by_cell(search, rows, matrix, DIMS, PRECISIONS))
    assert list(found) == cell_keys(WIDTH, DIMS, PRECISIONS, rotated=True)
    compared = []
    for (way, dim, precision), values in found.items():
        basis = matrix.numpy() if way == "rotated" else np.eye(WIDTH)
        expected, unlike = slow_values(search, rows, basis, dim, precision)
        if not unlike:  # documents of one code come in any order
            continue
        compared.append((way, precision))
        assert set(values) == set(expected)
        for measure, value in values.items():
            np.testing.assert_allclose(
                value, expected[measure], atol=1e-9, err_msg=f"{way} {dim} {precision} {measure}"
            )
    assert set(compared) >= {(way, precision) for way in ("truncated", "rotated") for precision in PRECISIONS}
    assert found["truncated", WIDTH, "float32"]["recall@10"].min() == 1
    assert found["truncated", 3, "binary"]["recall@10"].mean() < found["truncated", 12, "int8"]["recall@10"].mean()


def test_the_full_width_is_always_there_and_floats_of_it_once():
    """Rotated floats of full width are the same vectors; without a map nothing is rotated."""
    assert cell_keys(4, [2], ["int8"], rotated=False) == [("truncated", 2, "int8"), ("truncated", 4, "float32")]
    keys = cell_keys(4, [2, 4], ["float32", "int8"], rotated=True)
    assert ("rotated", 4, "float32") not in keys
    assert ("rotated", 4, "int8") in keys
    assert len(keys) == len(set(keys)) == 7


def test_intervals_are_the_bootstrap_of_the_same_queries():
    """As wide as the formula for a mean says; a cell without differences has none, and equal cells equal ones."""
    random = np.random.default_rng(3)
    rows = np.stack([random.normal(0.2, 0.5, size=400), np.zeros(400), random.exponential(size=400)])
    found = paired_intervals(np.concatenate([rows, rows[:1]]), seed=0)
    for row, (low, high) in zip(rows, found[:3], strict=True):
        error = row.std() / 20
        np.testing.assert_allclose(
            [low, high], [row.mean() - 1.96 * error, row.mean() + 1.96 * error], atol=0.2 * error
        )
    assert found[1].tolist() == [0, 0]
    assert found[0].tolist() == found[3].tolist(), "paired"
    assert paired_intervals(rows, seed=0).tolist() == found[:3].tolist()


def test_seen_documents_do_not_count_as_gain():
    """The principal axes of random vectors rank these very documents better, and unseen ones no better."""
    random = np.random.default_rng(0)
    documents = torch.tensor(unit(random.normal(size=(600, 64))), dtype=torch.float32)
    rows = torch.arange(400)
    basis = torch.linalg.eigh(documents[rows].T @ documents[rows]).eigenvectors.flip(1)
    search = Search(documents, documents[400:], torch.arange(400, 600))
    values = dict(values_by_cell(search, rows, basis, [8, 16, 32], ["float32"]))
    seen = np.mean([values["rotated", dim, "float32"]["recall@10"] for dim in (16, 32)])
    assert seen > np.mean([values["truncated", dim, "float32"]["recall@10"] for dim in (16, 32)]) + 0.02
    gained, gain, chance = gain_on_unseen(search, rows, basis, [8, 16, 32], 0)
    assert not gained
    assert abs(gain) < chance < 0.1
    # what is in the last values of all documents is found by axes of some of them
    documents[:, :32] *= 0.1
    search = Search(documents, documents[400:], torch.arange(400, 600))
    basis = torch.linalg.eigh(documents[rows].T @ documents[rows]).eigenvectors.flip(1)
    gained, gain, chance = gain_on_unseen(search, rows, basis, [8, 16, 32], 0)
    assert gained
    assert gain > chance + 0.1


def test_too_few_unseen_documents_gain_nothing():
    """Five documents find each other in any case."""
    search, _ = case(relevant=False)
    assert gain_on_unseen(search, torch.arange(35), torch.eye(WIDTH), [3], 0) == (False, 0.0, 0.0)
