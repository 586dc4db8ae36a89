"""Quadratic programs: the minimisers of a batch, and the gradients of every argument.

All is in float64, and the loss is the sum of v * z with fixed weights v. The reference
asks none of the methods: at the right active set the minimiser is the solution of one
linear system, and autograd goes through that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from measuring import in_turns, kept_bytes, spread
from scipy.optimize import nnls
from torch import Tensor
from torch.autograd import grad

from implicit_layers import solve_qp

OURS, QPTH = ("ours", "solve_qp"), ("qpth", "QPFunction")
CVXPYLAYERS = ("cvxpylayers", "defaults")
TIGHT = ("cvxpylayers", "1e-9, dense")
ARGUMENTS = ("Q", "p", "G", "h", "A", "b")
PASSES = ("forward", "both")
#: The largest relative error of a gradient, and of a minimiser, that is not marked.
EXACT = 1e-6
#: Slack or multiplier: the smallest with which a constraint is not weakly active.
CLEAR = 1e-6

#: From Q, p, G, h, and A, b if there are equations, to the minimisers.
Solve = Callable[..., Tensor]
#: Group, name, whether it also solves the programs that share matrices, the solver.
Method = tuple[str, str, bool, Solve]


@dataclass(frozen=True)
class Programs:
    """Minimise z'Qz / 2 + p'z subject to Gz <= h and Az = b, for a batch.

    Attributes
    ----------
    title
        As in the tables.
    arguments
        Leaves that require a gradient: Q, p, G, h, and A, b if there are equations.
    v
        Weights of the loss, of the shape of z.
    """

    title: str
    arguments: tuple[Tensor, ...]
    v: Tensor

    @property
    def shared(self) -> bool:
        """Whether the batch has one Q, one G and one A."""
        return self.arguments[0].ndim == 2


def programs(n: int, m: int, q: int, batch: int, shared: bool = False) -> Programs:
    """Random programs with n unknowns, m inequalities, q equations, a point inside."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    copies = () if shared else (batch,)
    root, G, A = (normal(*copies, rows, n) for rows in (n, m, q))
    inside, p, v = normal(3, batch, n)
    Q = root @ root.mT + 0.1 * torch.eye(n, dtype=torch.float64)
    room = torch.rand(batch, m, generator=random, dtype=torch.float64)
    h, b = ((matrix @ inside[:, :, None])[:, :, 0] for matrix in (G, A))
    arguments = (Q, p, G, h + room, A, b)[: 6 if q else 4]
    title = f"n = {n}" + (", shared" if shared else "")
    return Programs(title, tuple(x.requires_grad_() for x in arguments), v)


#: The numbers of unknowns, inequalities and equations, the batch; shared or not.
CASES = (
    (10, 10, 0, 100, False),
    (50, 50, 10, 64, False),
    (100, 100, 20, 16, False),
    (10, 10, 0, 100, True),
    (50, 50, 10, 64, True),
)


@dataclass(frozen=True)
class Reference:
    """What is true of the programs: minimisers, and gradients of the arguments."""

    z: Tensor
    gradients: tuple[Tensor, ...]


def active_rows(
    Q: Tensor, p: Tensor, G: Tensor, h: Tensor, A: Tensor, b: Tensor
) -> Tensor:
    """Which rows of G are active at the minimiser of one program, by least squares.

    In coordinates of the plane Az = b with the minimiser on it for origin, and Q for
    the norm, the program asks for the shortest w with Ew >= f. Non-negative least
    squares finds that (Lawson and Hanson 1974), the multipliers up to a factor.
    """
    n, q = len(p), len(b)
    system = torch.cat([torch.cat([Q, A.T], 1), torch.cat([A, A.new_zeros(q, q)], 1)])
    origin = torch.linalg.solve(system, torch.cat([-p, b]))[:n]
    along = torch.linalg.qr(A.T, mode="complete")[0][:, q:]
    factor = torch.linalg.cholesky(along.T @ Q @ along)
    E = -torch.linalg.solve_triangular(factor, (G @ along).T, upper=False)
    f = G @ origin - h
    target = np.append(np.zeros(len(E)), 1.0)
    return torch.from_numpy(nnls(torch.cat([E, f[None]]).numpy(), target)[0] > 0)


def reference(given: Programs) -> Reference:
    """Minimisers and gradients through the linear system at the active set.

    Raises
    ------
    ValueError
        If a multiplier or slack has not its sign, or is so small that the gradient
        is one-sided: then it is no reference.
    """
    batch, n = given.v.shape
    Q, p, G, h, *rest = given.arguments
    A, b = rest or (p.new_zeros(batch, 0, n), p.new_zeros(batch, 0))
    Q, G, A = (x.expand(batch, -1, -1) for x in (Q, G, A))
    m = h.shape[1]
    with torch.no_grad():
        each = zip(Q, p, G, h, A, b, strict=True)
        active = torch.stack([active_rows(*one) for one in each])
    C, d = torch.cat([G, A], 1), torch.cat([h, b], 1)
    on = torch.cat([active, torch.ones_like(b, dtype=torch.bool)], 1).double()
    # rows that are not active say that their multiplier is zero
    rows = C * on[:, :, None]
    upper = torch.cat([(Q + Q.mT) / 2, rows.mT], 2)
    lower = torch.cat([rows, torch.diag_embed(1 - on)], 2)
    right = torch.cat([-p, d * on], 1)
    solution = torch.linalg.solve(torch.cat([upper, lower], 1), right)
    z = solution[:, :n]
    slack = (h - (G @ z[:, :, None])[:, :, 0]).detach()
    least = torch.where(active, solution[:, n : n + m].detach(), slack).min().item()
    if not least > CLEAR:
        raise ValueError(
            f"{given.title}: the reference has a multiplier or slack of {least:.1e}"
        )
    return Reference(z.detach(), grad((z * given.v).sum(), given.arguments))


def ours(*arguments: Tensor) -> Tensor:
    """`solve_qp` as it is."""
    return solve_qp(*arguments).z


METHODS: list[Method] = [(*OURS, True, ours)]


def both_passes(given: Programs, solve: Solve) -> tuple[Tensor, ...]:
    """Forward and backward pass."""
    return grad((solve(*given.arguments) * given.v).sum(), given.arguments)


@torch.no_grad()
def forward(given: Programs, solve: Solve) -> Tensor:
    """The minimisers without a gradient."""
    return solve(*given.arguments)


def exactness(given: Programs, solve: Solve, truth: Reference) -> dict[str, Any]:
    """Relative error of the gradient of each argument, and how many samples are off."""
    z, gradients = forward(given, solve), both_passes(given, solve)
    off = (z - truth.z).norm(dim=1) > EXACT * truth.z.norm(dim=1)
    pairs = zip(ARGUMENTS, gradients, truth.gradients, strict=False)
    errors = {name: ((g - e).norm() / e.norm()).item() for name, g, e in pairs}
    return {"error": max(errors.values()), "errors": errors, "off": int(off.sum())}


def measured(
    given: Programs, methods: Sequence[Method], rounds: int
) -> list[dict[str, Any]]:
    """Time of the forward pass and of both, errors and memory; one row a method.

    cvxpylayers takes part in the first rounds alone, since one of its turns is as long
    as many of the others'.
    """
    truth, rows, runs = reference(given), {}, {}
    for group, name, everywhere, solve in methods:
        if everywhere or not given.shared:
            row = {"group": group, "name": name, **exactness(given, solve, truth)}
            if group != CVXPYLAYERS[0]:  # which keeps what it needs outside of torch
                kept = partial(solve, *given.arguments)
                row["bytes"] = kept_bytes(kept, exclude=given.arguments)
            for what, run in zip(PASSES, (forward, both_passes), strict=True):
                runs[group, name, what] = partial(run, given, solve)
            rows[group, name] = row
    few = max(rounds // 7, 1)
    seconds = in_turns(runs, few)
    others = {key: run for key, run in runs.items() if key[0] != CVXPYLAYERS[0]}
    for key, more in in_turns(others, rounds - few).items():
        seconds[key] += more
    for key, row in rows.items():
        row.update({what: spread(seconds[*key, what]) for what in PASSES})
    return list(rows.values())
