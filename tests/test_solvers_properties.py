"""What holds of every solver on every map: honest fields, no neighbours, no traces."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_solvers import (
    SOLVERS,
    TIGHT,
    Linear,
    Recorder,
    Scalar,
    Tanh,
    every_solver,
    numbers,
    randn,
    rotation,
    solve,
    symmetric,
)
from torch import nn

from implicit_layers import Solution, anderson, broyden, fixed_point_iteration, newton

pytestmark = pytest.mark.filterwarnings("error")
MORE = [
    *((solver, {}) for solver in SOLVERS),
    (anderson, {"memory": 1}),
    (broyden, {"memory": 3}),
    (broyden, {"line_search": True}),
    (newton, {"patience": 0}),
]
with_options = pytest.mark.parametrize(
    ("solver", "options"), MORE, ids=lambda x: getattr(x, "__name__", str(x))
)
many = settings(max_examples=60, deadline=None, derandomize=True)


class Each:
    """A map of its own for each sample, so that no sum is taken over a batch."""

    def __init__(self, *maps):
        self.maps = maps

    def __call__(self, z):
        return torch.cat([f(z[i : i + 1]) for i, f in enumerate(self.maps)])

    def jacobian(self, z):
        return torch.cat([f.jacobian(z[i : i + 1]) for i, f in enumerate(self.maps)])


class Breaking:
    """A map that gives only `value` from its evaluation number `call` on."""

    def __init__(self, f, call, value=np.nan):
        self.f, self.left, self.value = f, call, value
        self.jacobian = f.jacobian

    def __call__(self, z):
        self.left -= 1
        fz = self.f(z)
        return torch.full_like(fz, self.value) if self.left <= 0 else fz


def check_fields(f, solution, z0, solver, max_iter, atol=1e-6, rtol=1e-5):
    """Hold every field to its definition, by what the recorder saw."""
    batch, norms = len(z0), f.residuals()
    assert isinstance(solution, Solution)
    assert solution.z.shape == z0.shape and solution.z.dtype == z0.dtype
    assert solution.residual.shape == (batch,) and solution.residual.dtype == z0.dtype
    assert solution.converged.shape == (batch,)
    assert solution.converged.dtype == torch.bool
    assert solution.iterations.shape == (batch,)
    assert solution.iterations.dtype == torch.long
    assert solution.z.isfinite().all()

    # evaluations: as many as the trace has entries, never more than allowed
    assert 1 <= f.calls <= max_iter
    assert solution.trace.shape == (f.calls,)
    assert (solution.iterations >= 1).all()
    # the loop ends with its last sample
    assert f.calls - (solver is newton) <= solution.iterations.max() <= f.calls
    seen = torch.where(norms.isfinite(), norms, 0).amax(dim=1)
    some = norms.isfinite().any(dim=1)
    np.testing.assert_allclose(solution.trace[some], seen[some], rtol=1e-5, atol=1e-30)
    assert not solution.trace.isnan().any()

    # residual and converged: of exactly that z, found among the evaluations
    allowed = atol + rtol * torch.stack(f.values).double().reshape(
        f.calls, batch, -1
    ).norm(dim=2)
    tested = torch.ones(f.calls, dtype=torch.bool)
    if solver in (fixed_point_iteration, anderson):
        tested[:-1:2] = False  # odd evaluations, but for the last
    for i in range(batch):
        count = int(solution.iterations[i])
        mine = [torch.equal(z[i], solution.z[i]) for z in f.arguments[:count]]
        assert any(mine)
        at = mine.index(True)
        residual, norm = solution.residual[i].item(), norms[:count, i]
        if norm[at].isfinite():
            np.testing.assert_allclose(residual, norm[at], rtol=1e-5, atol=1e-30)
        else:
            assert residual == np.inf
        passed = norm.isfinite() & (norm <= allowed[:count, i]) & tested[:count]
        if solution.converged[i]:
            assert residual <= allowed[at, i] * (1 + 1e-6)
            assert mine[-1]
            assert passed.nonzero()[0] == count - 1  # and not before
        else:
            assert residual > allowed[at, i] * (1 - 1e-6) or residual == np.inf
            assert not passed.any()
            best = norm[tested[:count] | (torch.arange(count) == 0)]
            best = best[best.isfinite()]
            assert not len(best) or residual <= best.min() * (1 + 1e-5)


# ---- the fields ---------------------------------------------------------------------


def maps(kind, batch, size, seed, dtype):
    """Linear maps of one kind."""
    matrix = randn(batch, size, size, seed=seed)
    b = randn(batch, size, seed=seed + 1)
    if kind in ("contractive", "expanding"):
        radius = 0.8 if kind == "contractive" else 2
        norm = torch.linalg.matrix_norm(matrix, ord=2)
        matrix = radius * matrix / norm[:, None, None]
    elif kind == "singular":  # one eigenvalue is 1, up to rounding
        basis = torch.linalg.qr(matrix).Q
        matrix = basis * torch.linspace(1, -0.8, size).double() @ basis.mT
    else:  # non-normal: eigenvalues 0.5, norm up to 20
        matrix = torch.triu(10 * matrix, diagonal=1)
        matrix.diagonal(dim1=1, dim2=2).fill_(0.5)
    return matrix.to(dtype), b.to(dtype)


KINDS = ["contractive", "expanding", "singular", "non-normal"]
problems = given(
    method=st.sampled_from(MORE),
    kind=st.sampled_from(KINDS),
    make=st.sampled_from([Linear, Tanh]),
    batch=st.integers(1, 4),
    size=st.integers(1, 6),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    max_iter=st.integers(1, 60),
    rtol=st.sampled_from([0, 1e-5, 1e-2]),
)


@many
@problems
def test_every_field_means_what_it_says(
    method, kind, make, batch, size, seed, dtype, max_iter, rtol
):
    f = Recorder(make(*maps(kind, batch, size, seed, dtype)))
    z0, (solver, options) = randn(batch, size, seed=seed + 2, dtype=dtype), method
    solution = solve(solver, f, z0, rtol=rtol, max_iter=max_iter, **options)
    check_fields(f, solution, z0, solver, max_iter, rtol=rtol)


@many
@given(
    method=st.sampled_from(MORE),
    kind=st.sampled_from(KINDS),
    batch=st.integers(1, 4),
    size=st.integers(1, 6),
    seed=st.integers(0, 10**6),
)
def test_what_has_converged_is_near_the_solution(method, kind, batch, size, seed):
    f = Linear(*maps(kind, batch, size, seed, torch.float64))
    solver, options = method
    z0 = torch.zeros(batch, size, dtype=torch.float64)
    solution = solve(solver, f, z0, rtol=0, max_iter=300, **options)
    if kind == "contractive" and options.get("memory") != 2:
        assert solution.converged.all()
    if kind == "singular":
        return
    inverse = np.linalg.inv(np.eye(size) - f.matrix.numpy())
    error = np.linalg.norm(solution.z.numpy() - f.root(), axis=1)
    bound = np.linalg.norm(inverse, ord=2, axis=(1, 2)) * 1e-6
    assert (error <= bound * 1.01 + 1e-9)[solution.converged.numpy()].all()


@with_options
@pytest.mark.parametrize("max_iter", range(1, 12))
def test_no_more_evaluations_than_allowed_and_the_last_one_counts(
    solver, options, max_iter
):
    f = Recorder(Linear(symmetric(4, 0.2), randn(2, 4)))
    z0 = torch.zeros(2, 4, dtype=torch.float64)
    solution = solve(solver, f, z0, max_iter=max_iter, **options)
    check_fields(f, solution, z0, solver, max_iter)
    if not solution.converged.all():
        assert f.calls == max_iter


@with_options
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("call", [1, 2, 3, 4, 7])
def test_fields_of_a_batch_of_all_fates(solver, options, value, call):
    f = Recorder(
        Each(
            Linear(0.1 * torch.eye(2).double(), numbers(1, 2)),  # easy
            Linear(rotation(1.5, 0.95), numbers(-1, 2)),  # slow
            Scalar(lambda z: z**2 + 2, lambda z: 2 * z),  # to infinity
            Breaking(Tanh(rotation(1, 3), numbers(3, 1)), call, value),
        )
    )
    z0 = randn(4, 2)
    solution = solve(solver, f, z0, max_iter=200, **options)
    check_fields(f, solution, z0, solver, 200)
    assert solution.converged[0] and not solution.converged[2]
    # at least as good as the start, where that could be evaluated
    start = f.residuals()[0]
    assert (solution.residual <= start * (1 + 1e-12))[start.isfinite()].all()


@every_solver
def test_tolerances_are_of_the_whole_sample_and_of_no_other(solver):
    # norm of the residual against atol alone: sqrt(12) times that of an entry
    f = Recorder(Linear(torch.eye(12).double() / 2, torch.ones(3, 12).double()))
    f.f.b = f.f.b * numbers(1, 1e3, 1e6)[:, None]
    z0 = torch.zeros(3, 12, dtype=torch.float64)
    for tolerance in ({"atol": 1e-4, "rtol": 0}, {"atol": 0, "rtol": 1e-4}):
        f.arguments, f.values = [], []
        solution = solve(solver, f, z0, **tolerance)
        assert solution.converged.all()
        check_fields(f, solution, z0, solver, 100, **tolerance)
    if solver is fixed_point_iteration:
        assert len(set(solution.iterations.tolist())) == 1  # relative: no scale


@pytest.mark.parametrize("growth", [1, 1.02])
def test_iterate_that_passed_is_returned_and_not_an_earlier_smaller_residual(growth):
    # the residual does not fall, but rtol times the norm of f(z) reaches it in the end
    f = Recorder(Scalar(lambda z: growth * z + 1, lambda z: growth + 0 * z))
    solution = fixed_point_iteration(f, numbers(0), atol=0, rtol=0.1)
    check_fields(f, solution, numbers(0), fixed_point_iteration, 100, 0, 0.1)
    assert solution.converged.all() and solution.z > 8


@every_solver
def test_both_tolerances_zero_asks_for_a_residual_of_zero(solver):
    f = Scalar(lambda z: torch.where(z > 1, z / 2, 1), lambda z: 0.5 * (z > 1).double())
    solution = solve(solver, f, numbers(1.5, 8, 0.2), atol=0, rtol=0)
    assert solution.converged.all()
    assert torch.equal(solution.z, numbers(1, 1, 1))
    short = solve(solver, Scalar(torch.cos, torch.sin), numbers(1), rtol=0, max_iter=4)
    assert not short.converged.any() and short.residual > 0


# ---- neighbours ---------------------------------------------------------------------


def fates(dtype):
    """Maps of (1, 2) and whether a sample of them has a solution to be found."""

    def linear(matrix, *b):
        return Linear(matrix.to(dtype), torch.tensor([b], dtype=dtype))

    eye = torch.eye(2, dtype=torch.float64)
    hard = Tanh(rotation(1, 3).to(dtype), randn(1, 2, dtype=dtype))
    return {
        "easy": (linear(0.1 * eye, 1, 2), True),
        "slow": (linear(torch.diag(numbers(0.9, -0.8)), 1, -1), True),
        "slow later": (linear(torch.diag(numbers(0.05, 0.95)), 9, 1e-3), True),
        "expanding": (linear(rotation(2, 1.3), 2, 1), None),
        "hard": (hard, None),
        "to infinity": (Scalar(lambda z: z**2 + 2, lambda z: 2 * z), False),
        "overflows": (Scalar(lambda z: 9 * torch.exp(z), lambda z: 9 * z.exp()), False),
        "no solution": (linear(eye, 1, 2), False),
        "nan at once": (Breaking(hard, 1), False),
        "nan soon": (Breaking(hard, 2), False),
        "nan later": (Breaking(hard, 4), False),
        "inf": (Breaking(hard, 3, np.inf), False),
    }


@many
@given(
    method=st.sampled_from(MORE),
    names=st.lists(st.sampled_from(list(fates(torch.float64))), min_size=2, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_sample_has_in_a_batch_the_result_it_has_alone(method, names, dtype, seed):
    solver, options = method
    z0 = randn(len(names), 2, seed=seed, dtype=dtype)
    batch = Recorder(Each(*(fates(dtype)[name][0] for name in names)))
    together = solve(solver, batch, z0, max_iter=150, **options)
    assert together.z.isfinite().all()
    for i, name in enumerate(names):
        f, solvable = fates(dtype)[name]
        alone = solve(solver, f, z0[i : i + 1], max_iter=150, **options)
        if solver is anderson and name == "hard":
            continue  # a map that expands threefold: rounding decides its path
        eps = 1e-5 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(together.z[i], alone.z[0], rtol=eps, atol=eps)
        torch.testing.assert_close(
            together.residual[i], alone.residual[0], rtol=1e-3, atol=eps
        )
        assert together.converged[i] == alone.converged[0]
        assert together.iterations[i] == alone.iterations[0]
        if solvable is not None:
            assert together.converged[i] == solvable, name


@with_options
@pytest.mark.parametrize("neighbour", ["easy", "slow", "hard", "to infinity"])
@pytest.mark.parametrize("name", ["slow later", "slow"])
def test_number_of_steps_is_not_the_neighbour_s(solver, options, name, neighbour):
    f, other = fates(torch.float64)[name][0], fates(torch.float64)[neighbour][0]
    z0 = randn(2, 2, seed=11)
    alone = solve(solver, f, z0[1:], max_iter=150, **options)
    beside = solve(solver, Each(other, f), z0, max_iter=150, **options)
    assert beside.iterations[1] == alone.iterations[0]
    torch.testing.assert_close(beside.z[1:], alone.z, rtol=1e-12, atol=1e-12)


@with_options
@pytest.mark.parametrize("name", ["nan at once", "nan soon", "nan later", "inf"])
def test_dead_sample_does_not_keep_the_others_waiting(solver, options, name):
    dead, easy = fates(torch.float64)[name][0], fates(torch.float64)["easy"][0]
    f = Recorder(Each(easy, dead, easy))
    solution = solve(solver, f, randn(3, 2), max_iter=1000, **options)
    assert solution.converged.tolist() == [True, False, True]
    assert solution.z.isfinite().all()
    assert solution.iterations[1] <= 20
    assert f.calls <= 20


@with_options
@pytest.mark.parametrize("call", [2, 3, 4, 5])
def test_finished_sample_is_shown_to_f_where_it_ended(solver, options, call):
    # f may refuse a NaN, or be slow far out; neither is a matter of a finished sample
    hard = fates(torch.float64)["hard"][0]
    easy = Linear(0.01 * torch.eye(2).double(), numbers(1, 2))
    f = Recorder(Each(easy, Breaking(hard, call), hard))
    solution = solve(solver, f, randn(3, 2), max_iter=30, **options)
    assert solution.converged[0] and not solution.converged[1]
    assert f.calls > max(solution.iterations[:2])
    for i in range(2):
        later = torch.stack(f.arguments)[solution.iterations[i] :, i]
        assert later.isfinite().all()
        moved = (later - solution.z[i]).abs().max()
        if solver in (broyden, newton):
            assert moved == 0
        elif i == 0:  # plain steps go on, and change what was solved by a tolerance
            assert moved <= 1e-4


@with_options
def test_batch_of_the_dead_ends_at_once(solver, options):
    z0 = randn(3, 2)
    f = Recorder(Scalar(lambda z: z * np.nan, lambda z: torch.zeros_like(z)))
    solution = solve(solver, f, z0, max_iter=1000, **options)
    assert not solution.converged.any()
    assert torch.equal(solution.z, z0)
    assert (solution.residual == np.inf).all()
    assert f.calls <= 15


@every_solver
def test_order_of_the_samples_is_the_order_of_the_results(solver):
    names = ["slow", "easy", "to infinity", "nan soon", "slow later"]
    order = [3, 0, 4, 2, 1]
    z0 = randn(5, 2)
    first, second = (
        solve(solver, Each(*(fates(torch.float64)[names[i]][0] for i in p)), z0[p])
        for p in (range(5), order)
    )
    torch.testing.assert_close(first.z[order], second.z, rtol=1e-12, atol=1e-12)
    assert torch.equal(first.converged[order], second.converged)
    assert torch.equal(first.iterations[order], second.iterations)


@with_options
def test_converged_sample_moves_no_more(solver, options):
    class Fickle(Linear):
        """From its seventh evaluation on another map, which is far from solved."""

        calls = 0

        def __call__(self, z):
            self.calls += 1
            return super().__call__(z) + 50 * (self.calls > 6)

    eye = torch.eye(2, dtype=torch.float64)
    easy = Fickle(0.01 * eye, numbers(1, 2))
    hard = Scalar(lambda z: z + 5 * torch.arctan(z), lambda z: 1 + 5 / (1 + z**2))
    harder = Tanh(rotation(1, 3), numbers(-0.4, 0.3))
    z0 = torch.stack([numbers(1, 2), numbers(30, 40), numbers(1, 1)])
    solution = solve(solver, Each(easy, hard, harder), z0, max_iter=30, **options)
    assert easy.calls > 8
    assert solution.converged[0] and solution.iterations[0] <= 6
    torch.testing.assert_close(
        solution.z[0], numbers(1, 2) / 0.99, rtol=1e-4, atol=1e-4
    )


# ---- numbers, shapes, memory --------------------------------------------------------


@many
@given(
    method=st.sampled_from(MORE),
    power=st.sampled_from([-40, -13, 13, 40]),
    kind=st.sampled_from(["contractive", "expanding"]),
    seed=st.integers(0, 10**6),
)
def test_unit_of_measurement_does_not_matter(method, power, kind, seed):
    # a power of two changes no digit, so the same steps are taken to the last bit
    (solver, options), scale = method, 2.0**power
    f = Tanh(*maps(kind, 2, 3, seed, torch.float64))

    def scaled(z):
        return scale * f(z / scale)

    def jacobian(z):
        return f.jacobian(z / scale)

    scaled = Scalar(scaled, None)
    scaled.jacobian = jacobian
    z0 = randn(2, 3, seed=seed)
    one = solve(solver, f, z0, atol=0, **options)
    other = solve(solver, scaled, scale * z0, atol=0, **options)
    assert torch.equal(one.z, other.z / scale)
    assert torch.equal(one.iterations, other.iterations)
    assert torch.equal(one.converged, other.converged)


@with_options
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 2, 4, 5), (1,), (1, 7)])
def test_every_shape_and_number_format(solver, options, shape, dtype):
    x = randn(*shape, dtype=dtype)

    def f(z):
        assert z.shape == shape and z.dtype == dtype
        return torch.tanh(0.5 * z + x)

    # automatic Jacobian, and a referee entry by entry in double precision
    solution = solver(f, torch.zeros_like(x), **options)
    assert solution.converged.all()
    assert solution.z.shape == shape and solution.z.dtype == dtype
    z = torch.zeros_like(x).double()
    for _ in range(100):
        z = torch.tanh(0.5 * z + x)
    np.testing.assert_allclose(solution.z, z, rtol=1e-3, atol=1e-4)


@every_solver
def test_half_precision_of_double_is_not_used(solver):
    x = randn(3, 4)
    solution = solver(lambda z: torch.tanh(z / 2 + x), torch.zeros_like(x), **TIGHT)
    assert solution.converged.all()
    assert (solution.residual <= 3e-12).all()


@with_options
@pytest.mark.parametrize("shape", [(0,), (0, 3), (0, 2, 4, 4)])
def test_empty_batch_is_an_empty_solution(solver, options, shape):
    z0 = torch.zeros(shape)
    solution = solver(torch.tanh, z0, **options)
    assert solution.z.shape == shape
    for field in (solution.residual, solution.converged, solution.iterations):
        assert field.shape == (0,)
    assert solution.converged.dtype == torch.bool
    assert solution.iterations.dtype == torch.long
    assert solution.trace.ndim == 1 and len(solution.trace) <= 1


@with_options
@pytest.mark.parametrize(
    "layout",
    [
        lambda z: z.mT.contiguous().mT,
        lambda z: z[:1].expand(4, 3),
        lambda z: torch.stack([z, z], dim=2)[..., 0],
        lambda z: z.clone().requires_grad_(),
    ],
    ids=["transposed", "expanded", "strided", "wanting gradients"],
)
def test_start_in_any_memory_is_left_as_it_was(solver, options, layout):
    z0 = layout(randn(4, 3))
    before = z0.detach().clone()
    f = Linear(symmetric(3, 0.95), randn(4, 3, seed=1))
    solution = solve(solver, f, z0, max_iter=300, **options)
    assert torch.equal(z0, before)
    same = solve(solver, f, before, max_iter=300, **options)
    torch.testing.assert_close(solution.z, same.z, rtol=1e-10, atol=1e-10)
    solution.z.zero_()  # the caller's own memory
    assert torch.equal(z0, before)


@with_options
def test_what_f_was_given_and_what_it_gave_is_never_written_to(solver, options):
    class Keeping(Recorder):
        """Keeps the very tensors beside the copies."""

        def __call__(self, z):
            self.kept = getattr(self, "kept", [])
            value = super().__call__(z)
            self.kept += [z, value] if value is not z else [z, z]
            return value

    for inner in (
        Linear(rotation(2, 0.95), randn(3, 2)),
        Linear(rotation(2, 1.2), randn(3, 2)),
        Breaking(Linear(rotation(2, 0.95), randn(3, 2)), 4),
        Scalar(lambda z: z, torch.ones_like),
    ):
        f = Keeping(inner)
        solution = solve(solver, f, randn(3, 2, seed=1), max_iter=40, **options)
        solution.z.zero_()
        copies = [z for pair in zip(f.arguments, f.values, strict=True) for z in pair]
        assert all(
            torch.equal(kept.nan_to_num(7), copy.nan_to_num(7))
            for kept, copy in zip(f.kept, copies, strict=True)
        )


@with_options
@pytest.mark.parametrize(
    "constant",
    [randn(3, 2), randn(1, 2).expand(3, 2), randn(2, 3).T],
    ids=["whole", "expanded", "transposed"],
)
def test_constant_that_f_returns_each_time_is_not_written_to(solver, options, constant):
    c = constant.clone()
    f = Scalar(lambda z: constant, torch.zeros_like)
    solution = solve(solver, f, torch.zeros(3, 2).double(), **options)
    assert solution.converged.all()
    assert torch.equal(solution.z, c)
    solution.z.zero_()
    assert torch.equal(constant, c)


@every_solver
def test_no_graph_is_built_and_the_mode_is_left_as_it_was(solver):
    layer = nn.Linear(3, 3)
    nn.init.orthogonal_(layer.weight, gain=0.9)
    modes = []

    def f(z):
        modes.append(torch.is_grad_enabled())
        return layer(z)

    z0 = torch.zeros(2, 3, requires_grad=True)
    solution = solver(f, z0, max_iter=300)
    assert solution.converged.all()
    fields = [solution.z, solution.residual, solution.trace, *(solution.factors or ())]
    assert not any(field.requires_grad for field in fields)
    assert not modes[0]
    assert torch.is_grad_enabled()
    with torch.inference_mode():
        assert solver(f, z0, max_iter=300).converged.all()


def test_newton_has_its_jacobian_in_inference_mode_too():
    f = Linear(rotation(1, 3), randn(3, 2))
    with torch.inference_mode():
        for z0 in (torch.zeros(3, 2, dtype=torch.float64), randn(3, 2)[:]):
            assert newton(f, z0).converged.all()


@with_options
def test_random_numbers_of_the_caller_are_neither_used_nor_moved(solver, options):
    f = Linear(rotation(2, 1.1), randn(3, 2))
    z0 = randn(3, 2, seed=1)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = solve(solver, f, z0, **options)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(solve(solver, f, z0, **options).z, first.z)
