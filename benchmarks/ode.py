"""This book's ways to compute the gradient of where a differential equation ends.

A method is as in methods.py, and its tolerance is the relative one; the absolute one is
a tenth of it.
"""

from collections.abc import Callable

import torch
from cases import ODES, RK4, STEPS, Case
from methods import Map, Method, Solve
from torch import Tensor

from implicit_layers import odeint

BACKPROP, CHECKPOINT = ("ours", "backprop"), ("ours", "checkpoint")
ADJOINT = ("ours", "adjoint")
TORCHDIFFEQ = ("torchdiffeq", "backprop"), ("torchdiffeq", "adjoint")
DIFFRAX = ("diffrax", "checkpoint")


def interval(case: Case) -> Tensor:
    """Where every method starts, and where it ends."""
    return torch.tensor([0.0, 1.0], dtype=case.x.dtype)


def ours(gradient: str) -> Solve:
    """`odeint` with one of its gradients."""

    def solve(case: Case, f: Map, tolerance: float) -> Tensor:
        ys, _ = odeint(
            f,
            case.x,
            interval(case),
            method=case.kind,
            rtol=tolerance,
            atol=tolerance / 10,
            gradient=gradient,
            params=case.parameters if gradient == "adjoint" else None,
            step_size=1 / STEPS if case.kind == RK4 else None,
        )
        return ys[-1]

    return solve


def alone(case: Case, evaluations: int, products: int) -> Callable[[], object]:
    """So many evaluations and products of a case, with no solver between them.

    A product needs an evaluation on the tape, and goes on to the parameters.
    """
    f, x, v = case.f, case.x, case.v

    def run() -> object:
        with torch.no_grad():
            for _ in range(evaluations - products):
                f(0.0, x)
        values = [f(0.0, x) for _ in range(products)]
        return torch.autograd.grad(values, case.leaves, [v] * len(values))

    return run


#: As in `methods.METHODS`.
METHODS: list[Method] = [
    (*key, ODES, ours(key[1])) for key in (BACKPROP, CHECKPOINT, ADJOINT)
]
