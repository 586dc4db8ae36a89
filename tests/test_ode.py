"""Solutions of ODEs against SciPy, closed forms and conditions in exact fractions."""

import math
from fractions import Fraction
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from implicit_layers import ODEError, ODEStatistics, ode, odeint

pytestmark = pytest.mark.filterwarnings("error")
ORDERS = {"euler": 1, "midpoint": 2, "rk4": 4, "dopri5": 5, "implicit_euler": 1}
STAGES = {"euler": 1, "midpoint": 2, "rk4": 4}
TIGHT = {"rtol": 1e-12, "atol": 1e-12}
agree = partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-12)
every_method = pytest.mark.parametrize("method", ORDERS)
given_steps = pytest.mark.parametrize("method", STAGES)
many = settings(max_examples=30, deadline=None, derandomize=True)


@pytest.fixture(scope="module", autouse=True)
def without_tape():
    with torch.no_grad():
        yield


class Recorder:
    """A right-hand side that remembers at which times and states it was called."""

    def __init__(self, f):
        self.f, self.times, self.states = f, [], []

    def __call__(self, t, y):
        self.times.append(t)
        self.states.append(y)
        return self.f(t, y)

    @property
    def calls(self):
        return len(self.times)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def oscillator(t, y):
    return torch.stack([y[:, 1], -y[:, 0]], dim=1)


def swing(t, y):
    """Its solutions turn by sin(t): y0 exp(i sin t)."""
    return torch.cos(t) * oscillator(t, y)


def van_der_pol(t, y, mu=5.0):
    return torch.stack([y[:, 1], mu * (1 - y[:, 0] ** 2) * y[:, 1] - y[:, 0]], dim=1)


def kicked(t, y):
    """Slow, but for a narrow kick at t = 1, which steps must be rejected for."""
    return 10 * torch.exp(-((10 * (t - 1)) ** 2)) - y


def logistic(t, y):
    return y * (1 - y)


def turned(y0, angle):
    cos, sin = math.cos(angle), math.sin(angle)
    return torch.stack(
        [cos * y0[:, 0] + sin * y0[:, 1], cos * y0[:, 1] - sin * y0[:, 0]], 1
    )


# ---- tableaus -----------------------------------------------------------------------


def exact(x):
    return Fraction(x).limit_denominator(1_000_000)


def trees(order):
    """The rooted trees with so many nodes, each as the tuple of its branches."""
    return sorted(forests(order - 1, order - 1))


def forests(nodes, largest):
    """The multisets of trees with so many nodes in all, none larger than `largest`."""
    if nodes == 0:
        return {()}
    found = set()
    for size in range(1, min(nodes, largest) + 1):
        for tree in trees(size):
            found |= {
                tuple(sorted((tree, *rest))) for rest in forests(nodes - size, size)
            }
    return found


def nodes_of(tree):
    return 1 + sum(map(nodes_of, tree))


def density(tree):
    return nodes_of(tree) * math.prod(map(density, tree))


def elementary(matrix, tree):
    """What the stages make of a tree, one number each."""
    values = [Fraction(1)] * len(matrix)
    for branch in tree:
        inner = elementary(matrix, branch)
        for i, row in enumerate(matrix):
            values[i] *= sum(a * x for a, x in zip(row, inner, strict=False))
    return values


def order_of(matrix, weights, limit=6):
    """The largest order whose conditions, and those of all below, hold exactly."""
    for order in range(1, limit + 1):
        for tree in trees(order):
            stages = elementary(matrix, tree)
            total = sum(b * x for b, x in zip(weights, stages, strict=True))
            if total != Fraction(1, density(tree)):
                return order - 1
    return limit


def test_there_are_as_many_rooted_trees_as_the_textbooks_count():
    assert [len(trees(order)) for order in range(1, 7)] == [1, 1, 2, 4, 9, 20]


@pytest.mark.parametrize("method", [*STAGES, "dopri5"])
def test_tableau_meets_the_conditions_of_its_order_and_no_more(method):
    rule = ode._EXPLICIT[method]
    matrix = [[exact(a) for a in row] for row in rule.rows]
    assert [len(row) for row in matrix] == list(range(len(rule.weights)))
    assert [sum(row) for row in matrix] == [exact(c) for c in rule.nodes]
    assert order_of(matrix, [exact(b) for b in rule.weights]) == ORDERS[method]


def test_embedded_method_has_order_four_and_last_stage_is_the_next_first():
    rule = ode._EXPLICIT["dopri5"]
    matrix = [[exact(a) for a in row] for row in rule.rows]
    weights = [exact(b) for b in rule.weights]
    error = [exact(e) for e in ode._DOPRI5_ERROR]
    assert order_of(matrix, [b - e for b, e in zip(weights, error, strict=True)]) == 4
    assert [*matrix[-1], 0] == weights


# ---- orders -------------------------------------------------------------------------


def slope(sizes, errors):
    return np.polyfit(np.log(sizes), np.log(errors), 1)[0]


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "implicit_euler"])
def test_error_falls_with_the_order_of_the_method(method):
    y0, end = randn(3, 2), 2.0
    sizes = [end / n for n in (20, 40, 80, 160)]
    errors = [
        (solution[-1] - turned(y0, math.sin(end))).norm()
        for h in sizes
        for solution in [
            odeint(swing, y0, double(0, end), method=method, step_size=h, **TIGHT)[0]
        ]
    ]
    # the first order of implicit Euler sets in later
    assert abs(slope(sizes[1:], errors[1:]) - ORDERS[method]) < 0.15


def test_error_of_dopri5_falls_with_the_fifth_power_of_its_steps():
    y0, end = double(0.6, -0.8)[None], 20.0
    counts, errors = [], []
    for tolerance in (1e-5, 1e-6, 1e-7, 1e-8, 1e-9):
        options = {"rtol": 0.0, "atol": tolerance}
        ys, stats = odeint(oscillator, y0, double(0, end), **options)
        counts.append(stats.accepted)
        errors.append((ys[-1] - turned(y0, end)).norm())
    assert abs(slope(counts, errors) + 5) < 0.15


def test_one_step_of_dopri5_has_an_error_of_order_six():
    # tolerances so loose that the whole interval is one step
    y0, sizes, errors = double(0.6, -0.8)[None], [0.2, 0.1, 0.05], []
    for h in sizes:
        ys, stats = odeint(swing, y0, double(0, h), rtol=1.0, atol=1.0)
        assert stats.steps == [pytest.approx(h)]
        errors.append((ys[-1] - turned(y0, math.sin(h))).norm())
    assert abs(slope(sizes, errors) - 6) < 0.15


@pytest.mark.parametrize("degree", range(5))
def test_dopri5_integrates_polynomials_exactly_also_between_its_steps(degree):
    t = torch.linspace(-1, 1.5, 41, dtype=torch.float64)
    y0 = torch.ones(1, 1, dtype=torch.float64)
    ys, stats = odeint(lambda t, y: t**degree * torch.ones_like(y), y0, t)
    if degree < 4:  # the interpolant has order 4, the ends of the steps have order 5
        agree(
            ys[:, 0, 0], 1 + (t ** (degree + 1) - (-1) ** (degree + 1)) / (degree + 1)
        )
    agree(ys[-1], 1 + (1.5 ** (degree + 1) - (-1.0) ** (degree + 1)) / (degree + 1))
    assert stats.reached_end


# ---- the given steps ----------------------------------------------------------------


def textbook(method, f, y, t, h):
    """One step in NumPy."""
    k1 = f(t, y)
    if method == "euler":
        return y + h * k1
    k2 = f(t + h / 2, y + h / 2 * k1)
    if method == "midpoint":
        return y + h * k2
    k3 = f(t + h / 2, y + h / 2 * k2)
    k4 = f(t + h, y + h * k3)
    return y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


@given_steps
@pytest.mark.parametrize(
    ("t", "step_size", "counts"),
    [
        ((0, 0.3, 1), None, (1, 1)),
        ((0, 0.3, 1), 0.1, (3, 7)),  # though 0.3 / 0.1 and 0.7 / 0.1 are not exact
        ((0, 0.3, 1), 0.25, (2, 3)),
        ((0, 0.3, 1), 5.0, (1, 1)),
        ((2, 1.5, -1), 0.5, (1, 5)),
    ],
    ids=str,
)
def test_given_steps_are_those_of_the_textbook(method, t, step_size, counts):
    y0 = randn(4, 2)
    f = Recorder(lambda t, y: torch.sin(y.flip(1)) + t * y**2 / 9)
    ys, stats = odeint(f, y0, double(*t), method=method, step_size=step_size)
    y, expected, sizes = y0.numpy(), [y0.numpy()], []
    for (start, stop), count in zip(pairwise(t), counts, strict=True):
        h = (stop - start) / count
        for i in range(count):
            y = textbook(
                method,
                lambda t, y: np.sin(y[:, ::-1]) + t * y**2 / 9,
                y,
                start + i * h,
                h,
            )
            sizes.append(h)
        expected.append(y)
    agree(ys, expected)
    agree(stats.steps, sizes)
    assert (stats.accepted, stats.rejected) == (len(sizes), 0)
    assert f.calls == stats.evaluations == STAGES[method] * len(sizes)
    assert all(y is not None and y.shape == y0.shape for y in f.states)


@pytest.mark.parametrize("count", [3, 7, 10, 49, 1000])
@pytest.mark.parametrize("start", [0.0, 0.1, -7.3])
def test_rounding_adds_no_step(start, count):
    t = double(start, start + 0.1 * count)
    _, stats = odeint(logistic, double(0.5), t, method="euler", step_size=0.1)
    assert stats.accepted == count


@pytest.mark.parametrize("falling", [False, True])
def test_implicit_euler_solves_its_linear_equation(falling):
    matrix, y, h = randn(3, 3), randn(2, 3, seed=1), -0.1 if falling else 0.1
    drive = randn(3, seed=2)
    t = h * torch.arange(4, dtype=torch.float64)
    ys, stats = odeint(
        lambda t, y: y @ matrix.T + torch.sin(t) * drive,
        y,
        t,
        method="implicit_euler",
        **TIGHT,
    )
    for now, after in zip(t[1:], ys[1:], strict=True):
        right = y + h * torch.sin(now) * drive
        y = torch.linalg.solve(torch.eye(3).double() - h * matrix, right.T).T
        agree(after, y, rtol=1e-9)
    agree(stats.steps, [h] * 3)


def test_implicit_euler_is_stable_where_euler_explodes():
    # Prothero and Robinson: the solution cos(t), with a fast decay towards it
    def f(t, y):
        return -1e4 * (y - torch.cos(t)) - torch.sin(t)

    t, y0 = torch.linspace(0, 1, 21, dtype=torch.float64), double(1.0, 1.5)
    ys, _ = odeint(f, y0, t, method="implicit_euler", **TIGHT)
    agree(ys[1:, 0], torch.cos(t[1:]), atol=1e-5, rtol=0)
    agree(ys[2:, 1], torch.cos(t[2:]), atol=1e-4, rtol=0)
    exploded, _ = odeint(f, y0, t, method="euler")
    assert exploded.abs().max() > 1e30


# ---- the chosen steps, against SciPy ------------------------------------------------

PROBLEMS = {
    "decay": (lambda t, y: -y, (1.0,), 5.0),
    "logistic": (logistic, (0.01,), 12.0),
    "swing": (swing, (1.0, -0.3), 9.0),
    "van der pol": (van_der_pol, (2.0, 0.0), 20.0),
    "kicked": (kicked, (0.1,), 3.0),
    "from zero": (lambda t, y: torch.cos(t) + 0 * y, (0.0,), 4.0),
    "falling": (swing, (1.0, -0.3), -9.0),
    "large and small": (lambda t, y: y * double(0.5, -0.5), (1e3, 1e-3), 4.0),
}


def scipy_solution(f, y0, t, rtol, atol):
    return solve_ivp(
        lambda s, y: f(double(s)[0], torch.from_numpy(y)[None])[0].numpy(),
        (t[0].item(), t[-1].item()),
        np.array(y0),
        rtol=rtol,
        atol=atol,
        dense_output=True,
    )


@pytest.mark.parametrize(
    ("rtol", "atol"), [(1e-3, 1e-6), (1e-6, 1e-3), (1e-7, 1e-9), (1e-10, 1e-4)]
)
@pytest.mark.parametrize("name", PROBLEMS)
def test_one_sample_is_solved_by_the_steps_of_scipy(name, rtol, atol):
    f, y0, end = PROBLEMS[name]
    recorder = Recorder(f)
    t = torch.linspace(0, 1, 101, dtype=torch.float64) * end
    ys, stats = odeint(recorder, double(y0), t, rtol=rtol, atol=atol)
    theirs = scipy_solution(f, y0, t, rtol, atol)
    assert stats.accepted == len(theirs.t) - 1
    assert stats.evaluations == recorder.calls == theirs.nfev
    agree(stats.steps, np.diff(theirs.t), rtol=1e-6)
    agree(ys[:, 0], theirs.sol(t.numpy()).T, rtol=1e-7, atol=1e-8)


def test_problems_reject_steps_and_stretch_them():
    # or the comparisons above would say nothing of it
    for name in ("kicked", "van der pol"):
        f, y0, end = PROBLEMS[name]
        _, stats = odeint(f, double(y0), double(0, end), rtol=1e-3)
        assert stats.rejected > 2
    f, y0, end = PROBLEMS["from zero"]
    _, stats = odeint(f, double(y0), double(0, end), rtol=1e-3)
    assert max(b / a for a, b in pairwise(stats.steps)) == pytest.approx(10)


@pytest.mark.parametrize("tolerance", [1e-4, 1e-7, 1e-10])
def test_error_at_the_end_is_near_the_tolerance(tolerance):
    options = {"rtol": tolerance, "atol": tolerance}
    y0, t = double(0.1, 0.5, 0.9), torch.linspace(0, 4, 33, dtype=torch.float64)
    ys, _ = odeint(logistic, y0, t, **options)
    expected = 1 / (1 + (1 / y0 - 1) * torch.exp(-t[:, None]))
    assert (ys - expected).abs().max() < 10 * tolerance
    y0 = randn(5, 2)
    ys, _ = odeint(swing, y0, t, **options)
    expected = torch.stack([turned(y0, math.sin(s)) for s in t.tolist()])
    assert (ys - expected).abs().max() < 20 * tolerance


# ---- time ---------------------------------------------------------------------------


def accepts(method, **options):
    """Options with which a method is exact enough to be compared with a solution."""
    return {"method": method, **({} if method == "dopri5" else {"step_size": 0.01})} | (
        TIGHT | options
    )


@every_method
def test_falling_time_is_rising_time_in_a_mirror(method):
    y0, t = randn(3, 2), double(1, 0.7, -0.5, -2)
    down, first = odeint(swing, y0, t, method=method, step_size=None)
    up, second = odeint(lambda t, y: -swing(-t, y), y0, -t, method=method)
    agree(down, up)
    agree(first.steps, [-h for h in second.steps])
    assert first.evaluations == second.evaluations
    assert all(h < 0 for h in first.steps)


@every_method
def test_way_back_leads_to_the_start(method):
    y0, t = randn(3, 2), double(0, 0.3, 0.5)
    there, _ = odeint(swing, y0, t, **accepts(method))
    back, _ = odeint(swing, there[-1], t.flip(0), **accepts(method))
    tolerance = 0.02 if "euler" in method else 1e-4
    agree(back.flip(0), there, atol=tolerance, rtol=0)


@pytest.mark.parametrize("falling", [False, True])
@pytest.mark.parametrize("name", ["swing", "kicked", "van der pol"])
def test_times_asked_for_change_no_step(name, falling):
    f, y0, end = PROBLEMS[name]
    y0, end = double(y0), -end / 4 if falling else end
    few, first = odeint(f, y0, double(0, end))
    t = torch.linspace(0, 1, 1001, dtype=torch.float64) * end
    many_, second = odeint(f, y0, t)
    assert first == second
    assert torch.equal(many_[-1], few[-1])
    some, _ = odeint(f, y0, t[::50])
    agree(some, many_[::50], rtol=1e-13)


def test_crowded_times_are_all_answered():
    t = torch.cat([torch.linspace(0, 1, 50), torch.linspace(2, 2 + 1e-4, 50)]).double()
    t = torch.cat([t, double(t[-1] + 1e-15 * 4, 3 - 1e-15, 3)]).unique()
    ys, _ = odeint(logistic, double(0.2), t, **TIGHT)
    agree(ys[:, 0], 1 / (1 + 4 * torch.exp(-t)), rtol=1e-8)


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype_of_t", [torch.float32, torch.float64])
@pytest.mark.parametrize("wanted", [False, True])
def test_f_gets_a_number_and_a_state_like_y0(method, dtype, dtype_of_t, wanted):
    y0, t = randn(2, 3).to(dtype), torch.linspace(0, 1, 4, dtype=dtype_of_t)
    f = Recorder(lambda t, y: -y * t)
    with torch.set_grad_enabled(wanted):
        ys = odeint(f, y0, t.requires_grad_(wanted), method=method)[0].detach()
    assert ys.dtype == dtype
    assert ys.shape == (4, 2, 3)
    for s, y in zip(f.times, f.states, strict=True):
        assert (s.shape, s.dtype, s.device) == ((), dtype, y0.device)
        assert y.dtype == dtype
        assert y.shape[-1] == 3
        assert -1e-6 <= s <= 1 + 1e-6
    agree(ys[0], y0)
    assert torch.equal(ys[0], y0)


@every_method
def test_single_precision_is_near_double(method):
    y0, t = randn(3, 2), double(0, 0.5, 2)
    wide, _ = odeint(swing, y0, t, method=method, step_size=None)
    narrow, _ = odeint(swing, y0.float(), t.float(), method=method)
    agree(narrow, wide, rtol=1e-4, atol=1e-5)


# ---- batches ------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("shape", [(), (1,), (4,), (2, 3, 4), (0,), (2, 0)])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_shape_of_a_sample_does_not_matter(method, batch, shape):
    y0, t = randn(batch, *shape), double(0, 0.2, 1)
    ys, stats = odeint(lambda t, y: torch.sin(y) - t, y0, t, method=method)
    assert ys.shape == (3, *y0.shape)
    assert torch.equal(ys[0], y0)
    line, same = odeint(
        lambda t, y: torch.sin(y) - t,
        y0.reshape(batch, -1, 1) if y0.numel() else y0,
        t,
        method=method,
    )
    agree(ys.flatten(), line.flatten())
    assert same.steps == pytest.approx(stats.steps)
    assert stats.reached_end


def test_worst_sample_decides_the_steps():
    # zero is at rest; a mean over the batch would take longer steps
    hard = randn(1, 2)
    alone, first = odeint(swing, hard, double(0, 5))
    for row in (0, 3, 99):
        y0 = torch.zeros(100, 2, dtype=torch.float64)
        y0[row] = hard
        ys, second = odeint(swing, y0, double(0, 5))
        agree(second.steps, first.steps)
        agree(ys[:, row], alone[:, 0])
        assert second.evaluations == first.evaluations
        assert ys[:, 50].abs().max() == 0


def test_norm_of_a_sample_is_a_mean_over_its_entries():
    y0 = randn(1, 2)
    _, once = odeint(swing, y0, double(0, 5))

    def doubled(t, y):
        return swing(t, y[:, :2]).repeat(1, 8)

    _, often = odeint(doubled, y0.repeat(1, 8), double(0, 5))
    agree(often.steps, once.steps)


@every_method
def test_order_of_the_samples_does_not_matter(method):
    y0, order = randn(5, 2), torch.tensor([3, 0, 4, 1, 2])
    ys, first = odeint(van_der_pol, y0, double(0, 0.3, 0.5), method=method)
    shuffled, second = odeint(
        van_der_pol, y0[order], double(0, 0.3, 0.5), method=method
    )
    agree(shuffled, ys[:, order])
    agree(second.steps, first.steps)


# ---- statistics ---------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("problem", [swing, kicked])
@pytest.mark.parametrize("end", [3.0, -0.5])
def test_statistics_are_what_happened(method, problem, end):
    f, t = Recorder(problem), torch.linspace(0, end, 31, dtype=torch.float64)
    _, stats = odeint(f, randn(2, 2), t, method=method)
    assert isinstance(stats, ODEStatistics)
    assert stats.evaluations == f.calls
    assert stats.backward_evaluations == 0
    assert stats.accepted == len(stats.steps)
    assert all(type(h) is float and h * end > 0 for h in stats.steps)
    assert sum(stats.steps) == pytest.approx(end, rel=1e-12)
    assert stats.reached_end is True
    if method == "dopri5":
        assert f.calls == 2 + 6 * (stats.accepted + stats.rejected)
        assert stats.rejected > 0 or problem is swing or end < 1
    elif method != "implicit_euler":
        assert f.calls == STAGES[method] * 30


def test_statistics_of_two_calls_are_apart():
    _, first = odeint(logistic, double(0.5), double(0, 1))
    before = ODEStatistics(**vars(first))
    _, second = odeint(logistic, double(0.5), double(0, 9))
    assert first == before != second
    assert first.steps is not second.steps
    assert ODEStatistics() == ODEStatistics(0, 0, 0, 0, [], False)


@pytest.mark.parametrize("t0", [0.0, -3.0, 100.0])
def test_autonomous_solution_does_not_know_the_time(t0):
    y0, t = randn(2, 2), double(0, 1, 4)
    ys, first = odeint(van_der_pol, y0, t)
    later, second = odeint(van_der_pol, y0, t + t0)
    agree(later, ys, rtol=1e-8)
    agree(second.steps, first.steps, rtol=1e-6)


# ---- failures -----------------------------------------------------------------------


@every_method
def test_too_many_steps_are_refused_and_just_enough_are_not(method):
    y0, t = double(1.0, 0.2)[:, None], torch.linspace(0, 3, 31, dtype=torch.float64)
    options = {"method": method}
    ys, enough = odeint(kicked, y0, t, **options)
    number = enough.accepted + enough.rejected
    again, _ = odeint(kicked, y0, t, max_steps=number, **options)
    assert torch.equal(again, ys)
    f = Recorder(kicked)
    with pytest.raises(ODEError, match=rf"{number - 1} steps.*max_steps") as caught:
        odeint(f, y0, t, max_steps=number - 1, **options)
    error = caught.value
    assert isinstance(error, RuntimeError)
    assert error.time == pytest.approx(3 - enough.steps[-1])
    assert error.statistics.steps == enough.steps[:-1]
    assert error.statistics.evaluations == f.calls
    assert not error.statistics.reached_end
    assert "stiff" in str(error)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blow_up_is_an_error_that_says_when(dtype, sign):
    f = Recorder(lambda t, y: sign * y**2)  # 1 / (1 - t)
    with pytest.raises(ODEError, match=r"t = -?1.*blow up") as caught:
        odeint(f, torch.tensor([0.1, 1.0], dtype=dtype), double(0, 2 * sign))
    error = caught.value
    assert error.time == pytest.approx(sign, abs=1e-4)
    assert error.statistics.rejected > 0
    assert sum(error.statistics.steps) == pytest.approx(error.time)
    assert error.statistics.evaluations == f.calls < 5000
    assert not error.statistics.reached_end


@every_method
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_derivative_that_is_not_finite_at_the_start(method, value):
    f = Recorder(lambda t, y: torch.where(y > 1, value, -y))
    words = "implicit Euler|not finite" if method == "implicit_euler" else "not finite"
    with pytest.raises(ODEError, match=words) as caught:
        odeint(f, double(0.5, 1.5), double(2, 2.5, 3), method=method)
    error = caught.value
    assert 2 <= error.time <= 2.5
    assert error.statistics.accepted == 0
    assert error.statistics.evaluations == f.calls
    assert not error.statistics.reached_end


@every_method
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_derivative_that_is_not_finite_later(method, value):
    f = Recorder(lambda t, y: torch.where(t > 0.55, value, -y))
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    with pytest.raises(ODEError, match=r"not finite|no state") as caught:
        odeint(f, double(0.5, 1.5), t, method=method)
    error = caught.value
    late = 0.1 if method != "dopri5" else 1e-6
    assert 0.55 - late <= error.time <= 0.55 + late
    assert error.statistics.evaluations == f.calls
    # implicit Euler names the time whose state it sought
    assert error.time - sum(error.statistics.steps) == pytest.approx(
        0.1 if method == "implicit_euler" else 0
    )


def test_state_outside_of_the_domain_is_stepped_around():
    # the root of a negative state is NaN: such a step is tried again, shorter
    f = Recorder(lambda t, y: -torch.sqrt(y))
    ys, stats = odeint(f, double(1.0), double(0, 1.999), rtol=1e-2, atol=1e-2)
    assert any((y < 0).any() for y in f.states)
    assert stats.reached_end
    agree(ys[-1], [(1 - 1.999 / 2) ** 2], atol=1e-2)


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4"])
def test_state_that_overflows_is_an_error(method):
    t = torch.linspace(0, 100, 101)
    with pytest.raises(ODEError, match="not finite") as caught:
        odeint(lambda t, y: y**3, torch.tensor([[2.0]]), t, method=method)
    assert 0 <= caught.value.time < 10


def test_newton_that_fails_inside_is_an_error_of_the_solver():
    f = Recorder(lambda t, y: 1 + y**2)  # h (1 + z^2) = z has no root for h > 1 / 2
    with pytest.raises(ODEError, match=r"implicit Euler.*t = 1\b.*smaller") as caught:
        odeint(f, double(0.0), double(0, 1), method="implicit_euler")
    assert caught.value.statistics.evaluations == f.calls
    assert isinstance(caught.value.__cause__, RuntimeError)


@every_method
def test_error_of_f_itself_comes_through(method):
    def f(t, y):
        raise KeyError("mine")

    with torch.enable_grad():
        with pytest.raises(KeyError, match="mine"):
            odeint(f, double(1.0), double(0, 1), method=method)
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("slope", [1e16, 1e35])
def test_steep_slope_in_single_precision_is_solved(slope):
    # in units of the tolerance it is up to 1e40, which is infinite in float32
    y0, t = torch.ones(1, 4), torch.tensor([0.0, 1.0])
    ys, _ = odeint(lambda t, y: torch.full_like(y, slope), y0, t)
    agree(ys[-1], torch.full((1, 4), slope), rtol=1e-5)


# ---- linear systems -----------------------------------------------------------------


@st.composite
def linear_systems(draw):
    """A matrix of norm at most 3, a batch, and times that rise or fall."""
    size, batch = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    seed = draw(st.integers(0, 2**20))
    matrix = randn(size, size, seed=seed)
    matrix = draw(st.floats(0, 3)) * matrix / torch.linalg.matrix_norm(matrix, ord=2)
    gaps = draw(st.lists(st.floats(0.01, 0.7), min_size=1, max_size=4))
    start, sign = draw(st.floats(-5, 5)), draw(st.sampled_from([1, -1]))
    t = start + sign * torch.tensor([0, *gaps], dtype=torch.float64).cumsum(0)
    return matrix, randn(batch, size, seed=seed + 1), t


@given(linear_systems())
@many
def test_linear_system_has_the_matrix_exponential(system):
    matrix, y0, t = system
    ys, stats = odeint(lambda t, y: y @ matrix.T, y0, t, rtol=1e-9, atol=1e-9)
    flow = torch.matrix_exp((t - t[0])[:, None, None] * matrix)
    agree(ys, y0 @ flow.mT, rtol=1e-5, atol=1e-6)
    assert sum(stats.steps) == pytest.approx((t[-1] - t[0]).item())


@given(linear_systems(), st.sampled_from(["euler", "midpoint", "rk4"]))
@many
def test_given_step_of_a_linear_system_is_a_taylor_polynomial(system, method):
    matrix, y0, t = system
    ys, _ = odeint(lambda t, y: y @ matrix.T, y0, t, method=method)
    y = y0
    for h, after in zip(t.diff(), ys[1:], strict=True):
        term = y
        for power in range(1, ORDERS[method] + 1):
            term = h / power * term @ matrix.T
            y = y + term
        agree(after, y, rtol=1e-8, atol=1e-10)


@given(linear_systems())
@many
def test_flow_of_a_linear_system_is_linear(system):
    matrix, y0, t = system
    ys, _ = odeint(lambda t, y: y @ matrix.T, y0, t, **TIGHT)
    other, _ = odeint(lambda t, y: y @ matrix.T, 2 * y0 + 1, t, **TIGHT)
    one, _ = odeint(lambda t, y: y @ matrix.T, torch.ones_like(y0), t, **TIGHT)
    agree(other, 2 * ys + one, rtol=1e-7, atol=1e-7)
