"""The same gradients by torchdiffeq, torchode and diffrax, in `.venv-bench` alone.

All take a step anew when the error is above 1, and choose its size as we do: 0.9 over
the fifth root of the error, between a fifth and ten times the last one.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffrax
import torchdiffeq
import torchode
from cases import DOPRI5, ODES, RK4, STEPS, Case
from methods import Map, Method, Solve
from ode import DIFFRAX, TORCHDIFFEQ, interval
from torch import Tensor, nn

DOPRI = (DOPRI5,)


def with_torchdiffeq(adjoint: bool, **rest: Any) -> Solve:
    """One norm for the whole batch; at 1 it interpolates what lies beyond."""
    integrate = torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint

    def solve(case: Case, f: Map, tolerance: float) -> Tensor:
        parameters = {"adjoint_params": case.parameters} if adjoint else {}
        ys = integrate(
            f,
            case.x,
            interval(case),
            method=case.kind,
            rtol=tolerance,
            atol=tolerance / 10,
            options={"step_size": 1 / STEPS} if case.kind == RK4 else None,
            **parameters,
            **rest,
        )
        return ys[-1]

    return solve


class Module(nn.Module):
    """A case's derivative as a module, which is how torchode finds its parameters."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.leaves = case, nn.ParameterList(case.parameters)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        """The derivative, at a time for each sample."""
        return replace(self.case, parameters=tuple(self.leaves)).f(t, z)


def with_torchode(gradient: Callable[..., Any]) -> Solve:
    """Torchode: each sample has steps and a norm of its own."""

    def solve(case: Case, f: Map, tolerance: float) -> Tensor:
        term = torchode.ODETerm(Module(case), with_stats=False)
        step = torchode.Dopri5(term=term)
        control = torchode.IntegralController(
            atol=tolerance / 10, rtol=tolerance, term=term
        )
        start, end = interval(case)[:, None].expand(2, len(case.x))
        problem = torchode.InitialValueProblem(case.x, start, end, None)
        return gradient(term, step, control).solve(problem).ys[:, -1]

    return solve


def through_steps(term: Any, step: Any, control: Any) -> Any:
    """Autograd, with step sizes that are constants as they are in torchdiffeq."""
    return torchode.AutoDiffAdjoint(
        step, control, backprop_through_step_size_control=False
    )


SEMINORM = {"adjoint_options": {"norm": "seminorm"}}
#: As in `methods.METHODS`. The seminorm leaves the parameters' gradients out of the
#: error. Torchode's first adjoint has them for each sample, the joint one for all.
TORCH: list[Method] = [
    (*TORCHDIFFEQ[0], ODES, with_torchdiffeq(adjoint=False)),
    (*TORCHDIFFEQ[1], ODES, with_torchdiffeq(adjoint=True)),
    ("torchdiffeq", "adjoint, seminorm", DOPRI, with_torchdiffeq(True, **SEMINORM)),
    ("torchode", "backprop", DOPRI, with_torchode(through_steps)),
    ("torchode", "adjoint", DOPRI, with_torchode(torchode.BacksolveAdjoint)),
    ("torchode", "joint adjoint", DOPRI, with_torchode(torchode.JointBacksolveAdjoint)),
]


def with_diffrax(adjoint: Any, most: int) -> Any:
    """Diffrax on the whole batch: one norm, and a first step of 0.01."""

    def solve(f: Any, case: Case, size: float, leaves: Any, tolerance: Any) -> Any:
        *parameters, x = leaves
        found = diffrax.diffeqsolve(
            diffrax.ODETerm(f),
            diffrax.Dopri5(),
            0.0,
            1.0,
            None,
            x,
            parameters,
            stepsize_controller=diffrax.PIDController(
                rtol=tolerance, atol=tolerance / 10
            ),
            adjoint=adjoint,
            max_steps=most,
        )
        # one evaluation at the start, and the last of a step is the next one's first
        return found.ys[-1], 1 + 6 * found.stats["num_steps"]

    return solve


#: As in `peers.JAX`. The memory of the first grows with the root of the steps allowed.
JAX: list[Method] = [
    (*DIFFRAX, DOPRI, with_diffrax(diffrax.RecursiveCheckpointAdjoint(), 64)),
    ("diffrax", "adjoint", DOPRI, with_diffrax(diffrax.BacksolveAdjoint(), 64)),
]
