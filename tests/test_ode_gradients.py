"""Gradients of trajectories against closed forms, differences and unrolled loops."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from scipy.integrate import RK45
from test_ode import (
    ORDERS,
    Recorder,
    double,
    kicked,
    linear_systems,
    oscillator,
    randn,
    van_der_pol,
)
from torch import nn
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from implicit_layers import ODEError, odeint

# a tape that nobody releases, or a gradient asked of no leaf, warns
pytestmark = pytest.mark.filterwarnings("error")
METHODS = list(ORDERS)
EXACT = ["backprop", "checkpoint"]
TIGHT = {"rtol": 1e-12, "atol": 1e-12}
agree = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
every_method = pytest.mark.parametrize("method", METHODS)
exact = pytest.mark.parametrize("gradient", EXACT)
every_gradient = pytest.mark.parametrize("gradient", [*EXACT, "adjoint"])
explicit = pytest.mark.parametrize("method", METHODS[:-1])
many = settings(max_examples=10, deadline=None, derandomize=True)


class Field(nn.Module):
    """tanh(W y + b t), of any width."""

    def __init__(self, width=3, seed=0):
        super().__init__()
        self.weight = nn.Parameter(randn(width, width, seed=seed))
        self.bias = nn.Parameter(randn(width, seed=seed + 1))

    def forward(self, t, y):
        return torch.tanh(y @ self.weight.T + self.bias * t)


def field(weight, bias):
    return lambda t, y: torch.tanh(y @ weight.T + bias * t)


def wanting(*tensors):
    return tuple(tensor.clone().requires_grad_() for tensor in tensors)


def problem(times=(0.0, 0.4, 1.0), batch=2, width=3):
    """A start, times, weights and a bias that all want a gradient."""
    return wanting(
        randn(batch, width, seed=2),
        double(*times),
        randn(width, width),
        randn(width, seed=1),
    )


def outcome(ys):
    """A number that depends on every state, on each in its own way."""
    return (torch.sin(ys) * torch.linspace(1, 2, ys.numel()).view(ys.shape)).sum()


def gradients(y0, t, weight, bias, f=field, loss=outcome, **options):
    if options.get("gradient") == "adjoint":
        options.setdefault("params", (weight, bias))
    ys, _ = odeint(f(weight, bias), y0, t, **options)
    return grad(loss(ys), (y0, t, weight, bias))


def far(actual, expected):
    """Whether some gradient is off by more than a thousandth of its size."""
    return any(
        (a - b).abs().max() > 1e-3 * b.abs().max()
        for a, b in zip(actual, expected, strict=True)
    )


# ---- against differences ------------------------------------------------------------


@exact
@every_method
@pytest.mark.parametrize("times", [(0.0, 0.4, 1.0), (0.5, -0.1)])
def test_gradient_is_that_of_differences(method, gradient, times):
    # no interval is a multiple of the step, or their number would jump
    step = {} if method == "dopri5" else {"step_size": 0.25}
    tolerances = TIGHT if method == "implicit_euler" else {"rtol": 1e-8, "atol": 1e-8}

    def trajectory(y0, t, weight, bias):
        options = {"method": method, "gradient": gradient, **tolerances, **step}
        return odeint(field(weight, bias), y0, t, **options)[0]

    arguments = problem(times, batch=1, width=2)
    assert gradcheck(trajectory, arguments, atol=2e-5)


@exact
@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "dopri5"])
def test_second_derivative_is_that_of_differences(method, gradient):
    def trajectory(y0, t, weight, bias):
        options = {"method": method, "gradient": gradient, "rtol": 1e-7, "atol": 1e-7}
        return odeint(field(weight, bias), y0, t, **options)[0]

    arguments = problem((0.0, 0.3, 0.5), batch=1, width=2)
    assert gradgradcheck(trajectory, arguments, atol=1e-4)


def test_second_derivatives_agree_and_are_not_zero():
    y0, t, weight, bias = problem()
    results = []
    for gradient in EXACT:
        ys, _ = odeint(field(weight, bias), y0, t, gradient=gradient)
        first = grad(outcome(ys), (y0, t, weight, bias), create_graph=True)
        scalar = sum(torch.sin(x).sum() for x in first)
        results.append(grad(scalar, (y0, t, weight, bias)))
    agree(*results)
    assert all(x.abs().max() > 0.01 for x in results[0])


# ---- against a tape of our own ------------------------------------------------------


def unrolled(y, t, f, rule, sizes):
    """The states at the ends of given steps; the last one reaches the last time."""
    matrix, weights, nodes = rule
    now, ys = t[0], [y]
    for i, h in enumerate(sizes):
        h = t[-1] - now if i == len(sizes) - 1 else h
        stages = []
        for c, row in zip(nodes, matrix, strict=True):
            moved = sum(a * k for a, k in zip(row, stages, strict=False))
            stages.append(f(now + c * h, y + h * moved))
        y = y + h * sum(b * k for b, k in zip(weights, stages, strict=True))
        now = now + h
        ys.append(y)
    return ys


RK4 = ([[], [0.5], [0, 0.5], [0, 0, 1]], [1 / 6, 1 / 3, 1 / 3, 1 / 6], [0, 0.5, 0.5, 1])
DOPRI5 = tuple(x.tolist() for x in (RK45.A, RK45.B, RK45.C))


@exact
def test_gradient_of_rk4_is_that_of_a_hand_written_loop(gradient):
    arguments = problem((0.0, 0.4, 1.0, 1.1))
    y0, t, weight, bias = arguments
    ys = [y0]
    for start, stop in pairwise(t):
        step = unrolled(
            ys[-1], torch.stack([start, stop]), field(weight, bias), RK4, [0]
        )
        ys.append(step[-1])
    theirs = grad(outcome(torch.stack(ys)), arguments)
    agree(gradients(*arguments, method="rk4", gradient=gradient), theirs)


@exact
@pytest.mark.parametrize("end", [4.0, -4.0])
def test_gradient_of_dopri5_is_that_of_its_steps_on_a_tape(gradient, end):
    arguments = problem((0.0, end))
    y0, t, weight, bias = arguments
    f = field(weight, bias)
    _, stats = odeint(f, y0, t, rtol=1e-3)
    assert stats.accepted > 4
    states = unrolled(y0, t, f, DOPRI5, stats.steps)
    theirs = grad(outcome(torch.stack([y0, states[-1]])), arguments)
    agree(gradients(*arguments, gradient=gradient, rtol=1e-3), theirs)


@exact
def test_gradient_between_the_steps_is_that_of_the_solution(gradient):
    t = torch.linspace(0, 3, 20, dtype=torch.float64)
    arguments = problem(t)
    # a loop of RK4 from each time to the next, with short steps
    y0, t, weight, bias = arguments
    ys = [y0]
    for start, stop in pairwise(t):
        sizes = [(stop - start) / 20] * 20
        pair = torch.stack([start, stop])
        ys.append(unrolled(ys[-1], pair, field(weight, bias), RK4, sizes)[-1])
    theirs = grad(outcome(torch.stack(ys)), arguments)
    ours = gradients(*arguments, gradient=gradient, rtol=1e-9, atol=1e-9)
    agree(ours, theirs, rtol=1e-5, atol=1e-5)


# ---- checkpoint is backprop ---------------------------------------------------------


@every_method
@pytest.mark.parametrize("times", [(0.0, 0.4, 1.0), (2.0, 0.3), (0.0, 0.1, 5.0, 5.1)])
def test_checkpoint_gives_the_numbers_of_backprop(method, times):
    arguments = problem(times)
    step = {} if method == "dopri5" else {"step_size": 0.25}
    results = [
        gradients(*arguments, method=method, gradient=gradient, **step)
        for gradient in EXACT
    ]
    agree(*results)
    assert all(x.abs().max() > 0.01 for x in results[0])


@pytest.mark.parametrize("wanted", ["y0", "t", "f", "y0 t", "y0 f", "t f", "y0 t f"])
@every_method
def test_checkpoint_gives_the_numbers_of_backprop_where_not_all_is_wanted(
    method, wanted
):
    y0, t, weight, bias = (x.detach() for x in problem((0, 0.1, 0.5, 1)))
    results = []
    for gradient in EXACT:
        leaves = {"y0": y0.clone(), "t": t.clone(), "f": weight.clone()}
        asked = [leaves[name].requires_grad_() for name in wanted.split()]
        f = field(leaves["f"], bias)
        ys, _ = odeint(
            f, leaves["y0"], leaves["t"], method=method, gradient=gradient, rtol=1e-3
        )
        results.append((ys.detach(), *grad(outcome(ys), asked)))
    agree(*results)


@pytest.mark.parametrize("name", ["kicked", "van der pol"])
def test_checkpoint_gives_the_numbers_of_backprop_after_rejected_steps(name):
    results = []
    for gradient in EXACT:
        scale, t = wanting(double(1.0), double(0, 0.5, 1.1, 3))
        y0 = wanting(double(0.1)[None] if name == "kicked" else double(2, 0)[None])[0]
        f = kicked if name == "kicked" else van_der_pol
        ys, stats = odeint(
            lambda t, y, f=f, scale=scale: scale * f(t, y),
            y0,
            t,
            gradient=gradient,
            rtol=1e-3,
        )
        assert stats.rejected > 0
        results.append((ys.detach(), *grad(outcome(ys), (y0, t, scale))))
    agree(*results)


# ---- the adjoint --------------------------------------------------------------------


SMALL_STEPS = {
    "euler": {"step_size": 0.005},
    "midpoint": {"step_size": 0.01},
    "rk4": {"step_size": 0.04},
    "dopri5": {"rtol": 1e-8, "atol": 1e-8},
}


def agree_in_the_limit(ours, theirs, method):
    tolerance = {"euler": 3e-2, "midpoint": 1e-3}.get(method, 1e-5)
    agree(ours, theirs, rtol=tolerance, atol=tolerance)


@explicit
def test_adjoint_comes_near_backprop_with_small_steps(method):
    arguments, options = problem(), {"method": method, **SMALL_STEPS[method]}
    ours = gradients(*arguments, gradient="adjoint", **options)
    agree_in_the_limit(ours, gradients(*arguments, **options), method)


@pytest.mark.parametrize("tolerance", [1e-4, 1e-6, 1e-8, 1e-10])
@pytest.mark.parametrize("end", [2.0, -2.0])
def test_adjoint_of_a_linear_system_is_within_ten_tolerances(tolerance, end):
    y0, t, matrix, _ = problem((0.0, end / 3, end))
    flow = torch.matrix_exp((t - t[0])[:, None, None] * matrix)
    theirs = grad(outcome(y0 @ flow.mT), (y0, t, matrix))
    ys, _ = odeint(
        lambda t, y: y @ matrix.T,
        y0,
        t,
        gradient="adjoint",
        params=(matrix,),
        rtol=tolerance,
        atol=tolerance,
    )
    ours = grad(outcome(ys), (y0, t, matrix))
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() < 10 * tolerance * max(1, b.norm())


@explicit
@pytest.mark.parametrize("index", [0, 1, -1])
def test_adjoint_of_a_loss_on_one_state(method, index):
    arguments = problem((0.0, 0.4, 0.7))
    options = {"method": method, **SMALL_STEPS[method]}

    def loss(ys):
        return torch.sin(ys[index]).sum()

    ours = gradients(*arguments, loss=loss, gradient="adjoint", **options)
    theirs = gradients(*arguments, loss=loss, **options)
    agree_in_the_limit(ours, theirs, method)
    if index == 0:
        assert torch.equal(ours[0], torch.cos(arguments[0]))
        assert all(x.abs().max() == 0 for x in ours[1:])


@every_gradient
def test_gradient_of_each_time_is_the_slope_there(gradient):
    # dy/dt at the end; and the start moves everything the other way
    matrix, y0 = randn(3, 3), randn(2, 3, seed=1)
    t = double(0.3, 0.5, 1.0, 1.1).requires_grad_()
    options = {"params": ()} if gradient == "adjoint" else {}
    ys, _ = odeint(
        lambda t, y: y @ matrix.T, y0, t, gradient=gradient, **options, **TIGHT
    )
    v = randn(*ys.shape, seed=3)
    (ours,) = grad(ys, t, v)
    slopes = (v * (ys.detach() @ matrix.T)).sum((1, 2))
    agree(ours[1:], slopes[1:], rtol=1e-8, atol=1e-8)
    agree(ours.sum(), torch.zeros_like(ours.sum()), atol=1e-8, rtol=0)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6])
def test_relative_error_of_the_adjoint_does_not_depend_on_the_size_of_the_loss(scale):
    arguments = problem()
    options = {"rtol": 1e-4, "atol": 1e-4, "gradient": "adjoint"}
    plain = gradients(*arguments, **options)
    scaled = gradients(*arguments, loss=lambda ys: scale * outcome(ys), **options)
    agree([x / scale for x in scaled], list(plain), rtol=1e-8, atol=1e-10)


def test_zero_gradient_comes_back_as_zero():
    for gradient in (*EXACT, "adjoint"):
        found = gradients(*problem(), loss=lambda ys: 0 * ys.sum(), gradient=gradient)
        assert all(torch.equal(x, torch.zeros_like(x)) for x in found)


def test_adjoint_in_single_precision():
    arguments = problem()
    theirs = gradients(*arguments, **TIGHT)
    single = wanting(*(x.detach().float() for x in arguments))
    ours = gradients(*single, gradient="adjoint")
    assert all(x.dtype == torch.float32 for x in ours)
    agree([x.double() for x in ours], list(theirs), rtol=1e-3, atol=1e-3)


@every_gradient
def test_times_may_have_a_dtype_of_their_own(gradient):
    y0, t, weight, bias = problem()
    (narrow,) = wanting(t.detach().float())
    expected = gradients(y0, t, weight, bias, gradient=gradient)
    found = gradients(y0, narrow, weight, bias, gradient=gradient)
    assert found[1].dtype == torch.float32
    for a, b in zip(found, expected, strict=True):
        agree(a.double(), b, rtol=1e-4, atol=1e-4)


@given(linear_systems())
@many
def test_every_gradient_of_a_linear_system_is_that_of_the_matrix_exponential(system):
    matrix, y0, t = wanting(*system)
    flow = torch.matrix_exp((t - t[0])[:, None, None] * matrix)
    theirs = grad(outcome(y0 @ flow.mT), (matrix, y0, t))
    for gradient in (*EXACT, "adjoint"):
        options = {"params": (matrix,)} if gradient == "adjoint" else {}
        ys, _ = odeint(
            lambda t, y: y @ matrix.T,
            y0,
            t,
            gradient=gradient,
            rtol=1e-7,
            atol=1e-7,
            **options,
        )
        ours = grad(outcome(ys), (matrix, y0, t))
        agree(ours, theirs, rtol=1e-4, atol=1e-4)


# ---- what the adjoint is given ------------------------------------------------------


def test_parameters_of_a_module_are_found():
    f = Field()
    y0, t = problem()[:2]
    ys, _ = odeint(f, y0, t, gradient="adjoint", **TIGHT)
    found = grad(outcome(ys), (y0, t, *f.parameters()))
    ys, _ = odeint(f, y0, t, gradient="adjoint", params=iter(f.parameters()), **TIGHT)
    agree(grad(outcome(ys), (y0, t, *f.parameters())), found)
    f.bias.requires_grad_(False)  # and then one tensor is all of them
    ys, _ = odeint(f, y0, t, gradient="adjoint", params=f.weight, **TIGHT)
    agree(grad(outcome(ys), (y0, t, f.weight)), found[:3])
    f.bias.requires_grad_()
    ys, _ = odeint(f, y0, t, **TIGHT)
    agree(grad(outcome(ys), (y0, t, *f.parameters())), found, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("given", [tuple, list, iter])
def test_params_that_are_no_leaves_lead_on_to_theirs(given):
    y0, t, weight, bias = problem()

    def found(gradient):
        scaled, shifted = weight / 2, torch.exp(bias)
        options = {"params": given([scaled, shifted])} if gradient == "adjoint" else {}
        f = field(scaled, shifted)
        ys, _ = odeint(f, y0, t, gradient=gradient, **options, **TIGHT)
        return grad(outcome(ys), (y0, t, weight, bias))

    agree(found("adjoint"), found("backprop"), rtol=1e-7, atol=1e-7)


def test_frozen_parameter_has_no_gradient_and_costs_the_others_nothing():
    f = Field()
    theirs = gradients(*problem()[:2], f.weight, f.bias, **TIGHT)
    f.bias.requires_grad_(False)
    y0, t = problem()[:2]
    ys, _ = odeint(f, y0, t, gradient="adjoint", **TIGHT)
    outcome(ys).backward()
    assert f.bias.grad is None
    agree((y0.grad, t.grad, f.weight.grad), theirs[:3], rtol=1e-7, atol=1e-7)


def test_unused_parameter_has_the_gradient_zero():
    f = Field()
    f.unused = nn.Parameter(randn(4))
    y0, t = problem()[:2]
    ys, _ = odeint(f, y0, t, gradient="adjoint")
    outcome(ys).backward()
    assert f.unused.grad is None or f.unused.grad.abs().max() == 0
    assert f.weight.grad.abs().max() > 0.1


@every_gradient
def test_right_hand_side_may_ignore_the_state(gradient):
    # dy/dt = w t: the gradient of y(t) is t^2 / 2
    y0, t, weight = wanting(randn(2, 3), double(0, 1, 2), randn(3, seed=1))
    options = {"params": (weight,)} if gradient == "adjoint" else {}
    ys, _ = odeint(
        lambda t, y: t * weight.expand(2, 3), y0, t, gradient=gradient, **options
    )
    v = randn(*ys.shape, seed=2)
    of_y0, of_weight = grad(ys, (y0, weight), v)
    agree(of_y0, v.sum(0))
    agree(of_weight, (v[1] / 2 + 2 * v[2]).sum(0), rtol=1e-8, atol=1e-8)


@every_gradient
def test_right_hand_side_may_ignore_everything(gradient):
    y0, t = wanting(randn(2, 3), double(0, 1, 3))
    options = {"params": ()} if gradient == "adjoint" else {}
    ys, _ = odeint(lambda t, y: torch.ones_like(y), y0, t, gradient=gradient, **options)
    of_y0, of_t = grad(ys.sum(), (y0, t))
    agree(of_y0, torch.full_like(y0, 3))
    agree(of_t, double(-12, 6, 6))


@every_gradient
def test_start_need_not_want_a_gradient(gradient):
    y0, t, weight, bias = problem()
    expected = gradients(y0, t, weight, bias, **TIGHT)[2:]
    options = {"params": (weight, bias)} if gradient == "adjoint" else {}
    ys, _ = odeint(
        field(weight, bias),
        y0.detach(),
        t.detach(),
        gradient=gradient,
        **options,
        **TIGHT,
    )
    found = grad(outcome(ys), (weight, bias))
    agree(found, expected, rtol=1e-7, atol=1e-7)


@every_gradient
def test_only_the_start_wants_a_gradient(gradient):
    y0, t, weight, bias = problem()
    expected = gradients(y0, t, weight, bias, **TIGHT)[0]
    f = field(weight.detach(), bias.detach())
    options = {"params": ()} if gradient == "adjoint" else {}
    ys, _ = odeint(f, y0, t.detach(), gradient=gradient, **options, **TIGHT)
    agree(grad(outcome(ys), y0)[0], expected, rtol=1e-7, atol=1e-7)


@every_gradient
@pytest.mark.parametrize("method", METHODS[:-1])
def test_nothing_that_wants_a_gradient_gives_none(gradient, method):
    f = Field().requires_grad_(False)
    ys, _ = odeint(f, randn(2, 3), double(0, 1), method=method, gradient=gradient)
    assert not ys.requires_grad


@pytest.mark.xfail(reason="Newton's step is on a tape even if nothing wants a gradient")
def test_nothing_that_wants_a_gradient_gives_none_from_implicit_euler():
    f = Field().requires_grad_(False)
    ys, _ = odeint(f, randn(2, 3), double(0, 1), method="implicit_euler")
    assert not ys.requires_grad


@pytest.mark.parametrize("hidden", ["weight", "bias", "start", "time", "deep"])
def test_adjoint_that_would_lose_a_gradient_is_refused(hidden):
    y0, t, weight, bias = problem()
    f = Recorder(field(weight, bias))
    params = (weight, bias)
    if hidden in ("weight", "bias"):
        params = (bias,) if hidden == "weight" else (weight,)
    elif hidden == "deep":
        f, params = field(torch.exp(weight.T).T.clone(), bias), (bias,)
    else:
        lost = y0[0] if hidden == "start" else t[1]
        f = field(weight, bias + lost)
    with pytest.raises(ValueError, match=r"params.*lose.*checkpoint"):
        odeint(f, y0, t, gradient="adjoint", params=params)
    with torch.no_grad():  # where nothing can be lost
        odeint(f, y0, t, gradient="adjoint", params=params)


def test_adjoint_that_would_lose_the_gradient_of_a_whole_slope_is_refused():
    (slope,) = wanting(randn(2, 3))
    with pytest.raises(ValueError, match="lose"):
        odeint(lambda t, y: slope, randn(2, 3), T, gradient="adjoint", params=())


T = double(0, 1)


@pytest.mark.parametrize("loss", [outcome, torch.sum])
@explicit
def test_adjoint_cannot_be_differentiated_twice(method, loss):
    y0, t, weight, bias = problem()
    options = {"gradient": "adjoint", "params": (weight, bias), "method": method}
    ys, _ = odeint(field(weight, bias), y0, t, **options)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad(loss(ys), y0, create_graph=True)


def test_adjoint_that_fails_on_its_way_back_says_so():
    # a decay, and where it comes from is found by a growth
    y0, t = wanting(double(1.0, 2.0), double(0, 3))
    options = {"gradient": "adjoint", "params": (), "rtol": 1e-6}
    ys, stats = odeint(lambda t, y: -10 * y, y0, t, **options)
    enough = stats.accepted + stats.rejected
    outcome(ys).backward()
    assert stats.backward_evaluations > stats.evaluations
    ys, _ = odeint(lambda t, y: -10 * y, y0, t, max_steps=enough, **options)
    with pytest.raises(ODEError, match="max_steps") as caught:
        outcome(ys).backward()
    assert 0 < caught.value.time < 3
    assert caught.value.statistics.accepted + caught.value.statistics.rejected == enough


# ---- stiff problems -----------------------------------------------------------------


@exact
def test_gradient_of_implicit_euler_is_that_of_its_linear_equations(gradient):
    # y' = A y + b sin(t), with eigenvalues down to -1e4
    y0, t, _, bias = problem((0.0, 0.1, 0.3, 0.8))
    (rates,) = wanting(double(-1e4, -30.0, 0.5))
    mix = torch.linalg.qr(randn(3, 3)).Q
    matrix = mix @ torch.diag(rates) @ mix.T
    ys = [y0]
    for start, stop in pairwise(t):
        h = stop - start
        right = ys[-1] + h * torch.sin(stop) * bias
        system = torch.eye(3, dtype=torch.float64) - h * matrix
        ys.append(torch.linalg.solve(system, right.T).T)
    theirs = grad(outcome(torch.stack(ys)), (y0, t, rates, bias), retain_graph=True)
    solved, _ = odeint(
        lambda t, y: y @ matrix.T + torch.sin(t) * bias,
        y0,
        t,
        method="implicit_euler",
        gradient=gradient,
        **TIGHT,
    )
    agree(solved, torch.stack(ys), rtol=1e-8, atol=1e-8)
    ours = grad(outcome(solved), (y0, t, rates, bias))
    agree(ours, theirs, rtol=1e-8, atol=1e-8)


# ---- f of all kinds -----------------------------------------------------------------


@exact
@every_method
def test_checkpoints_of_ones_own_inside_f(gradient, method):
    arguments = problem()

    def saving(weight, bias):
        plain = field(weight, bias)
        return lambda t, y: checkpoint(plain, t, y, use_reentrant=False) - y

    def simple(weight, bias):
        plain = field(weight, bias)
        return lambda t, y: plain(t, y) - y

    options = {"method": method, "gradient": gradient}
    found = gradients(*arguments, f=saving, **options)
    agree(found, gradients(*arguments, f=simple, method=method))


def hamiltonian(weight, bias):
    """A field that is itself a gradient: y' = J grad H(y), H a small network."""

    def f(t, y):
        with torch.enable_grad():
            y = y if y.requires_grad else y.detach().requires_grad_()
            energy = torch.tanh(y @ weight.T + bias).square().sum()
            (slope,) = grad(energy, y, create_graph=True)
        return slope.flip(1) * double(1, 0, -1)

    return f


@every_gradient
@pytest.mark.parametrize("wanted", [False, True])
def test_right_hand_side_may_take_gradients_itself(gradient, wanted):
    y0, t, weight, bias = problem((0.0, 0.5, 2.0))
    y0 = y0.detach().requires_grad_(wanted)
    options = {"params": (weight, bias)} if gradient == "adjoint" else {}
    asked = (y0, weight, bias) if wanted else (weight, bias)
    f, accuracy = hamiltonian(weight, bias), {"rtol": 1e-8, "atol": 1e-8}
    ys, stats = odeint(f, y0, t, gradient=gradient, **options, **accuracy)
    assert stats.backward_evaluations == 0
    found = grad(outcome(ys), asked)
    with torch.no_grad():
        states = odeint(f, y0, t, **accuracy)[0]
    agree(ys, states)
    reference = unrolled(y0, t[[0, 2]], f, RK4, [0.05] * 40)
    loss = torch.stack([y0, reference[10], reference[-1]])
    theirs = grad(outcome(loss), asked)
    agree(found, theirs, rtol=1e-4, atol=1e-4)


def test_times_in_single_precision_that_want_a_gradient_change_no_step():
    y0, t = randn(1, 2), torch.tensor([1e5, 1e5 + 1.0])

    def fast(t, y):
        return 50 * oscillator(t, y)

    expected, first = odeint(fast, y0, t)
    found, second = odeint(fast, y0, t.clone().requires_grad_())
    agree(found.detach(), expected, rtol=1e-8, atol=1e-8)
    agree(second.steps, first.steps, rtol=1e-8, atol=0)
