"""odeint in use: memory, calls counted, what stays alive, the modes of autograd."""

import copy
from functools import partial

import pytest
import torch
from test_ode import ORDERS, Recorder, double, kicked, randn, van_der_pol
from test_ode_gradients import Field, field, outcome, problem, wanting
from torch import nn
from torch.autograd import grad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from implicit_layers import odeint
from implicit_layers.measure import saved_bytes

pytestmark = pytest.mark.filterwarnings("error")
GRADIENTS = ["backprop", "checkpoint", "adjoint"]
PAIRS = [(m, g) for m in ORDERS for g in GRADIENTS]
PAIRS.remove(("implicit_euler", "adjoint"))
agree = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
every_gradient = pytest.mark.parametrize("gradient", GRADIENTS)
pairs = pytest.mark.parametrize(("method", "gradient"), PAIRS)
STATE = 10_000  # entries: large beside numbers and parameters


class Meter(TorchDispatchMode):
    """The bytes of all tensors that operations have made and nobody has dropped."""

    def __init__(self):
        super().__init__()
        self.storages, self.peak = [], 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage.nbytes() >= 8 * STATE:
                    self.storages.append((StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, self.live())
        return result

    def live(self):
        self.storages = [(ref, n) for ref, n in self.storages if not ref.expired()]
        return sum({ref.cdata: n for ref, n in self.storages}.values())


def memory(gradient, steps, method="rk4", t_wanted=False):
    """What the tape holds and what backward needs besides, in states."""
    (y0, scale) = wanting(randn(1, STATE), double(0.7))
    t = double(0, 1).requires_grad_(t_wanted)
    options = {} if gradient != "adjoint" else {"params": (scale,)}
    with Meter() as meter:
        ys, _ = odeint(
            lambda t, y: torch.sin(scale * torch.cos(y)),
            y0,
            t,
            method=method,
            step_size=1 / steps,
            gradient=gradient,
            **options,
        )
        held, meter.peak = meter.live(), 0
        ys[-1].sum().backward()
        return held / (8 * STATE), (meter.peak - held) / (8 * STATE)


# ---- memory -------------------------------------------------------------------------


def test_adjoint_has_the_same_memory_after_ten_steps_and_after_many():
    few, many = (memory("adjoint", steps) for steps in (10, 50))
    assert few[0] == many[0] <= 4  # ys and its first and last entry
    assert many[1] <= few[1] < 80


def test_saved_bytes_of_the_adjoint_do_not_grow_from_10_to_1000_evaluations():
    (y0, scale) = wanting(randn(1, 100), double(0.7))
    found = {}
    for gradient in GRADIENTS:
        for steps in (10, 1000):
            options = {"params": (scale,)} if gradient == "adjoint" else {}

            def forward(gradient=gradient, steps=steps, options=options):
                _, stats = odeint(
                    lambda t, y: torch.sin(scale * y),
                    y0,
                    double(0, 1),
                    method="euler",
                    step_size=1 / steps,
                    gradient=gradient,
                    **options,
                )
                assert steps <= stats.evaluations <= steps + 1

            found[gradient, steps] = saved_bytes(forward, exclude=(y0, scale))
    assert found["adjoint", 10] == found["adjoint", 1000] < 3000
    state, more = 800, 990
    assert 1.9 * more * state < found["backprop", 1000] - found["backprop", 10]
    assert found["checkpoint", 1000] < 1.1 * 1000 * state


@pytest.mark.parametrize("method", ["rk4", "midpoint"])
def test_checkpoint_holds_one_state_a_step_and_backprop_several(method):
    few, many = (memory("checkpoint", steps, method)[0] for steps in (5, 35))
    assert 0.9 <= (many - few) / 30 <= 1.1
    few, many = (memory("backprop", steps, method)[0] for steps in (5, 35))
    assert (many - few) / 30 > {"rk4": 8, "midpoint": 4}[method]


def test_backward_of_checkpoint_needs_one_step_more_and_not_all():
    few, many = (memory("checkpoint", steps)[1] for steps in (5, 40))
    assert many <= few + 2
    assert few < 40


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])
def test_dopri5_holds_as_little(gradient):
    states = []
    for end in (2.0, 20.0):
        y0 = randn(1, STATE).requires_grad_()
        with Meter() as meter:
            ys, stats = odeint(
                lambda t, y: torch.sin(torch.cos(y) + t),
                y0,
                double(0, end),
                gradient=gradient,
            )
            states.append((meter.live() / (8 * STATE), stats.accepted))
        assert ys.requires_grad
    (few, short), (many, long) = states
    assert long > short + 10
    a_step = (many - few) / (long - short)
    assert (0.9 < a_step < 1.2) if gradient == "checkpoint" else a_step > 10


# ---- what stays alive ---------------------------------------------------------------


@pairs
def test_fifty_steps_of_training_leave_nothing_behind(live_tensors, method, gradient):
    f, t = Field(), double(0, 0.3, 0.5)
    counts = []
    for steps in (5, 45):
        for step in range(steps):
            ys, stats = odeint(f, randn(2, 3), t, method=method, gradient=gradient)
            if step % 5:  # and now and then a result is not used
                f.zero_grad()
                ys.square().sum().backward()
        del ys
        counts.append(live_tensors())
    assert counts[0] == counts[1]
    assert all(type(h) is float for h in stats.steps)


@pairs
def test_start_times_and_module_are_left_as_they_were(method, gradient):
    f, y0, t = Field(), randn(2, 3), double(0, 0.5)
    before = [x.clone() for x in (y0, t, *f.parameters())]
    ys, _ = odeint(f, y0, t, method=method, gradient=gradient)
    ys.sum().backward()
    assert all(map(torch.equal, before, (y0, t, *f.parameters())))
    assert not y0.requires_grad
    assert y0.grad is None
    ys.detach().zero_()  # the result is no view of the start
    assert torch.equal(y0, before[0])


# ---- calls --------------------------------------------------------------------------


@pairs
def test_evaluations_are_counted_forward_and_backward(method, gradient):
    y0, t, weight, bias = problem((0, 0.3, 1.0))
    f = Recorder(field(weight, bias))
    options = {"params": (weight, bias)} if gradient == "adjoint" else {}
    ys, stats = odeint(f, y0, t, method=method, gradient=gradient, **options)
    forward = f.calls
    assert (stats.evaluations, stats.backward_evaluations) == (forward, 0)
    outcome(ys).backward(retain_graph=True)
    assert stats.evaluations == forward
    backward = stats.backward_evaluations
    assert backward == f.calls - forward
    if gradient == "backprop":
        assert backward == 0
    elif gradient == "checkpoint":
        assert 0 < backward <= forward + stats.accepted
    else:
        assert backward > 0
    outcome(ys).backward()
    assert stats.evaluations == forward
    assert stats.backward_evaluations == f.calls - forward
    assert stats.backward_evaluations >= 2 * backward - 7


def test_rejected_steps_are_not_computed_again():
    y0 = double(0.1)[None].requires_grad_()
    f = Recorder(kicked)
    ys, stats = odeint(f, y0, double(0, 3), gradient="checkpoint", rtol=1e-3)
    assert stats.rejected > 2
    ys.sum().backward()
    assert stats.backward_evaluations <= 7 * stats.accepted + 1


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])
def test_gradient_changes_no_state_and_no_step(gradient):
    y0, t = double(2.0, 0.0)[None], double(0, 1, 5)
    with torch.no_grad():
        expected, plain = odeint(van_der_pol, y0, t)
    (wanted, times) = wanting(y0, t)
    ys, stats = odeint(van_der_pol, wanted, times, gradient=gradient)
    agree(ys.detach(), expected)
    agree(stats.steps, plain.steps)
    assert (stats.rejected, stats.evaluations) == (plain.rejected, plain.evaluations)


@pairs
def test_same_call_gives_the_same_bits(method, gradient):
    results = []
    for _ in range(2):
        y0, t, weight, bias = problem((0, 0.3, 1.0))
        options = {"params": (weight, bias)} if gradient == "adjoint" else {}
        f = field(weight, bias)
        ys, _ = odeint(f, y0, t, method=method, gradient=gradient, **options)
        results.append((ys, *grad(outcome(ys), (y0, t, weight, bias))))
    assert all(map(torch.equal, *results))


# ---- modes --------------------------------------------------------------------------


@pairs
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_states_are_the_same_without_gradients(method, gradient, mode):
    f, (y0, t) = Field(), problem()[:2]
    expected, with_tape = odeint(f, y0, t, method=method)
    with mode():
        ys, stats = odeint(f, y0, t, method=method, gradient=gradient)
        made_here, _ = odeint(f, y0 + 0, t + 0, method=method, gradient=gradient)
    assert not ys.requires_grad
    # with a tape, implicit Euler takes one step of Newton more
    tolerance = 1e-4 if method == "implicit_euler" else 1e-10
    agree(ys, expected.detach(), rtol=tolerance, atol=tolerance)
    agree(made_here, ys)
    assert stats.accepted == with_tape.accepted
    assert stats.backward_evaluations == 0


class Flow(nn.Module):
    """A layer: the state at the end."""

    def __init__(self, **options):
        super().__init__()
        self.field, self.options = Field(), options
        self.register_buffer("t", double(0, 0.3, 0.6))

    def forward(self, y):
        return odeint(self.field, y, self.t, **self.options)[0][-1]


@pairs
def test_copy_of_a_module_has_gradients_of_its_own(method, gradient):
    flow, y = Flow(method=method, gradient=gradient), randn(2, 3)
    flow(y).sum().backward()
    other = copy.deepcopy(flow)
    other.zero_grad()
    loss = other(y).sum()
    loss.backward()
    for ours, theirs in zip(flow.parameters(), other.parameters(), strict=True):
        assert ours is not theirs
        assert torch.equal(ours.grad, theirs.grad)
    with torch.no_grad():
        other.field.weight.mul_(2)
    assert not torch.equal(other(y), flow(y))
    assert other.state_dict().keys() == flow.state_dict().keys()


@pairs
def test_two_flows_in_one_graph(method, gradient):
    y0, t, weight, bias = problem((0, 0.2, 0.5))

    def twice(gradient):
        options = {"params": (weight, bias)} if gradient == "adjoint" else {}
        options |= {"method": method, "gradient": gradient, "rtol": 1e-8, "atol": 1e-8}
        options |= {} if method == "dopri5" else {"step_size": 0.02}
        f = field(weight, bias)
        first, _ = odeint(f, y0, t, **options)
        second, _ = odeint(f, torch.sin(first[-1]), t, **options)
        loss = outcome(first) + outcome(second) + (first * second).sum()
        return grad(loss, (y0, t, weight, bias))

    tolerance = {"euler": 5e-2, "midpoint": 1e-3}.get(method, 1e-5)
    tolerance = tolerance if gradient == "adjoint" else 1e-9
    agree(twice(gradient), twice("backprop"), rtol=tolerance, atol=tolerance)


@pairs
def test_graph_that_is_kept_gives_the_same_gradient_again(method, gradient):
    y0, t, weight, bias = problem()
    options = {"params": (weight, bias)} if gradient == "adjoint" else {}
    ys, _ = odeint(
        field(weight, bias), y0, t, method=method, gradient=gradient, **options
    )
    asked = (y0, t, weight, bias)
    first, other, second = (
        grad(loss, asked, retain_graph=True)
        for loss in (outcome(ys), ys[1].sum(), outcome(ys))
    )
    assert all(map(torch.equal, first, second))
    assert not torch.equal(first[0], other[0])
    outcome(ys).backward()
    with pytest.raises(RuntimeError, match="second time"):
        ys.sum().backward()


@every_gradient
def test_backward_of_one_of_many_graphs_does_not_need_the_others(gradient):
    f, t = Field(), double(0, 0.6)
    starts = [randn(2, 3, seed=i).requires_grad_() for i in range(3)]
    ends = [odeint(f, y, t, gradient=gradient)[0][-1] for y in starts]
    # in another order, and one of them not at all
    later = grad(outcome(ends[2]), starts[2])[0]
    first = grad(outcome(ends[0]), starts[0])[0]
    for y, found in ((starts[0], first), (starts[2], later)):
        end = odeint(f, y, t, gradient=gradient)[0][-1]
        agree(grad(outcome(end), y)[0], found)


@every_gradient
def test_backward_while_another_is_under_way(gradient):
    # a hook in the middle of one backward pass that runs another one
    f, t = Field(), double(0, 0.6)
    y0 = randn(2, 3).requires_grad_()

    def end(y):
        return odeint(f, y, t, gradient=gradient)[0][-1]

    expected = grad(end(end(y0)).sum(), y0)[0]
    middle, extra = end(y0), end(y0).sum()
    middle.register_hook(lambda v: v + 0 * grad(extra, y0)[0])
    agree(grad(end(middle).sum(), y0)[0], expected)


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])
def test_second_derivative_within_training(gradient):
    # a penalty on the gradient, as in a loss
    f = Field()
    results = []
    for way in ("backprop", gradient):
        y0 = randn(2, 3).requires_grad_()
        ys, _ = odeint(f, y0, double(0, 0.4, 1), gradient=way)
        (slope,) = grad(ys.sum(), y0, create_graph=True)
        f.zero_grad()
        (outcome(ys) + slope.square().sum()).backward()
        results.append([y0.grad, *(p.grad.clone() for p in f.parameters())])
    agree(*results)
