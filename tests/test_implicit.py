"""Gradients of roots against closed forms, SciPy, differences and unrolled loops."""

import weakref
from functools import partial

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import grad, gradcheck, gradgradcheck

from implicit_layers import (
    anderson,
    broyden,
    fixed_point_iteration,
    implicit_fixed_point,
    newton,
)

# a sample that did not converge warns, and then nothing below is worth a word
pytestmark = pytest.mark.filterwarnings("error")
SOLVERS = [fixed_point_iteration, anderson, broyden, newton]
TIGHT = {"atol": 1e-13, "rtol": 1e-13, "max_iter": 1000}
BACKWARD = [partial(solver, **TIGHT) for solver in SOLVERS]
PAIRS = [(solver, None) for solver in SOLVERS]
PAIRS += [(anderson, backward) for backward in BACKWARD] + [(newton, BACKWARD[0])]
MODES = ["implicit", "unrolled", "neumann", "jfb", "phantom"]
agree = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
solvers = pytest.mark.parametrize("solver", SOLVERS)
pairs = pytest.mark.parametrize(
    ("solver", "backward_solver"),
    PAIRS,
    ids=[f"{a.__name__}-{b.func.__name__ if b else 'default'}" for a, b in PAIRS],
)


def root(f, z0, **options):
    return implicit_fixed_point(f, z0, **TIGHT | options)[0]


def differs(actual, expected):
    """Whether two tensors differ by more than a hundredth, somewhere."""
    return (actual - expected).abs().max() > 0.01 * expected.abs().max()


def tanh_map(weight, x):
    return lambda z: torch.tanh(z @ weight.T + x)


def tanh_problem(batch=3, size=4, radius=0.7, seed=0, dtype=torch.float64):
    """Weights of spectral norm `radius` and inputs, both wanting gradients."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(size, size, generator=generator, dtype=torch.float64)
    x = torch.randn(batch, size, generator=generator, dtype=torch.float64)
    weight = radius * weight / torch.linalg.matrix_norm(weight, ord=2)
    return weight.to(dtype).requires_grad_(), x.to(dtype).requires_grad_()


def rotation_problem(batch=2, seed=0):
    """A map z -> R z + tanh(z) / 20 + x, R a turn by 2 radians times 1.05."""
    generator = torch.Generator().manual_seed(seed)
    cos, sin = 1.05 * np.cos(2), 1.05 * np.sin(2)
    rotation = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
    x = torch.randn(batch, 2, generator=generator, dtype=torch.float64)
    return rotation.requires_grad_(), x.requires_grad_()


def rotation_map(rotation, x):
    return lambda z: z @ rotation.T + torch.tanh(z) / 20 + x


def unroll(f, z, steps=150):
    for _ in range(steps):
        z = f(z)
    return z


def derivatives(function, arguments, orders):
    """The gradient of a scalar, the gradient of a scalar of that, and so on.

    Each is brought to size 1 before the next, or they would grow with the order.
    """
    outputs, results = [function(*arguments)], []
    for _ in range(orders):
        scalar = 0.0
        for t in outputs:
            weights = torch.linspace(1, 2, t.numel(), dtype=t.dtype)
            size = t.detach().abs().max()
            scalar = scalar + torch.sin(weights * (t / size).flatten()).sum()
        outputs = grad(scalar, arguments, create_graph=True)
        results.append([output.detach() for output in outputs])
    return results


def circle(x, **options):
    """The upper half of x^2 + z^2 = 1."""
    return root(lambda z: z - (x**2 + z**2 - 1) / 2, torch.ones_like(x), **options)


def circle_derivatives(x):
    z = torch.sqrt(1 - x**2)
    fourth = -(3 * z**2 + 15 * x**2) / z**7
    return [-x / z, -1 / z**3, -3 * x / z**5, fourth]


@pytest.mark.parametrize("order", [1, 2, 3])
@pairs
def test_circle_has_exact_derivatives_up_to_the_order(solver, backward_solver, order):
    x = torch.tensor([-0.6, 0.3, 0.7], dtype=torch.float64, requires_grad=True)
    options = {"solver": solver, "backward_solver": backward_solver, "order": order}
    derivative = circle(x, **options)
    agree(derivative.detach(), torch.sqrt(1 - x.detach() ** 2))
    for number, exact in enumerate(circle_derivatives(x.detach()), 1):
        (derivative,) = grad(derivative.sum(), x, create_graph=True)
        if number <= order:
            agree(derivative.detach(), exact)
        else:  # one order further it is wrong, and nothing says so
            assert differs(derivative.detach(), exact)
            break


def test_two_orders_unless_told_otherwise():
    x = torch.tensor([0.3, 0.7], dtype=torch.float64, requires_grad=True)
    derivative = circle(x)
    for exact in circle_derivatives(x.detach())[:2]:
        (derivative,) = grad(derivative.sum(), x, create_graph=True)
        agree(derivative.detach(), exact)


@solvers
def test_linear_map_has_the_derivatives_of_the_linear_system(solver):
    matrix, b = tanh_problem()
    eye = torch.eye(4, dtype=torch.float64)

    def implicit(matrix, b):
        return root(
            lambda z: z @ matrix.T + b, torch.zeros_like(b), solver=solver, order=3
        )

    def solved(matrix, b):
        return torch.linalg.solve(eye - matrix, b.T).T

    agree(implicit(matrix, b), solved(matrix, b))
    agree(derivatives(implicit, (matrix, b), 3), derivatives(solved, (matrix, b), 3))


@pytest.mark.parametrize("by_autograd", [False, True])
@solvers
def test_ridge_regression_has_the_derivatives_of_its_closed_form(solver, by_autograd):
    rng = np.random.default_rng(0)
    design, measured = rng.normal(size=(12, 3)), rng.normal(size=(2, 12))
    penalty = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    hessian = design.T @ design + 2.0 * np.eye(3)
    rate = 1 / np.linalg.norm(hessian, 2)
    inputs, targets = torch.tensor(design), torch.tensor(measured)

    def objective(w):
        misfit = (w @ inputs.T - targets).square().sum()
        return (misfit + penalty * w.square().sum()) / 2

    def gradient_step(w):
        if by_autograd:
            return w - rate * torch.func.grad(objective)(w)
        return w - rate * ((w @ inputs.T - targets) @ inputs + penalty * w)

    w = root(gradient_step, torch.zeros(2, 3).double(), solver=solver, order=3)
    weights = rng.normal(size=(2, 3))
    exact = measured @ design @ np.linalg.inv(hessian)
    np.testing.assert_allclose(w.detach(), exact, rtol=1e-10)
    derivative = (w * torch.tensor(weights)).sum()
    for factor in (-1, -2, -3):
        (derivative,) = grad(derivative, penalty, create_graph=True)
        exact = factor * exact @ np.linalg.inv(hessian)
        np.testing.assert_allclose(derivative.item(), (weights * exact).sum(), 1e-10)


def scipy_root(weight, x):
    def residual(z, x):
        return np.tanh(weight @ z + x) - z

    return np.array([scipy.optimize.root(residual, 0 * s, s, tol=1e-14).x for s in x])


def slope_by_differences(function, argument, direction, h=1e-3):
    """Five-point rule, off by terms of h^4."""
    at = [function(argument + k * h * direction) for k in (-2, -1, 1, 2)]
    return (at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * h)


@pairs
def test_gradient_is_that_of_differences_of_roots_by_scipy(solver, backward_solver):
    weight, x = tanh_problem(radius=0.9)
    options = {"solver": solver, "backward_solver": backward_solver}
    z = root(tanh_map(weight, x), torch.zeros_like(x), **options)
    gradients = grad(torch.sin(z).sum(), (weight, x))
    values = weight.detach().numpy(), x.detach().numpy()
    np.testing.assert_allclose(z.detach(), scipy_root(*values), atol=1e-10)
    rng = np.random.default_rng(1)
    for place, gradient in enumerate(gradients):

        def loss(value, place=place):
            pair = (value, values[1]) if place == 0 else (values[0], value)
            return np.sin(scipy_root(*pair)).sum()

        for _ in range(3):
            direction = rng.normal(size=gradient.shape)
            slope = slope_by_differences(loss, values[place], direction)
            assert abs((gradient.numpy() * direction).sum() - slope) < 1e-9


def adjoint_by_hand(weight, z, v, terms=None):
    """Gradients for W and x given v for z = tanh(W z + x), by matrices in NumPy.

    With `terms`, the inverse of the transposed I - J is cut after so many terms.
    """
    slopes = 1 - z**2
    jacobians = slopes[:, :, None] * weight
    adjoints = []
    for jacobian, seed in zip(jacobians, v, strict=True):
        if terms is None:
            u = np.linalg.solve((np.eye(len(weight)) - jacobian).T, seed)
        else:
            powers = (np.linalg.matrix_power(jacobian.T, i) for i in range(terms))
            u = sum(power @ seed for power in powers)
        adjoints.append(u)
    gradient_of_x = slopes * np.array(adjoints).reshape(z.shape)
    return gradient_of_x.T @ z, gradient_of_x


def derivatives_of_tanh(orders, **options):
    def implicit(weight, x):
        return root(tanh_map(weight, x), torch.zeros_like(x), **options)

    return derivatives(implicit, tanh_problem(), orders)


@pytest.fixture(scope="module")
def four_derivatives():
    """What a converged unroll of the tanh map has."""

    def unrolled(weight, x):
        return unroll(tanh_map(weight, x), torch.zeros_like(x))

    return derivatives(unrolled, tanh_problem(), 4)


@pairs
def test_three_derivatives_are_those_of_a_converged_unroll(
    solver, backward_solver, four_derivatives
):
    options = {"solver": solver, "backward_solver": backward_solver, "order": 3}
    agree(derivatives_of_tanh(3, **options), four_derivatives[:3])


@pytest.mark.parametrize("order", [1, 2, 3])
def test_derivative_beyond_the_order_is_wrong_also_in_many_dimensions(
    order, four_derivatives
):
    actual = derivatives_of_tanh(order + 1, order=order)
    expected = four_derivatives[: order + 1]
    agree(actual[:order], expected[:order])
    for wrong, right in zip(actual[order], expected[order], strict=True):
        assert differs(wrong, right)


@solvers
def test_finite_differences_accept_first_and_second_derivatives(solver):
    def function(weight, x, scale):
        f = tanh_map(weight, x)
        return root(lambda z: f(z) * scale, torch.zeros_like(x), solver=solver)

    scale = torch.tensor([0.9, -0.8], dtype=torch.float64, requires_grad=True)
    arguments = (*tanh_problem(batch=2, size=2), scale)
    assert gradcheck(function, arguments)
    assert gradgradcheck(function, arguments)


@pytest.mark.parametrize("solver", [anderson, broyden, newton])
def test_finite_differences_accept_derivatives_where_plain_iteration_diverges(solver):
    rotation, x = rotation_problem()

    def function(rotation, x):
        return root(rotation_map(rotation, x), torch.zeros_like(x), solver=solver)

    z = function(rotation, x).detach().numpy()
    jacobians = (
        rotation.detach().numpy() + (1 - np.tanh(z) ** 2)[:, :, None] * np.eye(2) / 20
    )
    assert abs(np.linalg.eigvals(jacobians)).min() > 1.02
    assert gradcheck(function, (rotation, x))
    assert gradgradcheck(function, (rotation, x))


@pytest.mark.parametrize("backward_solver", [None, *BACKWARD[1:]])
def test_third_derivatives_where_plain_iteration_diverges(backward_solver):
    arguments = rotation_problem()

    def implicit(rotation, x):
        options = {"order": 3, "backward_solver": backward_solver}
        return root(rotation_map(rotation, x), torch.zeros_like(x), **options)

    def by_newton_on_the_tape(rotation, x):
        z = torch.zeros_like(x)
        for _ in range(12):
            slopes = (1 - torch.tanh(z) ** 2) / 20
            matrix = torch.eye(2, dtype=z.dtype) - rotation - torch.diag_embed(slopes)
            z = z + torch.linalg.solve(matrix, rotation_map(rotation, x)(z) - z)
        return z

    agree(implicit(*arguments), by_newton_on_the_tape(*arguments))
    expected = derivatives(by_newton_on_the_tape, arguments, 3)
    agree(derivatives(implicit, arguments, 3), expected)


def test_newton_takes_a_jacobian_in_closed_form():
    weight, x = tanh_problem()

    def jacobian(z):
        return (1 - torch.tanh(z @ weight.T + x) ** 2)[:, :, None] * weight

    def function(weight, x, **options):
        z0 = torch.zeros_like(x)
        return root(tanh_map(weight, x), z0, solver=newton, order=3, **options)

    with_jacobian = partial(function, jacobian=jacobian)
    expected = derivatives(function, (weight, x), 3)
    agree(derivatives(with_jacobian, (weight, x), 3), expected)


@pytest.mark.parametrize("norm", [0.5, 0.9, 0.99])
@solvers
def test_default_tolerances_give_a_gradient_of_their_size(solver, norm):
    weight, x = (tensor.detach() for tensor in tanh_problem(batch=5, size=8))
    weight = weight + weight.T
    weight *= norm / torch.linalg.matrix_norm(weight, ord=2)
    x = (x / 10).requires_grad_()
    f, z0 = tanh_map(weight, x), torch.zeros_like(x)
    options = {"max_iter": 5000} if solver is fixed_point_iteration else {}
    z, _ = implicit_fixed_point(f, z0, solver=solver, **options)
    gradient = grad(torch.sin(z).sum(), x)[0].numpy()
    with torch.no_grad():
        z = unroll(f, z0, 5000).numpy()
    radius = abs(np.linalg.eigvals((1 - z**2)[:, :, None] * weight.numpy())).max()
    exact = adjoint_by_hand(weight.numpy(), z, np.cos(z))[1]
    error = np.linalg.norm(gradient - exact, axis=1) / np.linalg.norm(exact, axis=1)
    # a residual r of this nearly symmetric map means an error of r / (1 - radius)
    assert error.max() < 3e-5 / (1 - radius)


def test_newton_solves_the_adjoint_system_with_the_factors_that_it_has():
    weight, x = tanh_problem(batch=5, size=12, radius=4.0)
    products = []

    def f(z):
        fz = tanh_map(weight, x)(z)
        if fz.requires_grad:
            fz.register_hook(lambda gradient: products.append(1))
        return fz

    counts = []
    for backward_solver in (None, BACKWARD[1]):
        options = {"solver": newton, "backward_solver": backward_solver}
        z = root(f, torch.zeros_like(x), **options)
        products.clear()
        gradients = grad(torch.sin(z).sum(), (weight, x))
        counts.append(len(products))
        z = z.detach().numpy()
        by_hand = adjoint_by_hand(weight.detach().numpy(), z, np.cos(z))
        agree(gradients, [torch.tensor(array) for array in by_hand])
    assert 0 < 4 * counts[0] < counts[1]


STEPS = [1, 2, 3, 10]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("mode", MODES)
def test_scalar_map_has_the_gradient_that_a_geometric_series_predicts(mode, steps):
    # z = a z + b has z = b / (1 - a), and k terms of the series are (1 - a^k) / (1 - a)
    a = torch.tensor([[0.5, -0.4, 0.8]], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([[1.0, 2.0, -3.0]], dtype=torch.float64, requires_grad=True)
    options = {"gradient": mode, "steps": steps, "damping": 0.3}
    z = root(lambda z: a * z + b, torch.zeros_like(b), **options)
    slope = a.detach()
    missing = {
        "implicit": 0 * slope,
        "unrolled": slope**steps,
        "neumann": slope**steps,
        "jfb": slope,
        "phantom": (1 - 0.3 + 0.3 * slope) ** steps,
    }
    expected = (1 - missing[mode]) / (1 - slope)
    root_by_hand = b.detach() / (1 - slope)
    agree(z.detach(), root_by_hand)
    agree(grad(z.sum(), (b, a)), (expected, expected * root_by_hand))


@pytest.mark.parametrize("mode", MODES)
def test_cheap_modes_take_one_step_and_damp_by_half_unless_told_otherwise(mode):
    a = torch.tensor([[0.5, -0.4]], dtype=torch.float64)
    b = torch.tensor([[1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    z = root(lambda z: a * z + b, torch.zeros_like(b), gradient=mode)
    expected = {"implicit": 1 / (1 - a), "phantom": torch.full_like(a, 0.5)}
    agree(grad(z.sum(), b)[0], expected.get(mode, torch.ones_like(a)))


@solvers
@pytest.mark.parametrize("steps", STEPS)
def test_unrolled_is_neumann_is_the_sum_of_powers(solver, steps):
    weight, x = tanh_problem(radius=0.9)

    def gradients(mode):
        options = {"solver": solver, "gradient": mode, "steps": steps}
        z = root(tanh_map(weight, x), torch.zeros_like(x), **options)
        return grad(torch.sin(z).sum(), (weight, x))

    z = unroll(tanh_map(weight, x), torch.zeros_like(x), 500).detach().numpy()
    by_hand = adjoint_by_hand(weight.detach().numpy(), z, np.cos(z), steps)
    expected = [torch.tensor(array) for array in by_hand]
    agree(gradients("unrolled"), expected)
    agree(gradients("neumann"), expected)
    if steps == 1:
        agree(gradients("jfb"), expected)
    else:
        assert differs(gradients("jfb")[1], expected[1])


@pytest.mark.parametrize("damping", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("steps", STEPS)
def test_phantom_is_a_damped_loop_on_the_tape(damping, steps):
    arguments = tanh_problem(radius=0.9)

    def phantom(weight, x):
        options = {"gradient": "phantom", "steps": steps, "damping": damping}
        return root(tanh_map(weight, x), torch.zeros_like(x), **options)

    def loop(weight, x):
        z = unroll(tanh_map(weight, x), torch.zeros_like(x), 500).detach()
        for _ in range(steps):
            z = (1 - damping) * z + damping * torch.tanh(z @ weight.T + x)
        return z

    agree(phantom(*arguments), loop(*arguments))
    agree(derivatives(phantom, arguments, 2), derivatives(loop, arguments, 2))


def test_unrolled_is_a_loop_on_the_tape_in_second_derivatives_too():
    arguments = tanh_problem()

    def last_steps(weight, x):
        options = {"gradient": "unrolled", "steps": 3}
        return root(tanh_map(weight, x), torch.zeros_like(x), **options)

    def loop(weight, x):
        z = unroll(tanh_map(weight, x), torch.zeros_like(x)).detach()
        return unroll(tanh_map(weight, x), z, 3)

    agree(derivatives(last_steps, arguments, 2), derivatives(loop, arguments, 2))


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_returns_the_solution(mode):
    weight, x = tanh_problem()
    options = {"gradient": mode, "steps": 3, **TIGHT}
    z, solution = implicit_fixed_point(
        tanh_map(weight, x), torch.zeros_like(x), **options
    )
    agree(z.detach(), unroll(tanh_map(weight, x), torch.zeros_like(x)).detach())
    agree(solution.z, z.detach())
    assert solution.converged.all()
    assert z.requires_grad
    assert not solution.z.requires_grad


def evaluations_on_the_tape(**options):
    weight, x = tanh_problem()
    on_tape = []

    def f(z):
        on_tape.append(torch.is_grad_enabled())
        return torch.tanh(z @ weight.T + x)

    root(f, torch.zeros_like(x), **options)
    return sum(on_tape)


class Kept:
    """What autograd holds instead of a tensor, so that we can see it let go."""

    def __init__(self, tensor):
        self.tensor = tensor.detach()


def states_kept(**options):
    """Memory that a result holds on to, in states (B, n); not weights and inputs.

    Unlike `saved_bytes` it leaves out the tapes of the solver itself that are gone
    when the result is there: Newton's Jacobians need some.
    """
    weight, x = tanh_problem(batch=50)
    kept = weakref.WeakSet()

    def pack(tensor):
        kept.add(held := Kept(tensor))
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        z = root(tanh_map(weight, x), torch.zeros_like(x), **options)
    storages = [held.tensor.untyped_storage() for held in kept]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    for known in (weight, x):
        sizes.pop(known.untyped_storage().data_ptr(), None)
    assert z.requires_grad
    return sum(sizes.values()) / x.untyped_storage().nbytes()


def test_an_order_costs_one_evaluation_and_neumann_one_however_many_terms():
    first = evaluations_on_the_tape(order=1)
    counts = [evaluations_on_the_tape(order=order) - first for order in (2, 3, 4)]
    assert counts == [1, 2, 3]
    assert evaluations_on_the_tape(gradient="jfb") == 1
    for steps in (1, 7):
        assert evaluations_on_the_tape(gradient="neumann", steps=steps) == 1
        assert evaluations_on_the_tape(gradient="unrolled", steps=steps) == steps
        assert evaluations_on_the_tape(gradient="phantom", steps=steps) == steps


@solvers
def test_memory_does_not_grow_with_iterations(solver):
    limits = {"solver": solver, "atol": 0.0, "rtol": 0.0, "on_failure": "ignore"}
    few, many = (states_kept(max_iter=n, **limits) for n in (4, 60))
    assert 0 < few == many
    # an unrolled loop of as many steps keeps a state a step
    assert states_kept(gradient="unrolled", steps=60) >= 60


def test_memory_grows_with_steps_on_the_tape_and_not_with_terms_of_a_series():
    assert states_kept(gradient="neumann") > 0
    terms = [states_kept(gradient="neumann", steps=k) for k in (1, 40)]
    assert terms[0] == terms[1]
    for mode in ("unrolled", "phantom"):
        short, long = (states_kept(gradient=mode, steps=k) for k in (1, 41))
        assert long >= short + 40


def test_exact_gradient_of_one_order_keeps_two_states():
    assert states_kept(order=1) <= 2


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 4),
    size=st.integers(1, 6),
    radius=st.floats(0, 0.9),
    single=st.booleans(),
    solver=st.sampled_from(SOLVERS),
    terms=st.none() | st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_gradient_is_the_adjoint_by_matrices(
    batch, size, radius, single, solver, terms, seed
):
    dtype = torch.float32 if single else torch.float64
    weight, x = tanh_problem(batch, size, radius, seed, dtype)
    options = {"solver": solver, "gradient": "neumann" if terms else "implicit"}
    limits = {"atol": 1e-6, "rtol": 1e-6} if single else {}
    z = root(
        tanh_map(weight, x), torch.zeros_like(x), steps=terms or 1, **options, **limits
    )
    assert z.shape == x.shape
    assert z.dtype == dtype
    gradients = grad(torch.sin(z).sum(), (weight, x))
    weight, x = weight.detach().double(), x.detach().double()
    z = unroll(tanh_map(weight, x), torch.zeros_like(x), 400).numpy()
    by_hand = adjoint_by_hand(weight.numpy(), z, np.cos(z), terms)
    for gradient, expected in zip(gradients, by_hand, strict=True):
        assert gradient.dtype == dtype
        tolerance = 2e-3 if single else 1e-10
        np.testing.assert_allclose(gradient, expected, tolerance, tolerance)
