"""A layer whose output is the solution of a quadratic program."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.linalg import cholesky_ex, eigvalsh

from implicit_layers.implicit import Report
from implicit_layers.solvers import refuse_bad_count, refuse_bad_numbers

#: The interior point stops here first: the active set is mostly clear by then.
LOOSE = 1e-5
#: A sample is given up when its violation has not fallen by a tenth in so many steps.
PATIENCE = 20
#: Added to a matrix of unit scale, so that dependent rows do not make it singular.
RIDGE = 3e-12
#: Q counts as singular when a pivot of its factor is below this, relative to Q.
PIVOT = 1e-7
#: Slack by multiplier where a constraint is left out.
FAR = 1e25
#: Of each argument, without the batch.
SHAPES = {"Q": "nn", "p": "n", "G": "mn", "h": "m", "A": "qn", "b": "q"}


@dataclass(frozen=True)
class QPSolution:
    """The solutions of a batch of quadratic programs, and how they were found.

    Without a batch dimension in the arguments there is none here.

    Attributes
    ----------
    z
        The minimisers, (B, n), with gradients.
    inequality_duals
        Multipliers of Gz <= h, (B, m), not negative, with gradients.
    equality_duals
        Multipliers of Az = b, (B, q), with gradients.
    converged
        Whether the KKT conditions hold to the tolerance, (B,) of bool. Where they do
        not the program is infeasible, unbounded or too hard; z is the best iterate.
    iterations
        Steps of the interior-point method, (B,).
    gap
        Primal minus dual objective, (B,).
    """

    z: Tensor
    inequality_duals: Tensor
    equality_duals: Tensor
    converged: Tensor
    iterations: Tensor
    gap: Tensor


def solve_qp(
    Q: Tensor,
    p: Tensor,
    G: Tensor | None = None,
    h: Tensor | None = None,
    A: Tensor | None = None,
    b: Tensor | None = None,
    *,
    tol: float = 1e-8,
    max_iter: int = 50,
    on_failure: str = "warn",
) -> QPSolution:
    """Minimise z'Qz / 2 + p'z subject to Gz <= h and Az = b, for a batch at once.

    Each argument has a batch dimension or is shared by the batch. The solution and its
    multipliers have gradients to all of them, by the KKT conditions; that of a shared
    argument is the sum over the batch. All is computed in float64.

    Parameters
    ----------
    Q
        Symmetric positive semidefinite, (n, n) or (B, n, n); only the symmetric part
        counts.
    p
        (n,) or (B, n).
    G, h
        Inequalities, (m, n) or (B, m, n), and (m,) or (B, m). None: there are none.
        One without a bound is left out; an infinite h is refused.
    A, b
        Equalities, (q, n) or (B, q, n), and (q,) or (B, q). None: there are none.
    tol
        A sample has converged when no KKT condition is violated by more: stationarity
        relative to the entries of p and Qz, feasibility (rows of G and A scaled to
        norm one) to those of h and b, the gap to the terms of the objective.
    max_iter
        Largest number of interior-point steps.
    on_failure
        `"warn"`, `"raise"` or `"ignore"` when samples did not converge. Their gradient
        is zero, and they leave the other samples alone.

    Returns
    -------
    QPSolution
        Minimisers, multipliers, and what happened to each sample.

    Raises
    ------
    TypeError
        If an argument is no floating-point tensor, or they differ in dtype or device.
    ValueError
        If shapes do not fit, an entry is a NaN or infinite, Q has a negative
        eigenvalue, G comes without h or A without b, or a setting is out of range.
    RuntimeError
        If samples did not converge and `on_failure` is `"raise"`.

    Notes
    -----
    Mehrotra's (1992) predictor-corrector method on the dual Schur complement, ended by
    a primal-dual active-set step. The gradient is that of Amos and Kolter (2017) at the
    active set, exact for any order of derivative. At a weakly active constraint (slack
    and multiplier both zero) it is a one-sided derivative. Where the minimiser is not
    unique, z is one of them and has no gradient that means anything.
    """
    refuse_bad_count("max_iter", max_iter)
    if not 0 < tol < 1:
        raise ValueError(f"tol must lie between 0 and 1, got {tol}")
    report = Report(on_failure, "the program may be infeasible or unbounded")
    (Q, p, C, d), m, single = _together(Q, p, G, h, A, b)
    dtype = p.dtype
    Q, p, C, d = (given.double() for given in (Q, p, C, d))
    with torch.no_grad():
        scale = _Scale(Q, p, C, d, m)
    Q, p, C, d = scale.scaled(Q, p, C, d)
    with torch.no_grad():
        program = _Program(Q.detach(), p.detach(), C.detach(), d.detach(), m, dtype)
        point = program.minimum(tol, max_iter)
    # what is too large for the number format is no solution
    found = torch.cat(scale.unscaled(point.z, point.y), dim=1).to(dtype)
    converged = (point.violation <= tol) & found.isfinite().all(dim=1)
    report("quadratic program", converged, point.violation)
    z, y = _KKTSolve.apply(-p, d, Q, C, program.kkt, converged, (point.z, point.y))
    gap = program.gap(point.z, point.y, _rows(point.z, program.Q)) * scale.objective
    z, y = scale.unscaled(z, y)
    z, inequality_duals, equality_duals = (x.to(dtype) for x in (z, y[:, :m], y[:, m:]))
    result = (z, inequality_duals, equality_duals, converged, point.steps, gap)
    return QPSolution(*(x[0] if single else x for x in result))


class _Scale:
    """Constants that bring the entries of a program near one.

    The largest entry of Q and the norm of each row become 1; the unit of z is the
    smaller one of two that the program suggests, from p and from the right sides. With
    a p of zeros it is from those right sides that z = 0 does not meet.
    """

    def __init__(self, Q: Tensor, p: Tensor, C: Tensor, d: Tensor, m: int) -> None:
        rows = C.norm(dim=2)
        self.rows = torch.where(rows > 0, rows, 1)
        curvature, slope = Q.abs().amax((1, 2))[:, None], p.abs().amax(1, keepdim=True)
        if not bool((curvature > 0).all()):  # a linear program: p gives the scale
            curvature = torch.where(curvature > 0, curvature, slope)
        self.curvature = torch.where(curvature > 0, curvature, 1)
        one = slope / self.curvature
        other = unmet = one
        if d.shape[1]:
            sides = d / self.rows
            other = sides.abs().amax(1, keepdim=True)
            sides[:, :m].clamp_(max=0)
            unmet = sides.abs().amax(1, keepdim=True)
        smaller = torch.minimum(one, other)
        unit = torch.where(smaller > 0, smaller, torch.maximum(one, unmet))
        self.unit = torch.where(unit > 0, unit, 1)
        self.objective = (self.curvature * self.unit**2)[:, 0]

    def scaled(self, Q: Tensor, p: Tensor, C: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        """The program in the units of the solver."""
        return (
            Q / self.curvature[:, :, None],
            p / (self.curvature * self.unit),
            C / self.rows[:, :, None],
            d / (self.rows * self.unit),
        )

    def unscaled(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Its solution in the units of the caller."""
        return z * self.unit, y * (self.curvature * self.unit / self.rows)


class _Point(NamedTuple):
    """An iterate of each sample."""

    z: Tensor  # (B, n)
    y: Tensor  # all multipliers, (B, m + q)
    s: Tensor  # slacks of the inequalities as the walk keeps them, (B, m)
    D: Tensor  # slack by multiplier of each constraint, at most FAR, (B, m + q)
    a: Tensor  # what is missing in Qz + C'y = -p, (B, n)
    c: Tensor  # what is missing in Cz = d, (B, m + q)
    violation: Tensor  # of the KKT conditions, (B,)
    steps: Tensor  # interior-point steps taken, (B,)


class _Program:
    """min z'Qz / 2 + p'z with Cz <= d in the first m rows, Cz = d in the others."""

    def __init__(
        self, Q: Tensor, p: Tensor, C: Tensor, d: Tensor, m: int, dtype: torch.dtype
    ) -> None:
        self.Q, self.p, self.C, self.d, self.m = Q, p, C, d, m
        self.kkt = _KKT(Q, C, dtype)

    def minimum(self, tol: float, max_iter: int) -> _Point:
        """Walk near the solution, jump to it, walk on where that did not do."""
        inside = self.start()
        going = torch.ones_like(inside.violation, dtype=torch.bool)
        # a point of the path is off by more than its violation, a corner is not; so
        # where no corner was found the walk goes on for a while
        for target in (max(tol, LOOSE), tol, tol / 1000):
            if self.m:
                inside = self.walk(inside, target, max_iter, going)
            point = self.polished(inside, tol / 1000)
            done = point.violation <= tol / 1000
            going = (inside.violation <= target) & ~done
            if not bool(going.any()):
                break
            # from a corner that is not the solution there is no way on
            inside = _choose(done, point, inside)
        if not torch.equal(self.kkt.D, point.D):
            self.kkt.factor(point.D)
        return point

    def start(self) -> _Point:
        """The solution with the squared slacks for a penalty, slacks made positive."""
        D = torch.zeros_like(self.d)
        D[:, : self.m] = 1
        self.kkt.factor(D)
        z, y = self.kkt.solve(-self.p, self.d)
        s = -y[:, : self.m]
        if self.m:
            s, y[:, : self.m] = _positive(s, -s)
        return self.point(z, y, s, z.new_zeros(len(z), dtype=torch.int64))

    def point(self, z: Tensor, y: Tensor, s: Tensor, steps: Tensor) -> _Point:
        """A point of the interior."""
        D = torch.zeros_like(y)
        D[:, : self.m] = (s / y[:, : self.m]).clamp(max=FAR)
        return self.judged(z, y, s, D, steps)

    def judged(
        self, z: Tensor, y: Tensor, s: Tensor, D: Tensor, steps: Tensor
    ) -> _Point:
        """A point and what is missing there; the multipliers have their sign."""
        Qz = _rows(z, self.Q)
        a = -self.p - Qz - _rows(y, self.C)
        c = self.d - _rows(z, self.C.mT)
        return _Point(z, y, s, D, a, c, self.violation(z, y, Qz, a, c), steps)

    def violation(
        self, z: Tensor, y: Tensor, Qz: Tensor, a: Tensor, c: Tensor
    ) -> Tensor:
        """The largest violation of a KKT condition."""
        slack = c[:, : self.m]
        size = torch.maximum(self.p.abs(), Qz.abs()).amax(1).clamp(min=1)
        worst = a.abs().amax(1) / size
        if c.shape[1]:
            unmet = torch.cat([slack.clamp(max=0), c[:, self.m :]], dim=1)
            unmet = unmet.abs() / self.d.abs().clamp(min=1)
            worst = torch.maximum(worst, unmet.amax(1))
        terms = torch.maximum((z * Qz).sum(1).abs(), (z * self.p).sum(1).abs())
        products = (y[:, : self.m] * slack).abs().sum(1)
        loose = torch.maximum(products, self.gap(z, y, Qz).abs()) / terms.clamp(min=1)
        return torch.maximum(worst, loose).nan_to_num(nan=torch.inf)

    def gap(self, z: Tensor, y: Tensor, Qz: Tensor) -> Tensor:
        """Primal minus dual objective."""
        return ((Qz + self.p) * z).sum(1) + (self.d * y).sum(1)

    def walk(
        self, point: _Point, target: float, max_iter: int, wanted: Tensor
    ) -> _Point:
        """Take interior-point steps until each sample is good, or no better for long.

        A sample that is done is held fixed, so its neighbours make no difference to it.
        """
        best, mark = point, point.violation
        waited = torch.zeros_like(point.steps)
        while True:
            going = wanted & (best.violation > target) & (waited < PATIENCE)
            going &= point.steps < max_iter
            if not bool(going.any()):
                return best
            point = _choose(going, self.step(point), point)
            best = _choose(going & (point.violation < best.violation), point, best)
            best = best._replace(steps=point.steps)
            better = best.violation < 0.9 * mark
            mark = torch.where(better, best.violation, mark)
            waited = torch.where(better, 0, waited + 1)

    def step(self, point: _Point) -> _Point:
        """One predictor-corrector step."""
        z, y, s, m = point.z, point.y, point.s, self.m
        dual = y[:, :m]
        self.kkt.factor(point.D)
        a, c = point.a, point.c
        lacking = c[:, :m] - s
        # predictor: aim at complementary products of zero
        dz, dy = self.kkt.solve(a, c)
        ds = lacking - _rows(dz, self.C.mT)[:, :m]
        length = _length(dual, dy[:, :m], s, ds)
        product = (dual * s).mean(1, keepdim=True)
        aimed = (dual + length * dy[:, :m]) * (s + length * ds)
        centre = (aimed.mean(1, keepdim=True) / product) ** 3 * product
        # corrector: aim at the central path, with the predictor's second-order error
        c = c.clone()
        c[:, :m] += (ds * dy[:, :m] - centre) / dual
        dz, dy = self.kkt.solve(a, c)
        ds = lacking - _rows(dz, self.C.mT)[:, :m]
        length = 0.99 * _length(dual, dy[:, :m], s, ds)
        return self.point(
            z + length * dz, y + length * dy, s + length * ds, point.steps + 1
        )

    def polished(self, point: _Point, tol: float) -> _Point:
        """Guess which constraints are active and solve with these as equalities.

        A guess that its own solution contradicts is mended, a few times. The result is
        taken only where it violates the KKT conditions less.
        """
        active = point.D < 1
        for _ in range(5):
            D = torch.where(active, 0, FAR).to(point.D)
            self.kkt.factor(D)
            z, y = self.kkt.refined(-self.p, self.d)
            signed = torch.where(active, y, 0)
            signed[:, : self.m].clamp_(min=0)
            new = self.judged(z, signed, point.s, D, point.steps)
            slack = new.c[:, : self.m]
            wrong = torch.zeros_like(active)
            wrong[:, : self.m] = (y[:, : self.m] > slack) != active[:, : self.m]
            point = _choose(new.violation < point.violation, new, point)
            wrong &= (point.violation > tol)[:, None]
            if not bool(wrong.any()):
                break
            active = active ^ wrong
        return point


class _KKT:
    """Solves Qu + C'w = a, Cu - Dw = c, for diagonal matrices D from 0 to FAR.

    By the dual Schur complement, which stays accurate for entries of D far apart. With
    a definite Q what does not depend on D is computed once, and once for the batch if Q
    and C are shared. Else Q is first lifted by C'(1 + D)^-1 C, a multiple of the second
    equation.
    """

    def __init__(self, Q: Tensor, C: Tensor, dtype: torch.dtype) -> None:
        self.Q, self.C = Q, C
        factor, info = cholesky_ex(Q)
        pivots = factor.diagonal(dim1=1, dim2=2)
        self.definite = not info.any() and bool((pivots**2 > PIVOT).all())
        if self.definite:
            self._reduce(factor)
        elif (eigvalsh(Q) < -max(1e-9, 100 * torch.finfo(dtype).eps)).any():
            raise ValueError(
                "Q has a negative eigenvalue: the program is not convex, and its "
                "stationary points need not be minima"
            )

    def _reduce(self, factor: Tensor) -> None:
        self.inverse = torch.cholesky_inverse(factor)
        self.across = self.inverse @ self.C.mT
        self.complement = self.C @ self.across

    def factor(self, D: Tensor) -> None:
        """Factorise for another diagonal D (B, m + q)."""
        self.D = D
        if not self.definite:
            H = self.Q + self.C.mT @ (self.C / (1 + D)[:, :, None])
            H.diagonal(dim1=1, dim2=2).add_(RIDGE)
            self._reduce(cholesky_ex(H)[0])
        S = self.complement.expand(len(D), -1, -1).clone()
        diagonal = S.diagonal(dim1=1, dim2=2)
        diagonal.mul_(1 + RIDGE).add_((D if self.definite else D + D**2) + RIDGE)
        self.lower = cholesky_ex(S)[0]

    def solve(self, a: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """The solution for a (B, n) and c (B, m + q)."""
        if not self.definite:
            a = a + _rows(c / (1 + self.D), self.C)
        right = _rows(a, self.across) - c
        w = torch.cholesky_solve(right[:, :, None], self.lower)[:, :, 0]
        u = _rows(a, self.inverse) - _rows(w, self.across.mT)
        return u, w if self.definite else w * (1 + self.D)

    def refined(self, a: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """The same, with the error removed: twice if Q is singular, as it is larger."""
        u, w = self.solve(a, c)
        for _ in range(1 if self.definite else 2):
            more_a = a - _rows(u, self.Q) - _rows(w, self.C)
            more_c = c - _rows(u, self.C.mT) + self.D * w
            more_u, more_w = self.solve(more_a, more_c)
            u, w = u + more_u, w + more_w
        return u, w


class _KKTSolve(Function):
    """The KKT system as a linear map of its right sides a and c, and of Q and C.

    With the active set held fixed a solution is that of (a, c) = (-p, d), which gives
    all its derivatives. Samples that did not converge have none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        c: Tensor,
        Q: Tensor,
        C: Tensor,
        kkt: _KKT,
        usable: Tensor,
        known: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        if known is None:
            u, w = kkt.refined(a, c)
            mask = usable[:, None]
            known = torch.where(mask, u, 0), torch.where(mask, w, 0)
        ctx.kkt, ctx.usable = kkt, usable
        ctx.save_for_backward(*known, Q, C)
        return known

    @staticmethod
    def backward(ctx: Any, v: Tensor, v_dual: Tensor) -> Any:
        z, y, Q, C = ctx.saved_tensors
        u, w = _KKTSolve.apply(v, v_dual, Q, C, ctx.kkt, ctx.usable, None)
        to_Q = to_C = None
        if ctx.needs_input_grad[2]:
            to_Q = -_outer(u, z, len(Q))
        if ctx.needs_input_grad[3]:
            to_C = -_outer(y, u, len(C)) - _outer(w, z, len(C))
        return u, w, to_Q, to_C, None, None, None


def _rows(x: Tensor, matrix: Tensor) -> Tensor:
    """Each row of x (B, i) times its matrix (B, i, j), or the one of all (1, i, j)."""
    if len(matrix) == 1:
        return x @ matrix[0]
    return torch.bmm(x[:, None], matrix)[:, 0]


def _outer(x: Tensor, y: Tensor, matrices: int) -> Tensor:
    """The outer products of the rows; their sum if all samples share one matrix."""
    return (x.T @ y)[None] if matrices == 1 else x[:, :, None] * y[:, None]


def _choose(mask: Tensor, new: _Point, old: _Point) -> _Point:
    """The new point where the mask says so."""
    return _Point(
        *(
            torch.where(mask.view(-1, *[1] * (a.ndim - 1)), a, b)
            for a, b in zip(new, old, strict=True)
        )
    )


def _length(dual: Tensor, d_dual: Tensor, s: Tensor, ds: Tensor) -> Tensor:
    """How far to go, at most 1, before a multiplier or slack is zero, (B, 1)."""
    fall = torch.maximum(-d_dual / dual, -ds / s).amax(1, keepdim=True)
    return fall.clamp(min=1).reciprocal()


def _positive(s: Tensor, dual: Tensor) -> tuple[Tensor, Tensor]:
    """Shift slacks and multipliers above zero, well balanced (Mehrotra 1992)."""
    s, dual = (x + (-1.5 * x.amin(1, keepdim=True)).clamp(min=0) for x in (s, dual))
    half = (s * dual).sum(1, keepdim=True) / 2
    to_s = half / dual.sum(1, keepdim=True).clamp(min=1e-3)
    to_dual = half / s.sum(1, keepdim=True).clamp(min=1e-3)
    return (s + to_s).clamp(min=1e-3), (dual + to_dual).clamp(min=1e-3)


def _together(
    Q: Tensor,
    p: Tensor,
    G: Tensor | None,
    h: Tensor | None,
    A: Tensor | None,
    b: Tensor | None,
) -> tuple[tuple[Tensor, ...], int, bool]:
    """Check the arguments; put the constraints together, and p and d in a batch.

    Returns Q, p, C, d, the number of inequalities, and whether there was no batch.
    """
    for matrix, side, names in ((G, h, "Gh"), (A, b, "Ab")):
        if (matrix is None) != (side is None):
            raise ValueError(f"{names[0]} and {names[1]} come together: give both")
    refuse_bad_numbers("p", p)
    width = p.shape[-1] if p.ndim else 0
    if G is None or h is None:
        G, h = p.new_zeros(0, width), p.new_zeros(0)
    if A is None or b is None:
        A, b = p.new_zeros(0, width), p.new_zeros(0)
    batch = _refuse_bad_arguments({"Q": Q, "p": p, "G": G, "h": h, "A": A, "b": b})
    single, size = batch is None, batch or 1
    Q, G, A = (x if x.ndim == 3 else x[None] for x in (Q, G, A))
    shared = max(len(G), len(A))
    C = torch.cat([x.expand(shared, -1, -1) for x in (G, A)], dim=1)
    d = torch.cat([x.expand(size, -1) for x in (h, b)], dim=1)
    return ((Q + Q.mT) / 2, p.expand(size, -1), C, d), G.shape[1], single


def _refuse_bad_arguments(given: dict[str, Tensor]) -> int | None:
    """Raise if the arguments do not fit together; gives the batch size, if any."""
    for name, x in given.items():
        refuse_bad_numbers(name, x)
    p = given["p"]
    sizes = {
        letter: given[name].shape[-1] if given[name].ndim else 0
        for letter, name in zip("nmq", "phb", strict=True)
    }
    batch: int | None = None
    for name, x in given.items():
        if x.dtype != p.dtype or x.device != p.device:
            raise TypeError(
                f"{name} is {x.dtype} on {x.device}, p is {p.dtype} on {p.device}: "
                "give all in one dtype, on one device"
            )
        letters = SHAPES[name]
        shape, extra = tuple(sizes[letter] for letter in letters), x.ndim - len(letters)
        if extra not in (0, 1) or x.shape[extra:] != shape:
            wanted = ", ".join(letters) if len(letters) > 1 else f"{letters},"
            here = ", ".join(f"{letter} = {size}" for letter, size in sizes.items())
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}: give ({wanted}), with a batch "
                f"dimension before or none, here with {here}"
            )
        if extra:
            if batch not in (None, len(x)):
                raise ValueError(f"{name} has a batch of {len(x)}, others of {batch}")
            batch = len(x)
    if sizes["n"] == 0 or batch == 0:
        raise ValueError("the batch is empty" if sizes["n"] else "p is empty")
    return batch
