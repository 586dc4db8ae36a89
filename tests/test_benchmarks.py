"""The benchmarks without the peers: the gradients, the rule of the game, the tables."""

import json
import re
import time
from pathlib import Path
from typing import Any

import equilibrium
import measuring
import ode
import pytest
import qp
import report
import torch
from cases import (
    DOPRI5,
    ODES,
    STEPS,
    Case,
    convolutional,
    differential_equation,
    gradient_error,
    reference,
    tanh_case,
)
from measuring import (
    LADDER,
    LIMIT,
    choose_tolerance,
    count,
    in_turns,
    kept_bytes,
    settle,
)
from methods import (
    DEFAULT,
    METHODS,
    Solve,
    bare_products,
    newton_hook,
    ours,
    unrolled,
)
from torch import Tensor

from implicit_layers import anderson, implicit_fixed_point, odeint
from implicit_layers.measure import saved_bytes

ROOT = Path(__file__).parents[1]
LOCK, PEERS = ROOT / "requirements.txt", ROOT / "benchmarks" / "requirements.txt"
PAGE = ROOT / "chapters" / "how_fast.md"


def small_case(gain: float = 0.5) -> Case:
    torch.manual_seed(0)
    weight = gain * torch.randn(8, 8) / 8**0.5
    x, v = torch.randn(2, 4, 8)
    return tanh_case("small", "small", weight, x, v, max_iter=300)


def small_ode(kind: str = DOPRI5) -> Case:
    return differential_equation(kind, width=8, batch=4)


def without_adjoint(case: Case, f: Any, tolerance: float) -> Tensor:
    """Leaves out the adjoint system: fast, and wrong."""
    z0 = torch.zeros_like(case.x)
    return implicit_fixed_point(f, z0, gradient="jfb", rtol=tolerance)[0]


def measured(*methods: tuple[str, Solve]) -> list[dict[str, Any]]:
    named = [("ours", name, ("tanh",), solve) for name, solve in methods]
    case = small_case()
    return measuring.measure(case, reference(case), named, [], rounds=1)


# --- gradients ---


def test_reference_is_the_implicit_function_theorem() -> None:
    case = small_case()
    weight, x = (leaf.detach().double() for leaf in case.leaves)
    z = torch.zeros_like(x)
    for _ in range(200):
        z = torch.tanh(z @ weight.T + x)
    slope = 1 - z**2
    matrix = torch.eye(8, dtype=z.dtype) - slope[:, :, None] * weight
    u = slope * torch.linalg.solve(matrix.mT, case.v.double())
    exact = reference(case)
    for gradient, expected in zip(exact.gradients, (u.T @ z, u), strict=True):
        assert torch.allclose(gradient, expected, rtol=0, atol=1e-11)
    assert exact.size == pytest.approx(z.norm().item(), rel=1e-12)


def test_reference_refuses_what_plain_iteration_does_not_solve() -> None:
    torch.manual_seed(0)
    x, v = torch.randn(2, 3, 4)
    case = tanh_case("circle", "circle", -3 * torch.eye(4), 0.1 * x, v, max_iter=50)
    with pytest.raises(ValueError, match="circle: after 250 steps"):
        reference(case)


def test_the_reference_of_a_differential_equation_is_exact() -> None:
    case = small_ode().to(torch.float64)
    ys, _ = odeint(case.f, case.x, ode.interval(case), rtol=1e-11, atol=1e-12)
    exact = torch.autograd.grad((ys[-1] * case.v).sum(), case.leaves)
    assert gradient_error(reference(small_ode()).gradients, exact) < 1e-9


def test_the_reference_refuses_steps_that_are_too_long() -> None:
    case = small_ode()
    with torch.no_grad():
        case.parameters[0].mul_(100)
    with pytest.raises(ValueError, match="dopri5: 50 and 100 steps of the reference"):
        reference(case)


@pytest.mark.parametrize("kind", ODES)
@pytest.mark.parametrize("method", ode.METHODS, ids=lambda method: method[1])
def test_every_method_can_be_exact_on_a_differential_equation(
    kind: str, method: Any
) -> None:
    case = small_ode(kind)
    gradients = measuring.gradient(case, method[3], tolerance=1e-6)
    assert gradient_error(gradients, reference(case).gradients) < LIMIT / 10


TANH = [(f"{group}, {name}", solve) for group, name, _, solve in METHODS]
CONV = [(f"{group}, {name}", s) for group, name, kinds, s in METHODS if "conv" in kinds]


@pytest.mark.parametrize("solve", [s for _, s in TANH], ids=[name for name, _ in TANH])
def test_every_method_can_be_exact_on_the_tanh_map(solve: Solve) -> None:
    case = small_case()
    gradients = measuring.gradient(case, solve, tolerance=1e-6)
    assert gradient_error(gradients, reference(case).gradients) < LIMIT / 10


@pytest.mark.parametrize("solve", [s for _, s in CONV], ids=[name for name, _ in CONV])
def test_every_method_can_be_exact_on_images(solve: Solve) -> None:
    case = convolutional(batch=2)
    gradients = measuring.gradient(case, solve, tolerance=1e-6)
    assert gradient_error(gradients, reference(case).gradients) < LIMIT


def one_step_gradients(case: Case) -> tuple[Tensor, ...]:
    """Through one evaluation at the solution, in float64."""
    case = case.to(torch.float64)
    z = torch.zeros_like(case.x)
    with torch.no_grad():
        for _ in range(200):
            z = case.f(z)
    return torch.autograd.grad((case.f(z) * case.v).sum(), case.leaves)


LAYERS = pytest.mark.parametrize(
    "layer", equilibrium.LAYERS, ids=lambda layer: ", ".join(layer[:2])
)


@LAYERS
def test_both_gradients_of_an_equilibrium_are_right(layer: equilibrium.Layer) -> None:
    case, (_, _, exact, cheap) = equilibrium.problem(batch=2), layer
    gradients = measuring.gradient(case, exact, equilibrium.TOLERANCE)
    assert gradient_error(gradients, reference(case).gradients) < LIMIT
    gradients = measuring.gradient(case, cheap, equilibrium.TOLERANCE)
    assert gradient_error(gradients, one_step_gradients(case)) < LIMIT / 2


@LAYERS
def test_every_sample_of_an_equilibrium_meets_the_rule(
    layer: equilibrium.Layer,
) -> None:
    case = equilibrium.problem(batch=4)
    with torch.no_grad():
        case.x[0].mul_(100)  # converges at once, and may not end the others
    z = equilibrium.forward(case, layer[2])
    fz = case.f(z)
    change, size = ((t.flatten(1).norm(dim=1)) for t in (fz - z, fz))
    assert not z.requires_grad
    assert bool((change <= 1.01 * equilibrium.TOLERANCE * size).all())


def test_a_wrong_gradient_of_an_equilibrium_is_marked() -> None:
    wrong = ours(anderson, gradient="jfb")
    layers = [equilibrium.LAYERS[0], ("ours", "wrong", wrong, wrong)]
    rows = equilibrium.measured(equilibrium.problem(batch=2), layers, rounds=1)
    text = report.markdown({"limit": LIMIT, "equilibrium": rows})
    marked = [line for line in text.splitlines() if "†" in line]
    assert len(marked) == 1 and "ours: wrong" in marked[0]
    assert "ours: wrong" in text.split("<!-- end of passes -->")[0]


def small_programs(shared: bool = False) -> qp.Programs:
    return qp.programs(n=4, m=5, q=1, batch=3, shared=shared)


SHARED = pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])


@SHARED
@pytest.mark.parametrize("index", range(6), ids=qp.ARGUMENTS)
def test_the_reference_of_quadratic_programs_is_a_difference_quotient(
    shared: bool, index: int
) -> None:
    given, step = small_programs(shared), 1e-6
    gradients = qp.reference(given).gradients
    torch.manual_seed(0)
    direction = torch.randn_like(given.arguments[index])

    def loss(length: float) -> float:
        moved = [x.detach().requires_grad_() for x in given.arguments]
        moved[index] = (moved[index] + length * direction).detach().requires_grad_()
        there = qp.Programs(given.title, tuple(moved), given.v)
        return float((qp.reference(there).z * given.v).sum())

    slope = (loss(step) - loss(-step)) / (2 * step)
    assert slope == pytest.approx(float((gradients[index] * direction).sum()), rel=1e-6)


@SHARED
def test_the_reference_of_quadratic_programs_is_their_minimiser(shared: bool) -> None:
    given = small_programs(shared)
    z = qp.reference(given).z
    curvature, slope, rows, right, equations, values = (
        x.detach() for x in given.arguments
    )

    def times(matrix: Tensor, x: Tensor) -> Tensor:
        return (matrix @ x[..., None])[..., 0]

    def objective(x: Tensor) -> Tensor:
        return (x * (times(curvature, x) / 2 + slope)).sum(-1)

    assert torch.allclose(times(equations, z), values, rtol=0, atol=1e-12)
    slack = right - times(rows, z)
    assert bool((slack > -1e-12).all()) and bool((slack < 1e-12).any())
    # among feasible points near it, moved back onto the equations, it is the lowest
    moved = z + 1e-3 * torch.randn(1000, *z.shape, dtype=z.dtype)
    correction = times(equations, moved) - values
    normal = equations / equations.norm(dim=-1, keepdim=True) ** 2
    moved = moved - (normal.mT @ correction[..., None])[..., 0]
    allowed = (right - times(rows, moved) >= 0).all(-1)
    assert bool(allowed.any(0).all())
    assert bool((objective(moved) >= objective(z))[allowed].all())


def test_a_weakly_active_constraint_has_no_reference() -> None:
    one, zero = torch.eye(2, dtype=torch.float64), torch.zeros(1, 2).double()
    arguments = (one, zero, one[:1], torch.zeros(1, 1).double())
    leaves = tuple(x.clone().requires_grad_() for x in arguments)
    with pytest.raises(ValueError, match="weak: the reference has a multiplier or"):
        qp.reference(qp.Programs("weak", leaves, torch.ones(1, 2).double()))


@SHARED
@pytest.mark.parametrize("equations", [0, 2])
def test_our_quadratic_programs_are_exact(shared: bool, equations: int) -> None:
    given = qp.programs(n=6, m=8, q=equations, batch=5, shared=shared)
    found = qp.exactness(given, qp.ours, qp.reference(given))
    assert found["error"] < 1e-9 and found["off"] == 0
    assert len(found["errors"]) == len(given.arguments) == (6 if equations else 4)


def doubled(*arguments: Tensor) -> Tensor:
    """The right minimisers with twice their gradient."""
    z = qp.ours(*arguments)
    return 2 * z - z.detach()


def beside(*arguments: Tensor) -> Tensor:
    """The right gradient, and the first minimiser moved."""
    z = qp.ours(*arguments)
    moved = torch.zeros_like(z)
    moved[0, 0] = 1e-3
    return z + moved


def test_wrong_quadratic_programs_are_marked() -> None:
    methods = [
        *qp.METHODS,
        ("ours", "doubled", True, doubled),
        ("ours", "beside", True, beside),
    ]
    parts = []
    for shared in (False, True):
        given = small_programs(shared)
        rows = qp.measured(given, methods, rounds=1)
        parts.append({"title": given.title, "batch": 3, "rows": rows})
    text = report.markdown({"limit": LIMIT, "qp": parts})
    both, rest = text.split("<!-- end of QP, both passes -->")
    marked = [line for line in both.splitlines() if "†" in line]
    assert len(marked) == 1 and "ours: doubled" in marked[0]
    assert marked[0].count("†") == 2
    forward, errors = rest.split("<!-- end of QP, forward -->")
    marked = [line for line in forward.splitlines() if "†" in line]
    assert len(marked) == 1 and "ours: beside" in marked[0]
    marked = [line for line in errors.splitlines() if "†" in line]
    assert len(marked) == 2 and all("ours: doubled" in line for line in marked)
    assert text.count("| 1 of 3 |") == 2 and text.count("| 0 of 3 |") == 4


@pytest.mark.parametrize(("rounds", "few"), [(1, 1), (15, 2)])
def test_a_slow_method_takes_part_in_few_rounds(rounds: int, few: int) -> None:
    calls = []

    def slow(*arguments: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            calls.append(arguments)
            time.sleep(11 * measuring.TURN)  # so long that only the first is repeated
        return qp.ours(*arguments)

    methods = [*qp.METHODS, (*qp.CVXPYLAYERS, False, slow)]
    rows = qp.measured(small_programs(), methods, rounds)
    assert [row["name"] for row in rows] == [name for _, name, _, _ in methods]
    assert len(calls) == 1 + 1 + few  # for the errors, to warm up, and counted
    rows = qp.measured(small_programs(shared=True), methods, rounds=1)
    assert [row["name"] for row in rows] == [qp.OURS[1]]


def test_error_is_the_larger_of_parameters_and_input() -> None:
    exact = (torch.ones(2, 2), torch.ones(3))
    assert gradient_error((torch.ones(2, 2), 1.5 * torch.ones(3)), exact) == 0.5
    assert gradient_error((3 * torch.ones(2, 2), torch.ones(3)), exact) == 2.0


# --- the rule of the game ---


def test_the_loosest_exact_tolerance_is_chosen() -> None:
    tolerance, error = choose_tolerance(lambda tolerance: 0.1 * tolerance)
    looser = LADDER[LADDER.index(tolerance) - 1]
    assert error == 0.1 * tolerance <= LIMIT < 0.1 * looser


def test_a_method_that_is_always_exact_takes_the_loosest_tolerance() -> None:
    assert choose_tolerance(lambda tolerance: 0.0) == (LADDER[0], 0.0)


def test_without_an_exact_tolerance_the_best_is_shown() -> None:
    _, error = choose_tolerance(lambda t: float("nan") if t > 1e-6 else 1e5 * t)
    assert error == pytest.approx(1e5 * LADDER[-1])


def test_a_case_may_bring_its_own_tolerance() -> None:
    case = small_ode()
    assert settle(case, lambda tolerance: 2 * tolerance) == (1e-5, 2e-5)
    assert settle(small_case(), lambda tolerance: 0.0) == (LADDER[0], 0.0)


def test_an_inexact_gradient_is_marked_and_cannot_win() -> None:
    rows = measured((DEFAULT[1], METHODS[0][3]), ("wrong", without_adjoint))
    right, wrong = rows
    assert right["error"] <= LIMIT < wrong["error"]
    wrong["ms"] = right["ms"] / 100
    results = {"limit": LIMIT, "small": {"title": "small", "rate": 0.5, "rows": rows}}
    text = report.markdown(results)
    winners = text.split("<!-- winners -->")[1].split("<!--")[0]
    assert "ours: Anderson" in winners and "wrong" not in winners
    marked = [line for line in text.splitlines() if "†" in line]
    assert len(marked) == 2 and all("ours: wrong" in line for line in marked)


# --- measuring ---


def test_runs_take_turns() -> None:
    calls: list[str] = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = in_turns(runs, rounds=3)
    order = re.sub(r"(.)\1+", r"\1", "".join(calls))
    assert order == "ababab"
    assert [len(times) for times in seconds.values()] == [3, 3]


def test_spread_is_in_milliseconds() -> None:
    expected = {"ms": 3000.0, "low": 2000.0, "high": 4000.0}
    assert measuring.spread([5, 1, 2, 4, 3]) == expected
    assert measuring.spread([0.5])["ms"] == 500.0


def test_work_is_counted_forward_and_backward() -> None:
    case = small_case()
    case = Case(**{**vars(case), "max_iter": 7})
    counts = count("tanh", lambda: measuring.gradient(case, unrolled, tolerance=0.0))
    assert counts == {"evaluations": 7, "products": 7, "factorisations": 0}
    counts = count("tanh", bare_products(case, 5))
    assert counts == {"evaluations": 5, "products": 0, "factorisations": 0}


def test_work_on_a_differential_equation_is_counted() -> None:
    case, (_, _, _, solve) = small_ode("rk4"), ode.METHODS[0]
    counts = count("rk4", lambda: measuring.gradient(case, solve, tolerance=1e-5))
    number = {"evaluations": 4 * STEPS, "products": 4 * STEPS, "factorisations": 0}
    assert counts == number
    counts = count("rk4", ode.alone(case, evaluations=5, products=3))
    assert counts == {"evaluations": 5, "products": 3, "factorisations": 0}


def test_kept_bytes_agree_with_saved_bytes_and_see_what_a_hook_holds() -> None:
    case = small_case()

    def kept(solve: Solve) -> tuple[int, int]:
        def forward() -> Tensor:
            return solve(case, case.f, 1e-3)

        saved = saved_bytes(forward, exclude=case.leaves)
        return kept_bytes(forward, case.leaves), saved

    both, saved = kept(unrolled)
    assert both == saved > 0
    both, saved = kept(newton_hook)
    assert both == saved + 4 * 8 * 8 * 4  # a matrix for each of four samples


# --- tables, page, environment ---


def test_sizes_and_times_are_short() -> None:
    texts = [report.short(value) for value in (0.123, 9.999, 12.34, 123.4)]
    assert texts == ["0.12", "10.00", "12.3", "123"]
    texts = [report.size(number) for number in (None, 80_000, 4_160_000)]
    assert texts == ["", "80 kB", "4.2 MB"]


@pytest.mark.parametrize(
    ("change", "reached"),
    [
        ({}, [True, True, True, True]),
        ({"ms": 7.0}, [False, True, True, True]),
        ({"error": 3e-6}, [True, False, True, True]),
        ({"bytes": 101}, [True, True, False, True]),
    ],
)
def test_targets_of_differential_equations(
    change: dict[str, float], reached: list[bool]
) -> None:
    backprop, adjoint = ode.TORCHDIFFEQ
    numbers = {
        backprop: {"ms": 9.0, "error": 2e-6, "bytes": 1000},
        adjoint: {"ms": 30.0},
        ode.CHECKPOINT: {"ms": 6.0, "error": 1e-6, "bytes": 100, **change},
        ode.ADJOINT: {"ms": 10.0},
    }
    rows = [{"group": g, "name": n, **row} for (g, n), row in numbers.items()]
    assert [met for *_, met in report.ode_targets(rows)] == reached


@pytest.mark.parametrize(
    ("ours", "theirs", "error", "missed"),
    [
        (4.0, 9.0, 1e-9, []),
        (9.5, 9.0, 1e-9, [0, 1, 2, 3]),
        (5.0, 9.0, 1e-9, [2, 3]),
        (4.0, 9.0, 2e-6, [6]),
        (10.5, 30.0, 0.0, [4, 5]),
    ],
)
def test_targets_of_quadratic_programs(
    ours: float, theirs: float, error: float, missed: list[int]
) -> None:
    times = {qp.OURS: ours, qp.QPTH: theirs, qp.CVXPYLAYERS: 200.0, qp.TIGHT: 100.0}
    rows = [
        {"group": group, "name": name, "both": {"ms": ms}, "error": error}
        for (group, name), ms in times.items()
    ]
    titles = ("n = 10", "n = 50", "n = 10, shared", "n = 50, shared")
    parts = [{"title": title, "rows": rows} for title in titles]
    reached = [met for *_, met in report.qp_targets(parts)]
    assert [i for i, met in enumerate(reached) if not met] == missed


def pins(lock: Path) -> set[str]:
    return set(re.findall(r"^[\w.-]+==[^\n#]*[^\n# ]", lock.read_text(), re.M))


def test_the_peers_agree_with_the_book_on_what_they_share() -> None:
    def names(pins: set[str]) -> set[str]:
        return {pin.split("==")[0] for pin in pins}

    book, peers = pins(LOCK), pins(PEERS)
    assert {"torchdeq", "jax", "jaxopt", "optimistix"} <= names(peers)
    assert {"torchdiffeq", "torchode", "diffrax"} <= names(peers)
    assert {"qpth", "cvxpylayers"} <= names(peers)
    assert "torch" not in names(peers)
    shared = {pin for pin in peers if pin.split("==")[0] in names(book)}
    assert shared and shared <= book


def results() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((PEERS.parent / "results.json").read_text())
    return loaded


def test_the_tables_are_made_from_the_results() -> None:
    text = (PEERS.parent / "results.md").read_text()
    assert report.markdown(results()) == text


def test_the_page_shows_every_table_once() -> None:
    text, page = (PEERS.parent / "results.md").read_text(), PAGE.read_text()
    sections = re.findall(r"<!-- (?!end of )(.+) -->", text)
    shown = re.findall(r":start-after: <!-- (.+) -->", page)
    ends = re.findall(r":end-before: <!-- end of (.+) -->", page)
    assert sorted(sections) == sorted(shown) and shown == ends


def test_the_figures_are_there_and_small() -> None:
    names = re.findall(r"\{figure\} (\S+)", PAGE.read_text())
    assert len(names) == 3
    for name in names:
        assert 10_000 < (PAGE.parent / name).stat().st_size < 150_000


def test_what_the_page_says_in_words_holds() -> None:
    loaded = results()
    rows = [point["rows"] for point in loaded["iterations"]]
    kept = {
        key: [report.find(row, key)["bytes"] for row in rows]
        for key in [("ours", "plain iteration"), ("usual code", "plain loop, unrolled")]
    }
    assert len(set(kept["ours", "plain iteration"])) == 1
    unrolling = kept["usual code", "plain loop, unrolled"]
    assert unrolling == sorted(unrolling) and unrolling[-1] > 10 * unrolling[0]
    hard = loaded["sym0.99"]["rows"]
    plain = report.find(hard, ("usual code", "plain loop, unrolled"))["evaluations"]
    assert report.find(hard, DEFAULT)["evaluations"] < plain / 5
    ours, theirs = ("ours", "plain iteration"), ("jaxopt", "fixed point, BiCGStab")
    assert report.ratio(hard, ours, DEFAULT) > 1
    assert report.ratio(hard, theirs, ("jaxopt", "Anderson, BiCGStab")) > 1


def test_what_the_page_says_of_an_equilibrium_holds() -> None:
    rows = report.by_key(results()["equilibrium"])
    exact = {key: row["exact"] for key, row in rows.items()}
    kept = {key: part["bytes"] for key, part in exact.items()}
    work = {key: part["evaluations"] for key, part in exact.items()}
    assert all(part["error"] <= LIMIT for part in exact.values())
    assert {part["tolerance"] for part in exact.values()} == {equilibrium.TOLERANCE}
    assert max(work.values()) < equilibrium.MAX_ITER
    cheap = [row["one step"] for row in rows.values()]
    errors = [part["error"] for part in cheap]
    assert {part["products"] for part in cheap} == {1}
    assert min(errors) > 0.5 and max(errors) - min(errors) < 1e-3
    for one, two in (
        (equilibrium.ANDERSON_1, DEFAULT),
        (equilibrium.PLAIN_1, equilibrium.PLAIN),
    ):
        assert work[one] == work[two] - 1
        assert kept[one] == kept["TorchDEQ", "fixed point"] < kept[two]
    assert kept[equilibrium.UNROLLED] > 10 * kept[DEFAULT]
    assert work[DEFAULT] < work[equilibrium.PLAIN] < 1.5 * work[DEFAULT]
    assert work["TorchDEQ", "Anderson"] > work["TorchDEQ", "fixed point"]


def test_what_the_page_says_of_differential_equations_holds() -> None:
    measured = results()["odes"]
    chosen, given = (measured[kind]["rows"] for kind in ODES)

    def of(what: str, rows: Any, key: tuple[str, str]) -> Any:
        return report.find(rows, key)[what]

    backprop, adjoint = ode.TORCHDIFFEQ
    keys = (ode.BACKPROP, ode.CHECKPOINT, ode.ADJOINT)
    kept = [of("bytes", chosen, key) for key in keys]
    assert kept == sorted(kept, reverse=True) and kept[0] > 3 * kept[1]
    assert of("error", chosen, ode.BACKPROP) == of("error", chosen, ode.CHECKPOINT)
    assert of("error", chosen, backprop) > of("error", chosen, adjoint)
    assert {of("evaluations", given, key) for key in (ode.BACKPROP, backprop)} == {80}


def test_what_the_page_says_of_quadratic_programs_holds() -> None:
    parts = results()["qp"]
    assert [(part["title"], part["batch"]) for part in parts] == [
        (qp.programs(*case).title, case[3]) for case in qp.CASES
    ]
    for part, (*_, shared) in zip(parts, qp.CASES, strict=True):
        rows = report.by_key(part["rows"])
        assert set(rows) == {qp.OURS, qp.QPTH} | (
            set() if shared else {qp.CVXPYLAYERS, qp.TIGHT}
        )
        assert rows[qp.OURS]["error"] < 1e-12
        theirs, kept = rows[qp.QPTH]["errors"], rows[qp.QPTH]["bytes"]
        mean = 1 - 1 / part["batch"]
        for name, error in theirs.items():
            wrong = shared and name in "QGA"
            assert error == pytest.approx(mean, rel=1e-3) if wrong else error < 1e-6
        if shared:
            assert rows[qp.OURS]["bytes"] < kept
        else:
            assert 1.5 * kept < rows[qp.OURS]["bytes"] < 2.5 * kept
            assert rows[qp.CVXPYLAYERS]["error"] > 1e-4 > 1e-6 > rows[qp.TIGHT]["error"]
        assert {
            name: row["off"] for name, row in rows.items() if row["off"]
        }.keys() <= {qp.CVXPYLAYERS}
