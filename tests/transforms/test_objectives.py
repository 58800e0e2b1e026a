"""What fits minimise, against loops over rows and dims in NumPy float64 that take nothing from ``mipic_st``."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mipic_st.numerics import prefix_cosines
from mipic_st.transforms.objectives import CutObjective, RotationObjective
from transforms_fixtures import unit


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
    objective = RotationObjective([2, 6], contrastive, 0.7, contrastive_temperature=0.2, similarity_temperature=0.3)
    value = objective(
        *(torch.tensor(array) for array in (anchors, positives, frame)),
        negatives=torch.tensor(negatives) if more else None,
        same=torch.tensor(same) if repeated else None,
    )
    expected = reference_objective(anchors, positives, negatives, frame, [2, 6], contrastive, 0.7, 0.2, 0.3, same)
    assert value.item() == pytest.approx(expected, rel=1e-9)


def test_gradients_of_the_objective():
    """Autograd against finite differences, in float64."""
    generator = torch.Generator().manual_seed(0)
    anchors, positives = (torch.randn(5, 6, generator=generator, dtype=torch.double) for _ in range(2))
    frame = torch.randn(6, 4, generator=generator, dtype=torch.double, requires_grad=True)
    anchors, positives = (torch.nn.functional.normalize(part, dim=1) for part in (anchors, positives))
    objective = RotationObjective([2, 4], contrastive_dims=[2])
    assert torch.autograd.gradcheck(lambda frame: objective(anchors, positives, frame), (frame,))


def test_prefix_cosines_are_cosines_of_prefixes():
    """Equals cutting, normalising and multiplying."""
    random = np.random.default_rng(1)
    left, right = random.normal(size=(4, 9)), random.normal(size=(6, 9))
    for dim in (2, 5, 9):
        cosines = prefix_cosines(torch.tensor(left), torch.tensor(right), dim)
        np.testing.assert_allclose(cosines.numpy(), unit(left[:, :dim]) @ unit(right[:, :dim]).T, atol=1e-12)


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
    objective = CutObjective(dims, vector_weight, temperature=0.3)
    assert objective(*tensors).item() == pytest.approx(expected, rel=1e-6)
    assert torch.autograd.gradcheck(lambda w: objective(*tensors[:2], w), tensors[2].requires_grad_())
