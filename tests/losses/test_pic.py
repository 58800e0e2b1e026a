"""PIC (Eq. 15-17) against the references, and what its heads and targets must do."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

import reference
from mipic_st.losses import pic


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parameters(head):
    """The four tensors of a head, in the order that the references take them."""
    return [head[0].weight, head[0].bias, head[2].weight, head[2].bias]


def make_head(dim, next_dim, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return pic.chain_head(dim, next_dim).to(dtype)


def chain_link(head, vector, next_vector, temperature=0.05):
    """One link of the chain as the loss makes it (Eq. 15 and 16)."""
    return pic.chain_info_nce(pic.predict_next(head, vector), next_vector, temperature)


def relative(got, expected):
    return ((got.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


# ------------------------------------------------------------------------------------------------ chain_info_nce


@pytest.mark.parametrize("temperature", [0.05, 1.0])
@pytest.mark.parametrize(("batch", "dim"), [(2, 1), (3, 16), (16, 5), (1, 4)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_info_nce_equals_reference(dtype, tolerance, batch, dim, temperature):
    """The mean over sentences of -log softmax of the cosines at the sentence's own target (Eq. 16)."""
    predicted, target = draw(batch, dim, seed=1, dtype=dtype), draw(batch, dim, seed=2, dtype=dtype)
    got = pic.chain_info_nce(predicted, target, temperature)
    expected = reference.info_nce_value(predicted.double().numpy(), target.double().numpy(), temperature)
    assert got.shape == ()
    assert got.dtype == dtype
    assert got.item() == pytest.approx(expected, rel=tolerance, abs=tolerance)


def test_info_nce_default_temperature_is_the_papers():
    """Without a temperature: 0.05, Table 7."""
    predicted, target = draw(6, 8, seed=1), draw(6, 8, seed=2)
    assert torch.equal(pic.chain_info_nce(predicted, target), pic.chain_info_nce(predicted, target, 0.05))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_info_nce_gradient_equals_reference(dtype, tolerance):
    """The gradient of the prediction equals that of the reference."""
    predicted, target = draw(7, 9, seed=3, dtype=dtype).requires_grad_(), draw(7, 9, seed=4, dtype=dtype)
    plain = predicted.detach().double().requires_grad_()
    (got,) = torch.autograd.grad(pic.chain_info_nce(predicted, target), predicted)
    (expected,) = torch.autograd.grad(reference.info_nce_tensor(plain, target.double()), plain)
    assert relative(got, expected) < tolerance


def test_info_nce_gradcheck():
    """Numerical derivatives of the prediction, over two columns."""
    predicted, target = draw(2, 4, 3, seed=5).requires_grad_(), draw(2, 4, 3, seed=6)
    assert torch.autograd.gradcheck(lambda predicted: pic.chain_info_nce(predicted, target, 0.5), predicted)


def test_target_gets_no_gradient():
    """The deeper, wider vector is a constant."""
    predicted, target = draw(4, 3, seed=7).requires_grad_(), draw(4, 3, seed=8).requires_grad_()
    pic.chain_info_nce(predicted, target).backward()
    assert target.grad is None
    assert predicted.grad.abs().max() > 0


@pytest.mark.parametrize("leading", [(3,), (2, 3)])
def test_columns_are_separate_batches(leading):
    """The loss of several columns is the mean of the losses of each, not one batch of all their sentences."""
    predicted, target = draw(*leading, 5, 4, seed=9), draw(*leading, 5, 4, seed=10)
    apart = [
        reference.info_nce_value(p.numpy(), t.numpy())
        for p, t in zip(predicted.flatten(0, -3), target.flatten(0, -3), strict=True)
    ]
    got = pic.chain_info_nce(predicted, target).item()
    assert got == pytest.approx(np.mean(apart))
    joined = reference.info_nce_value(predicted.reshape(-1, 4).numpy(), target.reshape(-1, 4).numpy())
    assert got != pytest.approx(joined, rel=0.01)


@pytest.mark.parametrize("columns", [(), (2,)])
def test_batch_of_one_is_zero(columns):
    """Without negatives there is nothing to tell apart: value and gradient are zero."""
    predicted, target = draw(*columns, 1, 6, seed=11).requires_grad_(), draw(*columns, 1, 6, seed=12)
    value = pic.chain_info_nce(predicted, target)
    (gradient,) = torch.autograd.grad(value, predicted)
    assert value.item() == 0
    assert gradient.count_nonzero() == 0


def test_info_nce_takes_cosines():
    """The lengths of predictions and targets do not matter."""
    predicted, target = draw(5, 4, seed=13), draw(5, 4, seed=14)
    lengths = draw(5, 1, seed=15).abs() + 0.1
    expected = pic.chain_info_nce(predicted, target)
    torch.testing.assert_close(pic.chain_info_nce(predicted * lengths, target), expected)
    torch.testing.assert_close(pic.chain_info_nce(predicted, target * lengths), expected)


def test_info_nce_rewards_the_own_target():
    """Perfect predictions score near zero, those of the next sentence far from it."""
    target = torch.eye(6, dtype=torch.float64)
    assert pic.chain_info_nce(target, target).item() == pytest.approx(math.log(1 + 5 * math.exp(-20)))
    assert pic.chain_info_nce(target.roll(1, 0), target).item() == pytest.approx(20 + math.log(1 + 5 * math.exp(-20)))


@pytest.mark.parametrize("kind", ["equal", "zero"])
def test_equal_sentences_are_finite(kind):
    """Equal sentences, or vectors of zeros, cannot be distinguished: log B, with finite gradients."""
    predicted = torch.zeros(8, 5) if kind == "zero" else draw(1, 5, seed=16, dtype=torch.float32).repeat(8, 1)
    predicted.requires_grad_()
    value = pic.chain_info_nce(predicted, predicted.detach().clone())
    (gradient,) = torch.autograd.grad(value, predicted)
    assert value.item() == pytest.approx(math.log(8), rel=1e-5)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_info_nce_is_float32_under_autocast(dtype):
    """bf16 autocast changes no bit, and half precision vectors are compared in float32."""
    predicted, target = draw(6, 8, seed=17, dtype=dtype), draw(6, 8, seed=18, dtype=dtype)
    expected = pic.chain_info_nce(predicted.float(), target.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = pic.chain_info_nce(predicted, target)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)
    assert torch.equal(pic.chain_info_nce(predicted, target), expected)


# ---------------------------------------------------------------------------------------------------- chain_head


@pytest.mark.parametrize(
    ("dim", "next_dim", "inner"), [(16, 32, 16), (512, 768, 384), (64, 16, 32), (8, 9, 4), (1, 1, 1)]
)
def test_chain_head_widths(dim, next_dim, inner):
    """Two linear layers with one ReLU; the inner width is half the larger of both, at least one."""
    linear, relu, last = pic.chain_head(dim, next_dim)
    assert (linear.in_features, linear.out_features) == (dim, inner)
    assert isinstance(relu, nn.ReLU)
    assert (last.in_features, last.out_features) == (inner, next_dim)


def test_chain_head_equals_reference():
    """phi_c is the two-layer network written out (Eq. 15)."""
    head, vectors = make_head(6, 10), draw(5, 6, seed=19)
    expected = reference.head_value(vectors.numpy(), *(parameter.detach().numpy() for parameter in parameters(head)))
    np.testing.assert_allclose(head(vectors).detach().numpy(), expected, rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------------------------------------------- chain_link


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize(("dim", "next_dim"), [(4, 12), (16, 32), (9, 5)])
def test_chain_link_equals_reference(dim, next_dim, dtype, tolerance):
    """Value, and gradients of the vector and of every head parameter by name, equal the reference."""
    head = make_head(dim, next_dim, dtype)
    vector, target = draw(8, dim, seed=20, dtype=dtype).requires_grad_(), draw(8, next_dim, seed=21, dtype=dtype)
    names = ["vector", *(name for name, _ in head.named_parameters())]
    leaves = [vector, *parameters(head)]
    plain = [leaf.detach().double().requires_grad_() for leaf in leaves]
    value = chain_link(head, vector, target)
    expected = reference.info_nce_tensor(reference.head_tensor(*plain), target.double())
    assert names == ["vector", "0.weight", "0.bias", "2.weight", "2.bias"]
    assert value.item() == pytest.approx(expected.item(), rel=tolerance / 10)
    for name, got, wanted in zip(
        names, torch.autograd.grad(value, leaves), torch.autograd.grad(expected, plain), strict=True
    ):
        assert wanted.abs().max() > 0, name
        assert relative(got, wanted) < tolerance, name


def test_chain_link_gradcheck():
    """Numerical derivatives of the vector and of every head parameter."""
    head = make_head(3, 5)
    inputs = (draw(4, 3, seed=22).requires_grad_(), *parameters(head))
    target = draw(4, 5, seed=23)
    names = [name for name, _ in head.named_parameters()]

    class Given(nn.Module):
        """The head with the parameters that gradcheck hands in."""

        def __init__(self, values):
            super().__init__()
            self.head, self.values = head, dict(zip(names, values, strict=True))

        def forward(self, vector):
            return torch.func.functional_call(self.head, self.values, vector)

    assert torch.autograd.gradcheck(lambda v, *values: chain_link(Given(values), v, target, 0.5), inputs)


def test_chain_link_detaches_the_next_vector():
    """No gradient flows into the next checkpoint, also where both vectors come from the same states."""
    head, states = make_head(3, 5), draw(4, 5, seed=24).requires_grad_()
    (gradient,) = torch.autograd.grad(chain_link(head, states[:, :3], states), states)
    assert gradient[:, :3].abs().max() > 0
    assert gradient[:, 3:].count_nonzero() == 0


def test_chain_link_columns_are_separate():
    """Columns in a leading axis are compared within themselves."""
    head = make_head(3, 5)
    vector, target = draw(2, 4, 3, seed=25), draw(2, 4, 5, seed=26)
    apart = torch.stack([chain_link(head, vector[c], target[c]) for c in range(2)]).mean()
    torch.testing.assert_close(chain_link(head, vector, target), apart)


def test_chain_link_batch_of_one_is_zero():
    """A single sentence gives zero and zero gradients to the vector and the head."""
    head, vector = make_head(3, 5), draw(1, 3, seed=27).requires_grad_()
    value = chain_link(head, vector, draw(1, 5, seed=28))
    assert value.item() == 0
    for gradient in torch.autograd.grad(value, [vector, *parameters(head)]):
        assert gradient.count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chain_link_is_float32_under_autocast(dtype):
    """The head, too, runs in float32 under bf16 autocast: values and gradients are the same bits."""
    head = make_head(16, 32, torch.float32)
    target = draw(6, 32, seed=30, dtype=dtype)
    results = []
    for enabled in (False, True):
        vector = draw(6, 16, seed=29, dtype=dtype).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            value = chain_link(head, vector, target)
        results.append([value, *torch.autograd.grad(value, [vector, *parameters(head)])])
    assert results[1][0].dtype == torch.float32
    assert all(torch.equal(without, with_it) for without, with_it in zip(*results, strict=True))


@pytest.mark.parametrize("vector_dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("head_dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_chain_link_takes_any_mix_of_formats(vector_dtype, head_dtype):
    """Vectors and head of different precision are no error, and lose no more than a bf16 head loses."""
    head = make_head(4, 6, head_dtype)
    vector, target = draw(5, 4, seed=31, dtype=vector_dtype), draw(5, 6, seed=32, dtype=vector_dtype)
    value = chain_link(head, vector, target)
    exact = [tensor.detach().double() for tensor in (vector, *parameters(head))]
    expected = reference.info_nce_tensor(reference.head_tensor(*exact), target.double()).item()
    assert value.item() == pytest.approx(expected, rel=0.05 if head_dtype is torch.bfloat16 else 1e-5)
    assert value.dtype in (torch.float32, torch.float64)


def test_chain_equals_straightforward():
    """The sum over the links equals L_PIC of the straightforward implementation (Eq. 17), gradients included."""
    dims = (4, 8, 16, 32)
    vectors = [draw(6, dim, seed=dim).requires_grad_() for dim in dims]
    heads = [make_head(*pair, seed=seed) for seed, pair in enumerate(pairwise(dims))]
    value = sum(chain_link(head, vectors[c], vectors[c + 1]) for c, head in enumerate(heads))
    expected = reference.straightforward_chain(vectors, [parameters(head) for head in heads])
    torch.testing.assert_close(value, expected)
    for got, wanted in zip(
        torch.autograd.grad(value, vectors[:-1]), torch.autograd.grad(expected, vectors[:-1]), strict=True
    ):
        torch.testing.assert_close(got, wanted)
