"""Random states of one layer, what SIA gives for them, and what the reference gives."""

import torch

import reference
from mipic_st.losses import sia

# (full width, prefixes): powers of two, a single prefix, neighbouring widths, a prefix of one, a near-full prefix.
SHAPES = [(48, (8, 16, 32)), (8, (4,)), (21, (1, 2, 3, 5, 8, 13)), (10, (1, 9))]
GAMMAS = {1: (0.4,), 2: (0.3, 1.0), 3: (0.2, 0.45, 0.7), 6: (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)}
LENGTHS = (30, 17, 9, 8, 3, 2, 1, 0)
DIRECTIONS = ["prefix_full", "full_prefix"]


class Case:
    """Random states of one layer: ragged sentences, a query, one lift per prefix."""

    def __init__(self, width, dims, lengths=LENGTHS, seed=0, dtype=torch.float64, lift_scale=None):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.dims, self.gammas = dims, GAMMAS[len(dims)]
        self.mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        # a common offset, as real states have one: without centring CKA would come out wrong
        self.hidden = (draw(len(lengths), max(lengths), width) + draw(width)).to(dtype)
        self.query = draw(len(lengths), width).to(dtype)
        self.lifts = [(draw(dim, width) * (lift_scale or dim**-0.5)).to(dtype) for dim in dims]

    def leaves(self, dtype=None):
        """Copies of the tensors that may get gradients, by name."""
        named = {"hidden": self.hidden, "query": self.query}
        named |= {f"lift {dim}": lift for dim, lift in zip(self.dims, self.lifts, strict=True)}
        return {
            name: tensor.detach().clone().to(dtype or tensor.dtype).requires_grad_() for name, tensor in named.items()
        }

    def terms(self, leaves=None, **options):
        """What mipic_st computes."""
        leaves = leaves or self.leaves()
        lifts = [leaves[f"lift {dim}"] for dim in self.dims]
        return sia.sia_terms(leaves["hidden"], leaves["query"], self.mask, self.dims, lifts, self.gammas, **options)

    def expected(self, **options):
        """What the NumPy reference computes from the same numbers."""
        return reference.sia_values(
            self.hidden.double().numpy(),
            self.query.double().numpy(),
            self.mask.numpy(),
            self.dims,
            [lift.double().numpy() for lift in self.lifts],
            self.gammas,
            **options,
        )


def gradients(scalar, leaves):
    """Gradient of each named leaf, zeros where there is none."""
    found = torch.autograd.grad(scalar, list(leaves.values()), allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }


def assert_same_gradients(got, expected, tolerance):
    """Each named gradient within ``tolerance`` of the largest entry of the expected one."""
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        difference = (got[name].double() - gradient.double()).abs().max().item()
        assert difference <= tolerance * max(scale, 1e-30), f"{name}: {difference} of {scale}"


def weights(shape, seed=9):
    """Different weights for every sentence and prefix, so that no error cancels in a sum."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5


def moved(case, positions, length, filler=3.0):
    """The case with the real token j of every sentence at ``positions(n_b)[j]`` of ``length``, padding filled."""
    other = Case(case.hidden.shape[2], case.dims, lengths=[length] * len(case.hidden))
    other.query, other.lifts = case.query, case.lifts
    noise = torch.Generator().manual_seed(99)
    other.hidden = filler * torch.randn(other.hidden.shape, generator=noise, dtype=torch.float64).to(case.hidden.dtype)
    other.mask = torch.zeros(other.hidden.shape[:2], dtype=torch.bool)
    places = []
    for b, real in enumerate(case.mask):
        place = torch.tensor(positions(int(real.sum())), dtype=torch.long)
        other.hidden[b, place] = case.hidden[b, real]
        other.mask[b, place] = True
        places.append(place)
    return other, places


PADDINGS = {
    "right": lambda n: list(range(n)),
    "left": lambda n: list(range(50 - n, 50)),
    "both": lambda n: list(range(7, 7 + n)),
    "holes": lambda n: [j + j // 3 for j in range(n)],
}
