"""Monotone equilibria against enumeration, least squares and direct derivatives."""

import copy
import itertools
import math
from functools import partial

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import numbers, solvers
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.func import functional_call

from implicit_layers import (
    MonotoneLinear,
    anderson,
    fixed_point_iteration,
    implicit_fixed_point,
    newton,
    peaceman_rachford,
)

pytestmark = pytest.mark.filterwarnings("error")
TIGHT = {"atol": 1e-12, "rtol": 1e-12, "max_iter": 5000}
agree = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)


def layer(features=4, seed=0, margin=0.5, skew=1.0):
    """A layer with a chosen size of its skew part, in double precision."""
    linear = MonotoneLinear(features, margin=margin).double()
    linear.a.data = numbers(features, features, seed=seed) / math.sqrt(features)
    linear.b.data = skew * numbers(features, features, seed=seed + 1)
    return linear


def equilibrium(linear, x, *, step=1.0, solver=fixed_point_iteration, start=None):
    u0 = torch.zeros_like(x) if start is None else start
    f = peaceman_rachford(linear, x, step=step)
    u, solution = implicit_fixed_point(f, u0, solver=solver, **TIGHT)
    assert solution.converged.all()
    return u.relu()


def by_enumeration(weight, x):
    """All z = relu(W z + x), for each set of positive entries the one there may be."""
    size, found = len(x), []
    for positive in itertools.product([False, True], repeat=size):
        s = np.flatnonzero(positive)
        z = np.zeros(size)
        z[s] = np.linalg.solve(np.eye(len(s)) - weight[np.ix_(s, s)], x[s])
        rest = ~np.array(positive)
        if (z[s] > 0).all() and ((weight @ z + x)[rest] <= 0).all():
            found.append(z)
    return found


def the_only_solutions(weight, x):
    """What enumeration finds for each row of x: exactly one."""
    rows = []
    for row in x.numpy():
        (only,) = by_enumeration(weight.detach().numpy(), row)
        rows.append(only)
    return np.array(rows)


def lowest_eigenvalue(linear):
    """The least one of the symmetric part of I - W, by NumPy."""
    remainder = np.eye(len(linear.a)) - linear.weight.detach().numpy()
    return np.linalg.eigvalsh((remainder + remainder.T) / 2).min()


def iteration_matrix(linear, step):
    """2 V - I, by NumPy."""
    weight = linear.weight.detach().numpy()
    unit = np.eye(len(weight))
    return 2 * np.linalg.inv(unit + step * (unit - weight)) - unit


# The layer


@settings(max_examples=40, deadline=None)
@given(
    features=st.integers(1, 12),
    margin=st.floats(1e-3, 5),
    scale=st.floats(0, 100),
    seed=st.integers(0, 10**6),
)
def test_symmetric_part_is_at_least_the_margin(features, margin, scale, seed):
    linear = MonotoneLinear(features, margin=margin).double()
    linear.a.data = scale * numbers(features, features, seed=seed)
    linear.b.data = scale * numbers(features, features, seed=seed + 1)
    assert lowest_eigenvalue(linear) >= margin - 1e-12 * (1 + scale**2) * features**2


def test_margin_is_reached_without_a_symmetric_part():
    linear = layer(margin=0.3)
    linear.a.data.zero_()
    remainder = np.eye(4) - linear.weight.detach().numpy()
    lowest = np.linalg.eigvalsh((remainder + remainder.T) / 2)
    np.testing.assert_allclose(lowest, 0.3, rtol=1e-12)


def test_weight_is_the_formula():
    linear = layer(5, margin=0.2)
    a, b = (p.detach().numpy() for p in (linear.a, linear.b))
    expected = 0.8 * np.eye(5) - a.T @ a + b - b.T
    np.testing.assert_allclose(linear.weight.detach(), expected, rtol=1e-12)


def test_default_margin():
    assert MonotoneLinear(3).margin == 0.1


@pytest.mark.parametrize("shape", [(3, 4), (1, 4), (0, 4), (2, 3, 4)])
def test_forward_multiplies_each_row(shape):
    linear, z = layer(), numbers(*shape)
    weight = linear.weight.detach().numpy()
    expected = np.einsum("ij,...j->...i", weight, z.numpy())
    np.testing.assert_allclose(linear(z).detach(), expected, rtol=1e-12)
    assert linear(z).shape == shape


def test_parameters_are_the_factors_and_start_small():
    torch.manual_seed(0)
    linear = MonotoneLinear(25)
    assert [name for name, _ in linear.named_parameters()] == ["a", "b"]
    for parameter in linear.parameters():
        assert parameter.shape == (25, 25)
        assert 0.19 < parameter.abs().max() <= 0.2
        assert parameter.mean().abs() < 0.03
    assert not torch.equal(linear.a, linear.b)
    torch.manual_seed(0)
    assert torch.equal(MonotoneLinear(25).a, linear.a)


def test_gradient_of_the_weight_reaches_both_factors():
    linear = layer(3)

    def weight(a, b):
        return functional_call(linear, {"a": a, "b": b}, (torch.eye(3).double(),))

    values = [p.detach().requires_grad_() for p in linear.parameters()]
    assert gradcheck(weight, values)
    assert all(g.abs().max() > 0.1 for g in grad(weight(*values)[0].sum(), values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_number_format_is_that_of_the_factors(dtype):
    linear = MonotoneLinear(3).to(dtype)
    assert linear.weight.dtype == linear(torch.ones(2, 3, dtype=dtype)).dtype == dtype


def test_copies_and_state():
    linear, z = layer(), numbers(2, 4)
    expected = linear(z).detach()
    other = MonotoneLinear(4, margin=0.5).double()
    other.load_state_dict(linear.state_dict())
    twin = copy.deepcopy(linear)
    linear.a.data.zero_()
    for copied in (other, twin):
        assert torch.equal(copied(z).detach(), expected)


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        (0, {}, "features.*0"),
        (-1, {}, "features.*-1"),
        (2.5, {}, "features.*2.5"),
        (3, {"margin": 0.0}, "margin.*0"),
        (3, {"margin": -0.1}, "margin.*-0.1"),
        (3, {"margin": math.inf}, "margin.*inf"),
        (3, {"margin": math.nan}, "margin.*nan"),
    ],
)
def test_bad_construction_is_refused(features, options, message):
    with pytest.raises(ValueError, match=message):
        MonotoneLinear(features, **options)


# The equilibrium


@settings(max_examples=30, deadline=None)
@given(
    features=st.integers(1, 5),
    margin=st.floats(0.1, 2),
    skew=st.floats(0, 3),
    step=st.floats(0.2, 2),
    seed=st.integers(0, 10**6),
)
def test_fixed_point_is_the_only_one_that_enumeration_finds(
    features, margin, skew, step, seed
):
    linear = layer(features, seed, margin, skew)
    x = numbers(2, features, seed=seed + 2)
    z = equilibrium(linear, x, step=step, solver=anderson).detach()
    expected = the_only_solutions(linear.weight, x)
    np.testing.assert_allclose(z, expected, atol=1e-8)


@solvers
def test_every_solver_finds_what_enumeration_finds(solver):
    linear, x = layer(6), numbers(5, 6, seed=2)
    z = equilibrium(linear, x, solver=solver).detach()
    expected = the_only_solutions(linear.weight, x)
    np.testing.assert_allclose(z, expected, atol=1e-9)
    assert 0.1 < (z > 0).double().mean() < 0.9
    agree(z, torch.relu(linear(z) + x).detach())


def test_symmetric_weights_give_a_problem_of_nonnegative_least_squares():
    # z minimises z^T (I - W) z / 2 - x^T z over z >= 0, and I - W is L L^T
    linear, x = layer(12, skew=0.0), numbers(4, 12, seed=2)
    z = equilibrium(linear, x).detach()
    lower = np.linalg.cholesky(np.eye(12) - linear.weight.detach().numpy())
    for row, given_x in zip(z, x.numpy(), strict=True):
        expected, _ = scipy.optimize.nnls(lower.T, np.linalg.solve(lower, given_x))
        np.testing.assert_allclose(row, expected, atol=1e-9)


def test_root_of_the_map_is_a_step_away_from_the_equilibrium():
    linear, x = layer(), numbers(3, 4, seed=2)
    z = equilibrium(linear, x).detach()
    for step in (0.3, 1.0, 2.5):
        u = z + step * (linear(z) + x - z)
        f = peaceman_rachford(linear, x, step=step)
        agree(f(u), u)
        agree(u.relu(), z)


@pytest.mark.parametrize("step", [0.1, 0.5, 2.0, 5.0])
def test_step_changes_neither_solution_nor_gradient(step):
    linear, results = layer(), []
    for each in (step, 1.0):
        x = numbers(3, 4, seed=2).requires_grad_()
        z = equilibrium(linear, x, step=each)
        wanted = (x, *linear.parameters())
        results.append([z.detach(), *grad(torch.sin(z).sum(), wanted)])
    agree(*results, rtol=1e-7, atol=1e-7)


def test_random_starts_end_in_one_solution():
    linear, x = layer(8, margin=0.1, skew=2.0), numbers(1, 8, seed=2)
    starts = 10 * numbers(50, 8, seed=3)
    z = equilibrium(linear, x.expand(50, 8), start=starts).detach()
    assert (z - z[0]).abs().max() < 1e-5


def test_converges_where_plain_iteration_diverges():
    linear, x = layer(8, skew=5.0), numbers(4, 8, seed=2)
    weight = linear.weight.detach()
    assert torch.linalg.matrix_norm(weight, ord=2) > 10

    def plain(z):
        return torch.relu(z @ weight.T + x)

    assert not fixed_point_iteration(plain, 0 * x, **TIGHT).converged.any()
    z = equilibrium(linear, x, step=0.1).detach()
    agree(plain(z), z)
    np.testing.assert_allclose(z, the_only_solutions(weight, x), atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    features=st.integers(1, 8),
    margin=st.floats(0.05, 3),
    skew=st.floats(0, 5),
    step=st.floats(0.05, 5),
    seed=st.integers(0, 10**6),
)
def test_map_contracts_by_the_norm_that_is_promised(features, margin, skew, step, seed):
    linear = layer(features, seed, margin, skew)
    bound = np.linalg.norm(iteration_matrix(linear, step), 2)
    assert bound < 1
    f = peaceman_rachford(linear, numbers(1, features, seed=seed), step=step)
    first = numbers(64, features, seed=seed + 2)
    second = first + 10 ** torch.linspace(-3, 2, 64)[:, None].double() * numbers(
        64, features, seed=seed + 3
    )
    with torch.no_grad():
        rates = (f(first) - f(second)).norm(dim=1) / (first - second).norm(dim=1)
    assert rates.max() <= bound * (1 + 1e-9) + 1e-9


def test_bound_is_attained_among_vectors_of_one_sign():
    linear, x = layer(), numbers(1, 4, seed=2)
    for step in (0.4, 1.0, 3.0):
        f, matrix = (
            peaceman_rachford(linear, x, step=step),
            iteration_matrix(linear, step),
        )
        for sign in (1, -1):
            u = sign * (1 + numbers(1, 4, seed=3).abs())
            jacobian = torch.func.jacrev(lambda u, f=f: f(u[None])[0])(u[0])
            np.testing.assert_allclose(
                jacobian.detach(), sign * matrix, rtol=1e-9, atol=1e-12
            )


def test_error_falls_at_least_by_the_bound_at_each_step():
    linear, x = layer(6), numbers(3, 6, seed=2)
    bound = np.linalg.norm(iteration_matrix(linear, 1.0), 2)
    f = peaceman_rachford(linear, x)
    with torch.no_grad():
        root = fixed_point_iteration(f, torch.zeros_like(x), **TIGHT).z
        u = 5 * numbers(3, 6, seed=4)
        errors = [(u - root).norm(dim=1)]
        for _ in range(30):
            u = f(u)
            errors.append((u - root).norm(dim=1))
    for before, after in itertools.pairwise(errors):
        assert (after <= bound * before + 1e-10).all()
    assert (errors[-1] < 0.1 * errors[0]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equilibrium_keeps_the_number_format(dtype):
    linear, x = layer().to(dtype), numbers(3, 4, seed=2).to(dtype)
    f = peaceman_rachford(linear, x)
    u, solution = implicit_fixed_point(f, torch.zeros_like(x))
    assert u.dtype == dtype
    assert solution.converged.all()
    expected = equilibrium(layer(), numbers(3, 4, seed=2))
    torch.testing.assert_close(u.relu().double(), expected, rtol=1e-3, atol=1e-4)


def test_batch_of_one_and_of_none():
    linear, x = layer(), numbers(3, 4, seed=2)
    z = equilibrium(linear, x)
    agree(equilibrium(linear, x[1:2]), z[1:2])
    assert peaceman_rachford(linear, x[:0])(x[:0]).shape == (0, 4)


def test_weight_is_read_once():
    linear, x, u = layer(), numbers(3, 4, seed=2), numbers(3, 4, seed=3)
    f = peaceman_rachford(linear, x)
    expected = f(u).detach()
    with torch.no_grad():
        linear.a.mul_(2)
    assert torch.equal(f(u).detach(), expected)
    assert not torch.allclose(peaceman_rachford(linear, x)(u).detach(), expected)


# Its gradient


@pytest.mark.parametrize("step", [1.0, 0.4])
@pytest.mark.parametrize("solver", [fixed_point_iteration, newton])
def test_finite_differences_accept_the_gradient(solver, step):
    linear = layer(3)

    def function(x, a, b):
        held = copy.copy(linear)
        held._parameters = {"a": a, "b": b}
        return equilibrium(held, x, solver=solver, step=step)

    x = numbers(2, 3, seed=2).requires_grad_()
    values = [p.detach().requires_grad_() for p in linear.parameters()]
    z = function(x, *values)
    assert (z > 0.01).any() and (z == 0).any()
    assert gradcheck(function, (x, *values))
    assert gradgradcheck(function, (x, *values), atol=1e-4)


def test_gradient_is_that_of_the_equilibrium_itself():
    linear, x = layer(6, skew=3.0), numbers(5, 6, seed=2).requires_grad_()
    z = equilibrium(linear, x, step=0.5)
    v = numbers(5, 6, seed=3)
    actual = grad(z, (x, *linear.parameters()), v)
    # u = (I - D W)^-T v, and then D u goes to x and D u z^T to W
    weight, values = linear.weight.detach(), z.detach()
    active = torch.diag_embed((values > 0).double())
    unit = torch.eye(6).double()
    of_x = torch.linalg.solve((unit - active @ weight).mT, v[:, :, None])
    of_x = (active @ of_x)[:, :, 0]
    of_weight = of_x.T @ values
    a = linear.a.detach()
    agree(actual[0], of_x)
    agree(actual[1], -a @ (of_weight + of_weight.T))
    agree(actual[2], of_weight - of_weight.T)


def test_equilibrium_learns():
    torch.manual_seed(0)
    linear, x = MonotoneLinear(6).double(), numbers(8, 6, seed=2)
    target = numbers(8, 6, seed=3).relu()
    optimizer = torch.optim.Adam(linear.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        loss = (equilibrium(linear, x, solver=anderson) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert lowest_eigenvalue(linear) > 0.1 - 1e-9
    assert losses[-1] < 0.8 * losses[0]


# What is refused


@pytest.mark.parametrize(
    "x",
    [torch.zeros(4), torch.zeros(2, 3), torch.zeros(2, 4, 1), torch.tensor(0.0)],
    ids=lambda x: str(tuple(x.shape)),
)
def test_input_of_another_shape_is_refused(x):
    with pytest.raises(ValueError, match=r"x has shape.*give \(B, 4\)"):
        peaceman_rachford(layer(), x.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.long])
def test_input_of_another_number_format_is_refused(dtype):
    with pytest.raises(ValueError, match=f"x is {dtype} and W torch.float64"):
        peaceman_rachford(layer(), torch.zeros(2, 4, dtype=dtype))


@pytest.mark.parametrize("step", [0.0, -1.0, math.inf, math.nan])
def test_bad_step_is_refused(step):
    with pytest.raises(ValueError, match=f"step.*{step}"):
        peaceman_rachford(layer(), torch.zeros(2, 4).double(), step=step)
