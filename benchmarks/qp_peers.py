"""The same programs by qpth and cvxpylayers; qpth is in `.venv-bench` alone."""

from functools import cache
from typing import Any

import cvxpy
import torch
from cvxpylayers.torch import CvxpyLayer
from qp import CVXPYLAYERS, QPTH, TIGHT, Method, Solve
from qpth.qp import QPFunction
from torch import Tensor


def qpth(*arguments: Tensor) -> Tensor:
    """Qpth as it is, but silent; without equations it wants two empty tensors."""
    none = [arguments[0].new_empty(0)] * (6 - len(arguments))
    return QPFunction(verbose=-1)(*arguments, *none)


@cache
def layer(n: int, m: int, q: int) -> CvxpyLayer:
    """The program as cvxpylayers takes it, with a root of Q for a parameter."""
    z, root, p = cvxpy.Variable(n), cvxpy.Parameter((n, n)), cvxpy.Parameter(n)
    G, h = cvxpy.Parameter((m, n)), cvxpy.Parameter(m)
    parameters, constraints = [root, p, G, h], [G @ z <= h]
    if q:
        A, b = cvxpy.Parameter((q, n)), cvxpy.Parameter(q)
        parameters += [A, b]
        constraints.append(A @ z == b)
    goal = cvxpy.Minimize(cvxpy.sum_squares(root @ z) / 2 + p @ z)
    return CvxpyLayer(cvxpy.Problem(goal, constraints), parameters, [z])


def cvxpylayers(derivative: str = "lsqr", **settings: Any) -> Solve:
    """Cvxpylayers, the linear systems of its gradient, and settings of its solver.

    The root of Q is on the tape.
    """

    def solve(Q: Tensor, *arguments: Tensor) -> Tensor:
        sizes = [vector.shape[-1] for vector in arguments[::2]]
        root = torch.linalg.cholesky(Q).mT
        program = layer(*sizes, *[0] * (3 - len(sizes)))
        # without a gradient the solver gets this and does not know it
        mode = {"mode": derivative} if torch.is_grad_enabled() else {}
        return program(root, *arguments, solver_args={**settings, **mode})[0]

    return solve


PEERS: list[Method] = [
    (*QPTH, True, qpth),
    (*CVXPYLAYERS, False, cvxpylayers()),
    (*TIGHT, False, cvxpylayers("dense", eps=1e-9, max_iters=100_000)),
]
