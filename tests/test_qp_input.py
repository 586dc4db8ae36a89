"""What solve_qp refuses, what it reports of samples that fail, and in which words."""

import math
import re
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from layers import numbers
from programs import NAMES, boxed, double, fields, ignoring, program, sample, solved

from implicit_layers import solve_qp

pytestmark = pytest.mark.filterwarnings("error")
agree = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
EYE = torch.eye(2).double()
ONE = torch.ones(1, 1).double()
# z <= -1 and z >= 1
IMPOSSIBLE = {"G": double([1], [-1]), "h": double(-1, -1)}


# Refused


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(2, dtype=torch.long), "is torch.int64"),
        (torch.ones(2, dtype=torch.complex128), "is torch.complex128"),
        (np.ones(2), "is ndarray"),
        ([1.0, 2.0], "is list"),
        (3.0, "is float"),
    ],
    ids=["long", "complex", "ndarray", "list", "float"],
)
def test_what_is_no_tensor_of_floating_point_numbers_is_refused(name, value, message):
    with pytest.raises(TypeError, match=f"{name} {message}: give a floating-point"):
        solve_qp(**program() | {name: value})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(name, value):
    arguments = program()
    arguments[name].view(-1)[1] = value
    with pytest.raises(ValueError, match=f"^{name} holds a NaN or an infinity"):
        solve_qp(**arguments)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "p"])
def test_mixed_number_formats_are_refused(name):
    arguments = program()
    arguments[name] = arguments[name].float()
    message = f"{name} is torch.float32 on cpu, p is torch.float64 on cpu: give all in"
    with pytest.raises(TypeError, match=message):
        solve_qp(**arguments)


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("Q", (4, 3), r"\(n, n\)"),
        ("Q", (4,), r"\(n, n\)"),
        ("Q", (2, 3, 4, 4), r"\(n, n\)"),
        ("Q", (3, 5, 5), r"\(n, n\)"),
        ("p", (2, 3, 4), r"\(n,\)"),
        ("G", (3, 4, 4), r"\(m, n\)"),
        ("G", (5, 3), r"\(m, n\)"),
        ("G", (4,), r"\(m, n\)"),
        ("h", (1, 3, 5), r"\(m,\)"),
        ("A", (3, 1, 4), r"\(q, n\)"),
        ("A", (2, 5), r"\(q, n\)"),
        ("b", (1, 3, 2), r"\(q,\)"),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_refused(name, shape, wanted):
    value = torch.zeros(shape).double()
    with pytest.raises(ValueError) as caught:
        solve_qp(**program() | {name: value})
    assert caught.match(rf"^{name} has shape .*: give {wanted}, with a batch dimension")


@pytest.mark.parametrize("name", ["p", "h", "b"])
def test_a_number_is_no_vector(name):
    with pytest.raises(ValueError, match=r"has shape.*here with .* = 0"):
        solve_qp(**program() | {name: double(1)[0]})


def test_shape_message_names_the_sizes():
    arguments = program() | {"G": torch.zeros(3, 4).double()}
    message = r"G has shape \(3, 4\): give .*here with n = 4, m = 5, q = 2"
    with pytest.raises(ValueError, match=message):
        solve_qp(**arguments)


@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_batches_of_other_sizes_are_refused(name, batch):
    arguments = program()
    arguments[name] = arguments[name][:1].repeat(
        batch, *[1] * (arguments[name].ndim - 1)
    )
    batches = f"batch of {batch}, others of 3"
    if name != "p":
        batches = f"{name} has a {batches}"
    with pytest.raises(ValueError, match=batches):
        solve_qp(**arguments)


def test_empty_programs_are_refused():
    with pytest.raises(ValueError, match="the batch is empty"):
        solve_qp(**{name: x[:0] for name, x in program().items()})
    with pytest.raises(ValueError, match="p is empty"):
        solve_qp(torch.zeros(0, 0), torch.zeros(0))


@pytest.mark.parametrize("missing", ["G", "h", "A", "b"])
def test_one_side_of_constraints_alone_is_refused(missing):
    pair = "Gh" if missing in "Gh" else "Ab"
    message = f"{pair[0]} and {pair[1]} come together: give both"
    with pytest.raises(ValueError, match=message):
        solve_qp(**program() | {missing: None})


@pytest.mark.parametrize("shared", ["", "Q"])
@pytest.mark.parametrize("eigenvalue", [-1e-6, -1.0])
def test_cost_with_a_negative_eigenvalue_is_refused(shared, eigenvalue):
    arguments = program(shared=shared)
    Q = arguments["Q"] if shared else arguments["Q"][1]
    Q.copy_(torch.diag(double(1, 1, 1, eigenvalue)))
    with pytest.raises(ValueError, match=r"Q has a negative eigenvalue.*not convex"):
        solve_qp(**arguments)
    with pytest.raises(ValueError, match="Q has a negative eigenvalue"):
        solve_qp(1e-6 * arguments["Q"], 1e-6 * arguments["p"])


def test_eigenvalue_that_is_negative_by_rounding_is_not_refused():
    for dtype in (torch.float32, torch.float64):
        root = numbers(20, 3, dtype=dtype)
        Q = root @ root.T
        assert torch.linalg.eigvalsh(Q).min() < 0
        G, h = torch.eye(20, dtype=dtype), torch.ones(20, dtype=dtype)
        solved(Q, numbers(20, dtype=dtype), torch.cat([G, -G]), torch.cat([h, h]))


@pytest.mark.parametrize("tol", [0.0, -1e-8, 1.0, math.nan, math.inf])
def test_bad_tolerance_is_refused(tol):
    with pytest.raises(ValueError, match=f"tol must lie between 0 and 1, got {tol}"):
        solve_qp(**program(), tol=tol)


@pytest.mark.parametrize("max_iter", [0, -1, 2.0, "many"])
def test_bad_number_of_steps_is_refused(max_iter):
    message = f"max_iter must be a whole number from 1, got {max_iter!r}"
    with pytest.raises(ValueError, match=message):
        solve_qp(**program(), max_iter=max_iter)


def test_unknown_way_to_report_is_refused():
    message = "on_failure is 'shout': give 'warn', 'raise' or 'ignore'"
    with pytest.raises(ValueError, match=message):
        solve_qp(**program(), on_failure="shout")


# Samples that fail


INFEASIBLE = {
    "bounds": {"Q": ONE, "p": double(0), **IMPOSSIBLE},
    "bounds, linear": {"Q": 0 * ONE, "p": double(1), **IMPOSSIBLE},
    "almost": {"Q": ONE, "p": double(0), "G": IMPOSSIBLE["G"], "h": double(0, -1e-4)},
    "far": {"Q": ONE, "p": double(1), "G": IMPOSSIBLE["G"], "h": double(1e6, -2e6)},
    "equalities": {"Q": EYE, "p": EYE[0], "A": torch.ones(2, 2).double(), "b": EYE[0]},
    "row of zeros": {"Q": EYE, "p": EYE[0], "A": 0 * EYE, "b": EYE[0]},
    "zeros, bound": {"Q": EYE, "p": EYE[0], "G": 0 * EYE, "h": -EYE[0]},
    "both": {"Q": EYE, "p": EYE[0], "G": EYE, "h": -EYE[0], "A": EYE, "b": EYE[1]},
}
UNBOUNDED = {
    "line": {"Q": 0 * ONE, "p": double(1)},
    "ray": {"Q": 0 * ONE, "p": double(-1), "G": -ONE, "h": double(0)},
    "valley": {"Q": torch.diag(double(1, 0)), "p": double(0, 1)},
    "face": {"Q": 0 * EYE, "p": -EYE[0], "G": EYE[1:], "h": double(1)},
    "plane": {"Q": 0 * EYE, "p": EYE[0], "A": EYE[1:], "b": double(1)},
}
FAILING = INFEASIBLE | UNBOUNDED


@pytest.mark.parametrize("name", FAILING)
def test_programs_without_a_solution_are_flagged(name):
    with pytest.warns(RuntimeWarning, match="quadratic program did not converge for 1"):
        solution = solve_qp(**FAILING[name])
    assert not solution.converged
    assert solution.iterations <= 50
    assert all(x.isfinite().all() for x in vars(solution).values())
    assert (solution.inequality_duals >= 0).all()


@pytest.mark.parametrize("name", ["bounds", "almost", "both"])
def test_infeasible_programs_are_given_up_long_before_the_last_step(name):
    solution = ignoring(**INFEASIBLE[name], max_iter=500)
    assert 10 < solution.iterations < 80  # all steps count, the best was earlier


def test_more_steps_return_no_worse_iterate():
    residuals = []
    for max_iter in (1, 2, 5, 12):
        with pytest.warns(RuntimeWarning) as caught:
            solve_qp(**INFEASIBLE["far"], max_iter=max_iter)
        (found,) = re.findall(r"residual (\S+):", str(caught[0].message))
        residuals.append(float(found))
    assert residuals == sorted(residuals, reverse=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_solution_beyond_the_number_format_is_flagged(dtype):
    large = torch.finfo(dtype).max ** 0.6
    one = torch.ones(1, 1, dtype=dtype)
    p = torch.tensor([[large], [1.0]], dtype=dtype)
    solution = ignoring(one / large, p)
    assert solution.converged.tolist() == [False, True]
    assert solved(one, p).z.tolist() == (-p).tolist()


@pytest.mark.parametrize("seed", range(3))
def test_larger_infeasible_programs_are_flagged(seed):
    # no z has G z <= h if the rows sum to zero and the right sides to less
    arguments = program(4, 10, 20, 2, seed=seed)
    G, h = arguments["G"], arguments["h"]
    G[2, -1] = -G[2, :-1].sum(0)
    h[2, -1] = -h[2, :-1].sum() - 0.1
    solution = ignoring(**arguments)
    assert solution.converged.tolist() == [True, True, False, True]
    assert solution.iterations.max() <= 50


def test_warning_says_how_many_and_what_may_be_the_cause():
    arguments = mixed()
    message = (
        "the quadratic program did not converge for 2 of 5 samples, largest residual "
        ".*e.*: the program may be infeasible or unbounded"
    )
    with pytest.warns(RuntimeWarning, match=message) as caught:
        solve_qp(**arguments)
    assert len(caught) == 1 and caught[0].filename == __file__
    with pytest.raises(RuntimeError, match=message):
        solve_qp(**arguments, on_failure="raise")
    with warnings.catch_warnings(record=True) as none:
        warnings.simplefilter("always")
        solve_qp(**arguments, on_failure="ignore")
    assert not none


def mixed(shared=()):
    """Five programs of which the second is infeasible and the last one unbounded."""
    arguments = program(5, 3, 6, 1, shared=shared, seed=4)
    arguments["h"][1, :2] = -1
    arguments["G"][1, :2] = double([1, 0, 0], [-1, 0, 0])
    arguments["Q"][4] = 0
    arguments["A"][4] = double([1, 0, 0])
    arguments["p"][4] = double(0, -1, 0)
    arguments["G"][4, :, 1] = -1
    return arguments


def test_failing_samples_leave_the_others_alone():
    arguments = mixed()
    solution = ignoring(**arguments)
    assert solution.converged.tolist() == [True, False, True, True, False]
    for i in (0, 2, 3):
        alone = solved(**sample(arguments, i))
        agree(fields(sample(solution, i)), fields(alone))
    others = {name: x[[0, 2, 3]] for name, x in arguments.items()}
    alone = solved(**others)
    assert torch.equal(alone.iterations, solution.iterations[[0, 2, 3]])


def test_infeasible_sample_changes_no_other_beyond_rounding():
    good = program(4, 6, 10, 2, seed=5)
    bad = {name: x.clone() for name, x in good.items()}
    bad["G"][2, 1] = -bad["G"][2, 0]
    bad["h"][2, 1] = -bad["h"][2, 0] - 1
    expected, solution = solved(**good), ignoring(**bad)
    assert solution.converged.tolist() == [True, True, False, True]
    rest = [0, 1, 3]
    ours, theirs = ([x[rest] for x in fields(each)] for each in (solution, expected))
    agree(ours, theirs, rtol=0, atol=1e-13)
    assert torch.equal(solution.iterations[rest], expected.iterations[rest])


def test_result_does_not_depend_on_the_neighbours():
    arguments = program(6, 8, 12, 2, shared="Gb", seed=5)
    for name in "phA":
        arguments[name][1::2] *= 3
    arguments["h"] += 20
    arguments["h"][::2, 3] -= 10
    solution = solved(**arguments)
    for i in range(6):
        one = solved(**sample(arguments, i))
        assert one.iterations == solution.iterations[i]
        agree(fields(sample(solution, i)), fields(one))


def test_singular_neighbour_changes_nothing():
    arguments = boxed(program(2, 4, 5, 1, seed=6))
    expected = solved(**sample(arguments, 0))
    arguments["Q"][1] = 0
    solution = sample(solved(**arguments), 0)
    agree(fields(solution), fields(expected))


def test_hard_neighbour_takes_no_step_of_an_easy_one():
    # the first is done at once, the second walks past tight bounds far away
    arguments = boxed(program(2, 4, 5, 1, seed=6), 1e6)
    arguments["h"][0] = 50
    alone = [int(solved(**sample(arguments, i)).iterations) for i in range(2)]
    assert alone[0] != alone[1]
    assert solved(**arguments).iterations.tolist() == alone


def test_steps_stop_at_their_limit():
    arguments = sample(program(1, 10, 20, 2), 0)
    message = "1 of 1"
    with pytest.warns(RuntimeWarning, match=message):
        solution = solve_qp(**arguments, max_iter=1)
    assert not solution.converged and solution.iterations == 1
