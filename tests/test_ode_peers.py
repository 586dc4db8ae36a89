"""The same trajectories and gradients from torchdiffeq, where it is installed."""

from functools import partial

import pytest
import torch
from test_ode import double
from test_ode_gradients import Field, outcome, wanting
from torch.autograd import grad

from implicit_layers import odeint

torchdiffeq = pytest.importorskip("torchdiffeq")
agree = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def problem(end, steps=4):
    times = end * torch.linspace(0, 1, steps + 1, dtype=torch.float64) ** 1.2
    return *wanting(double(0.4, -1, 2)[None], times), Field()


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "dopri5"])
@pytest.mark.parametrize("end", [1.0, -1.0])
@pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])
def test_trajectory_and_gradient_are_those_of_torchdiffeq(method, end, gradient):
    y0, t, f = problem(end, steps=50 if method == "rk4" else 4)
    asked = (y0, t, *f.parameters())
    # its rk4 is another one of order 4: the same only in the limit of small steps
    near = {"rtol": 1e-6, "atol": 1e-6} if method in ("rk4", "dopri5") else {}
    ours, _ = odeint(f, y0, t, method=method, gradient=gradient, **TIGHT)
    theirs = torchdiffeq.odeint(f, y0, t, method=method, **TIGHT)
    agree(ours, theirs, **near)
    agree(grad(outcome(ours), asked), grad(outcome(theirs), asked), **near)


@pytest.mark.parametrize("end", [1.0, -1.0])
def test_adjoint_is_that_of_torchdiffeq(end):
    y0, t, f = problem(end)
    asked = (y0, t, *f.parameters())
    ours, _ = odeint(f, y0, t, gradient="adjoint", **TIGHT)
    theirs = torchdiffeq.odeint_adjoint(f, y0, t, **TIGHT)
    ours, theirs = (grad(outcome(ys), asked) for ys in (ours, theirs))
    agree(ours, theirs, rtol=1e-7, atol=1e-7)
