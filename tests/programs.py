"""What the tests of quadratic programs share: programs, and a referee for each."""

from functools import partial

import cvxpy
import numpy as np
import torch
from layers import numbers

from implicit_layers import QPSolution, solve_qp

NAMES = ["Q", "p", "G", "h", "A", "b"]
MATRICES = ["Q", "G", "A"]
FIELDS = ["z", "inequality_duals", "equality_duals"]
ignoring = partial(solve_qp, on_failure="ignore")


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def apply(matrix, z):
    """The matrix, or each of a batch, times each row of z."""
    return (matrix @ z[..., None])[..., 0]


def program(batch=3, n=4, m=5, q=2, *, shared=(), rank=None, seed=0):
    """A random program that is feasible, as a dictionary; definite without a `rank`.

    Arguments whose names are in `shared` have no batch dimension.
    """

    def random(name, *shape):
        lead = () if name in shared else (batch,)
        return numbers(*lead, *shape, seed=seed + 10 * NAMES.index(name))

    root = random("Q", n, n if rank is None else rank)
    Q = root @ root.mT / n + (0.1 * torch.eye(n).double() if rank is None else 0)
    G, A, b = random("G", m, n), random("A", q, n), random("b", q)
    inside = numbers(batch, n, seed=seed + 100)
    inside = inside + apply(torch.linalg.pinv(A), b - apply(A, inside))
    h = apply(G, inside) + 0.1 * numbers(batch, m, seed=seed + 101).abs()
    h = h.amax(0) if "h" in shared else h
    return dict(zip(NAMES, (Q, random("p", n), G, h, A, b), strict=True))


def fields(solution):
    """z and both kinds of multipliers."""
    return tuple(getattr(solution, name) for name in FIELDS)


def stacked(arguments, names, make):
    """The program with more constraints of a kind: what `make` gives of those there."""
    return arguments | {
        name: torch.cat([arguments[name], make(arguments[name])], dim=1)
        for name in names
    }


def boxed(arguments, width=5.0):
    """The program with -width <= z <= width as well: bounded."""
    eye = torch.eye(arguments["p"].shape[-1]).double()
    G, h = arguments["G"], arguments["h"]
    G = torch.cat([G, torch.cat([eye, -eye]).expand(*G.shape[:-2], -1, -1)], dim=-2)
    bounds = torch.full((*h.shape[:-1], 2 * len(eye)), width).double()
    return arguments | {"G": G, "h": torch.cat([h, bounds], dim=-1)}


def sample(given, i):
    """The i-th program of a batch, or its solution."""
    if isinstance(given, QPSolution):
        return QPSolution(**{name: x[i] for name, x in vars(given).items()})
    return {
        name: x if x.ndim == (2 if name in MATRICES else 1) else x[i]
        for name, x in given.items()
    }


def solved(*given, **arguments):
    """The solution, of which all must have converged."""
    solution = solve_qp(*given, **arguments)
    assert solution.converged.all()
    return solution


def wanting(arguments):
    """Copies that want gradients."""
    return {name: x.detach().clone().requires_grad_() for name, x in arguments.items()}


def referee(Q, p, G, h, A, b):
    """z and both kinds of multipliers by cvxpy, for one program."""
    z = cvxpy.Variable(len(p))
    constraints = [G.numpy() @ z <= h.numpy(), A.numpy() @ z == b.numpy()]
    cost = cvxpy.quad_form(z, cvxpy.psd_wrap(Q.numpy())) / 2 + p.numpy() @ z
    tight = {name: 1e-12 for name in ("tol_gap_abs", "tol_gap_rel", "tol_feas")}
    problem = cvxpy.Problem(cvxpy.Minimize(cost), constraints)
    problem.solve(cvxpy.CLARABEL, **tight)
    assert problem.status in ("optimal", "optimal_inaccurate")
    return z.value, *(constraint.dual_value for constraint in constraints)


def violation(solution, Q, p, G, h, A, b):
    """The largest violation of a KKT condition of one program, in NumPy."""
    given = (Q, p, G, h, A, b, *fields(solution))
    Q, p, G, h, A, b, z, dual, y = (x.detach().numpy() for x in given)
    slack = h - G @ z
    return max(
        np.abs((Q + Q.T) @ z / 2 + p + G.T @ dual + A.T @ y).max(),
        *(np.maximum(-x, 0).max(initial=0) for x in (slack, dual)),
        np.abs(A @ z - b).max(initial=0),
        np.abs(dual * slack).max(initial=0),
    )


def worst(solution, arguments):
    """The largest violation in a batch."""
    return max(
        violation(sample(solution, i), **sample(arguments, i))
        for i in range(len(solution.z))
    )
