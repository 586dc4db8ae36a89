"""The Jacobian penalty against exact Jacobians, and its gradient against formulas."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import numbers
from torch import nn
from torch.autograd import grad, gradcheck, gradgradcheck

from implicit_layers import DEQ, jacobian_penalty

pytestmark = pytest.mark.filterwarnings("error")
agree = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-14)
contexts = pytest.mark.parametrize(
    "context", [torch.enable_grad, torch.no_grad, torch.inference_mode]
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def jacobians(f, z):
    """The exact Jacobian of each sample, (B, d, d)."""
    rows = torch.func.vmap(torch.func.jacrev(lambda z: f(z[None])[0]))(z)
    return rows.reshape(len(z), z[0].numel(), z[0].numel())


def exact(f, z):
    """The mean over the batch of the squared Frobenius norm per entry."""
    return jacobians(f, z).square().sum() / z.numel()


def variance(f, z):
    """That of one draw: signs v give v^T A v, off-diagonal pairs of A alone vary."""
    gram = jacobians(f, z)
    gram = gram @ gram.mT
    gram = gram - torch.diag_embed(gram.diagonal(dim1=1, dim2=2))
    return 2 * gram.square().sum() / z.numel() ** 2


def tanh_map(size=5, seed=1):
    weight = numbers(size, size, seed=seed)
    return lambda z: torch.tanh(z @ weight.T)


KERNEL = numbers(2, 2, 3, 3, seed=4) / 3


def convolution(z):
    return torch.tanh(nn.functional.conv2d(z, KERNEL, padding=1))


def numbers_alone(z):
    return torch.sin(3 * z)


CASES = {
    "vectors": (tanh_map(), numbers(3, 5)),
    "one sample": (tanh_map(), numbers(1, 5)),
    "matrices": (tanh_map(3), numbers(4, 2, 3)),
    "images": (convolution, numbers(2, 2, 4, 3)),
}


@pytest.mark.parametrize(("f", "z"), CASES.values(), ids=CASES)
def test_mean_of_many_draws_is_the_exact_norm(f, z):
    draws = 2000
    mean = jacobian_penalty(f, z, samples=draws, generator=seeded())
    assert mean.shape == () and mean.dtype == z.dtype
    deviation = (variance(f, z) / draws).sqrt()
    assert 0 < deviation < 0.02 * exact(f, z)
    assert (mean - exact(f, z)).abs() < 4 * deviation


@pytest.mark.parametrize("samples", [1, 5])
def test_draws_scatter_as_much_as_signs_do_and_less_with_more_samples(samples):
    f, z = CASES["vectors"]
    generator = seeded(1)
    draws = [
        jacobian_penalty(f, z, samples=samples, generator=generator)
        for _ in range(1000)
    ]
    # the variance of a thousand draws is good to some percent
    ratio = torch.stack(draws).var() / (variance(f, z) / samples)
    assert 0.8 < ratio < 1.25


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 4),
    size=st.integers(1, 6),
    samples=st.integers(1, 3),
    seed=st.integers(0, 10**6),
)
def test_every_draw_is_exact_for_a_diagonal_jacobian(batch, size, samples, seed):
    slopes, z = numbers(batch, size, seed=seed), numbers(batch, size, seed=seed + 1)

    def f(z):
        return slopes * z

    torch.manual_seed(seed)
    agree(jacobian_penalty(f, z, samples=samples), slopes.square().mean())


def test_every_draw_is_exact_where_the_rows_are_orthogonal():
    # v^T D Q has the norm of v^T D; the product from the other side would vary
    q = torch.linalg.qr(numbers(4, 4, seed=3))[0]
    matrix = torch.diag(torch.tensor([3.0, 1.0, 0.5, 0.1]).double()) @ q
    z = numbers(2, 4)
    for seed in range(5):
        penalty = jacobian_penalty(lambda z: z @ matrix.T, z, generator=seeded(seed))
        agree(penalty, matrix.square().mean() * 4)


def test_identity_has_one_and_numbers_have_their_slope():
    z = numbers(7)
    agree(jacobian_penalty(lambda z: z, z), torch.ones(()).double())
    agree(jacobian_penalty(numbers_alone, z), (3 * torch.cos(3 * z)).square().mean())


def test_batch_is_averaged():
    slopes, z = numbers(4, 3), numbers(4, 3, seed=1)
    alone = [
        jacobian_penalty(lambda z, s=s: s * z, row[None])
        for s, row in zip(slopes, z, strict=True)
    ]
    together = jacobian_penalty(lambda z: slopes * z, z)
    agree(together, torch.stack(alone).mean())


@pytest.mark.parametrize("samples", [2, 3, 7])
def test_samples_are_averaged(samples):
    f, z = CASES["images"]
    generator = seeded(5)
    one_by_one = [jacobian_penalty(f, z, generator=generator) for _ in range(samples)]
    assert len({draw.item() for draw in one_by_one}) == samples
    together = jacobian_penalty(f, z, samples=samples, generator=seeded(5))
    agree(together, torch.stack(one_by_one).mean())


def test_mean_square_of_the_eigenvalues_is_below():
    for seed in range(5):
        f, z = tanh_map(seed=seed), numbers(3, 5, seed=seed)
        eigenvalues = torch.linalg.eigvals(jacobians(f, z)).abs()
        assert eigenvalues.square().mean() < exact(f, z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_number_format_is_kept(dtype):
    weight, z = numbers(5, 5, seed=1).to(dtype), numbers(3, 5).to(dtype)
    penalty = jacobian_penalty(lambda z: torch.tanh(z @ weight.T), z, samples=500)
    assert penalty.dtype == dtype
    f, z = tanh_map(), numbers(3, 5)
    deviation = (variance(f, z) / 500).sqrt()
    assert (penalty.double() - exact(f, z)).abs() < 5 * deviation


# The gradient


@pytest.mark.parametrize("samples", [1, 4])
def test_linear_map_has_the_gradient_of_a_quadratic_form(samples):
    weight, z = numbers(4, 4, seed=1).requires_grad_(), numbers(3, 4)
    penalty = jacobian_penalty(
        lambda z: z @ weight.T, z, samples=samples, generator=seeded(7)
    )
    generator, moment = seeded(7), torch.zeros(4, 4).double()
    for _ in range(samples):
        signs = torch.empty_like(z).bernoulli_(generator=generator) * 2 - 1
        moment += signs.T @ signs / (samples * z.numel())
    agree(penalty.detach(), (weight.T @ moment @ weight).trace().detach())
    agree(grad(penalty, weight)[0], 2 * moment @ weight.detach())


@pytest.mark.parametrize("shape", [(2, 3), (2, 2, 3)])
def test_finite_differences_accept_the_gradient(shape):
    def function(weight, x):
        z = numbers(*shape, seed=2)
        return jacobian_penalty(
            lambda z: torch.tanh(z @ weight.T + x), z, samples=2, generator=seeded(3)
        )

    arguments = numbers(3, 3).requires_grad_(), numbers(*shape, seed=1).requires_grad_()
    assert gradcheck(function, arguments)
    assert gradgradcheck(function, arguments)


def test_mean_gradient_is_that_of_the_exact_norm():
    weight, z = numbers(3, 3, seed=1).requires_grad_(), numbers(4, 3)

    def f(z):
        return torch.tanh(z @ weight.T)

    penalty = jacobian_penalty(f, z, samples=3000, generator=seeded())
    (mean,) = grad(penalty, weight)
    (expected,) = grad(exact(f, z), weight)
    assert (mean - expected).norm() < 0.05 * expected.norm()


def test_place_is_held_constant():
    leaf = numbers(3, 4).requires_grad_()
    weight = numbers(4, 4, seed=1).requires_grad_()

    def f(z):
        return torch.tanh(z @ weight.T)

    for z in (leaf, torch.tanh(leaf)):
        before = z.detach().clone()
        penalty = jacobian_penalty(f, z)
        of_leaf, of_weight = grad(penalty, (leaf, weight), allow_unused=True)
        assert of_leaf is None
        assert of_weight.abs().max() > 0
        assert torch.equal(z.detach(), before)
    jacobian_penalty(torch.sin, leaf).backward()
    assert leaf.grad is None


def test_estimate_leaves_no_gradient_before_backward():
    torch.manual_seed(0)
    layer = nn.Linear(4, 4).double()
    penalty = jacobian_penalty(layer, numbers(3, 4))
    assert layer.weight.grad is None
    penalty.backward()
    assert layer.weight.grad.abs().max() > 0
    assert layer.bias.grad is None or not layer.bias.grad.any()


def test_penalty_of_an_equilibrium_makes_its_jacobian_smaller():
    torch.manual_seed(0)
    inner = nn.Linear(4, 4).double()

    def f(z, x):
        return torch.tanh(inner(z) + x)

    layer, x = DEQ(f, atol=1e-10, rtol=1e-10), numbers(8, 4, seed=1)
    optimizer = torch.optim.Adam(inner.parameters(), lr=0.01)

    def at_equilibrium(estimate, **options):
        layer(x)
        return estimate(lambda z: f(z, x), layer.solution.z, **options)

    norms, generator = [], seeded()
    for _ in range(40):
        with torch.no_grad():
            layer(x)
            slopes = 1 - layer.solution.z.square()
            rows = slopes[:, :, None] * inner.weight
            norms.append(float(rows.square().sum() / x.numel()))
        optimizer.zero_grad()
        at_equilibrium(jacobian_penalty, generator=generator).backward()
        optimizer.step()
    assert norms[-1] < norms[0] / 3


# Signs and modes


def test_generator_decides():
    f, z = CASES["vectors"]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = jacobian_penalty(f, z, generator=seeded(3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(jacobian_penalty(f, z, generator=seeded(3)), first)
    assert not torch.equal(jacobian_penalty(f, z, generator=seeded(4)), first)


def test_seed_of_pytorch_decides_without_a_generator():
    f, z = CASES["vectors"]
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(jacobian_penalty(f, z))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@contexts
def test_value_is_the_same_whatever_is_recorded(context):
    torch.manual_seed(0)
    layer, z = nn.Linear(5, 5).double(), numbers(3, 5)
    expected = jacobian_penalty(layer, z, samples=2, generator=seeded()).detach()
    assert expected > 0.01
    with context():
        for place in (z, z + 0):  # the second one of the mode itself
            penalty = jacobian_penalty(layer, place, samples=2, generator=seeded())
            assert torch.is_grad_enabled() == (context is torch.enable_grad)
            assert penalty.requires_grad == torch.is_grad_enabled()
            agree(penalty.detach().clone(), expected)
    assert layer.weight.grad is None


def test_one_evaluation_and_one_product_a_sample():
    weight, z, seen = numbers(5, 5).requires_grad_(), numbers(3, 5), []

    def f(z):
        seen.append("f")
        fz = torch.tanh(z @ weight.T)
        fz.register_hook(lambda v: seen.append("product"))
        return fz

    with torch.no_grad():
        jacobian_penalty(f, z, samples=4)
    assert seen == ["f"] + ["product"] * 4


def test_steps_leave_nothing_behind(live_tensors):
    weight, counts = numbers(4, 4).requires_grad_(), []
    for steps in (3, 20):
        for step in range(steps):
            z = numbers(3, 4, seed=step)
            penalty = jacobian_penalty(lambda z: torch.tanh(z @ weight.T), z)
            if step % 3:
                weight.grad = None
                penalty.backward()
        counts.append(live_tensors())
    assert counts[0] == counts[1]


@contexts
def test_map_that_ignores_its_argument_has_none(context):
    x, z = numbers(3, 4), numbers(3, 4, seed=1)
    weight = numbers(3, 4, seed=2).requires_grad_()
    with context():
        for f in (lambda z: x, lambda z: torch.sin(weight), lambda z: z.detach()):
            penalty = jacobian_penalty(f, z)
            assert penalty.shape == () and penalty.item() == 0
    loss = weight.sum() + jacobian_penalty(lambda z: torch.sin(weight), z)
    loss.backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))


# What is refused


@pytest.mark.parametrize(
    ("z", "options", "error", "message"),
    [
        (torch.zeros(2, 2, dtype=torch.long), {}, TypeError, "z is torch.int64"),
        ([0.0], {}, TypeError, "z is list"),
        (torch.tensor(1.0), {}, ValueError, "z has no dimension"),
        (torch.tensor([[float("nan")]]), {}, ValueError, "z holds a NaN"),
        (torch.tensor([[float("inf")]]), {}, ValueError, "z holds.*infinity"),
        (torch.zeros(0, 3), {}, ValueError, r"z has shape \(0, 3\)"),
        (torch.zeros(3, 0), {}, ValueError, r"z has shape \(3, 0\)"),
        (torch.zeros(2, 2), {"samples": 0}, ValueError, "samples.*0"),
        (torch.zeros(2, 2), {"samples": 1.5}, ValueError, "samples.*1.5"),
    ],
)
def test_bad_input_is_refused_before_f_is_called(z, options, error, message):
    def f(z):
        raise AssertionError("called")

    with pytest.raises(error, match=message):
        jacobian_penalty(f, z, **options)


@pytest.mark.parametrize(
    ("f", "error", "message"),
    [
        (lambda z: z[:, :1], ValueError, "shape"),
        (lambda z: z.double(), ValueError, "float64"),
        (lambda z: (z,), TypeError, "tuple"),
    ],
)
def test_map_to_something_else_is_refused(f, error, message):
    with pytest.raises(error, match=message):
        jacobian_penalty(f, torch.zeros(2, 2))
