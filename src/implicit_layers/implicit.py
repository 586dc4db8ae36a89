"""How the gradient of a root is found: by the implicit function theorem, or cheaply."""

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, grad
from torch.linalg import vector_norm

from implicit_layers.solvers import (
    Map,
    Solution,
    anderson,
    fixed_point_iteration,
    flat,
    on_tape,
    refuse_bad_batch,
    refuse_bad_count,
    refuse_bad_output,
)

#: A solver: called with f, a start and options.
Solver = Callable[..., Solution]


def implicit_fixed_point(
    f: Map,
    z0: Tensor,
    *,
    solver: Solver = anderson,
    gradient: str = "implicit",
    order: int = 2,
    steps: int = 1,
    damping: float = 0.5,
    backward_solver: Solver | None = None,
    on_failure: str = "warn",
    **solver_options: Any,
) -> tuple[Tensor, Solution]:
    """Solve z = f(z) off the tape and give the solution a gradient.

    Gradients reach every tensor that f touches, closed over or not. In `no_grad` or
    `inference_mode` the solution is returned as it is.

    Parameters
    ----------
    f
        Maps a batch (B, ...) to the same shape, each sample by itself.
    z0
        Where to start, (B, ...), float32 or float64. No gradient flows to it.
    solver
        `fixed_point_iteration`, `anderson`, `broyden`, `newton`, or one of your own
        that is called likewise.
    gradient
        How v, the gradient that comes in, is multiplied by the inverse of I - J:

        - `"implicit"`: exactly, by solving a linear system in each backward pass
          (Christianson 1994; Bai et al. 2019);
        - `"neumann"`: by the first `steps` terms of the Neumann series;
        - `"unrolled"`: the same numbers, through the last `steps` applications of f and
          with the memory of all of them;
        - `"jfb"`: by one term, the unit matrix in place of the inverse (Fung et al.
          2022);
        - `"phantom"`: through `steps` damped steps (Geng et al. 2021).

        The error of the last four falls like the spectral radius of the Jacobian (for
        `"phantom"` that of the damped map) to the power `steps`.
    order
        For `"implicit"`: derivatives up to this one are exact. Each order costs one
        evaluation of f and its memory.
    steps
        For `"unrolled"`, `"neumann"` and `"phantom"`, at least 1.
    damping
        For `"phantom"`: the step is z <- (1 - damping) z + damping f(z); above 0 and
        at most 1.
    backward_solver
        Solves (I - J)^T u = v in the form u = v + J^T u, with v scaled to a largest
        entry of 1 in each sample. None: the LU factors of `newton`, refined, where
        there are some, else `anderson`, both with the tolerances of the solver.
    on_failure
        `"warn"`, `"raise"` or `"ignore"` when samples did not converge, in the forward
        or in the backward pass. Their output is the best iterate (for the cheap
        gradients what f makes of it), and their gradient that of it as a solution.
    **solver_options
        Go to `solver`: `atol`, `rtol`, `max_iter`, `memory`, ...

    Returns
    -------
    tuple[Tensor, Solution]
        The solution with its gradient, (B, ...), and what the solver says of it.

    Raises
    ------
    TypeError
        If `z0` is no floating-point tensor, a solver cannot be called, or a solver
        option is unknown.
    ValueError
        If `gradient` or `on_failure` is unknown, `order` or `steps` is below 1,
        `damping` is out of range, or the solver refuses its input.
    RuntimeError
        If samples did not converge and `on_failure` is `"raise"`.

    Notes
    -----
    The exact gradient is that of one Newton step from the solution whose matrix is held
    constant: its value is the solution, its derivative that of the implicit function
    theorem. A second step, from the first one's result, makes second derivatives
    exact, and so on. See the chapter on implicit functions.
    """
    _refuse_arguments(solver, gradient, order, steps, damping, backward_solver)
    report = Report(
        on_failure, "raise max_iter, loosen the tolerances or take another solver"
    )
    with torch.no_grad():
        solution = solver(f, z0, **solver_options)
    report("solver", solution.converged, solution.residual)
    z = solution.z
    if not torch.is_grad_enabled():
        return z, solution
    if gradient == "implicit":
        inverse = _inverse(solution, backward_solver, report, solver_options)
        return _newton_steps(f, solution, inverse, order), solution
    if gradient == "neumann":
        inverse = partial(_neumann, steps=steps)
        return _newton_steps(f, solution, inverse, 1), solution
    factor = damping if gradient == "phantom" else 1.0
    for _ in range(1 if gradient == "jfb" else steps):
        fz = f(z)
        if not bool(solution.converged.all()):
            fz = torch.where(fz.isfinite(), fz, z)
        z = fz if factor == 1 else torch.lerp(z, fz, factor)
    return z, solution


def spectral_radius(
    f: Map, z: Tensor, *, iterations: int = 100, seed: int = 0
) -> Tensor:
    """Spectral radius of the Jacobian of f at z, for each sample.

    A random vector is multiplied by the transposed Jacobian again and again; the result
    is the geometric mean of the growth of its norm over the second half of the
    products. A mean is right also for a complex pair of largest eigenvalues, around
    which single factors oscillate. The error falls like one over `iterations` at worst.

    Parameters
    ----------
    f
        Maps a batch (B, ...) to the same shape, each sample by itself.
    z
        Where the Jacobian is taken, (B, ...).
    iterations
        Vector-Jacobian products, at least 2.
    seed
        Of the random vector to start from.

    Returns
    -------
    Tensor
        The radii, (B,).

    Raises
    ------
    TypeError
        If `z` is no floating-point tensor.
    ValueError
        If `z` has no batch dimension or holds a NaN or an infinity, or `iterations` is
        below 2.

    Notes
    -----
    The power method, with Gelfand's formula in place of a single factor.
    """
    refuse_bad_batch("z", z)
    refuse_bad_count("iterations", iterations, least=2)
    with on_tape(z) as point:
        linear = _Linearisation(point, f(point))
    refuse_bad_output(linear.value, z)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(flat(z).shape, generator=generator, dtype=torch.float64)
    vector, growth = start.to(z), z.new_zeros(len(z))
    for i in range(iterations):
        vector = flat(linear.product(vector.view(z.shape), transposed=True))
        norm = vector_norm(vector, dim=1)
        vector = vector / norm.clamp(min=torch.finfo(z.dtype).tiny)[:, None]
        if i >= iterations // 2:
            growth = growth + norm.log()
    return (growth / (iterations - iterations // 2)).exp()


class _Linearisation:
    """The map near a point of the tape: products with its Jacobian there."""

    def __init__(self, point: Tensor, value: Tensor) -> None:
        self.point, self.value = point, value

    def product(self, vector: Tensor, transposed: bool) -> Tensor:
        """J times a vector (B, ...), or the transpose of J times it."""
        if not self.value.requires_grad:
            return torch.zeros_like(vector)
        tracked = vector.requires_grad and torch.is_grad_enabled()
        if transposed:
            return pulled_back(self.value, self.point, vector, tracked)
        # the transposed product is linear in its vector, and its derivative is J
        with torch.enable_grad():
            dual = torch.zeros_like(vector).requires_grad_()
            product = pulled_back(self.value, self.point, dual, True)
        if not product.requires_grad:
            return torch.zeros_like(vector)
        return pulled_back(product, dual, vector, tracked)


def pulled_back(output: Tensor, of: Tensor, v: Tensor, create_graph: bool) -> Tensor:
    """The gradient for `of` of the product of v and the output, graph kept."""
    return grad(
        output,
        of,
        v,
        retain_graph=True,
        create_graph=create_graph,
        materialize_grads=True,
    )[0]


#: Multiplies a batch by the inverse of I - J (or, if transposed, of its transpose).
_Inverse = Callable[[_Linearisation, Tensor, bool], Tensor]


def _newton_steps(f: Map, solution: Solution, inverse: _Inverse, order: int) -> Tensor:
    """Take Newton steps with one constant matrix from the solution, on the tape."""
    failed = None if bool(solution.converged.all()) else ~solution.converged
    point = _Gate.apply(solution.z.detach().requires_grad_(), True)
    value = f(point)
    solve = partial(inverse, _Linearisation(point, value))
    z = _NewtonStep.apply(point, value, solve, failed)
    for _ in range(order - 1):
        point = _Gate.apply(z, False)
        z = _NewtonStep.apply(point, f(point), solve, failed)
    return z.clone()


class _NewtonStep(Function):
    """z + C(f(z) - z), with C the identity forward, the transposed solve backward.

    The value of a sample that failed stays where it is: f may lead it anywhere.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, fz: Tensor, solve: Any, failed: Tensor | None
    ) -> Tensor:
        ctx.solve = solve
        ctx.set_materialize_grads(False)
        if failed is None:
            return fz.view_as(fz)
        return torch.where(failed.view(-1, *[1] * (z.ndim - 1)), z, fz)

    @staticmethod
    def backward(ctx: Any, v: Tensor | None) -> Any:
        if v is None:
            return None, None, None, None
        u = _Solve.apply(v, ctx.solve, True)
        return v - u, u, None, None


class _Solve(Function):
    """A linear solve, the derivative of which is the transposed one."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, solve: Any, transposed: bool) -> Tensor:
        ctx.solve, ctx.transposed = solve, transposed
        return solve(v, transposed)

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> Any:
        return _Solve.apply(w, ctx.solve, not ctx.transposed), None, None


class _Gate(Function):
    """The identity; its gradient is dropped where it is known to be zero.

    A Newton step does not depend on where it starts, to first order. So a first
    derivative needs the last step alone, until some pass records a graph of its own
    for higher ones.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, locked: bool) -> Tensor:
        ctx.locked, ctx.open = locked, False
        ctx.set_materialize_grads(False)
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, v: Tensor | None) -> Any:
        ctx.open = ctx.open or torch.is_grad_enabled()
        return v if ctx.open and not ctx.locked else None, None


def _inverse(
    solution: Solution,
    backward_solver: Solver | None,
    report: "Report",
    options: dict[str, Any],
) -> _Inverse:
    """The way in which this call's adjoint systems are solved."""
    shared = {k: options[k] for k in ("atol", "rtol", "max_iter") if k in options}
    if backward_solver is None and solution.factors is not None:
        refine = partial(fixed_point_iteration, **shared)
        return partial(_solved, solver=refine, factors=solution.factors, report=report)
    solver = backward_solver or partial(anderson, **shared)
    return partial(_solved, solver=solver, factors=None, report=report)


def _solved(
    linear: _Linearisation,
    v: Tensor,
    transposed: bool,
    *,
    solver: Solver,
    factors: tuple[Tensor, Tensor] | None,
    report: "Report",
) -> Tensor:
    """Solve u = v + J^T u (or with J), from factors of a matrix near I - J if given."""
    if v.numel() == 0:
        return v
    known = v.isfinite()
    scale = flat(v).abs().amax(dim=1)
    scale = torch.where((scale > 0) & (scale < math.inf), scale, 1)
    scale = scale.view(-1, *[1] * (v.ndim - 1))
    right = v / scale

    def near_inverse(w: Tensor) -> Tensor:
        if factors is None:
            return w
        columns = flat(w)[:, :, None]
        return torch.linalg.lu_solve(*factors, columns, adjoint=transposed).view(
            v.shape
        )

    def improved(u: Tensor) -> Tensor:
        u_next = right + linear.product(u, transposed)
        return u_next if factors is None else u + near_inverse(u_next - u)

    solution = solver(improved, near_inverse(torch.where(known, right, 0)))
    usable = flat(known).all(dim=1)
    report("backward solver", solution.converged | ~usable, solution.residual)
    # the inverse mixes the entries of a sample, so one NaN makes all of them unknown
    return torch.where(usable.view(scale.shape), solution.z * scale, math.nan)


def _neumann(
    linear: _Linearisation, v: Tensor, transposed: bool, *, steps: int
) -> Tensor:
    """The first terms of the Neumann series of the inverse, times v."""
    term = total = v
    for _ in range(steps - 1):
        term = linear.product(term, transposed)
        total = total + term
    return total


class Report:
    """Says what did not converge, in the way that the caller asked for."""

    def __init__(self, on_failure: str, advice: str) -> None:
        if on_failure not in ("warn", "raise", "ignore"):
            raise ValueError(
                f"on_failure is {on_failure!r}: give 'warn', 'raise' or 'ignore'"
            )
        self.on_failure, self.advice = on_failure, advice

    def __call__(self, who: str, converged: Tensor, residual: Tensor) -> None:
        """Warn, raise or be silent; `residual` is that of each sample."""
        if self.on_failure == "ignore" or bool(converged.all()):
            return
        failed = ~converged
        message = (
            f"the {who} did not converge for {int(failed.sum())} of {len(failed)} "
            f"samples, largest residual {float(residual[failed].max()):.1e}: "
            f"{self.advice}"
        )
        if self.on_failure == "raise":
            raise RuntimeError(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def _refuse_arguments(
    solver: object,
    gradient: str,
    order: int,
    steps: int,
    damping: float,
    backward_solver: object,
) -> None:
    modes = ("implicit", "unrolled", "neumann", "jfb", "phantom")
    if gradient not in modes:
        raise ValueError(f"gradient is {gradient!r}: give one of {', '.join(modes)}")
    refuse_bad_count("order", order)
    refuse_bad_count("steps", steps)
    if not 0 < damping <= 1:
        raise ValueError(f"damping must be above 0 and at most 1, got {damping}")
    for name, given in (("solver", solver), ("backward_solver", backward_solver)):
        if given is not None and not callable(given):
            raise TypeError(f"{name} is {given!r}: give a function such as anderson")
