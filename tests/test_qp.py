"""The minimisers of quadratic programs against cvxpy, SciPy and closed forms."""

import itertools
from functools import partial

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import numbers
from programs import (
    FIELDS,
    NAMES,
    apply,
    boxed,
    double,
    fields,
    ignoring,
    program,
    referee,
    sample,
    solved,
    stacked,
    worst,
)

pytestmark = pytest.mark.filterwarnings("error")
agree = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-8)
EYE = torch.eye(3).double()
SCALES = double(1e-6, 1e-3, 1, 1e3, 1e6)


def same(actual, expected, **tolerance):
    """Whether two solutions agree in z and all multipliers."""
    agree(fields(actual), fields(expected), **tolerance)


def objective(z, arguments):
    return (z * (apply(arguments["Q"], z) / 2 + arguments["p"])).sum(-1)


# Referees


@pytest.mark.parametrize(
    ("batch", "n", "m", "q"),
    [
        (5, 1, 1, 0),
        (5, 1, 3, 1),
        (3, 4, 5, 2),
        (3, 5, 0, 2),
        (3, 5, 0, 0),
        (3, 5, 12, 0),
        (2, 30, 60, 10),
        (2, 10, 200, 3),
        (1, 100, 200, 20),
        (1, 100, 10, 60),
        (2, 3, 2, 3),
    ],
)
def test_minimisers_and_multipliers_are_those_of_cvxpy(batch, n, m, q):
    arguments = program(batch, n, m, q)
    solution = solved(**arguments)
    for i in range(batch):
        expected = referee(**sample(arguments, i))
        for name, theirs in zip(FIELDS, expected, strict=True):
            ours = getattr(solution, name)[i]
            np.testing.assert_allclose(ours, theirs, rtol=1e-7, atol=1e-7)
    assert worst(solution, arguments) < 1e-12
    assert solution.gap.abs().max() < 1e-12


@pytest.mark.parametrize("count", range(6))
def test_arguments_may_be_shared_in_every_combination(count):
    for shared in itertools.combinations(NAMES, count):
        arguments = program(shared=shared, seed=count)
        solution = solved(**arguments)
        assert solution.z.shape == (3, 4)
        assert solution.inequality_duals.shape == (3, 5)
        assert solution.equality_duals.shape == (3, 2)
        assert worst(solution, arguments) < 1e-12
        expand = {name: arguments[name].expand(3, *[-1] * 2) for name in "QGA"}
        for name in shared:
            x = arguments[name]
            expand[name] = x.expand(3, *x.shape)
        same(solved(**arguments | expand), solution)


def test_linear_programs_are_solved_like_by_linprog():
    arguments = boxed(program(4, 6, 8, 2, seed=3))
    arguments["Q"] = torch.zeros(6, 6).double()
    solution = solved(**arguments)
    assert worst(solution, arguments) < 1e-10
    for i in range(4):
        each = {name: x.numpy() for name, x in sample(arguments, i).items()}
        expected = scipy.optimize.linprog(
            *(each[name] for name in ("p", "G", "h", "A", "b")), bounds=(None, None)
        )
        close = partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-8)
        close(solution.z[i], expected.x)
        close(solution.inequality_duals[i], -expected.ineqlin.marginals)
        close(solution.equality_duals[i], -expected.eqlin.marginals)


def test_minimiser_is_that_of_slsqp():
    arguments = program(1, 4, 6, 1, seed=4)
    Q, p, G, h, A, b = (x.numpy() for x in sample(arguments, 0).values())
    constraints = [
        {"type": "ineq", "fun": lambda z: h - G @ z},
        {"type": "eq", "fun": lambda z: A @ z - b},
    ]
    expected = scipy.optimize.minimize(
        lambda z: z @ Q @ z / 2 + p @ z,
        np.zeros(4),
        jac=lambda z: Q @ z + p,
        method="SLSQP",
        constraints=constraints,
        options={"ftol": 1e-14},
    )
    np.testing.assert_allclose(solved(**arguments).z[0], expected.x, atol=1e-6)


# Closed forms


def test_without_constraints_the_minimiser_solves_one_linear_system():
    arguments = program(3, 5, 0, 0)
    solution = solved(arguments["Q"], arguments["p"])
    agree(solution.z, torch.linalg.solve(arguments["Q"], -arguments["p"]), rtol=1e-12)
    assert solution.inequality_duals.shape == solution.equality_duals.shape == (3, 0)
    assert solution.iterations.tolist() == [0, 0, 0]
    same(solved(**arguments), solution, rtol=0, atol=0)


def test_with_equalities_alone_the_minimiser_solves_the_kkt_system():
    arguments = program(3, 5, 0, 2)
    Q, p, A, b = (arguments[name] for name in "QpAb")
    solution = solved(Q, p, A=A, b=b)
    corner = torch.zeros(3, 2, 2).double()
    matrix = torch.cat([torch.cat([Q, A.mT], 2), torch.cat([A, corner], 2)], 1)
    expected = torch.linalg.solve(matrix, torch.cat([-p, b], 1))
    agree(torch.cat([solution.z, solution.equality_duals], 1), expected, rtol=1e-11)
    assert solution.iterations.tolist() == [0, 0, 0]


def test_nearest_point_of_a_box_is_the_clamped_one():
    x = 3 * numbers(20, 3)
    G, h = torch.cat([EYE, -EYE]), double(1, 1, 1, 1, 1, 1)
    solution = solved(EYE, -x, G, h)
    agree(solution.z, x.clamp(-1, 1), rtol=0, atol=1e-13)
    excess = torch.cat([x - 1, -1 - x], dim=1).clamp(min=0)
    agree(solution.inequality_duals, excess, rtol=0, atol=1e-13)
    assert torch.equal(solution.inequality_duals == 0, excess == 0)


def test_nearest_point_of_the_simplex_is_the_one_by_sorting():
    x = numbers(20, 7)
    eye, ones = torch.eye(7).double(), torch.ones(1, 7).double()
    z = solved(eye, -x, -eye, torch.zeros(7).double(), ones, double(1)).z
    ordered = x.sort(descending=True).values
    shift = (ordered.cumsum(1) - 1) / torch.arange(1, 8)
    count = (ordered > shift).sum(1, keepdim=True)
    agree(z, (x - shift.gather(1, count - 1)).clamp(min=0), rtol=0, atol=1e-13)


def test_only_the_symmetric_part_of_the_cost_counts():
    arguments = program()
    skew = numbers(4, 4, seed=9)
    expected = solved(**arguments)
    arguments["Q"] = arguments["Q"] + skew - skew.T
    same(solved(**arguments), expected, rtol=1e-11)


def test_without_a_batch_there_is_none_in_the_result():
    arguments = program(2)
    one = solved(**sample(arguments, 0))
    batch = sample(solved(**arguments), 0)
    same(one, batch, rtol=1e-11)
    assert one.z.shape == (4,) and one.inequality_duals.shape == (5,)
    assert one.equality_duals.shape == (2,)
    for name in ("converged", "iterations", "gap"):
        assert getattr(one, name).shape == ()
    assert one.iterations == batch.iterations > 0
    assert one.converged.dtype == torch.bool
    arguments = {name: x[:1] for name, x in arguments.items()}
    assert solved(**arguments).z.shape == (1, 4)


def test_single_precision_is_computed_in_double():
    arguments = {name: x.float() for name, x in program(shared="GA").items()}
    solution = solved(**arguments)
    expected = solved(**{name: x.double() for name, x in arguments.items()})
    for name in [*FIELDS, "gap"]:
        actual = getattr(solution, name)
        assert actual.dtype == (torch.float64 if name == "gap" else torch.float32)
        agree(actual.double(), getattr(expected, name), rtol=1e-7, atol=1e-7)
    assert torch.equal(solution.iterations, expected.iterations)


def test_arguments_are_left_as_they_were():
    arguments = program(shared="Qh")
    copies = {name: x.clone() for name, x in arguments.items()}
    solved(**arguments)
    assert all(torch.equal(x, copies[name]) for name, x in arguments.items())


# Degenerate programs


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_singular_costs_have_the_objective_of_cvxpy(rank):
    arguments = boxed(program(4, 5, 4, 1, rank=rank, seed=5))
    solution = solved(**arguments)
    assert worst(solution, arguments) < 1e-10
    for i in range(4):
        each = sample(arguments, i)
        expected = objective(torch.from_numpy(referee(**each)[0]), each)
        agree(objective(solution.z[i], each), expected)


def test_singular_cost_without_inequalities():
    # the equalities fix what the cost leaves open
    Q, A = torch.diag(double(1, 2, 0)), double([1, 1, 1])
    solution = solved(Q, double(0, 0, 0), A=A, b=double(3))
    agree(solution.z, double(0, 0, 3))
    agree(solution.equality_duals, double(0))


def test_singular_cost_with_a_slope_far_smaller_than_the_right_side():
    root = double([2, -2, 1], [1, -1, 1])
    Q, p, A = root.T @ root, double(1, -1, 0), double([1, -1, -1])
    arguments = {"Q": Q, "p": p, "A": A, "b": double(-1e4)}
    solution = solved(**arguments)
    assert (apply(A, solution.z) + 1e4).abs() < 1e-6
    assert (apply(Q, solution.z) + p + solution.equality_duals * A[0]).norm() < 1e-6


def test_nothing_to_minimise_is_minimised_by_any_feasible_point():
    zero = torch.zeros(3, 3).double()
    solution = solved(zero, zero[0])
    assert solution.z.tolist() == [0, 0, 0]
    arguments = program(2, 3, 4, 1)
    arguments |= {"Q": zero, "p": zero[0]}
    solution = solved(**arguments)
    assert worst(solution, arguments) < 1e-8


def test_dependent_equalities_do_no_harm():
    arguments = program(seed=6)
    expected = solved(**arguments)
    arguments = stacked(arguments, "Ab", lambda x: x[:, :1] - 2 * x[:, 1:])
    solution = solved(**arguments)
    agree(solution.z, expected.z)
    assert worst(solution, arguments) < 1e-8


def test_doubled_inequalities_share_one_multiplier():
    arguments = program(seed=6)
    expected = solved(**arguments)
    arguments = stacked(arguments, "Gh", lambda x: 3 * x)
    solution = solved(**arguments)
    agree(solution.z, expected.z)
    first, second = solution.inequality_duals.chunk(2, dim=1)
    agree(first + 3 * second, expected.inequality_duals)


def test_feasible_set_without_interior():
    # G z <= h and -G z <= -h are equalities in disguise
    arguments = program(seed=6)
    G, h = arguments["G"][:, :1], arguments["h"][:, :1]
    expected = solved(
        **arguments
        | {
            "A": torch.cat([arguments["A"], G], dim=1),
            "b": torch.cat([arguments["b"], h], dim=1),
        }
    )
    arguments = stacked(arguments, "Gh", lambda x: -x[:, :1])
    solution = solved(**arguments)
    agree(solution.z, expected.z)
    assert worst(solution, arguments) < 1e-8


def test_feasible_set_of_one_point():
    x = numbers(4, 3)
    G, h = torch.cat([EYE, -EYE]), torch.cat([x, -x], dim=1)
    agree(solved(EYE, 5 * numbers(4, 3, seed=1), G, h).z, x)


def test_weakly_active_constraints():
    # the minimiser without constraints lies on them
    z, G = numbers(4, 3), numbers(3, 3, seed=1)
    solution = solved(EYE, -z, G, z @ G.T)
    agree(solution.z, z)
    agree(solution.inequality_duals, torch.zeros(4, 3).double())


def test_rows_of_zeros_say_nothing():
    arguments = program(seed=6)
    expected = solved(**arguments)
    for matrix, side, bound in (("G", "h", [0, 1]), ("A", "b", [0, 0])):
        zeros = torch.zeros(3, 2, 4).double()
        arguments[matrix] = torch.cat([arguments[matrix], zeros], dim=1)
        bound = double(*bound).expand(3, 2)
        arguments[side] = torch.cat([arguments[side], bound], dim=1)
    solution = solved(**arguments)
    agree(solution.z, expected.z)
    agree(solution.inequality_duals[:, :5], expected.inequality_duals)


def test_degenerate_vertex_of_a_linear_program():
    # more constraints than needed meet in the solution (1, 1)
    G = double([1, 0], [0, 1], [1, 1], [1, 2], [-1, 0], [0, -1])
    h = double(1, 1, 2, 3, 0, 0)
    zero = torch.zeros(2, 2).double()
    p = -double([1, 1], [2, 1], [1, 3], [1, 2])
    solution = solved(zero, p, G, h)
    agree(solution.z, torch.ones(4, 2).double())
    agree(solution.inequality_duals @ G, -p)


@pytest.mark.parametrize("bound", [1e3, 1e6, 1e9])
def test_far_bounds_change_nothing(bound):
    arguments = program(seed=6)
    expected = solved(**arguments)
    solution = solved(**boxed(arguments, bound))
    agree(solution.z, expected.z)
    agree(solution.inequality_duals[:, :5], expected.inequality_duals)


def test_far_bounds_do_not_spoil_the_least_norm():
    # with p = 0 the scale of z is that of what z = 0 violates
    arguments = program(seed=6)
    arguments["p"] = 0 * arguments["p"]
    expected = solved(**arguments)
    agree(solved(**boxed(arguments, 1e7)).z, expected.z)


# Scales


def scaled(arguments, **factors):
    """A batch of one program, times a factor for each sample."""
    return {
        name: x * factors[name].view(-1, *[1] * x.ndim) if name in factors else x
        for name, x in arguments.items()
    }


def test_scaled_cost_has_the_same_minimiser_and_scaled_multipliers():
    arguments = sample(program(seed=7), 0)
    expected = solved(**arguments)
    solution = solved(**scaled(arguments, Q=SCALES, p=SCALES))
    agree(solution.z, expected.z.expand(5, -1))
    for name in FIELDS[1:]:
        actual = getattr(solution, name) / SCALES[:, None]
        agree(actual, getattr(expected, name).expand(5, -1))


def test_other_units_of_the_variables_scale_the_minimiser():
    arguments = sample(program(seed=7), 0)
    expected = solved(**arguments)
    solution = solved(**scaled(arguments, p=SCALES, h=SCALES, b=SCALES))
    for name in FIELDS:
        actual = getattr(solution, name) / SCALES[:, None]
        agree(actual, getattr(expected, name).expand(5, -1))
    loose = ignoring(**scaled(arguments, p=SCALES, h=SCALES, b=SCALES), max_iter=1)
    ratios = loose.gap / SCALES**2
    agree(ratios, ratios[2].expand(5))


def test_scaled_rows_scale_their_multipliers_alone():
    arguments = program(1, 6, 5, 5, seed=7)
    expected = solved(**arguments)
    arguments["G"] = arguments["G"] * SCALES[:, None]
    arguments["h"] = arguments["h"] * SCALES
    arguments["A"] = arguments["A"] * SCALES[:, None]
    arguments["b"] = arguments["b"] * SCALES
    solution = solved(**arguments)
    agree(solution.z, expected.z)
    for name in FIELDS[1:]:
        agree(getattr(solution, name) * SCALES, getattr(expected, name))
    assert torch.equal(solution.iterations, expected.iterations)


def test_linear_program_in_other_units():
    arguments = sample(boxed(program(1, 4, 3, 1, seed=3)), 0)
    arguments["Q"] = torch.zeros(4, 4).double()
    expected = solved(**arguments)
    for factors in ({"p": SCALES}, {"h": SCALES, "b": SCALES}):
        solution = solved(**scaled(arguments, **factors))
        unit = SCALES[:, None] if "h" in factors else 1
        agree(solution.z / unit, expected.z.expand(5, -1))
        unit = SCALES[:, None] if "p" in factors else 1
        duals = solution.inequality_duals / unit
        agree(duals, expected.inequality_duals.expand(5, -1))
        if "p" in factors:
            assert (solution.iterations == expected.iterations).all()


def test_least_norm_in_other_units():
    arguments = sample(program(seed=7), 0)
    arguments["p"] = 0 * arguments["p"]
    expected = solved(**arguments)
    solution = solved(**scaled(arguments, h=SCALES, b=SCALES))
    assert (solution.iterations == expected.iterations).all()
    for name in FIELDS:
        actual = getattr(solution, name) / SCALES[:, None]
        agree(actual, getattr(expected, name).expand(5, -1))


# Properties


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 6), m=st.integers(1, 12))
def test_order_of_the_constraints_makes_no_difference(seed, n, m):
    arguments = program(2, n, m, n // 2, seed=seed)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    expected = solved(**arguments)
    for name in "Gh":
        arguments[name] = arguments[name][:, order]
    solution = solved(**arguments)
    agree(solution.z, expected.z)
    agree(solution.inequality_duals, expected.inequality_duals[:, order])


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 6), m=st.integers(0, 12))
def test_affine_change_of_variables_changes_the_minimiser_alone(seed, n, m):
    arguments = program(2, n, m, n // 2, seed=seed)
    expected = solved(**arguments)
    Q, p, G, h, A, b = arguments.values()
    T, t = torch.eye(n).double() + 0.3 * numbers(n, n, seed=seed), numbers(n, seed=1)
    T = T if torch.linalg.cond(T) < 50 else torch.eye(n).double()
    # z = T u + t
    other = solved(
        T.T @ Q @ T,
        apply(T.T, apply(Q, t) + p),
        G @ T,
        h - apply(G, t),
        A @ T,
        b - apply(A, t),
    )
    agree(apply(T, other.z) + t, expected.z)
    agree(other.inequality_duals, expected.inequality_duals)
    agree(other.equality_duals, expected.equality_duals)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 6), m=st.integers(0, 12))
def test_solutions_meet_the_kkt_conditions(seed, n, m):
    arguments = program(2, n, m, n // 2, seed=seed)
    solution = solved(**arguments)
    assert worst(solution, arguments) < 1e-10
    assert (solution.inequality_duals >= 0).all()


# Steps


def test_steps_hardly_grow_with_the_size():
    for n in (5, 20, 60):
        steps = solved(**program(8, n, 2 * n, n // 5)).iterations
        assert steps.dtype == torch.int64
        assert steps.min() >= 3 and steps.max() <= 17
        assert steps.double().mean() < 13


def test_tighter_tolerance_takes_hardly_more_steps():
    # the active set is mostly found before, and its solution is exact
    arguments = program(8, 20, 40, 4)
    loose, tight = (solved(**arguments, tol=tol) for tol in (1e-5, 1e-11))
    assert (loose.iterations == tight.iterations).sum() >= 6


def test_more_steps_than_allowed_are_not_taken():
    arguments = program(8, 20, 40, 4)
    solution = ignoring(**arguments, max_iter=3)
    assert solution.iterations.max() == 3
    assert not solution.converged.all()
    enough = int(solved(**arguments).iterations.max())
    solved(**arguments, max_iter=enough)


def test_walk_goes_on_from_inside_where_the_first_guess_was_wrong():
    # forces of a trolley within bounds: nearly singular, with many small multipliers
    steps, dt = 12, 0.3
    step, push = double([1, dt], [0, 1]), double([dt**2 / 2], [dt])
    powers = [torch.linalg.matrix_power(step, k) for k in range(steps + 1)]
    moves = torch.cat(
        [
            torch.cat(
                [powers[max(t - k, 0)] @ push * (k <= t) for k in range(steps)], 1
            )
            for t in range(steps)
        ]
    )
    weight = double(1, 1e-8).repeat(steps)[:, None]
    eye = torch.eye(steps).double()
    Q = moves.T @ (weight * moves) + 1e-8 * eye
    free = 0.5 * numbers(64, 2) @ torch.cat(powers[1:]).T
    G, h = torch.cat([eye, -eye]), torch.ones(2 * steps).double()
    solution = solved(Q, free @ (weight * moves), G, h)
    # steps from a corner would lead nowhere, and be waited for in vain
    assert 8 < solution.iterations.max() < 20


def test_gap_is_primal_minus_dual_objective():
    arguments = program(6, 20, 40, 4, shared="QG", seed=1)
    solution = ignoring(**arguments, max_iter=2)
    z = solution.z
    dual = -(z * apply(arguments["Q"], z)).sum(1) / 2
    dual -= (solution.inequality_duals * arguments["h"]).sum(1)
    dual -= (solution.equality_duals * arguments["b"]).sum(1)
    agree(solution.gap, objective(z, arguments) - dual)
    assert (solution.gap.abs() > 1e-3).any()


def test_gap_is_closed_at_every_solution_however_badly_scaled():
    arguments = boxed(program(40, 4, 4, 1, rank=2, seed=8))
    scales = 10 ** (2 * numbers(40, 4))
    arguments["Q"] = scales[:, :, None] * arguments["Q"] * scales[:, None]
    arguments["p"] = scales * arguments["p"]
    for name in "GA":
        arguments[name] = arguments[name] * scales[:, None]
    solution = ignoring(**arguments)
    z = solution.z
    terms = torch.maximum(
        (z * apply(arguments["Q"], z)).sum(1).abs(), (z * arguments["p"]).sum(1).abs()
    )
    closed = solution.gap.abs() <= 2e-8 * terms.clamp(min=1)
    assert closed[solution.converged].all()
    assert solution.converged.double().mean() > 0.5


@pytest.mark.parametrize("tol", [1e-3, 1e-6, 1e-11])
def test_tolerance_holds_at_every_solution(tol):
    arguments = program(8, 20, 40, 4)
    for name in "phb":
        arguments[name] = arguments[name] / 3
    solution = solved(**arguments, tol=tol)
    assert worst(solution, arguments) < 10 * tol
