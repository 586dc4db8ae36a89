"""Ways to compute a case's gradient in PyTorch: this book's, and what people write.

A method is a function `solve(case, f, tolerance)` that returns z with its gradient.
What a tolerance means is the method's own business: run.py chooses it such that the
*gradients* are equally exact.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from cases import Case
from torch import Tensor
from torch.autograd import Function, grad

from implicit_layers import (
    Solution,
    anderson,
    broyden,
    fixed_point_iteration,
    implicit_fixed_point,
    newton,
)

Map = Callable[[Tensor], Tensor]
Solve = Callable[[Case, Map, float], Tensor]


# --- this book's ---


def ours(solver: Callable[..., Solution], **options: Any) -> Solve:
    """`implicit_fixed_point` with one of the module's solvers, and with options."""

    def solve(case: Case, f: Map, tolerance: float) -> Tensor:
        z, _ = implicit_fixed_point(
            f,
            torch.zeros_like(case.x),
            solver=solver,
            on_failure="ignore",
            atol=0.0,
            rtol=tolerance,
            max_iter=case.max_iter,
            **options,
        )
        return z

    return solve


def ours_newton(case: Case, f: Map, tolerance: float) -> Tensor:
    """`implicit_fixed_point` with `newton` and the closed form of the Jacobian."""
    (weight,) = case.parameters

    def jacobian(z: Tensor) -> Tensor:
        return (1 - f(z) ** 2)[:, :, None] * weight

    return ours(partial(newton, jacobian=jacobian))(case, f, tolerance)


def ours_in_place(case: Case, f: Map, tolerance: float) -> Tensor:
    """Plain iteration of a map that is written to touch memory as little as it can."""
    (weight,), x = case.parameters, case.x
    return ours(fixed_point_iteration)(
        case, lambda z: torch.addmm(x, z, weight.T).tanh_(), tolerance
    )


# --- what people write ---


def unrolled(case: Case, f: Map, tolerance: float) -> Tensor:
    """The plain loop, all of it on the tape; one norm for the batch."""
    z = torch.zeros_like(case.x)
    for _ in range(case.max_iter):
        z, before = f(z), z
        if (z - before).detach().norm() < tolerance:
            break
    return z


def newton_matrix(weight: Tensor, slope: Tensor) -> Tensor:
    """I - diag(slope) weight for each sample."""
    return torch.eye(len(weight)) - slope[:, :, None] * weight


def newton_loop(case: Case, tolerance: float) -> tuple[Tensor, Tensor | None]:
    """Batched Newton as chapter 1 finds it; z, and the last matrix that was made."""
    (weight,), x = case.parameters, case.x
    z, matrix = torch.tanh(x), None
    for _ in range(case.max_iter):
        u = z @ weight.T + x
        residual = torch.tanh(u) - z
        if residual.norm() < tolerance:
            break
        matrix = newton_matrix(weight, 1 / torch.cosh(u) ** 2)
        z = z + torch.linalg.solve(matrix, residual)
    return z, matrix


def unrolled_newton(case: Case, f: Map, tolerance: float) -> Tensor:
    """Newton's method, all of it on the tape."""
    return newton_loop(case, tolerance)[0]


def newton_hook(case: Case, f: Map, tolerance: float) -> Tensor:
    """Newton off the tape, f once on it, a hook that solves with the last matrix."""
    with torch.no_grad():
        z, matrix = newton_loop(case, tolerance)
    z = f(z)
    z.register_hook(lambda v: torch.linalg.solve(matrix.mT, v))
    return z


# The two solvers below serve forward and backward, so their rule is relative.


def popular_loop(f: Map, z: Tensor, tolerance: float, max_iter: int) -> Tensor:
    """Plain iteration until the relative change of the batch is small."""
    for _ in range(max_iter):
        z, before = f(z), z
        if (z - before).norm() < tolerance * (1e-5 + z.norm()):
            break
    return z


def popular_anderson(
    f: Map,
    z: Tensor,
    tolerance: float,
    max_iter: int,
    memory: int = 5,
    ridge: float = 1e-4,
) -> Tensor:
    """Anderson as commonly written: from the first step, the whole window each time.

    The weights come from the bordered system with ones around the Gram matrix of the
    residuals, on whose diagonal stands a ridge that knows nothing of their size.
    """
    batch, shape = len(z), z.shape
    inputs = torch.zeros(batch, memory, z[0].numel())
    outputs = torch.zeros_like(inputs)
    system = torch.zeros(batch, memory + 1, memory + 1)
    system[:, 0, 1:] = system[:, 1:, 0] = 1
    right = torch.zeros(batch, memory + 1, 1)
    right[:, 0] = 1
    for k in range(max_iter):
        slot, n = k % memory, min(k, memory)
        if k >= 2:
            residuals = outputs[:, :n] - inputs[:, :n]
            gram = torch.bmm(residuals, residuals.mT)
            system[:, 1 : n + 1, 1 : n + 1] = gram + ridge * torch.eye(n)
            solved = torch.linalg.solve(system[:, : n + 1, : n + 1], right[:, : n + 1])
            z = torch.bmm(solved[:, 1:].mT, outputs[:, :n]).view(shape)
        value = f(z)
        inputs[:, slot], outputs[:, slot] = z.flatten(1), value.flatten(1)
        if (value - z).norm() < tolerance * (1e-5 + value.norm()):
            break
        z = value
    return value


def popular(solver: Callable[..., Tensor]) -> Solve:
    """Solve off the tape, f once on it, and a hook that runs the solver again."""

    def solve(case: Case, f: Map, tolerance: float) -> Tensor:
        limits = (tolerance, case.max_iter)
        with torch.no_grad():
            z = solver(f, torch.zeros_like(case.x), *limits)
        z = f(z)
        point = z.detach().requires_grad_()
        value = f(point)

        def correct(v: Tensor) -> Tensor:
            def adjoint(u: Tensor) -> Tensor:
                return grad(value, point, u, retain_graph=True)[0] + v

            return solver(adjoint, v, *limits)

        z.register_hook(correct)
        return z

    return solve


# --- limits ---


class _ByHand(Function):
    """The tanh map alone: loop and adjoint by hand, in two buffers, all in place."""

    @staticmethod
    def forward(ctx, weight, x, tolerance, max_iter, counts):
        z, other = torch.tanh(x), torch.empty_like(x)
        for k in range(2, max_iter + 1):
            torch.addmm(x, z, weight.T, out=other).tanh_()
            z, other = other, z
            if k % 2 == 0 and other.sub_(z).norm() < tolerance:
                break
        counts[0] = k
        ctx.save_for_backward(weight, z)
        ctx.tolerance, ctx.max_iter, ctx.counts = tolerance, max_iter, counts
        return z

    @staticmethod
    def backward(ctx, v):
        weight, z = ctx.saved_tensors
        slope = torch.addcmul(torch.ones_like(z), z, z, value=-1)
        u, other, product = v, torch.empty_like(v), torch.empty_like(v)
        for k in range(1, ctx.max_iter + 1):
            torch.addmm(v, torch.mul(u, slope, out=product), weight, out=other)
            u, other = other, (torch.empty_like(v) if u is v else u)
            if k % 2 == 0 and other.sub_(u).norm() < ctx.tolerance:
                break
        ctx.counts[1] = k
        u.mul_(slope)
        return u.T @ z, u, None, None, None


def by_hand(case: Case, f: Map, tolerance: float) -> Tensor:
    """The fastest plain loop that we can write for the tanh map."""
    (weight,) = case.parameters
    return _ByHand.apply(weight, case.x, tolerance, case.max_iter, [0, 0])


def bare_products(case: Case, count: int) -> Callable[[], None]:
    """So many products and tanh of the size of the case, and nothing else."""
    weight, x = (leaf.detach() for leaf in case.leaves)
    z, other = torch.zeros_like(x), torch.empty_like(x)

    def run() -> None:
        for _ in range(count):
            torch.addmm(x, z, weight.T, out=other).tanh_()

    return run


TANH, BOTH = ("tanh",), ("tanh", "conv")
#: Group, name, the kinds of map that it is for, and the method itself.
Method = tuple[str, str, tuple[str, ...], Any]

#: The yardstick of the ratios.
DEFAULT = ("ours", "Anderson (the default)")
#: The row that the row with nothing but products is compared with.
IN_PLACE = ("ours", "plain iteration, f in place")
LIMIT_ROW = ("limit", "its products and tanh alone")

METHODS: list[Method] = [
    (*DEFAULT, BOTH, ours(anderson)),
    ("ours", "plain iteration", BOTH, ours(fixed_point_iteration)),
    (*IN_PLACE, TANH, ours_in_place),
    ("ours", "Broyden", BOTH, ours(broyden)),
    ("ours", "Newton", TANH, ours_newton),
    ("usual code", "plain loop, unrolled", BOTH, unrolled),
    ("usual code", "plain loop and hook", BOTH, popular(popular_loop)),
    ("usual code", "Anderson and hook", BOTH, popular(popular_anderson)),
    ("usual code", "Newton, unrolled", TANH, unrolled_newton),
    ("usual code", "Newton and hook", TANH, newton_hook),
    ("limit", "loop and adjoint by hand, for tanh alone", TANH, by_hand),
]


def select(methods: list[Method], *names: tuple[str, str]) -> list[Method]:
    """The methods of the given groups and names."""
    return [method for method in methods if method[:2] in names]
