"""Gradients of quadratic programs against differences, cvxpylayers, closed forms."""

import warnings
from functools import partial

import cvxpy
import pytest
import torch
from cvxpylayers.torch import CvxpyLayer
from layers import numbers
from programs import (
    FIELDS,
    MATRICES,
    NAMES,
    apply,
    boxed,
    double,
    fields,
    program,
    sample,
    solved,
    stacked,
    wanting,
)
from torch.autograd import grad, gradcheck, gradgradcheck

from implicit_layers import solve_qp

pytestmark = pytest.mark.filterwarnings("error")
agree = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
EYE = torch.eye(3).double()


def layer(*values):
    return fields(solved(*values))


def outcome(solution):
    """A number that depends on z and on all multipliers."""
    return sum(
        (torch.sin(x) * (1 + numbers(*x.shape[-1:], seed=i))).sum()
        for i, x in enumerate(fields(solution))
    )


def gradients(arguments, **options):
    """Those of the outcome for all arguments, as a dictionary."""
    arguments = wanting(arguments)
    found = grad(outcome(solved(**arguments, **options)), list(arguments.values()))
    return dict(zip(arguments, found, strict=True))


def strictly_complementary(solution, arguments):
    """Whether some constraints are active and some not, and none of them weakly."""
    slack = arguments["h"] - apply(arguments["G"], solution.z)
    dual = solution.inequality_duals
    assert (dual > 0.01).any() and (slack > 0.01).any()
    return ((dual > 0.01) ^ (slack > 0.01)).all()


# Differences


@pytest.mark.parametrize("shared", ["", "QpGhA", "QGA", "phb", "Gb"])
def test_finite_differences_accept_all_gradients(shared):
    arguments = wanting(program(2, 3, 3, 1, shared=shared, seed=1))
    assert strictly_complementary(solved(**arguments), arguments)
    assert gradcheck(layer, tuple(arguments.values()))


@pytest.mark.parametrize("shared", ["", "QpGhAb"])
def test_finite_differences_accept_all_second_derivatives(shared):
    arguments = wanting(program(2, 2, 2, 1, shared=shared, seed=2))
    assert strictly_complementary(solved(**arguments), arguments)
    assert gradgradcheck(layer, tuple(arguments.values()))


def test_gradients_of_a_singular_cost_agree_with_differences():
    arguments = program(1, 3, 2, 1, rank=2, seed=3)
    solution = solved(**arguments)
    assert strictly_complementary(solution, arguments)
    arguments = wanting(arguments)
    arguments["Q"] = arguments["Q"].detach()  # rank 2 is not left alone by differences

    rest = tuple(arguments[name] for name in NAMES[1:])
    assert gradcheck(partial(layer, arguments["Q"]), rest)


def test_directional_differences_at_a_larger_size():
    arguments = program(2, 30, 40, 6, shared="GA")
    found = gradients(arguments)
    step = 1e-6
    for name, x in arguments.items():
        direction = numbers(*x.shape, seed=50)
        up, down = (
            outcome(solved(**arguments | {name: x + sign * step * direction}))
            for sign in (1, -1)
        )
        expected = (found[name] * direction).sum()
        torch.testing.assert_close(
            (up - down) / (2 * step), expected, rtol=1e-5, atol=0
        )


# Another layer, closed forms and a dense system


def test_gradients_are_those_of_cvxpylayers():
    arguments = program(2, 4, 5, 1, seed=4)
    root = torch.linalg.cholesky(arguments.pop("Q")).mT.contiguous()
    values = [root.requires_grad_(), *wanting(arguments).values()]
    R, p, G, h, A, b = (cvxpy.Parameter(x.shape[1:]) for x in values)
    z = cvxpy.Variable(4)
    constraints = [G @ z <= h, A @ z == b]
    cost = cvxpy.sum_squares(R @ z) / 2 + p @ z
    peer = CvxpyLayer(
        cvxpy.Problem(cvxpy.Minimize(cost), constraints),
        parameters=[R, p, G, h, A, b],
        variables=[z],
        solver_args={"eps": 1e-12, "max_iters": 100_000},
    )
    v = numbers(2, 4, seed=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of diffcp
        (theirs,) = peer(*values)
        expected = grad(theirs, values, v)
    ours = solved(root.mT @ root, *values[1:]).z
    agree(ours, theirs, rtol=1e-7, atol=1e-7)
    agree(grad(ours, values, v), expected, rtol=1e-6, atol=1e-6)


def test_jacobian_of_the_nearest_point_of_the_simplex():
    x = numbers(5)
    eye, ones = torch.eye(5).double(), torch.ones(1, 5).double()

    def nearest(x):
        return solved(eye, -x, -eye, torch.zeros(5).double(), ones, double(1)).z

    support = (nearest(x) > 0).double()
    assert 1 < support.sum() < 5
    expected = torch.diag(support) - torch.outer(support, support) / support.sum()
    agree(torch.autograd.functional.jacobian(nearest, x), expected)


def test_gradient_without_constraints_is_that_of_a_linear_system():
    arguments = program(3, 5, 0, 0)
    Q, p = (arguments[name].requires_grad_() for name in "Qp")
    expected = -torch.linalg.solve((Q + Q.mT) / 2, p)
    v = numbers(3, 5)
    agree(grad(solved(Q, p).z, (Q, p), v), grad(expected, (Q, p), v))


def by_dense_system(active, Q, p, G, h, A, b):
    """z and the multipliers with these inequalities as equalities."""
    C, d = torch.cat([G[active], A]), torch.cat([h[active], b])
    corner = torch.zeros(len(C), len(C)).double()
    Q = (Q + Q.mT) / 2
    matrix = torch.cat([torch.cat([Q, C.mT], 1), torch.cat([C, corner], 1)])
    found = torch.linalg.solve(matrix, torch.cat([-p, d]))
    z, y = found.split([len(p), len(d)])
    dual = torch.zeros_like(h).masked_scatter(active, y[: active.sum()])
    return z, dual, y[active.sum() :]


def test_gradients_of_a_hundred_variables_are_those_of_the_dense_system():
    arguments = program(2, 100, 150, 20, shared="GA")
    solution = solved(**arguments)
    ours = gradients(arguments)
    values = wanting(arguments)
    total = 0
    for i in range(2):
        active = solution.inequality_duals[i] > 0
        found = by_dense_system(active, **sample(values, i))
        for name, x in zip(FIELDS, found, strict=True):
            agree(getattr(solution, name)[i], x.detach(), rtol=1e-9, atol=1e-9)
        total = total + sum(
            (torch.sin(x) * (1 + numbers(len(x), seed=k))).sum()
            for k, x in enumerate(found)
        )
    for name, expected in zip(NAMES, grad(total, list(values.values())), strict=True):
        assert (ours[name] - expected).norm() < 1e-7 * expected.norm()


def test_third_derivatives_of_closed_forms():
    Q, p = double([4]).requires_grad_(), double(3).requires_grad_()
    G, h = double([2]).requires_grad_(), double(1).requires_grad_()
    # z = -p / Q, and z = h / G with the multiplier -(p + Q h / G) / G
    free = solved(Q, p, G, h).z
    bound = solved(Q, -10 * p, G, h)
    for value, x, third in (
        (free, Q, 6 * 3 / 4**4),
        (bound.z, G, -6 / 2**4),
        (bound.inequality_duals, G, 6 * -30 / 2**4 + 24 * 4 / 2**5),
    ):
        for _ in range(3):
            (value,) = grad(value.sum(), x, create_graph=True)
        agree(value.sum(), torch.tensor(third).double())


# Shared arguments, single arguments, formats and graphs


@pytest.mark.parametrize("shared", [*NAMES, "QGA", "QpGhA"])
def test_gradient_of_a_shared_argument_is_the_sum_over_the_samples(shared):
    arguments = program(3, shared=shared, seed=6)
    found = gradients(arguments)
    singles = [gradients(sample(arguments, i)) for i in range(3)]
    for name in NAMES:
        parts = torch.stack([single[name] for single in singles])
        expected = parts.sum(0) if name in shared else parts
        assert expected.abs().max() > 0.01
        agree(found[name], expected)


def test_each_gradient_may_be_asked_for_alone():
    arguments = program(3, shared="QGb", seed=6)
    expected = gradients(arguments)
    for name in NAMES:
        x = arguments[name].clone().requires_grad_()
        loss = outcome(solved(**arguments | {name: x}))
        agree(grad(loss, x)[0], expected[name])


@pytest.mark.parametrize("field", FIELDS)
def test_each_output_may_be_used_alone(field):
    arguments = wanting(program(2, 3, 3, 1, seed=1))
    values = list(arguments.values())
    v = numbers(*getattr(solved(**arguments), field).shape)
    alone = grad(getattr(solved(**arguments), field), values, v, allow_unused=True)
    solution = solved(**arguments)
    rest = sum(0 * getattr(solution, name).sum() for name in FIELDS)
    agree(alone, grad((getattr(solution, field) * v).sum() + rest, values))


def test_gradient_of_the_cost_is_symmetric():
    found = gradients(program())["Q"]
    agree(found, found.mT)
    assert found.abs().max() > 0.01


def test_gradients_in_single_precision():
    arguments = {name: x.float() for name, x in program(3, shared="GA").items()}
    found = gradients(arguments)
    expected = gradients({name: x.double() for name, x in arguments.items()})
    for name, x in found.items():
        assert x.dtype == torch.float32 and x.shape == arguments[name].shape
        error = (x - expected[name]).abs().max()
        assert error < 1e-5 * expected[name].abs().max()


def test_gradients_without_a_batch_have_the_shapes_of_the_arguments():
    arguments = sample(program(2), 0)
    found = gradients(arguments)
    assert all(x.shape == arguments[name].shape for name, x in found.items())


def test_no_graph_where_none_is_wanted():
    arguments = program()
    expected = solved(**wanting(arguments)).z
    assert expected.requires_grad
    frozen = solved(**arguments).z
    assert not frozen.requires_grad
    agree(frozen, expected.detach(), rtol=0, atol=0)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            z = solved(**wanting(arguments)).z
        assert not z.requires_grad
        agree(z.clone(), frozen, rtol=0, atol=0)


def test_layer_is_used_twice_in_one_graph():
    arguments = program(2, 3, 4, 0, seed=1)
    Q, G, h = (arguments[name] for name in "QGh")

    def function(p):
        return solved(Q, torch.sin(3 * solved(Q, p, G, h).z) + p, G, h).z

    p = arguments["p"].clone().requires_grad_()
    assert gradcheck(function, p)


def test_backward_passes_may_be_repeated():
    arguments = wanting(program(seed=6))
    values = list(arguments.values())
    loss = outcome(solved(**arguments))
    first = grad(loss, values, retain_graph=True)
    gradients(program(seed=7))  # another program between them
    agree(grad(loss, values), first, rtol=0, atol=0)


def test_multipliers_are_the_sensitivities_of_the_optimal_value():
    arguments = wanting(program(seed=6))
    solution = solved(**arguments)
    z = solution.z
    value = (z * (apply(arguments["Q"], z) / 2 + arguments["p"])).sum()
    of_h, of_b, of_p = grad(value, [arguments[name] for name in "hbp"])
    agree(of_h, -solution.inequality_duals.detach())
    agree(of_b, -solution.equality_duals.detach())
    agree(of_p, z.detach())


# Degenerate programs


@pytest.mark.parametrize("direction", [-1.0, 1.0])
def test_weakly_active_constraint_has_a_one_sided_derivative(direction):
    # z = max(x, 0) at x = 0
    x = double(0).requires_grad_()
    one = torch.ones(1, 1).double()
    solution = solved(one, -x, -one, double(0))
    (of_z,) = grad(solution.z, x, retain_graph=True)
    (of_dual,) = grad(solution.inequality_duals, x)
    assert of_z.item() == pytest.approx(0, abs=1e-9) or of_z.item() == pytest.approx(1)
    agree(of_z - of_dual, double(1))  # z - dual = x on both sides
    moved = solved(one, double(-direction * 0.01), -one, double(0))
    assert moved.z.item() == pytest.approx(max(direction, 0) * 0.01)


def test_weakly_active_face_has_a_one_sided_derivative():
    # z is the minimiser without constraints, and lies on the first of them
    arguments = sample(program(2, 3, 3, 0, seed=8), 0)
    Q, p, G, h = (arguments[name] for name in "QpGh")
    z = solved(Q, p, G, h).z
    slope = apply(Q, z) + p
    p = (p - slope).requires_grad_()
    v = numbers(3, seed=9)
    (found,) = grad(solved(Q, p, G, h).z, p, v)
    active = (h - G @ z).abs() < 1e-9
    assert active.sum() >= 1
    candidates = []
    for kept in ([False] * 3, active.tolist()):
        rows = G[torch.tensor(kept)]
        inverse = torch.linalg.inv(Q)
        across = rows @ inverse
        candidates.append(
            -(inverse - across.T @ torch.linalg.pinv(across @ rows.T) @ across) @ v
        )
    assert min((found - each).abs().max() for each in candidates) < 1e-8
    assert (candidates[0] - candidates[1]).abs().max() > 0.01


def test_doubled_active_rows_leave_the_gradient_of_the_minimiser_alone():
    arguments = wanting(program(seed=6))
    v = numbers(3, 4, seed=9)
    expected = grad(solved(**arguments).z, [arguments[name] for name in "Qpb"], v)
    doubled = stacked(arguments, "Gh", lambda x: 2 * x)
    solution = solved(**doubled)
    assert (solution.inequality_duals > 0.01).any()
    found = grad(solution.z, [arguments[name] for name in "QpbGh"], v)
    agree(found[:3], expected, rtol=1e-7, atol=1e-7)
    # moving a row and its double at once is moving the one row
    expected = grad(solved(**arguments).z, [arguments[name] for name in "Gh"], v)
    agree(found[3:], expected, rtol=1e-6, atol=1e-6)


def test_dependent_equalities_leave_the_gradient_of_the_minimiser_alone():
    arguments = wanting(program(seed=6))
    v = numbers(3, 4, seed=9)
    values = list(arguments.values())
    expected = grad(solved(**arguments).z, values, v)
    doubled = stacked(arguments, "Ab", lambda x: x[:, :1] - x[:, 1:])
    agree(grad(solved(**doubled).z, values, v), expected, rtol=1e-6, atol=1e-6)


def test_degenerate_vertex_does_not_move_with_the_cost():
    # three constraints meet in a corner of the plane
    G, h = double([1, 0], [0, 1], [1, 1]), double(1, 1, 2)
    p = -double([3, 4], [5, 4]).requires_grad_()
    z = solved(torch.eye(2).double(), p, G, h).z
    agree(grad(z.sum(), p)[0], torch.zeros(2, 2).double(), rtol=0, atol=1e-8)


def test_linear_program_has_the_gradient_of_its_vertex():
    arguments = boxed(sample(program(1, 4, 3, 1, seed=3), 0))
    arguments["Q"] = torch.zeros(4, 4).double()
    values = wanting(arguments)
    solution = solved(**values)
    active = solution.inequality_duals > 0
    assert active.sum() == 3
    asked = [values[name] for name in NAMES[1:]]
    v = numbers(4)
    found = grad(solution.z, asked, v)
    expected = grad(by_dense_system(active, **values)[0], asked, v, allow_unused=True)
    for ours, theirs in zip(found, expected, strict=True):
        agree(ours, 0 * ours if theirs is None else theirs, rtol=1e-7, atol=1e-7)


def test_gradients_follow_the_units():
    arguments = sample(program(seed=7), 0)
    expected = gradients(arguments)
    scales = double(1e-4, 1, 1e4)
    many = {name: x.expand(3, *x.shape).clone() for name, x in arguments.items()}
    for name in "phb":
        many[name] = many[name] * scales[:, None]
    values = wanting(many)
    solution = solved(**values)
    total = 0
    for i, x in enumerate(fields(solution)):
        weights = 1 + numbers(*x.shape[-1:], seed=i)
        total = total + (torch.sin(x / scales[:, None]) * weights).sum()
    for name, x in zip(NAMES, grad(total, list(values.values())), strict=True):
        unit = 1 if name in MATRICES else scales[:, None]
        agree(x * unit, expected[name].expand_as(x), rtol=1e-7, atol=1e-7)


def test_gradient_at_a_loose_tolerance_is_that_of_the_returned_point():
    # no active set is right there yet, but the path has a gradient near the exact one
    arguments = sample(program(8, 10, 20, 2, seed=21), 5)
    p = arguments["p"].clone().requires_grad_()
    v = numbers(10)
    exact, loose = (
        grad(solved(**arguments | {"p": p}, tol=tol).z, p, v)[0] for tol in (1e-8, 1e-3)
    )
    assert (loose - exact).norm() < 0.3 * exact.norm()


# Samples that fail


def with_failures(shared="A"):
    """Five programs, and the same with an infeasible second and unbounded fourth."""
    good = program(5, 3, 4, 0, shared=shared, seed=4)
    bad = {name: x.clone() for name, x in good.items()}
    bad["G"][1, :2] = double([1, 0, 0], [-1, 0, 0])
    bad["h"][1, :2] = double(-1, -1)
    bad["Q"][3] = torch.diag(double(1, 1, 0))
    bad["p"][3, 2] = -1
    bad["G"][3, :, 2] = -bad["G"][3, :, 2].abs()
    return good, bad


def test_failed_samples_have_a_gradient_of_zero_and_the_others_their_own():
    good, bad = (wanting(each) for each in with_failures())
    keep = torch.tensor([0, 2, 4])
    expected = grad(outcome(solve_qp(**good)), list(good.values()), allow_unused=True)
    solution = solve_qp(**bad, on_failure="ignore")
    assert solution.converged.tolist() == [True, False, True, False, True]
    found = grad(outcome(solution), list(bad.values()), allow_unused=True)
    for name, ours, theirs in zip(NAMES, found, expected, strict=True):
        if name not in "Ab":
            assert not ours[[1, 3]].any()
            assert ours[keep].abs().max() > 0.01
            agree(ours[keep], theirs[keep], rtol=1e-8, atol=1e-8)


def test_failed_samples_add_nothing_to_the_gradient_of_shared_arguments():
    arguments = program(4, 3, 4, 1, shared="QGA", seed=4)
    rest = {
        name: x if name in MATRICES else x[[0, 1, 3]] for name, x in arguments.items()
    }
    G = torch.cat([arguments["G"], double([1, 0, 0], [-1, 0, 0])])
    h = torch.cat([arguments["h"], torch.full((4, 2), 50.0).double()], dim=1)
    rest |= {"G": G, "h": h[[0, 1, 3]]}
    h = h.clone()
    h[2, 4:] = -1
    arguments = wanting(arguments | {"G": G, "h": h})
    solution = solve_qp(**arguments, on_failure="ignore")
    assert solution.converged.tolist() == [True, True, False, True]
    values = [arguments[name] for name in "QGA"]
    found = grad(outcome(solution), values, create_graph=True)
    expected = gradients(rest)
    agree(found, tuple(expected[name] for name in "QGA"), rtol=1e-8, atol=1e-8)
    second = grad(sum(x.square().sum() for x in found), arguments["h"])[0]
    assert not second[2].any() and second[[0, 1, 3]].abs().max() > 0.01


def test_failed_sample_passes_no_gradient_however_large():
    x = double(2).requires_grad_()
    G, h = double([1], [-1]), -torch.ones(2).double()
    one = torch.ones(1, 1).double()
    solution = solve_qp(one, x, G, h, on_failure="ignore")
    v = torch.full_like(solution.z, torch.inf)
    assert grad(solution.z, x, v)[0].item() == 0
