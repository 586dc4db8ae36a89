"""Solutions against closed forms, SciPy and textbook iterations in NumPy."""

from functools import partial

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse.linalg
import scipy.special
import torch

from implicit_layers import anderson, broyden, fixed_point_iteration, newton

pytestmark = pytest.mark.filterwarnings("error")
SOLVERS = [fixed_point_iteration, anderson, broyden, newton]
STABLE = SOLVERS[1:]  # those that do not need a contraction
TIGHT = {"atol": 1e-12, "rtol": 1e-12}
every_solver = pytest.mark.parametrize("solver", SOLVERS)
stable_solver = pytest.mark.parametrize("solver", STABLE)
agree = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)


class Linear:
    """z -> A z + b, with one matrix for all samples or one for each."""

    def __init__(self, matrix, b):
        self.matrix, self.b = matrix, b

    def __call__(self, z):
        return (self.matrix @ z[..., None])[..., 0] + self.b

    def jacobian(self, z):
        return self.matrix.expand(len(z), *self.matrix.shape[-2:]).clone()

    def root(self):
        matrix, b = self.matrix.double().numpy(), self.b.double().numpy()
        return np.linalg.solve(np.eye(matrix.shape[-1]) - matrix, b[..., None])[..., 0]


class Tanh(Linear):
    """z -> tanh(A z + b)."""

    def __call__(self, z):
        return torch.tanh(super().__call__(z))

    def jacobian(self, z):
        return (1 - self(z) ** 2)[..., None] * self.matrix

    def root(self):
        """SciPy's root of f(z) - z nearest to zero, for one matrix."""
        matrix, b = self.matrix.double().numpy(), self.b.double().numpy()
        found = [
            scipy.optimize.root(
                lambda z, row=row: np.tanh(matrix @ z + row) - z, 0 * row, tol=1e-13
            )
            for row in b
        ]
        assert all(abs(answer.fun).max() < 1e-12 for answer in found)
        return np.stack([answer.x for answer in found])


class Scalar:
    """A map of numbers, (B,) or of any other shape, and its derivative."""

    def __init__(self, f, derivative):
        self.f, self.derivative = f, derivative

    def __call__(self, z):
        return self.f(z)

    def jacobian(self, z):
        return torch.diag_embed(self.derivative(z).reshape(len(z), -1))


class Recorder:
    """A map that remembers what it was given and what it gave."""

    def __init__(self, f):
        self.f, self.arguments, self.values = f, [], []
        self.jacobian = f.jacobian

    def __call__(self, z):
        value = self.f(z)
        self.arguments.append(z.clone())
        self.values.append(value.clone())
        return value

    @property
    def calls(self):
        return len(self.values)

    def residuals(self):
        """Norms of f(z) - z in double precision, (calls, B)."""
        z, fz = torch.stack(self.arguments), torch.stack(self.values)
        return (fz.double() - z.double()).reshape(*z.shape[:2], -1).norm(dim=2)


def solve(solver, f, z0, **options):
    """Solve with the map's own Jacobian, so that nothing else calls the map."""
    if solver is newton:
        options["jacobian"] = f.jacobian
    return solver(f, z0, **options)


def randn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def symmetric(size, radius, seed=0):
    """A symmetric matrix with eigenvalues up to `radius` in size, of both signs."""
    vectors = torch.linalg.qr(randn(size, size, seed=seed)).Q
    values = radius * torch.linspace(-1, 1, size, dtype=torch.float64)
    return vectors * values @ vectors.T


def rotation(radians, times=1.0):
    cos, sin = times * np.cos(radians), times * np.sin(radians)
    return torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---- one unknown --------------------------------------------------------------------


@every_solver
def test_cosine_has_the_fixed_point_that_scipy_finds(solver):
    f = Scalar(torch.cos, lambda z: -torch.sin(z))
    solution = solve(solver, f, numbers(-3, 0, 0.5, 1, 40), **TIGHT)
    assert solution.converged.all()
    agree(solution.z, np.full(5, scipy.optimize.fixed_point(np.cos, 1, xtol=1e-14)))


@every_solver
def test_exponential_has_the_root_of_lambert(solver):
    # z = exp(-x z) at W(x) / x, with slope -W(x): below 1 in size up to x = e
    x = numbers(0.1, 1, 2, 2.5)
    f = Scalar(lambda z: torch.exp(-x * z), lambda z: -x * torch.exp(-x * z))
    solution = solve(solver, f, torch.zeros_like(x), max_iter=1000, **TIGHT)
    assert solution.converged.all()
    agree(solution.z, scipy.special.lambertw(x.numpy()).real / x.numpy())


@stable_solver
def test_exponential_too_steep_for_plain_iteration(solver):
    x = numbers(3, 5, 10)
    f = Scalar(lambda z: torch.exp(-x * z), lambda z: -x * torch.exp(-x * z))
    assert not fixed_point_iteration(f, torch.zeros_like(x)).converged.any()
    solution = solve(solver, f, torch.zeros_like(x), **TIGHT)
    assert solution.converged.all()
    agree(solution.z, scipy.special.lambertw(x.numpy()).real / x.numpy())


@every_solver
def test_babylonian_map_has_the_square_root(solver):
    a = numbers(1e-4, 0.5, 2, 9, 1e4)
    f = Scalar(lambda z: (z + a / z) / 2, lambda z: (1 - a / z**2) / 2)
    solution = solve(solver, f, torch.ones_like(a), **TIGHT)
    assert solution.converged.all()
    agree(solution.z, np.sqrt(a.numpy()))


@every_solver
def test_eccentric_anomaly_of_kepler(solver):
    mean = np.linspace(0.1, 3, 7)
    f = Scalar(
        lambda z: torch.tensor(mean) + 0.9 * torch.sin(z), lambda z: 0.9 * torch.cos(z)
    )
    solution = solve(solver, f, torch.tensor(mean), max_iter=500, **TIGHT)
    assert solution.converged.all()
    roots = [
        scipy.optimize.brentq(lambda z, m=m: z - 0.9 * np.sin(z) - m, 0, 4, xtol=1e-14)
        for m in mean
    ]
    agree(solution.z, roots)


# ---- linear systems -----------------------------------------------------------------


@every_solver
@pytest.mark.parametrize("radius", [0.5, 0.9, 0.99])
def test_contraction_of_each_radius(solver, radius):
    f = Recorder(Linear(symmetric(10, radius), randn(4, 10)))
    z0 = torch.zeros(4, 10, dtype=torch.float64)
    solution = solve(solver, f, z0, max_iter=5000, **TIGHT)
    assert solution.converged.all()
    agree(solution.z, f.f.root())
    plain = np.log(1e-12) / np.log(radius)  # evaluations that gain twelve digits
    if solver is fixed_point_iteration:
        assert 0.8 * plain < f.calls < 1.1 * plain + 5
    else:
        assert f.calls < plain + 5


@every_solver
@pytest.mark.parametrize("size", [2, 5, 9])
def test_contraction_that_first_grows(solver, size):
    # eigenvalues 0.5, norm above 3: the residual rises before it falls
    matrix = 0.5 * torch.eye(size, dtype=torch.float64)
    matrix += torch.triu(torch.full_like(matrix, 3.0), diagonal=1)
    f = Recorder(Linear(matrix, randn(3, size)))
    z0 = torch.zeros(3, size, dtype=torch.float64)
    solution = solve(solver, f, z0, max_iter=1000, **TIGHT)
    assert solution.converged.all()
    agree(solution.z, f.f.root(), rtol=1e-7)
    if solver is fixed_point_iteration and size > 2:
        assert f.residuals()[1].max() > 2 * f.residuals()[0].max()


@every_solver
def test_jacobi_iteration_for_poisson_against_a_sparse_solver(solver):
    size = 20  # radius cos(pi / 21) = 0.989
    off = torch.full((size - 1,), 0.5, dtype=torch.float64)
    matrix = torch.diag(off, 1) + torch.diag(off, -1)
    b = randn(3, size)
    solution = solve(solver, Linear(matrix, b), 0 * b, max_iter=5000, **TIGHT)
    assert solution.converged.all()
    poisson = scipy.sparse.diags_array(
        [-0.5, 1, -0.5], offsets=[-1, 0, 1], shape=matrix.shape
    )
    agree(solution.z, scipy.sparse.linalg.spsolve(poisson.tocsc(), b.numpy().T).T)


@pytest.mark.parametrize("times", [1.05, 2])
def test_plain_iteration_fails_on_an_expanding_rotation_and_keeps_its_start(times):
    f = Recorder(Linear(torch.stack([rotation(1, times), rotation(2.5, times)]), 1))
    f.f.b = randn(2, 2)
    z0 = randn(2, 2, seed=1)
    solution = fixed_point_iteration(f, z0, max_iter=50)
    assert not solution.converged.any()
    assert torch.equal(solution.z, z0)  # nothing after it was better
    agree(solution.residual, f.residuals()[0])
    assert f.calls == 50
    assert (solution.iterations == 50).all()


@stable_solver
@pytest.mark.parametrize("times", [1.05, 2])
def test_expanding_rotation_is_solved(solver, times):
    matrix = torch.stack([rotation(radians, times) for radians in (1, 2, 3)])
    f = Recorder(Linear(matrix, randn(3, 2)))
    z0 = randn(3, 2, seed=1)
    solution = solve(solver, f, z0, **TIGHT)
    assert solution.converged.all()
    agree(solution.z, f.f.root())
    assert f.calls <= 15


@stable_solver
@pytest.mark.parametrize("times", [1.05, 2])
def test_expanding_rotations_in_many_planes_are_solved(solver, times):
    blocks = [rotation(radians, times) for radians in np.linspace(1.2, 3, 4)]
    f = Linear(torch.block_diag(*blocks), randn(3, 8))
    options = {newton: {}, broyden: {}, anderson: {"memory": 10}}[solver]
    solution = solve(solver, f, randn(3, 8, seed=1), **TIGHT, **options)
    assert solution.converged.all()
    agree(solution.z, f.root())


# ---- many unknowns ------------------------------------------------------------------


@every_solver
@pytest.mark.parametrize("radius", [0.5, 0.9, 0.99])
def test_tanh_layer_has_the_root_that_scipy_finds(solver, radius):
    f = Tanh(symmetric(8, radius), randn(5, 8) / 10)
    z0 = torch.zeros(5, 8, dtype=torch.float64)
    solution = solve(solver, f, z0, max_iter=5000, **TIGHT)
    assert solution.converged.all()
    agree(solution.z, f.root())


@pytest.mark.parametrize("shape", [(4,), (4, 3)])
def test_plain_iteration_ends_in_the_cycle_of_a_steep_tanh(shape):
    x = randn(*shape) / 10
    solution = fixed_point_iteration(
        lambda z: torch.tanh(-3 * z + x), torch.zeros_like(x), max_iter=200
    )
    assert not solution.converged.any()
    assert (solution.residual <= torch.tanh(x).reshape(4, -1).norm(dim=1)).all()


@stable_solver
@pytest.mark.parametrize("size", [1, 3, 6])
def test_steep_tanh_is_solved(solver, size):
    # minus a positive definite matrix: expanding, and yet with a single root
    matrix = symmetric(size, 1, seed=3)
    f = Tanh(-(3 * torch.eye(size, dtype=torch.float64) + matrix), randn(4, size))
    z0 = torch.zeros(4, size, dtype=torch.float64)
    assert not fixed_point_iteration(f, z0).converged.any()
    solution = solve(solver, f, z0, **TIGHT)
    assert solution.converged.all()
    agree(solution.z, f.root())


@stable_solver
def test_expanding_cubic(solver):
    # z + z^3 = x, one root by Cardano, slope of f there: -3 z^2, down to -4
    x = numbers(-3, -1, 0.1, 1, 3)
    f = Scalar(lambda z: x - z**3, lambda z: -3 * z**2)
    z0 = numbers(-1, -0.5, 0, 0.5, 1)
    assert not fixed_point_iteration(f, z0).converged.all()
    solution = solve(solver, f, z0, **TIGHT)
    assert solution.converged.all()
    half, x = np.sqrt(x.numpy() ** 2 / 4 + 1 / 27), x.numpy()
    agree(solution.z, np.cbrt(x / 2 + half) + np.cbrt(x / 2 - half))


@every_solver
def test_scipy_and_solvers_agree_on_a_system_of_two_equations(solver):
    # a contraction of the unit square
    def g(z):
        return np.stack([np.cos(z[1]) / 2, np.sin(z[0] + z[1]) / 2])

    def f(z):
        a, b = z.unbind(dim=1)
        return torch.stack([torch.cos(b) / 2, torch.sin(a + b) / 2], dim=1)

    solution = solver(f, randn(4, 2), max_iter=500, **TIGHT)
    assert solution.converged.all()
    expected = scipy.optimize.root(lambda z: g(z) - z, np.zeros(2), tol=1e-13).x
    agree(solution.z, np.tile(expected, (4, 1)))


# ---- degenerate maps ----------------------------------------------------------------


@every_solver
@pytest.mark.parametrize("tolerance", [{}, {"atol": 0, "rtol": 0}])
def test_constant_map_is_solved_at_once(solver, tolerance):
    c = randn(3, 2)
    f = Recorder(Scalar(lambda z: c.clone(), torch.zeros_like))
    solution = solve(solver, f, torch.zeros_like(c), **tolerance)
    assert solution.converged.all()
    assert torch.equal(solution.z, c)
    assert (solution.residual == 0).all()
    assert f.calls <= 3


@every_solver
@pytest.mark.parametrize("tolerance", [{}, {"atol": 0, "rtol": 0}])
def test_identity_is_solved_where_it_starts(solver, tolerance):
    z0 = randn(3, 2)
    f = Scalar(lambda z: z, torch.ones_like)  # returns its very argument
    solution = solve(solver, f, z0, **tolerance)
    assert solution.converged.all()
    assert torch.equal(solution.z, z0)
    assert solution.z.data_ptr() != z0.data_ptr()
    assert (solution.residual == 0).all()
    assert (solution.iterations <= 2).all()


@every_solver
@pytest.mark.parametrize("tolerance", [{}, {"atol": 0, "rtol": 0}, {"atol": 0}])
def test_zero_map_is_solved_by_zero(solver, tolerance):
    # where f(z) = 0 a relative tolerance is no help: only a residual of 0 passes
    solution = solve(
        solver, Scalar(torch.zeros_like, torch.zeros_like), randn(3, 2), **tolerance
    )
    assert solution.converged.all()
    assert (solution.z == 0).all()


@every_solver
def test_start_at_the_solution_costs_two_evaluations_at_most(solver):
    f = Recorder(Linear(rotation(2, 1.5), randn(3, 2)))
    z0 = torch.from_numpy(f.f.root())
    solution = solve(solver, f, z0, **TIGHT)
    assert solution.converged.all()
    assert set(solution.iterations.tolist()) <= {1, 2}
    assert f.calls <= 2
    agree(solution.z, z0)


@every_solver
@pytest.mark.parametrize("tolerance", [{}, {"rtol": 0}])
def test_translation_has_no_solution_and_none_is_claimed(solver, tolerance):
    c = numbers(0.5, -3)
    f = Scalar(lambda z: z + c, torch.ones_like)
    z0 = numbers(1, 2)
    solution = solve(solver, f, z0, **tolerance)
    assert not solution.converged.any()
    assert solution.z.isfinite().all()
    assert (solution.residual <= c.abs() * (1 + 1e-12)).all()


@every_solver
def test_singular_direction_in_many_unknowns_is_no_exception(solver):
    # z_1 -> z_1 + 1 has no solution; the other entries contract, to no avail. Without
    # rtol, since far enough out, at 1e5, that takes a residual of 1 for nothing
    f = Linear(torch.diag(numbers(1, 0.5, 0.2)), numbers(1, 1, 1))
    solution = solve(solver, f, randn(4, 3), rtol=0)
    assert solution.z.isfinite().all()
    swallowed = solution.z[:, 0] + 1 == solution.z[:, 0]  # by rounding, from 1e16 on
    assert torch.equal(solution.converged, swallowed)
    assert (solution.residual >= 1 - 1e-12)[~swallowed].all()
    if solver is not broyden:  # whose matrix has its inverse in the limit alone
        assert not swallowed.any()


@every_solver
def test_singular_matrix_with_solutions(solver):
    # every (t, 1) is a fixed point of (z_1, (z_2 + 1) / 2)
    f = Linear(torch.diag(numbers(1, 0.5)), numbers(0, 0.5))
    z0 = randn(3, 2)
    solution = solve(solver, f, z0, **TIGHT)
    if solver is newton:  # its matrix has no inverse unless plain steps suffice
        assert (solution.residual <= (z0[:, 1] - 1).abs() / 2 + 1e-15).all()
        return
    assert solution.converged.all()
    agree(solution.z, torch.stack([z0[:, 0], torch.ones(3)], dim=1), atol=1e-8)


@every_solver
def test_double_root_is_reported_as_far_as_it_was_reached(solver):
    # z^2 + 1/4 = z at 1/2 alone, where 1 - J = 0: the residual is the error squared
    f = Recorder(Scalar(lambda z: z**2 + 0.25, lambda z: 2 * z))
    solution = solve(solver, f, numbers(0, 0.25, 0.5))
    agree(solution.residual, (solution.z - 0.5) ** 2, atol=1e-12)
    bound = 1e-6 + 1e-5 * (solution.z**2 + 0.25)
    assert torch.equal(solution.converged, solution.residual <= bound)
    assert solution.converged[2] and solution.iterations[2] <= 2
    if solver is fixed_point_iteration:  # error 1 / k: 1e-4 after 100 evaluations
        assert not solution.converged[:2].any()
        assert (solution.residual[:2] < 2e-4).all()
    else:
        assert solution.converged.all()


@every_solver
def test_parabola_without_fixed_point(solver):
    # z^2 + 1 - z is at least 3/4
    f = Scalar(lambda z: z**2 + 1, lambda z: 2 * z)
    z0 = numbers(-2, 0, 0.5, 3)
    solution = solve(solver, f, z0)
    assert not solution.converged.any()
    assert solution.z.isfinite().all()
    assert (solution.residual >= 0.75 - 1e-12).all()
    assert (solution.residual <= (z0**2 + 1 - z0) * (1 + 1e-12)).all()


@pytest.mark.parametrize("rtol", [0.0, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", [fixed_point_iteration, anderson, broyden])
def test_what_overflows_has_not_converged(solver, dtype, rtol):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 20, generator=generator, dtype=dtype) * 3 / 20**0.5
    x = torch.randn(1, 20, generator=generator, dtype=dtype)
    z0 = 10 * torch.rand(100, 20, generator=generator, dtype=dtype)
    f = lambda z: (z @ weight.T + x).relu()  # noqa: E731
    solution = solver(f, z0, atol=1e-6, rtol=rtol, max_iter=500)
    true = (f(solution.z) - solution.z).norm(dim=1)
    limit = 1e-6 + rtol * f(solution.z).norm(dim=1)
    assert ((true <= 1.01 * limit) | ~solution.converged).all()
    assert solution.z.norm(dim=1)[solution.converged].lt(1e9).all()
    if solver is fixed_point_iteration:
        assert not solution.converged.any()


@pytest.mark.parametrize("rtol", [0.0, 1e-5])
def test_what_overflows_is_given_up_at_once(rtol):
    z0 = torch.ones(1, 3)
    solution = fixed_point_iteration(lambda z: 10 * z, z0, rtol=rtol, max_iter=100)
    # the norm of 10^20 overflows in single precision, and every second step is tested
    assert solution.iterations.item() <= 22
    assert not solution.converged.any()
