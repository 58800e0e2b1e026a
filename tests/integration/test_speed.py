"""The alignment terms against a straightforward float64 loop over sentences: same numbers, a fraction of the time."""

import time
from itertools import pairwise

import pytest
import torch

import reference
from mipic_st.losses import pic, presets, sia

BATCH, WIDTH, PREFIXES, LAYERS = 32, 384, (16, 32, 64, 128, 256), 2
REPEATS = {"batched": 7, "straightforward": 2}


class Terms:
    """Random states of a few layers, a lift per layer and prefix, and a chain over all dims, as in a training step."""

    def __init__(self, length, ragged):
        torch.manual_seed(0)
        lengths = torch.randint(length // 2, length + 1, (BATCH,)) if ragged else torch.full((BATCH,), length)
        lengths[0] = length
        self.mask = torch.arange(length) < lengths[:, None]
        self.layers = [torch.randn(BATCH, length, WIDTH, requires_grad=True) for _ in range(LAYERS)]
        self.gammas = presets.default_gammas(len(PREFIXES))
        self.lifts = [
            [sia.initial_lift(dim, WIDTH, "random").requires_grad_() for dim in PREFIXES] for _ in range(LAYERS)
        ]
        self.projections = [pic.chain_head(dim, next_dim) for dim, next_dim in pairwise([*PREFIXES, WIDTH])]
        self.leaves = [*self.layers, *(lift for lifts in self.lifts for lift in lifts)]
        self.leaves += [parameter for head in self.projections for parameter in head.parameters()]

    def vectors(self):
        """Masked mean of each layer, and for the chain one of them per dim, cut to it."""
        weight = self.mask[:, :, None] / self.mask.sum(1)[:, None, None]
        queries = [(hidden * weight).sum(1) for hidden in self.layers]
        dims = [*PREFIXES, WIDTH]
        return queries, [queries[i * LAYERS // len(dims)][:, :dim] for i, dim in enumerate(dims)]

    def batched(self):
        """L_SIA + L_PIC by mipic_st."""
        queries, chain = self.vectors()
        total = sum(
            pic.chain_info_nce(pic.predict_next(head, vector), target)
            for head, (vector, target) in zip(self.projections, pairwise(chain), strict=True)
        )
        for hidden, query, lifts in zip(self.layers, queries, self.lifts, strict=True):
            terms = sia.sia_terms(hidden, query, self.mask, PREFIXES, lifts, self.gammas)
            valid = terms.cka_valid.sum(0).clamp(min=1)
            total = total + terms.attention.mean(0).sum() + (terms.cka.sum(0) / valid).sum()
        return total

    def straightforward(self):
        """The same by the reference."""
        queries, chain = self.vectors()
        total = reference.straightforward_chain(
            chain, [[head[0].weight, head[0].bias, head[2].weight, head[2].bias] for head in self.projections]
        )
        for hidden, query, lifts in zip(self.layers, queries, self.lifts, strict=True):
            total = total + sum(reference.straightforward_layer(hidden, query, self.mask, PREFIXES, lifts, self.gammas))
        return total

    def fastest(self, name):
        """Best time of forward and backward in seconds, with the value and the gradients."""
        times = []
        for _ in range(REPEATS[name]):
            start = time.perf_counter()
            value = getattr(self, name)()
            gradients = torch.autograd.grad(value, self.leaves)
            times.append(time.perf_counter() - start)
        return min(times), value.item(), gradients


@pytest.fixture(autouse=True)
def _one_thread():
    """Other work on the machine makes threads wait for each other, the batched version's most; one thread is steady."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("length", [24, 128])
def test_alignment_terms_are_ten_times_faster(length, ragged):
    """SIA and PIC, forward and backward, take at most a tenth of the time and give the same value and gradients."""
    terms = Terms(length, ragged)
    fast, value, gradients = terms.fastest("batched")
    slow, expected, expected_gradients = terms.fastest("straightforward")
    assert value == pytest.approx(expected, rel=1e-5)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert (gradient - wanted).abs().max() <= 1e-3 * wanted.abs().max()
    print(f"\nL={length} ragged={ragged}: {fast * 1e3:.1f} ms against {slow * 1e3:.0f} ms, {slow / fast:.1f} times")  # noqa: T201
    assert slow / fast >= 10
