"""CKA on the most important tokens (Eq. 7-12): values, gradients, and the memory it keeps."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import reference
from mipic_st.losses import cka
from sia_cases import PADDINGS, SHAPES, Case, assert_same_gradients, gradients, moved, weights


def test_topk_sizes_are_exact():
    """min(n, max(min_k, ceil(gamma n))) for all lengths to 600 and shares in steps of 0.01 and odd ones of 0.0001."""
    gammas = [step / 100 for step in range(1, 101)] + [0.0001, 0.1429, 0.3333, 0.4286, 0.6667, 0.9999]
    lengths = range(601)
    for min_k in (1, 8):
        sizes = cka.topk_sizes(torch.tensor(lengths), gammas, min_k)
        expected = [[reference.topk_size(n, gamma, min_k) for gamma in gammas] for n in lengths]
        assert sizes.tolist() == expected
        assert not sizes.is_floating_point()
    # in floating point the same formula goes wrong, so the lengths and shares above can tell
    assert any(
        math.ceil(gamma * n) != math.ceil(round(gamma * 10_000) * n / 10_000) for gamma in gammas for n in lengths
    )


@pytest.mark.parametrize("dims", [(3,), (1, 2, 3), (2, 7, 8), (4, 11)])
def test_prefix_grams_equal_gram_of_each_prefix(dims):
    """Entry (j, k) of prefix i is the inner product of the first d_i entries of tokens j and k."""
    tokens = torch.randn(2, 4, 11, dtype=torch.float64)
    grams = cka.prefix_grams(tokens, dims)
    assert len(grams) == len(dims)
    for gram, dim in zip(grams, dims, strict=True):
        for b in range(2):
            expected = [[float(sum(x * y)) for y in tokens[b, :, :dim]] for x in tokens[b, :, :dim]]
            np.testing.assert_allclose(gram[b].numpy(), expected, rtol=1e-10, atol=1e-10)


def test_prefix_grams_gradcheck():
    """Numerical derivatives of all Gram matrices."""
    tokens = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda tokens: tuple(cka.prefix_grams(tokens, (1, 3, 5))), tokens)


def test_centred_gram_is_the_gram_of_centred_tokens():
    """Inner products after taking the mean of the selected tokens away; rows and columns of all others are zero."""
    tokens = torch.randn(4, 6, 5, dtype=torch.float64) + 3
    selected = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1, 0, 1, 0, 1], [1, 0, 0, 0, 0, 0]])
    got = cka.centred_gram(tokens @ tokens.mT, selected.double(), selected.sum(1).double())
    for b in range(4):
        chosen = selected[b].bool()
        centred = torch.zeros(6, 5, dtype=torch.float64)
        centred[chosen] = tokens[b, chosen] - tokens[b, chosen].mean(0)
        torch.testing.assert_close(got[b], centred @ centred.T, atol=1e-10, rtol=1e-10)


def test_centred_gram_gradcheck():
    """Numerical derivatives for the Gram matrix, whether or not it is symmetric."""
    selected = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 1]]).double()
    gram = torch.randn(2, 4, 4, dtype=torch.float64)
    gram = (gram + gram.mT).requires_grad_()
    sizes = selected.sum(1)
    assert torch.autograd.gradcheck(lambda g: cka.centred_gram((g + g.mT) / 2, selected, sizes), gram)


# ------------------------------------------------------------------------------------------------ topk_cka_loss


@pytest.mark.parametrize("detach_full_width", [True, False])
@pytest.mark.parametrize("min_k", [1, 8, 100])
@pytest.mark.parametrize(("width", "dims"), SHAPES)
def test_topk_cka_loss_equals_reference(width, dims, min_k, detach_full_width):
    """1 - CKA over the most important tokens of each sentence, for any importance that is given."""
    case = Case(width, dims, seed=25)
    importance = torch.rand(case.mask.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
    values, valid = cka.topk_cka_loss(
        case.hidden, importance, case.mask, dims, case.gammas, min_k=min_k, detach_full_width=detach_full_width
    )
    _, expected, expected_valid = case.expected(min_k=min_k, full_attention=importance.numpy())
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(valid.numpy(), expected_valid)


def test_topk_cka_loss_takes_only_the_order_of_importance():
    """Any increasing function of the importance gives the same bits, and the importance gets no gradient."""
    case = Case(48, (8, 16, 32), seed=26)
    importance = torch.randn(case.mask.shape, dtype=torch.float64, requires_grad=True)
    values, _ = cka.topk_cka_loss(case.hidden, importance, case.mask, case.dims, case.gammas)
    stretched, _ = cka.topk_cka_loss(case.hidden, 5 * importance.exp() - 9, case.mask, case.dims, case.gammas)
    assert torch.equal(values, stretched)
    assert not values.requires_grad


def test_topk_cka_loss_leaves_out_unimportant_tokens():
    """A token outside the largest set changes nothing; one inside the smallest set changes every prefix."""
    case = Case(48, (8, 16, 32), lengths=(40,), seed=27)
    importance = torch.arange(40, 0, -1)[None].double()
    before, _ = cka.topk_cka_loss(case.hidden, importance, case.mask, case.dims, case.gammas)
    hidden = case.hidden.clone()
    hidden[0, 28:] += torch.randn(12, 48, dtype=torch.float64)
    torch.testing.assert_close(
        cka.topk_cka_loss(hidden, importance, case.mask, case.dims, case.gammas)[0], before, atol=1e-12, rtol=0
    )
    hidden[0, 7] += torch.randn(48, dtype=torch.float64)
    after, _ = cka.topk_cka_loss(hidden, importance, case.mask, case.dims, case.gammas)
    assert (after - before).abs().min() > 1e-6


def test_topk_cka_loss_ranks_equal_tokens_by_position():
    """With equal importance the first tokens are taken, wherever padding is."""
    case = Case(48, (8, 16, 32), lengths=(40, 33), seed=28)
    equal = torch.zeros(case.mask.shape, dtype=torch.float64)
    falling = torch.arange(40, 0, -1).expand(2, 40).double()
    values, _ = cka.topk_cka_loss(case.hidden, equal, case.mask, case.dims, case.gammas)
    expected, _ = cka.topk_cka_loss(case.hidden, falling, case.mask, case.dims, case.gammas)
    assert torch.equal(values, expected)
    other, _ = moved(case, PADDINGS["left"], 50)
    values, _ = cka.topk_cka_loss(
        other.hidden, torch.zeros(other.mask.shape).double(), other.mask, case.dims, case.gammas
    )
    torch.testing.assert_close(values, expected)


def test_topk_cka_loss_lies_between_zero_and_one():
    """CKA is a cosine of positive semi-definite matrices."""
    case = Case(48, (8, 16, 32), lengths=[30] * 50, seed=29, dtype=torch.float32)
    values, _ = cka.topk_cka_loss(case.hidden, case.hidden.sum(-1), case.mask, case.dims, case.gammas)
    assert values.min() > 0
    assert values.max() < 1


@pytest.mark.parametrize("width", [8, 100])
def test_a_spread_below_rounding_is_none(width):
    """Tokens that differ by less than float32 resolves are equal tokens, whichever products CKA comes from."""
    generator = torch.Generator().manual_seed(35)
    centre, offsets = 10 * torch.ones(width), torch.randn(1, 30, width, generator=generator)
    for spread, expected in ((1e-6, False), (1e-2, True)):
        hidden = centre + spread * offsets
        assert not torch.equal(hidden[0, 0], hidden[0, 1])
        mask = torch.ones(1, 30, dtype=torch.bool)
        values, valid = cka.topk_cka_loss(hidden, torch.zeros(1, 30), mask, (4,), (0.9,))
        assert bool(valid) is expected
        assert (values.item() != 0) is expected


def test_topk_cka_loss_gradcheck():
    """Numerical derivatives with an attached teacher, over sentences long and short."""
    case = Case(6, (2, 4), lengths=(9, 5, 2, 1, 0), seed=30)
    importance = torch.rand(case.mask.shape, dtype=torch.float64)

    def function(hidden):
        return cka.topk_cka_loss(hidden, importance, case.mask, case.dims, case.gammas, 3, False)[0]

    assert torch.autograd.gradcheck(function, case.hidden.requires_grad_())


# ------------------------------------------------------------------------------- memory, and more tokens than dims

MANY = (90, 61, 40, 12, 2, 1, 0)


@pytest.mark.parametrize("detach_full_width", [True, False])
@pytest.mark.parametrize("min_k", [1, 8, 50])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_more_tokens_than_dims(dtype, tolerance, min_k, detach_full_width):
    """Long and short sentences together, where CKA comes from products of features: values and gradients as ever."""
    case = Case(12, (2, 5, 9), lengths=MANY, seed=31, dtype=dtype)
    leaves, expected_leaves = case.leaves(), case.leaves(torch.float64)
    terms = case.terms(leaves, min_k=min_k, detach_full_width=detach_full_width)
    lifts = [expected_leaves[f"lift {dim}"] for dim in case.dims]
    _, expected, *_ = reference.sia_tensors(
        *(expected_leaves[name] for name in ("hidden", "query")),
        *(case.mask, case.dims, lifts, case.gammas, min_k, 0.05, "prefix_full", detach_full_width),
    )
    np.testing.assert_allclose(terms.cka.detach().numpy(), expected.detach().numpy(), rtol=0, atol=tolerance / 10)
    np.testing.assert_array_equal(terms.cka_valid.numpy(), case.expected(min_k=min_k)[2])
    weight = weights(terms.cka.shape)
    got = gradients((terms.cka.double() * weight).sum(), leaves)["hidden"]
    wanted = gradients((expected * weight).sum(), expected_leaves)["hidden"]
    assert_same_gradients({"hidden": got}, {"hidden": wanted}, tolerance)
    assert wanted.abs().max() > 1e-4


@pytest.mark.parametrize("rank", [0, 20, 41, 59])
@pytest.mark.parametrize("size", [1e3, 1e5])
def test_massive_token_among_more_tokens_than_dims(size, rank):
    """The same accuracy as with fewer tokens than dims, for values and for the gradients of the other tokens."""
    case = Case(24, (4, 8, 16), lengths=(60,), seed=32, dtype=torch.float32)
    case.hidden[0, rank, 20] = size
    importance = torch.arange(60, 0, -1)[None]
    results = []
    for hidden in (case.hidden.clone().requires_grad_(), case.hidden.double().requires_grad_()):
        values, _ = cka.topk_cka_loss(hidden, importance.to(hidden.dtype), case.mask, case.dims, case.gammas)
        (gradient,) = torch.autograd.grad(values[:, 0].sum(), hidden)
        results.append((values.detach().double(), gradient.double()))
    expected = case.expected(full_attention=importance.double().numpy())[1]
    for values, _ in results:
        np.testing.assert_allclose(values.numpy(), expected, rtol=0, atol=1e-4)
    scale = results[1][1].abs().max()
    assert (results[0][1] - results[1][1]).abs().max() <= 1e-3 * scale


class Sizes(TorchDispatchMode):
    """Notes the number of entries of the largest tensor that any operation made."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def kept_for_backward(case, **options):
    """Entries that the graph holds, other than those of hidden itself."""
    leaves, kept = case.leaves(), {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() / 8
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        terms = case.terms(leaves, **options)
    assert terms.cka.requires_grad
    return sum(size for place, size in kept.items() if place != leaves["hidden"].untyped_storage().data_ptr())


@pytest.mark.parametrize("detach_full_width", [True, False])
@pytest.mark.parametrize("width", [16, 200])
def test_kept_memory_is_linear_in_length(width, detach_full_width):
    """Twice the tokens, at most twice the memory; and less than the states themselves have at any length."""
    kept = [
        kept_for_backward(Case(width, (4, 8, 12), lengths=[length] * 4), detach_full_width=detach_full_width)
        for length in (60, 120, 240)
    ]
    assert kept[1] <= 2.1 * kept[0]
    assert kept[2] <= 2.1 * kept[1]
    if width == 200:
        assert kept[2] < 0.3 * 4 * 240 * width


@pytest.mark.parametrize("detach_full_width", [True, False])
def test_long_sentences_never_need_a_square_of_their_length(detach_full_width):
    """Forward or backward, no tensor is as large as one Gram matrix of the tokens of each sentence would be."""
    case = Case(8, (2, 4, 6), lengths=[300, 200], seed=33)
    leaves = case.leaves()
    with Sizes() as sizes:
        terms = case.terms(leaves, detach_full_width=detach_full_width)
        (terms.attention.sum() + terms.cka.sum()).backward()
    assert 2 * 300 * 8 <= sizes.largest <= 2 * 300 * 8 * 3 < 2 * 210**2


def test_nothing_is_kept_without_gradients():
    """Under no_grad, as in the first stage of a cached loss, values are the same bits."""
    case = Case(8, (2, 4, 6), lengths=[60, 30])
    with torch.no_grad():
        silent = case.terms()
    assert all(torch.equal(*pair) for pair in zip(silent, case.terms(), strict=True))
    assert not silent.cka.requires_grad


@pytest.mark.slow
def test_compiled_terms_are_the_same():
    """Inside torch.compile, with lengths on both sides of the width, values and gradients stay."""
    torch.compiler.reset()

    def compute(hidden, importance, mask):
        return cka.topk_cka_loss(hidden, importance, mask, (2, 4), (0.3, 0.7), 2)[0].sum()

    compiled = torch.compile(compute, backend="aot_eager", dynamic=True)
    for length in (5, 30, 31):
        case = Case(8, (2, 4), lengths=[length, 3], seed=34)
        results = []
        for function in (compute, compiled):
            hidden = case.hidden.clone().requires_grad_()
            value = function(hidden, case.hidden.sum(-1), case.mask)
            results.append((value.detach(), *torch.autograd.grad(value, hidden)))
        torch.testing.assert_close(*results)
