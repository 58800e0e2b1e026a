"""The references themselves: cases worked out by hand, and the three versions against each other."""

import math

import numpy as np
import pytest
import torch

import reference


def test_kl_by_hand():
    """KL of (1/2, 1/2) from (1/4, 3/4) is (ln 2 + ln 2/3) / 2, and the reverse is another number."""
    fair, skewed = np.log([0.5, 0.5]), np.log([0.25, 0.75])
    assert reference.kl(fair, skewed) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert reference.kl(skewed, fair) == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))


def test_scores_by_hand():
    """With D = 4 the score is half the inner product; a lift that moves entry 0 to entry 3 reads the query there."""
    tokens, query = np.array([[1.0, 2.0, 3.0, 4.0]]), np.array([1.0, 10.0, 100.0, 1000.0])
    assert reference.scores(tokens, query) == pytest.approx([(1 + 20 + 300 + 4000) / 2])
    assert reference.scores(tokens, query, np.array([[0.0, 0.0, 0.0, 1.0]])) == pytest.approx([1000 / 2])


def test_cka_by_hand():
    """Same features: 1. Two uncorrelated directions of equal spread against one of them: 1 / sqrt(2)."""
    square = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]) + 7
    assert reference.cka(square, square) == pytest.approx(1.0)
    assert reference.cka(square[:, :1], square) == pytest.approx(1 / math.sqrt(2))
    assert reference.cka(square[:1], square[:1]) is None
    assert reference.cka(np.ones((3, 2)), square[:3]) is None


def test_topk_size_by_hand():
    """Decimal shares: 0.55 of 100 tokens is 55, where floating point arithmetic says 56."""
    assert math.ceil(0.55 * 100) == 56
    assert reference.topk_size(100, 0.55, 8) == 55
    assert reference.topk_size(101, 0.55, 8) == 56
    assert reference.topk_size(20, 0.2, 8) == 8
    assert reference.topk_size(5, 0.2, 8) == 5
    assert reference.topk_size(0, 0.2, 8) == 0


def test_info_nce_by_hand():
    """Two orthogonal sentences, perfectly predicted: log(1 + exp(-1 / tau)), whatever their lengths."""
    predicted = np.array([[3.0, 0.0], [0.0, 0.5]])
    target = np.array([[1.0, 0.0], [0.0, 9.0]])
    assert reference.info_nce_value(predicted, target, 0.5) == pytest.approx(math.log(1 + math.exp(-2)))
    assert reference.info_nce_value(predicted, target[::-1], 0.5) == pytest.approx(2 + math.log(1 + math.exp(-2)))


@pytest.mark.parametrize("direction", ["prefix_full", "full_prefix"])
def test_versions_agree(direction):
    """NumPy, torch by sentence and the whole-layer version give the same numbers, detached or not."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 20, 12, generator=generator, dtype=torch.float64)
    query = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    mask = torch.arange(20) < torch.tensor([20, 13, 2, 1, 0])[:, None]
    dims, gammas = (3, 4, 9), (0.2, 0.5, 0.7)
    lifts = [torch.randn(dim, 12, generator=generator, dtype=torch.float64) for dim in dims]
    attention, distance, valid = reference.sia_values(
        hidden.numpy(),
        query.numpy(),
        mask.numpy(),
        dims,
        [lift.numpy() for lift in lifts],
        gammas,
        min_k=3,
        direction=direction,
    )
    assert valid.sum(axis=0).tolist() == [3, 3, 3]
    for detach_full_width in (True, False):
        arguments = (hidden, query, mask, dims, lifts, gammas, 3, 0.05, direction, detach_full_width)
        by_sentence = reference.sia_tensors(*arguments)
        np.testing.assert_allclose(by_sentence[0].numpy(), attention, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(by_sentence[1].numpy(), distance, rtol=1e-10, atol=1e-10)
        assert (by_sentence[2].numpy() == valid).all()
        layer = reference.straightforward_layer(*arguments)
        assert float(layer[0]) == pytest.approx(attention.mean(axis=0).sum())
        assert float(layer[1]) == pytest.approx((distance.sum(axis=0) / valid.sum(axis=0)).sum())


def test_chain_versions_agree():
    """Projections and InfoNCE in NumPy and in torch give the same numbers."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    vectors = [draw(6, 3), draw(6, 5), draw(6, 4)]
    projections = [(draw(2, 3), draw(2), draw(5, 2), draw(5)), (draw(2, 5), draw(2), draw(4, 2), draw(4))]
    expected = sum(
        reference.info_nce_value(
            reference.head_value(vectors[c].numpy(), *(parameter.numpy() for parameter in projections[c])),
            vectors[c + 1].numpy(),
        )
        for c in range(2)
    )
    assert float(reference.straightforward_chain(vectors, projections)) == pytest.approx(expected)
