"""SIA (Eq. 4-12) against the per-sentence references, and what must hold for any padding, batch and number format."""

import math

import numpy as np
import pytest
import torch

import reference
from mipic_st.losses import cka, sia
from sia_cases import DIRECTIONS, LENGTHS, PADDINGS, SHAPES, Case, assert_same_gradients, gradients, moved, weights

# -------------------------------------------------------------------------------------------- Eq. 4-12 as a whole


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("min_k", [1, 3, 8])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
@pytest.mark.parametrize(("width", "dims"), SHAPES)
def test_values_equal_reference(width, dims, temperature, min_k, direction):
    """Both terms and the validity equal Eq. 6 and 12, per sentence and prefix, for lengths from 30 down to none."""
    case = Case(width, dims, seed=width)
    expected = case.expected(min_k=min_k, temperature=temperature, direction=direction)
    got = case.terms(min_k=min_k, temperature=temperature, kl_direction=direction)
    np.testing.assert_allclose(got.attention.detach().numpy(), expected[0], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(got.cka.detach().numpy(), expected[1], rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(got.cka_valid.numpy(), expected[2])
    assert got.attention.shape == got.cka.shape == got.cka_valid.shape == (len(LENGTHS), len(dims))


@pytest.mark.parametrize("temperature", [0.05, 1.0])
@pytest.mark.parametrize(("width", "dims"), [*SHAPES, (384, (16, 32, 256))])
def test_float32_values_equal_reference(width, dims, temperature):
    """In float32, as in training, both terms stay within 1e-5 of the float64 reference."""
    case = Case(width, dims, seed=1, dtype=torch.float32)
    expected = case.expected(temperature=temperature)
    got = case.terms(temperature=temperature)
    assert got.attention.dtype == got.cka.dtype == torch.float32
    np.testing.assert_allclose(got.attention.detach().numpy(), expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.cka.detach().numpy(), expected[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got.cka_valid.numpy(), expected[2])


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("detach_full_width", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize(("width", "dims"), SHAPES)
def test_gradients_equal_reference(width, dims, dtype, tolerance, detach_full_width, direction):
    """Gradients of hidden, query and every lift equal those of the reference, teacher detached or not."""
    case = Case(width, dims, seed=2, dtype=dtype)
    leaves, expected_leaves = case.leaves(), case.leaves(torch.float64)
    terms = case.terms(leaves, min_k=3, temperature=0.5, kl_direction=direction, detach_full_width=detach_full_width)
    expected = reference.sia_tensors(
        expected_leaves["hidden"],
        expected_leaves["query"],
        case.mask,
        dims,
        [expected_leaves[f"lift {dim}"] for dim in dims],
        case.gammas,
        3,
        0.5,
        direction,
        detach_full_width,
    )
    weight = weights(terms.attention.shape)
    for term, (got, wanted) in enumerate([(terms.attention, expected[0]), (terms.cka, expected[1])]):
        got_gradients = gradients((got.double() * weight).sum(), leaves)
        wanted_gradients = gradients((wanted * weight).sum(), expected_leaves)
        assert_same_gradients(got_gradients, wanted_gradients, tolerance)
        assert wanted_gradients["hidden"].abs().max() > 1e-3, term


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_equals_straightforward_layer(direction):
    """Averaged over the sentences and summed over the prefixes, a layer equals the straightforward implementation."""
    case = Case(64, (8, 16, 32), lengths=(40, 33, 21, 12, 5), seed=3)
    got = case.terms(temperature=0.05, kl_direction=direction, detach_full_width=False)
    arguments = (case.hidden, case.query, case.mask, case.dims, case.lifts, case.gammas, 8, 0.05, direction, False)
    attention, distance = reference.straightforward_layer(*arguments)
    torch.testing.assert_close(got.attention.mean(dim=0).sum(), attention)
    torch.testing.assert_close(got.cka.mean(dim=0).sum(), distance)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradcheck_of_all_inputs(direction):
    """Numerical derivatives confirm those of both terms for hidden, query and lifts."""
    case = Case(5, (2, 4), lengths=(5, 3, 2, 1, 0), seed=4)
    leaves = case.leaves()

    def function(*tensors):
        given = dict(zip(leaves, tensors, strict=True))
        terms = case.terms(given, min_k=3, temperature=0.7, kl_direction=direction, detach_full_width=False)
        return terms.attention, terms.cka

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


def test_gradcheck_of_lifts_with_detached_teacher():
    """With a detached teacher the lifts still get their whole derivative."""
    case = Case(5, (2, 4), lengths=(5, 3), seed=5)
    constants = {"hidden": case.hidden, "query": case.query}

    def function(*lifts):
        given = constants | {f"lift {dim}": lift for dim, lift in zip(case.dims, lifts, strict=True)}
        return case.terms(given, temperature=0.7).attention

    assert torch.autograd.gradcheck(function, tuple(lift.requires_grad_() for lift in case.lifts))


def test_detached_teacher_gives_no_gradient_to_query():
    """A detached teacher detaches the query, for the students too, and leaves the values as they are."""
    case = Case(48, (8, 16, 32))
    leaves = case.leaves()
    detached = case.terms(leaves, detach_full_width=True)
    attached = case.terms(leaves, detach_full_width=False)
    torch.testing.assert_close(detached.attention, attached.attention, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(detached.cka, attached.cka, rtol=1e-12, atol=1e-12)
    assert gradients(detached.attention.sum(), leaves)["query"].abs().max() == 0
    assert gradients(attached.attention.sum(), leaves)["query"].abs().max() > 0


def test_detached_teacher_gives_no_gradient_behind_largest_prefix():
    """With a detached teacher, entries behind the largest prefix are full-width only and get no gradient."""
    case = Case(48, (8, 16, 32))
    leaves = case.leaves()
    terms = case.terms(leaves, detach_full_width=True)
    gradient = gradients(terms.attention.sum() + terms.cka.sum(), leaves)["hidden"]
    assert gradient[..., 32:].abs().max() == 0
    assert gradient[..., 16:32].abs().max() > 0


def test_without_lifts_attention_is_zero():
    """``lifts=None`` leaves out Eq. 6 and changes nothing about CKA."""
    case = Case(48, (8, 16, 32))
    terms = sia.sia_terms(case.hidden, case.query, case.mask, case.dims, None, case.gammas)
    assert terms.attention.count_nonzero() == 0
    torch.testing.assert_close(terms.cka, case.terms().cka.detach(), rtol=0, atol=0)


def test_without_cka_values_are_zero_and_invalid():
    """``with_cka=False`` leaves out Eq. 11 and changes nothing about the attention term."""
    case = Case(48, (8, 16, 32))
    terms = case.terms(with_cka=False)
    assert terms.cka.count_nonzero() == 0
    assert not terms.cka_valid.any()
    torch.testing.assert_close(terms.attention, case.terms().attention, rtol=0, atol=0)


def test_defaults_are_the_papers():
    """Without options: smallest set 8, tau 0.05, KL(prefix || full)."""
    case = Case(48, (8, 16, 32))
    expected = case.expected(min_k=8, temperature=0.05, direction="prefix_full")
    np.testing.assert_allclose(case.terms().attention.detach().numpy(), expected[0], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(case.terms().cka.detach().numpy(), expected[1], rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------ importance from attention maps


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_teacher_attention_equals_reference(direction):
    """Given attention weights replace the teacher's softmax, renormalised over real tokens, and rank the tokens."""
    case = Case(48, (8, 16, 32))
    given = torch.rand(case.mask.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.01
    expected = case.expected(temperature=0.3, direction=direction, full_attention=given.numpy())
    got = case.terms(temperature=0.3, kl_direction=direction, full_attention=given)
    np.testing.assert_allclose(got.attention.detach().numpy(), expected[0], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(got.cka.detach().numpy(), expected[1], rtol=1e-9, atol=1e-9)
    assert not np.allclose(case.terms(temperature=0.3).cka.detach().numpy(), expected[1], atol=1e-3)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_zero_teacher_attention_stays_finite(direction):
    """Tokens that the model gives no attention at all, and all-zero rows, leave values and gradients finite."""
    case = Case(48, (8, 16, 32), dtype=torch.float32)
    given = torch.zeros(case.mask.shape)
    given[:2, :3] = torch.tensor([0.5, 0.3, 0.2])
    leaves = case.leaves()
    terms = case.terms(leaves, kl_direction=direction, full_attention=given)
    assert terms.attention.isfinite().all()
    for gradient in gradients(terms.attention.sum() + terms.cka.sum(), leaves).values():
        assert gradient.isfinite().all()


# ------------------------------------------------------------------------------------- padding and batch


@pytest.mark.parametrize("filler", [0.0, 50.0])
@pytest.mark.parametrize("padding", PADDINGS)
def test_padding_changes_nothing(padding, filler):
    """Values, and gradients of real tokens, are the same with any padding around them; padding gets no gradient."""
    case = Case(48, (8, 16, 32), dtype=torch.float32)
    other, places = moved(case, PADDINGS[padding], 50, filler)
    results = []
    for which in (case, other):
        leaves = which.leaves()
        terms = which.terms(leaves, min_k=3, temperature=0.5, detach_full_width=False)
        weight = weights(terms.attention.shape).float()
        scalar = (terms.attention * weight).sum() + (terms.cka * weight).sum()
        results.append((terms, gradients(scalar, leaves)))
    (terms, gradient), (other_terms, other_gradient) = results
    torch.testing.assert_close(other_terms.attention, terms.attention, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(other_terms.cka, terms.cka, rtol=1e-5, atol=1e-6)
    assert torch.equal(other_terms.cka_valid, terms.cka_valid)
    for b, place in enumerate(places):
        expected = gradient["hidden"][b, case.mask[b]]
        torch.testing.assert_close(other_gradient["hidden"][b, place], expected, rtol=1e-3, atol=1e-5)
    assert other_gradient["hidden"][~other.mask].abs().max() == 0
    for name in gradient.keys() - {"hidden"}:
        torch.testing.assert_close(other_gradient[name], gradient[name], rtol=1e-3, atol=1e-5)


def test_sentence_does_not_depend_on_its_batch():
    """Each sentence alone, a batch of one without padding, has the values that it has in a ragged batch."""
    case = Case(48, (8, 16, 32), dtype=torch.float32)
    together = case.terms(min_k=3)
    for b, length in enumerate(LENGTHS):
        if length == 0:
            continue
        real = case.mask[b]
        alone = sia.sia_terms(
            case.hidden[b : b + 1, real],
            case.query[b : b + 1],
            real[real][None],
            case.dims,
            case.lifts,
            case.gammas,
            min_k=3,
        )
        torch.testing.assert_close(alone.attention[0], together.attention[b], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(alone.cka[0], together.cka[b], rtol=1e-5, atol=1e-6)
        assert torch.equal(alone.cka_valid[0], together.cka_valid[b])


def test_order_of_sentences_follows():
    """Reordering the batch reorders the values."""
    case = Case(48, (8, 16, 32))
    order = torch.tensor([3, 0, 7, 1, 6, 5, 2, 4])
    terms = case.terms()
    turned = sia.sia_terms(case.hidden[order], case.query[order], case.mask[order], case.dims, case.lifts, case.gammas)
    torch.testing.assert_close(turned.attention, terms.attention[order])
    torch.testing.assert_close(turned.cka, terms.cka[order])


def test_mask_of_integers_is_accepted():
    """The tokenizer's mask of zeros and ones means the same as a boolean one."""
    case = Case(48, (8, 16, 32))
    expected = case.terms()
    case.mask = case.mask.long()
    assert torch.equal(case.terms().attention, expected.attention)
    assert torch.equal(case.terms().cka, expected.cka)


# ------------------------------------------------------------------------------------------- degenerate sentences

DEGENERATE = {
    "no token": lambda hidden: (hidden, 0),
    "one token": lambda hidden: (hidden, 1),
    "two tokens": lambda hidden: (hidden, 2),
    "equal tokens": lambda hidden: (hidden[:, :1].expand_as(hidden).clone(), hidden.shape[1]),
    "zero tokens": lambda hidden: (torch.zeros_like(hidden), hidden.shape[1]),
    "equal sentences": lambda hidden: (hidden[:1].expand_as(hidden).clone(), hidden.shape[1]),
    "constant prefix": lambda hidden: (torch.cat([torch.ones_like(hidden[..., :32]), hidden[..., 32:]], -1), 13),
    "constant rest": lambda hidden: (torch.cat([hidden[..., :8], torch.ones_like(hidden[..., 8:])], -1), 13),
}


@pytest.mark.parametrize("detach_full_width", [True, False])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("kind", DEGENERATE)
def test_degenerate_sentences_stay_finite(kind, batch, direction, detach_full_width):
    """Values and gradients are finite, CKA is valid exactly where the reference can compute it, and zero elsewhere."""
    case = Case(48, (8, 16, 32), lengths=[13] * batch, seed=6, dtype=torch.float32)
    case.hidden, length = DEGENERATE[kind](case.hidden)
    case.mask = torch.arange(13).expand(batch, 13) < length
    leaves = case.leaves()
    terms = case.terms(leaves, min_k=3, kl_direction=direction, detach_full_width=detach_full_width)
    expected = case.expected(min_k=3, direction=direction)
    np.testing.assert_array_equal(terms.cka_valid.numpy(), expected[2])
    np.testing.assert_allclose(terms.cka.detach().numpy(), expected[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(terms.attention.detach().numpy(), expected[0], rtol=1e-5, atol=1e-4)
    assert terms.cka[~terms.cka_valid].count_nonzero() == 0
    for name, gradient in gradients(terms.attention.sum() + terms.cka.sum(), leaves).items():
        assert gradient.isfinite().all(), name


@pytest.mark.parametrize("length", [0, 1])
def test_short_sentences_have_no_gradient(length):
    """A sentence of one token or none has nothing to align: both terms are zero, and so are their gradients."""
    case = Case(48, (8, 16, 32), lengths=[length, 12], seed=7)
    leaves = case.leaves()
    terms = case.terms(leaves, detach_full_width=False)
    assert terms.attention[0].count_nonzero() == 0
    assert terms.cka[0].count_nonzero() == 0
    assert not terms.cka_valid[0].any()
    assert terms.cka_valid[1].all()
    gradient = gradients(terms.attention.sum() + terms.cka.sum(), leaves)["hidden"]
    assert gradient[0].count_nonzero() == 0
    assert gradient[1].count_nonzero() > 0


def test_two_tokens_have_cka_one():
    """Two tokens span one line at every width: CKA is one and valid."""
    terms = Case(48, (8, 16, 32), lengths=[2, 2, 2], seed=8).terms()
    assert terms.cka_valid.all()
    torch.testing.assert_close(terms.cka, torch.zeros_like(terms.cka), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("equal", [2, 7, 9, 11])
def test_equal_tokens_in_the_smallest_set_only(equal, dtype):
    """A small set of equal tokens is not valid, though the larger sets that contain it are."""
    case = Case(48, (8, 16, 32), lengths=[40], seed=9, dtype=dtype)
    case.gammas = (equal / 40, 0.6, 0.7)
    case.hidden[0, :equal] = case.hidden[0, 0] + 3
    importance = torch.arange(40, 0, -1, dtype=dtype)[None]
    values, valid = cka.topk_cka_loss(case.hidden, importance, case.mask, case.dims, case.gammas, min_k=1)
    assert valid.tolist() == [[False, True, True]]
    assert values[0, 0] == 0


# -------------------------------------------------------------------------------------------------- numerics


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype):
    """Under bf16 autocast, values and gradients are the same bits as without."""
    case = Case(48, (8, 16, 32), seed=10, dtype=dtype)
    results = []
    for enabled in (False, True):
        leaves = case.leaves()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            terms = case.terms(leaves, temperature=0.5, detach_full_width=False)
            scalar = terms.attention.sum() + terms.cka.sum()
        results.append([*terms, *gradients(scalar, leaves).values()])
    assert results[1][0].dtype == torch.float32
    assert all(torch.equal(with_it, without) for without, with_it in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_computed_in_float32(dtype):
    """Half precision states give exactly what the same numbers give in float32, and gradients in their own format."""
    case = Case(48, (8, 16, 32), seed=11, dtype=dtype)
    leaves = case.leaves()
    terms = case.terms(leaves)
    expected = case.terms(case.leaves(torch.float32))
    assert terms.attention.dtype == terms.cka.dtype == torch.float32
    assert torch.equal(terms.attention, expected.attention)
    assert torch.equal(terms.cka, expected.cka)
    assert all(gradient.dtype == dtype for gradient in gradients(terms.attention.sum(), leaves).values())


def test_float64_states_with_float32_lifts():
    """Lifts of another precision than the states are no error: the higher one is used."""
    case = Case(48, (8, 16, 32), seed=12)
    case.lifts = [lift.float() for lift in case.lifts]
    terms = case.terms()
    assert terms.attention.dtype == torch.float64
    np.testing.assert_allclose(terms.attention.detach().numpy(), case.expected()[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("where", [3, 20, 45])
def test_outlier_dimension_keeps_cka_accurate(where):
    """One dimension of 1000 on all tokens, inside or outside a prefix, leaves CKA accurate to 1e-4 in float32."""
    case = Case(48, (8, 16, 32), lengths=(60, 31, 12, 4), seed=13, dtype=torch.float32)
    case.hidden[..., where] += 1000
    expected = case.expected()
    terms = case.terms()
    np.testing.assert_array_equal(terms.cka_valid.numpy(), expected[2])
    np.testing.assert_allclose(terms.cka.detach().numpy(), expected[1], rtol=0, atol=1e-4)
    assert expected[1].max() > 0.05


@pytest.mark.parametrize("rank", [0, 20, 41, 59])
@pytest.mark.parametrize("size", [1e3, 1e5])
def test_massive_token_keeps_cka_accurate(size, rank):
    """One token with a massive entry, of any importance, leaves CKA accurate to 1e-4 also in the sets without it."""
    case = Case(384, (16, 64, 128), lengths=(60,), seed=14, dtype=torch.float32)
    case.hidden[0, rank, 200] = size
    importance = np.arange(60, 0, -1, dtype=np.float64)[None]
    expected = case.expected(full_attention=importance)
    values, valid = cka.topk_cka_loss(
        case.hidden, torch.from_numpy(importance).float(), case.mask, case.dims, case.gammas
    )
    np.testing.assert_array_equal(valid.numpy(), expected[2])
    np.testing.assert_allclose(values.numpy(), expected[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("scale", [1e3, 1e5])
def test_large_scores_stay_finite(scale, direction):
    """Scores in the millions and beyond make one-hot softmaxes, yet values and gradients stay finite and right."""
    case = Case(48, (8, 16, 32), seed=15, dtype=torch.float32)
    case.hidden *= scale
    leaves = case.leaves()
    terms = case.terms(leaves, kl_direction=direction, detach_full_width=False)
    expected = case.expected(direction=direction)
    assert expected[0].max() > 1e3
    np.testing.assert_allclose(terms.attention.detach().numpy(), expected[0], rtol=1e-4, atol=1e-4)
    for gradient in gradients(terms.attention.sum() + terms.cka.sum(), leaves).values():
        assert gradient.isfinite().all()


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_cka_does_not_depend_on_scale(scale):
    """Multiplying all states by a number changes neither CKA nor its validity."""
    case = Case(48, (8, 16, 32), seed=16, dtype=torch.float32)
    before = case.terms()
    case.hidden *= scale
    after = case.terms()
    torch.testing.assert_close(after.cka, before.cka, rtol=1e-4, atol=1e-5)
    assert torch.equal(after.cka_valid, before.cka_valid)


# ------------------------------------------------------------------------------------------------ identity lift


def test_identity_lift_scores_are_truncated_inner_products():
    """With P = [I 0] the student's score is the inner product of the prefixes over the root of the full width."""
    case = Case(48, (8, 16, 32), seed=17)
    lifts = [sia.initial_lift(dim, 48).double() for dim in case.dims]
    scores = sia.token_scores(case.hidden, sia.project_query(case.query, lifts))
    for i, dim in enumerate(case.dims):
        expected = torch.einsum("bd,bjd->bj", case.query[:, :dim], case.hidden[:, :, :dim]) / math.sqrt(48)
        torch.testing.assert_close(scores[:, i], expected)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_prefix_that_carries_everything_has_no_loss(direction):
    """Where the states end behind a prefix, the identity lift makes KL zero and CKA one for it and all wider ones."""
    case = Case(48, (8, 16, 32), seed=18)
    case.hidden[..., 16:] = 0
    case.lifts = [sia.initial_lift(dim, 48).double() for dim in case.dims]
    terms = case.terms(kl_direction=direction)
    assert terms.attention[:, 1:].abs().max() < 1e-9
    assert terms.cka[:, 1:].abs().max() < 1e-9
    assert terms.attention[:, 0].max() > 1
    assert terms.cka[:, 0].max() > 0.05


# ------------------------------------------------------------------------------------------------ initial_lift


def test_identity_lift():
    """``identity`` is [I 0]."""
    assert sia.initial_lift(2, 4).tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]]


@pytest.mark.parametrize(("dim", "width"), [(3, 7), (5, 5)])
def test_orthogonal_lift(dim, width):
    """``orthogonal`` has orthonormal rows and is not the identity."""
    lift = sia.initial_lift(dim, width, "orthogonal")
    torch.testing.assert_close(lift @ lift.T, torch.eye(dim), atol=1e-5, rtol=0)
    assert not torch.allclose(lift, torch.eye(dim, width), atol=0.1)


def test_random_lift():
    """``random`` is uniform within one over the root of the prefix width, as a linear layer of that input starts."""
    torch.manual_seed(0)
    lift = sia.initial_lift(16, 384, "random")
    assert lift.abs().max() <= 1 / 4
    assert lift.abs().max() > 0.99 / 4
    assert lift.std().item() == pytest.approx(1 / 4 / math.sqrt(3), rel=0.05)
    assert not lift.requires_grad


@pytest.mark.parametrize("init", ["identity", "orthogonal", "random"])
def test_initial_lift_shape(init):
    """Every kind is a float32 matrix of one row per prefix entry, and the seed decides it."""
    lifts = []
    for _ in range(2):
        torch.manual_seed(5)
        lifts.append(sia.initial_lift(6, 20, init))
    assert lifts[0].shape == (6, 20)
    assert lifts[0].dtype == torch.float32
    assert lifts[0].is_contiguous()
    assert torch.equal(*lifts)


def test_unknown_lift_is_refused():
    """The error names the argument, the choices and the value."""
    with pytest.raises(ValueError, match=r"lift_init must be 'identity', 'orthogonal' or 'random', got 'zeros'"):
        sia.initial_lift(2, 4, "zeros")


# -------------------------------------------------------------------------------------------- the pure functions


@pytest.mark.parametrize(("width", "dims"), SHAPES)
def test_project_query_replaces_lifting_every_token(width, dims):
    """Scoring with P q equals lifting each token with P, and the projected query is zero behind its prefix."""
    case = Case(width, dims, seed=19)
    projected = sia.project_query(case.query, case.lifts)
    assert projected.shape == (len(LENGTHS), len(dims), width)
    scores = sia.token_scores(case.hidden, projected)
    for b in range(len(LENGTHS)):
        for i, dim in enumerate(dims):
            expected = reference.scores(case.hidden[b].numpy(), case.query[b].numpy(), case.lifts[i].numpy())
            np.testing.assert_allclose(scores[b, i].numpy(), expected, rtol=1e-10, atol=1e-10)
            assert projected[b, i, dim:].count_nonzero() == 0


def test_project_query_gradcheck():
    """Numerical derivatives for query and lifts."""
    case = Case(5, (1, 4), lengths=(3, 3), seed=20)
    inputs = (case.query.requires_grad_(), *(lift.requires_grad_() for lift in case.lifts))
    assert torch.autograd.gradcheck(lambda query, *lifts: sia.project_query(query, lifts), inputs)


def test_token_scores_equal_reference():
    """Each token's inner product with each query over the root of the width (Eq. 4)."""
    case = Case(10, (1, 9), seed=21)
    queries = torch.stack([case.query, 2 * case.query + 1], dim=1)
    scores = sia.token_scores(case.hidden, queries)
    assert scores.shape == (len(LENGTHS), 2, max(LENGTHS))
    for b in range(len(LENGTHS)):
        for i in range(2):
            expected = reference.scores(case.hidden[b].numpy(), queries[b, i].numpy())
            np.testing.assert_allclose(scores[b, i].numpy(), expected, rtol=1e-10, atol=1e-10)


def test_token_scores_gradcheck():
    """Numerical derivatives for hidden and queries."""
    case = Case(5, (1, 4), lengths=(3, 3), seed=22)
    inputs = (case.hidden.requires_grad_(), torch.randn(2, 2, 5, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(sia.token_scores, inputs)


@pytest.mark.parametrize("axes", [(), (3,), (2, 3)])
def test_masked_log_softmax_equals_reference(axes):
    """Real tokens get the log-probabilities of a softmax over real tokens alone, padding gets 0, for any inner axes."""
    generator = torch.Generator().manual_seed(23)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 0, 0, 1, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    scores = 4 * torch.randn(5, *axes, 5, generator=generator, dtype=torch.float64)
    got = sia.masked_log_softmax(scores, mask)
    assert got.shape == scores.shape
    for b in range(5):
        for row, got_row in zip(scores[b].reshape(-1, 5), got[b].reshape(-1, 5), strict=True):
            assert got_row[~mask[b]].count_nonzero() == 0
            if mask[b].any():
                expected = reference.log_softmax(row[mask[b]].tolist(), 1.0)
                np.testing.assert_allclose(got_row[mask[b]].numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_log_softmax_is_finite_without_real_tokens(dtype):
    """A sentence without real tokens has finite values and zero gradient."""
    scores = torch.tensor([[1.0, -1e30, 1e30]], dtype=dtype, requires_grad=True)
    result = sia.masked_log_softmax(scores, torch.zeros(1, 3, dtype=torch.bool))
    assert result.isfinite().all()
    assert torch.autograd.grad(result.sum(), scores)[0].count_nonzero() == 0


def test_masked_log_softmax_gradcheck():
    """Numerical derivatives, padding and an empty sentence included."""
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]]).bool()
    scores = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda scores: sia.masked_log_softmax(scores, mask), scores)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_attention_kl_equals_reference(direction):
    """KL of the student's softmax at tau from the given teacher, or the reverse, summed over real tokens (Eq. 6)."""
    case = Case(10, (1, 9), seed=24)
    student = torch.randn(len(LENGTHS), 2, max(LENGTHS), dtype=torch.float64)
    teacher = sia.masked_log_softmax(torch.randn(len(LENGTHS), max(LENGTHS), dtype=torch.float64), case.mask)
    got = sia.attention_kl(student, teacher, case.mask, 0.3, direction)
    for b in range(len(LENGTHS)):
        real = case.mask[b]
        for i in range(2):
            expected = 0.0
            if real.any():
                pair = [reference.log_softmax(student[b, i, real].tolist(), 0.3), teacher[b, real].tolist()]
                expected = reference.kl(*(pair if direction == "prefix_full" else pair[::-1]))
            assert got[b, i].item() == pytest.approx(expected, abs=1e-12)


def test_attention_kl_default_is_student_first():
    """Without a direction: KL(a_i || a_D), the paper's."""
    student, mask = torch.tensor([[[3.0, 0.0]]]), torch.ones(1, 2, dtype=torch.bool)
    teacher = torch.log(torch.tensor([[0.5, 0.5]]))
    first = reference.kl(reference.log_softmax([3.0, 0.0], 1.0), np.log([0.5, 0.5]))
    reverse = reference.kl(np.log([0.5, 0.5]), reference.log_softmax([3.0, 0.0], 1.0))
    assert sia.attention_kl(student, teacher, mask, 1.0).item() == pytest.approx(first, rel=1e-5)
    assert first != pytest.approx(reverse, rel=0.1)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_attention_kl_gradcheck(direction):
    """Numerical derivatives for both sides."""
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]]).bool()
    inputs = (
        torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True),
        torch.randn(3, 4, dtype=torch.float64).log_softmax(-1).masked_fill(~mask, 0).requires_grad_(),
    )
    assert torch.autograd.gradcheck(lambda s, t: sia.attention_kl(s, t, mask, 0.5, direction), inputs)


# ------------------------------------------------------------------------------------------------- full precision


def test_full_precision_raises_half_formats_only():
    """bf16 and fp16 become float32; float32 and float64 are handed through untouched."""
    given = [torch.ones(2, dtype=dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)]
    result = sia.full_precision(*given)
    assert [tensor.dtype for tensor in result] == [torch.float32, torch.float32, torch.float32, torch.float64]
    assert result[2] is given[2]
    assert result[3] is given[3]


def test_no_autocast_switches_it_off():
    """Inside, a product of float32 matrices stays float32; outside it does not."""
    ones = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (ones @ ones).dtype == torch.bfloat16
        with sia.no_autocast(ones):
            assert (ones @ ones).dtype == torch.float32
