"""What odeint refuses before it calls f, and in which words."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from implicit_layers import odeint

pytestmark = pytest.mark.filterwarnings("error")
METHODS = ["euler", "midpoint", "rk4", "dopri5", "implicit_euler"]
T = torch.tensor([0.0, 1.0])
Y = torch.zeros(2, 3)


def never(t, y):
    raise AssertionError("f was called")


class Never(nn.Module):
    def forward(self, t, y):
        raise AssertionError("f was called")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
@pytest.mark.parametrize(
    ("y0", "error", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.long), TypeError, "y0.*int64.*float"),
        (torch.zeros(2, 3, dtype=torch.complex64), TypeError, "y0.*complex64.*float"),
        (np.zeros((2, 3)), TypeError, "y0.*ndarray.*tensor"),
        ([0.0], TypeError, "y0.*list.*tensor"),
        (torch.tensor(1.0), ValueError, "y0.*dimension.*batch"),
        (torch.tensor([[0, np.nan]]), ValueError, "y0.*NaN"),
        (torch.tensor([[0, -np.inf]]), ValueError, "y0.*infinity"),
    ],
    ids=str,
)
def test_bad_start_is_refused_before_f_is_called(method, gradient, y0, error, message):
    if (method, gradient) == ("implicit_euler", "adjoint"):
        gradient = "backprop"
    with pytest.raises(error, match=message):
        odeint(Never(), y0, T, method=method, gradient=gradient)


@pytest.mark.xfail(reason="half precision is let in")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused_before_f_is_called(dtype):
    with pytest.raises((TypeError, ValueError), match=r"y0.*float16"):
        odeint(never, Y.to(dtype), T)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("t", "error", "message"),
    [
        ([0.0, 1.0], TypeError, "t is list.*tensor of times"),
        (np.array([0.0, 1.0]), TypeError, "t is ndarray.*tensor of times"),
        (1.0, TypeError, "t is float.*tensor of times"),
        (torch.tensor([0, 1]), TypeError, "t is torch.int64.*floating"),
        (torch.tensor(1.0), ValueError, r"t.*shape \(\).*two times"),
        (torch.tensor([1.0]), ValueError, r"t.*shape \(1,\).*two times"),
        (torch.tensor([]), ValueError, r"t.*shape \(0,\).*two times"),
        (torch.zeros(2, 2), ValueError, r"t.*shape \(2, 2\).*two times"),
        (torch.tensor([0.0, 0.0]), ValueError, "t must.*strictly rising.*falling"),
        (torch.tensor([0.0, 1.0, 1.0]), ValueError, "t must.*strictly rising"),
        (torch.tensor([0.0, 1.0, 0.5]), ValueError, "t must.*strictly rising"),
        (torch.tensor([0.0, -1.0, -0.5]), ValueError, "t must.*strictly rising"),
        (torch.tensor([0.0, math.nan, 1.0]), ValueError, "t must be finite"),
        (torch.tensor([0.0, math.inf]), ValueError, "t must be finite"),
        (torch.tensor([-math.inf, 0.0]), ValueError, "t must be finite"),
    ],
    ids=str,
)
def test_bad_times_are_refused_before_f_is_called(method, t, error, message):
    with pytest.raises(error, match=message):
        odeint(never, Y, t, method=method)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "rk45"},
            "method is 'rk45'.*euler.*midpoint.*rk4.*dopri5.*implicit",
        ),
        ({"method": "RK4"}, "method is 'RK4'"),
        ({"method": None}, "method is None"),
        ({"gradient": "autograd"}, "gradient is 'autograd'.*backprop.*checkpoint.*adj"),
        ({"gradient": None}, "gradient is None"),
        ({"rtol": -1e-3}, "rtol is -0.001"),
        ({"rtol": math.nan}, "rtol is nan"),
        ({"rtol": math.inf}, "rtol is inf"),
        ({"atol": 0.0}, "atol 0.0.*positive"),
        ({"atol": -1e-3}, "atol -0.001"),
        ({"atol": math.nan}, "atol nan"),
        ({"atol": math.inf}, "atol inf"),
        ({"step_size": 0.1}, "dopri5 chooses.*step_size.*rk4"),
        ({"step_size": 0.0, "method": "rk4"}, "step_size must be positive.*0.0"),
        ({"step_size": -0.1, "method": "euler"}, "step_size must be positive.*-0.1"),
        ({"step_size": math.nan, "method": "midpoint"}, "step_size must.*nan"),
        ({"step_size": math.inf, "method": "implicit_euler"}, "step_size must.*inf"),
        ({"max_steps": 0}, "max_steps.*0"),
        ({"max_steps": -5}, "max_steps.*-5"),
        ({"max_steps": 2.5}, "max_steps.*2.5"),
        ({"method": "implicit_euler", "gradient": "adjoint"}, "stiff.*checkpoint"),
        ({"gradient": "adjoint"}, "adjoint.*nn.Module.*params"),
    ],
    ids=str,
)
@pytest.mark.parametrize("tape", [False, True])
def test_bad_option_is_refused_before_f_is_called(options, message, tape):
    with torch.set_grad_enabled(tape), pytest.raises(ValueError, match=message):
        odeint(never, Y, T, **options)


@pytest.mark.xfail(reason="params is not checked")
@pytest.mark.parametrize("params", [[3.0], [torch.zeros(2), None], "ab"])
def test_params_that_are_no_tensors_are_refused_before_f_is_called(params):
    with pytest.raises((TypeError, ValueError), match="params"):
        odeint(never, Y, T, gradient="adjoint", params=params)


@pytest.mark.xfail(reason="a tensor alone is taken for a list of its rows")
@pytest.mark.parametrize("shape", [(3,), (1,), (3, 2)])
def test_a_tensor_alone_is_no_params(shape):
    with pytest.raises((TypeError, ValueError), match="params"):
        odeint(never, Y, T, gradient="adjoint", params=torch.zeros(shape))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
@pytest.mark.parametrize(
    ("f", "error", "message"),
    [
        (lambda t, y: y[:, :2], ValueError, r"shape.*2, 2.*2, 3"),
        (lambda t, y: y[0], ValueError, "shape"),
        (lambda t, y: y.sum(1, keepdim=True), ValueError, "shape"),  # would broadcast
        (lambda t, y: t, ValueError, "shape"),
        (lambda t, y: y.double(), ValueError, "dtype.*float64.*float32"),
        (lambda t, y: y.to("meta"), ValueError, "device.*meta.*cpu"),
        (lambda t, y: y.detach().numpy(), TypeError, "f.*ndarray.*tensor"),
        (lambda t, y: None, TypeError, "f.*NoneType.*tensor"),
        (lambda t, y: (y, y), TypeError, "f.*tuple.*tensor"),
    ],
)
def test_something_else_than_a_derivative_is_refused_at_once(
    method, gradient, f, error, message
):
    calls = []

    def counted(t, y):
        calls.append(t)
        return f(t, y)

    options = {"params": ()} if gradient == "adjoint" else {}
    if (method, gradient) == ("implicit_euler", "adjoint"):
        options, gradient = {}, "backprop"
    with pytest.raises(error, match=message):
        odeint(counted, Y, T, method=method, gradient=gradient, **options)
    assert len(calls) == 1


def test_options_have_names():
    with pytest.raises(TypeError, match="positional"):
        odeint(never, Y, T, "rk4")


def test_valid_extremes_are_not_refused():
    y0 = torch.full((1, 2), 3e38)
    ys, _ = odeint(lambda t, y: 0 * y, y0, T, rtol=0.0, atol=1e-3)
    assert torch.equal(ys[-1], y0)
    _, stats = odeint(never_moves, Y, T, method="rk4", step_size=1e3, max_steps=1)
    assert stats.accepted == 1


def never_moves(t, y):
    return torch.zeros_like(y)
