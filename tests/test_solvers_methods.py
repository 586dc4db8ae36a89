"""What is particular to a method: its textbook iterates, speed, guard, memory."""

from itertools import pairwise

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse.linalg
import torch
from test_solvers import (
    SOLVERS,
    TIGHT,
    Linear,
    Recorder,
    Scalar,
    Tanh,
    agree,
    numbers,
    randn,
    rotation,
    symmetric,
)

from implicit_layers import anderson, broyden, fixed_point_iteration, newton

pytestmark = pytest.mark.filterwarnings("error")


# ---- newton -------------------------------------------------------------------------


def test_newton_proper_is_the_textbook_iteration():
    f = Recorder(Tanh(randn(4, 4), randn(3, 4, seed=1)))
    z0 = torch.from_numpy(f.f.root()) + 0.1 * randn(3, 4, seed=2)
    newton(f, z0, jacobian=f.jacobian, patience=0, **TIGHT)
    matrix, b, z = f.f.matrix.numpy(), f.f.b.numpy(), z0.numpy()
    for iterate in f.arguments[:4]:
        agree(iterate, z)
        fz = np.tanh(z @ matrix.T + b)
        system = np.eye(4) - (1 - fz**2)[..., None] * matrix
        z = z + np.linalg.solve(system, (fz - z)[..., None])[..., 0]


def test_newton_proper_doubles_the_digits_at_each_evaluation():
    f = Recorder(Scalar(torch.cos, lambda z: -torch.sin(z)))
    newton(f, numbers(0.5), jacobian=f.jacobian, patience=0, atol=1e-15, rtol=0)
    root = scipy.optimize.fixed_point(np.cos, 1, xtol=1e-15)
    error = [abs(z.item() - root) for z in f.arguments]
    assert f.calls <= 6  # plain iteration takes 85
    # |f''(z) / (2 (1 - f'(z)))| is 0.22 at the root
    assert all(new < 0.3 * old**2 + 1e-15 for old, new in pairwise(error))


def test_newton_needs_fewer_evaluations_than_plain_iteration_even_reusing_a_matrix():
    f = Recorder(Tanh(symmetric(6, 0.99), randn(3, 6) / 10))
    z0 = torch.zeros(3, 6, dtype=torch.float64)
    newton(f, z0, jacobian=f.jacobian, **TIGHT)
    calls = f.calls
    fixed_point_iteration(f, z0, max_iter=5000, **TIGHT)
    assert 10 * calls < f.calls - calls


def test_newton_makes_one_matrix_for_a_linear_map():
    made = []
    f = Recorder(Linear(2 * randn(5, 5), randn(3, 5, seed=1)))

    def jacobian(z):
        made.append(z)
        return f.jacobian(z)

    solution = newton(f, torch.zeros(3, 5, dtype=torch.float64), jacobian=jacobian)
    assert solution.converged.all()
    assert len(made) == 1
    assert f.calls <= 4


@pytest.mark.parametrize("patience", [0, 6, 20])
@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 2, 2, 2)])
def test_automatic_jacobian_is_the_closed_form(shape, patience):
    # entries coupled by a shift, so that the Jacobian is neither diagonal nor symmetric
    x = randn(*shape)

    def f(z):
        flat = z.reshape(3, -1)
        return torch.tanh(2 * flat + flat.roll(1, dims=1) ** 2).reshape(shape) + x

    def jacobian(z):
        flat = z.reshape(3, -1)
        size = flat.shape[1]
        slope = 1 - torch.tanh(2 * flat + flat.roll(1, dims=1) ** 2) ** 2
        eye = torch.eye(size, dtype=z.dtype)
        inner = 2 * eye + 2 * eye.roll(1, dims=0) * flat.roll(1, dims=1)[..., None]
        return slope[..., None] * inner

    given = newton(
        f, torch.zeros_like(x), jacobian=jacobian, patience=patience, **TIGHT
    )
    automatic = newton(f, torch.zeros_like(x), patience=patience, **TIGHT)
    agree(given.z, automatic.z)
    assert torch.equal(given.iterations, automatic.iterations)
    agree(given.factors[0], automatic.factors[0])


@pytest.mark.parametrize("start", [3.0, -8.0, 30.0])
def test_guard_solves_what_an_undamped_step_makes_worse(start):
    # arctan(z) = 0, the example of every textbook: diverges from beyond 1.392
    z = start
    for _ in range(4):
        z -= np.arctan(z) * (1 + z**2)
    assert not abs(z) < abs(start)
    f = Scalar(lambda z: z + 5 * torch.arctan(z), lambda z: 1 + 5 / (1 + z**2))
    for patience in (0, 6):
        solution = newton(
            f, numbers(start, 0.5), jacobian=f.jacobian, patience=patience, max_iter=100
        )
        assert solution.converged.all()
        assert (solution.z.abs() < 1e-6).all()


def test_guard_lets_no_residual_grow_from_step_to_step():
    f = Recorder(
        Scalar(lambda z: z + 5 * torch.arctan(z), lambda z: 1 + 5 / (1 + z**2))
    )
    solution = newton(f, numbers(30.0), jacobian=f.jacobian, patience=0, max_iter=100)
    best, halvings = np.inf, 0
    for residual in f.residuals()[:, 0].tolist():
        halvings = 0 if residual < best else halvings + 1
        assert halvings <= 10
        best = min(best, residual)
    assert solution.converged.all()


def test_newton_reports_a_singular_matrix_as_a_sample_that_failed():
    # the slope of f is exactly 1 at the second start and wherever it is moved
    f = Scalar(
        lambda z: torch.stack([2 * z[0] + 1, z[1] + 1, z[2] / 2 - 3]),
        lambda z: numbers(2, 1, 0.5),
    )
    solution = newton(f, numbers(0, 0, 0), jacobian=f.jacobian)
    assert solution.converged.tolist() == [True, False, True]
    agree(solution.z[[0, 2]], [-1, -6], rtol=1e-4)
    assert solution.z.isfinite().all()
    assert solution.iterations[1] < 50


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_newton_survives_a_jacobian_that_is_not_finite(bad):
    f = Linear(rotation(2, 1.5), randn(3, 2))

    def jacobian(z):
        slopes = f.jacobian(z)
        slopes[1, 0, 0] = bad
        return slopes

    solution = newton(f, torch.zeros(3, 2, dtype=torch.float64), jacobian=jacobian)
    assert solution.converged.tolist() == [True, False, True]
    assert solution.z.isfinite().all()
    agree(solution.z[[0, 2]], f.root()[[0, 2]], rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_factors_solve_with_the_matrix_at_the_solution(dtype):
    f = Tanh(2 * randn(5, 5, dtype=dtype), randn(3, 5, seed=1, dtype=dtype))
    z0 = torch.zeros(3, 5, dtype=dtype)
    solution = newton(f, z0, jacobian=f.jacobian, patience=0, max_iter=100)
    assert solution.converged.all()
    v = randn(3, 5, 1, seed=2, dtype=dtype)
    system = np.eye(5) - f.jacobian(solution.z).double().numpy()
    # off by what the last step has moved the Jacobian, by less than a hundredth
    agree(
        torch.linalg.lu_solve(*solution.factors, v),
        np.linalg.solve(system, v.double().numpy()),
        rtol=0.01,
        atol=0.01,
    )


def test_factors_of_a_linear_map_are_exact_and_not_transposed():
    f = Linear(2 * randn(4, 4), randn(3, 4, seed=1))
    solution = newton(f, torch.zeros(3, 4, dtype=torch.float64), jacobian=f.jacobian)
    v = randn(3, 4, 2, seed=2)
    expected = np.linalg.solve(np.eye(4) - f.matrix.numpy(), v.numpy())
    agree(torch.linalg.lu_solve(*solution.factors, v), expected)


@pytest.mark.parametrize("solver", SOLVERS[:3])
def test_only_newton_has_factors(solver):
    assert solver(torch.cos, numbers(1)).factors is None


# ---- anderson -----------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("seed", range(3))
def test_anderson_ends_on_a_linear_map_in_about_as_many_steps_as_unknowns(size, seed):
    matrix = randn(size, size, seed=seed)
    matrix = 1.5 * matrix / torch.linalg.eigvals(matrix).abs().max()
    f = Recorder(Linear(matrix, randn(1, size, seed=seed + 10)))
    z0 = torch.zeros(1, size, dtype=torch.float64)
    solution = anderson(f, z0, memory=size + 3, atol=1e-9, rtol=0)
    assert solution.converged.all()
    assert f.calls <= size + 10


def test_anderson_is_about_as_fast_as_gmres():
    f = Recorder(Linear(symmetric(30, 0.99), randn(1, 30)))
    system = np.eye(30) - f.f.matrix.numpy()
    residuals = []
    scipy.sparse.linalg.gmres(
        system,
        f.f.b[0].numpy(),
        rtol=1e-8,
        restart=30,
        callback=residuals.append,
        callback_type="pr_norm",
    )
    anderson(f, torch.zeros(1, 30, dtype=torch.float64), memory=30, atol=0, rtol=1e-8)
    assert f.calls <= len(residuals) + 10


@pytest.mark.parametrize("memory", [1, 2, 5, 50])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_anderson_with_any_memory(memory, dtype):
    f = Linear(symmetric(12, 0.95), randn(3, 12))
    f.matrix, f.b = f.matrix.to(dtype), f.b.to(dtype)
    solution = anderson(f, torch.zeros(3, 12, dtype=dtype), memory=memory, max_iter=500)
    assert solution.converged.all()
    agree(solution.z, f.root(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("radius", [0.9, 0.99])
def test_anderson_beats_plain_iteration_where_that_is_slow(radius):
    f = Recorder(Linear(symmetric(20, radius), randn(3, 20)))
    z0 = torch.zeros(3, 20, dtype=torch.float64)
    anderson(f, z0, max_iter=20000, **TIGHT)
    calls = f.calls
    fixed_point_iteration(f, z0, max_iter=40000, **TIGHT)
    assert calls < 0.7 * (f.calls - calls)


def test_anderson_is_plain_iteration_on_an_easy_map():
    f = Recorder(Linear(symmetric(5, 0.1), randn(3, 5)))
    z0 = torch.zeros(3, 5, dtype=torch.float64)
    easy, plain = anderson(f, z0), fixed_point_iteration(f, z0)
    assert torch.equal(easy.z, plain.z)


@pytest.mark.parametrize("ridge", [0, 1e-10, 1e-2, None])
def test_anderson_with_any_ridge(ridge):
    f = Linear(rotation(2, 1.05), randn(3, 2))
    solution = anderson(f, randn(3, 2, seed=1), ridge=ridge, max_iter=300)
    assert solution.converged.all()
    agree(solution.z, f.root(), rtol=1e-4, atol=1e-4)


# ---- broyden ------------------------------------------------------------------------


def textbook_broyden(f, z, steps):
    """Iterates by a dense matrix B with B s = y, and as it was across s (1965)."""
    iterates, system, residual = [z], np.eye(len(z)), f(z) - z
    for _ in range(steps):
        step = np.linalg.solve(system, residual)
        z = z + step
        change = residual - (f(z) - z)
        residual = residual - change
        system = system + np.outer(change - system @ step, step) / (step @ step)
        iterates.append(z)
    return iterates


@pytest.mark.parametrize("steps", [1, 2, 5, 12])
def test_broyden_is_the_textbook_update_of_a_dense_matrix(steps):
    f = Recorder(Tanh(2 * randn(4, 4), randn(2, 4, seed=1)))
    broyden(f, randn(2, 4, seed=2), max_iter=steps + 1, **TIGHT)
    matrix, shift = f.f.matrix.numpy(), f.f.b.numpy()
    for sample in range(2):
        iterates = textbook_broyden(
            lambda z, sample=sample: np.tanh(matrix @ z + shift[sample]),
            f.arguments[0][sample].numpy(),
            steps,
        )
        for ours, theirs in zip(f.arguments, iterates, strict=True):
            agree(ours[sample], theirs, rtol=1e-7, atol=1e-7)


def test_broyden_takes_the_steps_of_scipy():
    f = Recorder(Linear(symmetric(6, 0.9), randn(1, 6)))
    z0 = torch.zeros(1, 6, dtype=torch.float64)
    broyden(f, z0, atol=1e-9, rtol=0)
    seen = []

    def g(z):
        seen.append(z.copy())
        return f.f.matrix.numpy() @ z + f.f.b[0].numpy() - z

    scipy.optimize.broyden1(g, np.zeros(6), alpha=1, line_search=None, f_tol=1e-9)
    assert f.calls >= 8
    seen = [z for i, z in enumerate(seen) if i == 0 or (z != seen[i - 1]).any()]
    for ours, theirs in zip(f.arguments[:8], seen, strict=False):
        agree(ours[0], theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("seed", range(3))
def test_broyden_ends_on_a_linear_map_within_twice_as_many_steps_as_unknowns(
    size, seed
):
    # Gay (1979): 2 d steps, hence 2 d + 1 evaluations
    matrix = randn(size, size, seed=seed)
    matrix = 1.5 * matrix / torch.linalg.eigvals(matrix).abs().max()
    f = Recorder(Linear(matrix, randn(1, size, seed=seed + 10)))
    z0 = torch.zeros(1, size, dtype=torch.float64)
    solution = broyden(f, z0, atol=1e-8, rtol=0, memory=2 * size)
    assert solution.converged.all()
    assert f.calls <= 2 * size + 1


@pytest.mark.parametrize("memory", [3, 7])  # with less it can fail, and says so
@pytest.mark.parametrize("line_search", [False, True])
def test_broyden_with_less_memory_than_steps(memory, line_search):
    f = Recorder(Linear(symmetric(30, 0.9), randn(3, 30)))
    z0 = torch.zeros(3, 30, dtype=torch.float64)
    solution = broyden(
        f, z0, memory=memory, max_iter=500, line_search=line_search, **TIGHT
    )
    assert solution.converged.all()
    assert f.calls > memory + 3
    agree(solution.z, f.f.root())
    if memory >= 2 and not line_search:  # plain iteration takes 270
        assert f.calls < 200


def test_line_search_solves_what_full_steps_do_not():
    # ten times too long a step lands on the other side, where f is as flat
    x = numbers(0.3, -1, 2)
    z0 = x + numbers(2, -2, 3)

    def steep(z):
        return z - 10 * torch.tanh(z - x)

    full = broyden(steep, z0, rtol=0)
    searched = broyden(steep, z0, rtol=0, line_search=True)
    assert not full.converged.any()
    assert searched.converged.all()
    agree(searched.z, x, atol=1e-6)
