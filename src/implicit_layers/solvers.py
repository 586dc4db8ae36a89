"""How a root is found: four solvers for z = f(z), one way to call them, one result."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import grad
from torch.linalg import vector_norm

#: A map of a batch (B, ...) to the same shape that treats each sample alone.
Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Solution:
    """What a solver found, sample by sample.

    Attributes
    ----------
    z
        The iterate at which each sample converged, else its best, (B, ...); always
        finite, never part of a graph.
    residual
        Euclidean norm of f(z) - z over the entries of each sample, (B,); infinite
        where f gave nothing finite.
    converged
        Whether residual <= atol + rtol * norm of f(z), (B,) of bool.
    iterations
        Evaluations of f after which each sample had converged or given up, (B,).
    trace
        Largest finite residual over the batch at each evaluation, (evaluations,).
    factors
        From `newton` alone, where plain steps did not do: LU factors (B, d, d) and
        pivots (B, d) of I - J, with d entries a sample and J the Jacobian of f at an
        iterate near the solution (or zero for samples that needed none).
    """

    z: Tensor
    residual: Tensor
    converged: Tensor
    iterations: Tensor
    trace: Tensor
    factors: tuple[Tensor, Tensor] | None = None


@torch.no_grad()
def fixed_point_iteration(
    f: Map, z0: Tensor, *, atol: float = 1e-6, rtol: float = 1e-5, max_iter: int = 100
) -> Solution:
    """Repeat z <- f(z).

    Near a solution the error shrinks by the spectral radius of the Jacobian of f with
    each evaluation; where that is above 1 the iteration is driven away. Convergence is
    tested at the first evaluation and then at every second one.

    Parameters
    ----------
    f
        Maps a batch (B, ...) to the same shape, each sample by itself. It must return
        new memory and leave its argument as it is.
    z0
        Where to start, (B, ...), float32 or float64.
    atol, rtol
        A sample has converged when the norm of f(z) - z is at most
        atol + rtol * norm of f(z).
    max_iter
        Largest number of evaluations of f.

    Returns
    -------
    Solution
        Samples that did not converge are marked so and hold their best iterate.

    Raises
    ------
    TypeError
        If `z0` is no floating-point tensor, or f returns no tensor.
    ValueError
        If `z0` has no batch dimension or holds a NaN or an infinity, if f(z0) differs
        from it in shape, dtype or device, or if a tolerance or count is out of range.

    Notes
    -----
    Kelley (1995), section 4.1.
    """
    run = _Run(f, z0, atol, rtol, max_iter)
    z = run.z
    while run.goes_on:
        fz, _, norm = run.evaluate(z)
        if run.tested:
            run.record(z, fz, norm)
        z = run.hold(fz) if run.wild else fz
    return run.solution()


@torch.no_grad()
def anderson(
    f: Map,
    z0: Tensor,
    *,
    atol: float = 1e-6,
    rtol: float = 1e-5,
    max_iter: int = 100,
    memory: int = 5,
    ridge: float | None = None,
) -> Solution:
    """Anderson acceleration, type II, with its own coefficients for each sample.

    The next iterate combines the last values of f such that the same combination of
    their residuals is smallest; on a linear map that is, in essence, GMRES. A sample
    takes plain steps as long as those promise to end within a dozen more. After that
    it combines at every third step, and wherever a plain one doubled the residual; a
    sample that has not improved for a while forgets its history.

    Parameters
    ----------
    f, z0, atol, rtol, max_iter
        See `fixed_point_iteration`.
    memory
        Differences of iterates that are kept, at least 1; twice this number of states
        is the memory needed.
    ridge
        Regularisation of the least-squares problem, relative to the diagonal of its
        normal equations; 8 units of rounding if None.

    Returns
    -------
    Solution
        See `fixed_point_iteration`.

    Raises
    ------
    TypeError, ValueError
        See `fixed_point_iteration`; also for `memory` below 1 and a negative `ridge`.

    Notes
    -----
    Anderson (1965); Walker and Ni (2011), equation 2.1 and section 4; Banerjee,
    Suryanarayana and Pask (2016) for combining at some steps alone.
    """
    refuse_bad_count("memory", memory)
    refuse_bad_batch("z0", z0)
    ridge = 8 * torch.finfo(z0.dtype).eps if ridge is None else ridge
    _refuse_negative("ridge", ridge)
    run = _Run(f, z0, atol, rtol, max_iter)
    z = run.z
    window: _Window | None = None
    slow, before = run.finished, run.residual
    last = z, z, before
    while run.goes_on:
        fz, residual, norm = run.evaluate(z)
        if run.tested:
            tolerance = run.record(z, fz, norm)
            slower = slow
            if run.evaluations > 3:
                # two evaluations gained norm / before; six such pairs will not do
                promise = norm * (norm / before) ** 6
                slower = ~(promise <= tolerance)
            new = (slower | (norm > 2 * before)) & ~slow & ~run.finished
            slow, before = (slow | new) & ~run.finished, norm
            if bool(new.any()):
                window = window or _Window(z, memory, ridge)
                window.begin(new, *last)
        last = fz, residual, norm
        if window is not None:
            z = run.hold(window.step(fz, residual, norm, slow))
        else:
            z = run.hold(fz) if run.wild else fz
    return run.solution()


@torch.no_grad()
def broyden(
    f: Map,
    z0: Tensor,
    *,
    atol: float = 1e-6,
    rtol: float = 1e-5,
    max_iter: int = 100,
    memory: int = 20,
    line_search: bool = False,
) -> Solution:
    """Broyden's "good" method with limited memory, for each sample by itself.

    The inverse of I - J is approximated by the unit matrix plus one rank-one term an
    iteration. A full memory is emptied, and the approximation starts anew.

    Parameters
    ----------
    f, z0, atol, rtol, max_iter
        See `fixed_point_iteration`.
    memory
        Rank-one terms that are kept, at least 1; twice this number of states is the
        memory needed.
    line_search
        Halve a step for which the residual does not fall, up to eight times.

    Returns
    -------
    Solution
        See `fixed_point_iteration`.

    Raises
    ------
    TypeError, ValueError
        See `fixed_point_iteration`; also for `memory` below 1.

    Notes
    -----
    Broyden (1965), equation 4.9 ("method 1"); Kelley (1995), section 7.3.
    """
    refuse_bad_count("memory", memory)
    run = _Run(f, z0, atol, rtol, max_iter)
    z = run.z
    _, direction, norm = run.start()
    inverse = _RankOneTerms(z, memory)
    step, halvings = direction, torch.zeros_like(run.iterations)
    while run.goes_on:
        trial = run.hold(z + step)
        fz, residual, trial_norm = run.evaluate(trial)
        run.record(trial, fz, trial_norm)
        back = torch.zeros_like(run.finished)
        if line_search:
            back = ~(trial_norm < norm) & (halvings < 8)
            halvings = torch.where(back, halvings + 1, 0)
        turned = inverse.update(step, direction, residual, ~back)
        norm = torch.where(back, norm, trial_norm)
        z, direction = _choose(back, z, trial), _choose(back, direction, turned)
        step = _choose(back, step / 2, direction)
    return run.solution()


@torch.no_grad()
def newton(
    f: Map,
    z0: Tensor,
    *,
    atol: float = 1e-6,
    rtol: float = 1e-5,
    max_iter: int = 50,
    jacobian: Map | None = None,
    patience: int = 6,
) -> Solution:
    """Newton's method with a guarded step, for each sample by itself.

    The step solves (I - J) s = f(z) - z. It is halved until the norm of the residual
    falls; a sample for which a thousandth of the step does not help, or whose matrix is
    singular, has failed. The first matrix is the unit matrix, which makes a plain step
    of Newton's: easy samples need no other.

    Parameters
    ----------
    f, z0, atol, rtol
        See `fixed_point_iteration`.
    max_iter
        Largest number of evaluations of f.
    jacobian
        Gives the Jacobian of f at z, (B, d, d) with d entries a sample. If None it is
        made of d vector-Jacobian products at once.
    patience
        A sample keeps its matrix while its last step promises that so many more will do
        (three times as many with the unit matrix, whose steps are cheap). With 0 each
        step has its own matrix: Newton's method proper, with quadratic convergence.

    Returns
    -------
    Solution
        See `fixed_point_iteration`; with `factors` if any were made.

    Raises
    ------
    TypeError, ValueError
        See `fixed_point_iteration`; also for a negative `patience` and a Jacobian of
        another shape.

    Notes
    -----
    Nocedal and Wright (2006), section 11.1; reusing factors is the chord or Shamanskii
    method, Kelley (1995), section 5.4.
    """
    refuse_bad_count("patience", patience, least=0)
    run = _Run(f, z0, atol, rtol, max_iter)
    z = run.z
    _, residual, norm = run.start()
    matrices = _NewtonMatrices(run, jacobian)
    fraction, allowance = torch.ones_like(norm), torch.full_like(norm, 3.0)
    old = ~run.finished  # whose factors belong to another iterate
    worn = old if patience == 0 else run.finished & old  # who gets new ones
    while run.goes_on:
        matrices.factor(z, worn)
        old = old & ~worn
        step = matrices.solve(residual)
        trial = run.hold(z + fraction[:, None] * step)
        fz, new, trial_norm = run.evaluate(trial)
        tolerance = run.record(trial, fz, trial_norm)
        falls = trial_norm < norm
        # a step along old factors that fails says nothing about Newton's
        fraction = torch.where(falls | old, 1.0, fraction / 2)
        run.give_up(fraction < 1e-3)
        promise = trial_norm * (trial_norm / norm) ** (patience * allowance)
        worn = ~(promise <= tolerance) & (falls | old) & ~run.finished
        allowance = torch.where(worn, 1.0, allowance)
        old = old | falls
        z, residual = _choose(falls, trial, z), _choose(falls, new, residual)
        norm = torch.where(falls, trial_norm, norm)
    return run.solution(matrices.factors)


class _Run:
    """One call of a solver: where each sample stands, and who has finished."""

    def __init__(
        self, f: Map, z0: Tensor, atol: float, rtol: float, max_iter: int
    ) -> None:
        refuse_bad_batch("z0", z0)
        _refuse_negative("atol", atol)
        _refuse_negative("rtol", rtol)
        refuse_bad_count("max_iter", max_iter)
        self.f, self.z0 = f, z0
        self.rtol, self.max_iter = rtol, max_iter
        self.z = flat(z0.detach())
        self.atol = self.z.new_tensor(atol)
        # a norm that overflows must not make a tolerance that everything meets
        self.largest_size = torch.finfo(z0.dtype).max ** 0.5
        self.residual = self.z.new_full((len(z0),), math.inf)
        self.finished = torch.zeros_like(self.residual, dtype=torch.bool)
        self.failed = self.finished
        self.iterations = torch.zeros_like(self.finished, dtype=torch.long)
        # numbers, for small tensors kept between large ones slow the allocator down
        self.trace: list[float] = []
        self.left = len(z0)
        self.wild = False  # whether the last residuals are not all finite

    @property
    def evaluations(self) -> int:
        """Evaluations of f so far."""
        return len(self.trace)

    @property
    def goes_on(self) -> bool:
        """Whether there is a sample to solve and an evaluation left."""
        return self.left > 0 and self.evaluations < self.max_iter

    @property
    def tested(self) -> bool:
        """Whether a solver tests this evaluation: the first, then every second one."""
        return self.evaluations % 2 == 0 or self.evaluations in (1, self.max_iter)

    def evaluate(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f(z), f(z) - z, and the norm of that for each sample."""
        fz = self.f(z if self.z0.ndim == 2 else z.view(self.z0.shape))
        if not self.trace:
            refuse_bad_output(fz, self.z0)
        fz = fz if self.z0.ndim == 2 else fz.reshape(z.shape)
        residual = fz - z
        norm = vector_norm(residual, dim=1)
        largest = norm.amax().item()
        self.wild = not largest < math.inf
        self.trace.append(_largest_finite(norm) if self.wild else largest)
        return fz, residual, norm

    def start(self) -> tuple[Tensor, Tensor, Tensor]:
        """Evaluate f at the start and test it, if there is a sample."""
        if not self.goes_on:
            return self.z, torch.zeros_like(self.z), self.residual
        fz, residual, norm = self.evaluate(self.z)
        self.record(self.z, fz, norm)
        return fz, residual, norm

    def record(self, z: Tensor, fz: Tensor, norm: Tensor) -> Tensor:
        """Keep what is better, note who has finished; the tolerance of each sample."""
        size = vector_norm(fz, dim=1)
        bounded = size.clamp(max=self.largest_size)
        tolerance = torch.add(self.atol, bounded, alpha=self.rtol)
        better = norm < self.residual
        # a NaN is not greater than anything
        over = ~(norm > tolerance)
        if self.left == len(z) and bool(better.all()) and not bool(over.any()):
            self.z, self.residual = z, norm
            return tolerance
        over = over & ~self.finished
        if self.wild:
            self.give_up(~(norm < math.inf) & ~(size < math.inf))
        better = (better | over) & ~self.finished
        self.z = _choose(better, z, self.z)
        self.residual = torch.where(better, norm, self.residual)
        self._finish(over & ~self.finished)
        return tolerance

    def give_up(self, samples: Tensor) -> None:
        """Count the given samples as finished, and not as converged."""
        self.failed = self.failed | (samples & ~self.finished)
        self._finish(samples & ~self.finished)

    def _finish(self, samples: Tensor) -> None:
        self.iterations = self.iterations.masked_fill(samples, self.evaluations)
        self.finished = self.finished | samples
        self.left = len(samples) - int(self.finished.sum())

    def hold(self, z: Tensor) -> Tensor:
        """Put finished samples back to where they ended."""
        return _choose(self.finished, self.z, z) if self.left < len(z) else z

    def solution(self, factors: tuple[Tensor, Tensor] | None = None) -> Solution:
        """What was found."""
        return Solution(
            self.z.view(self.z0.shape).clone(),
            self.residual,
            self.finished & ~self.failed,
            self.iterations.masked_fill(~self.finished, self.evaluations),
            torch.tensor(self.trace, dtype=self.z.dtype),
            factors,
        )


class _Window:
    """The last differences of residuals and of values, for Anderson acceleration."""

    def __init__(self, z: Tensor, memory: int, ridge: float) -> None:
        batch, size = z.shape
        self.residuals, self.values = z.new_zeros(2, batch, memory, size)
        self.fz = self.residual = torch.zeros_like(z)
        self.norm = self.lowest = z.new_zeros(batch)
        self.age = self.count = torch.zeros_like(self.norm, dtype=torch.long)
        self.ridge, self.noise = ridge, 100 * torch.finfo(z.dtype).eps
        self.pushed = 0

    def begin(
        self, samples: Tensor, fz: Tensor, residual: Tensor, norm: Tensor
    ) -> None:
        """Start the history of the given samples with the evaluation before this."""
        self.fz, self.residual, self.norm = fz, residual, norm
        self._forget(samples)
        self.lowest = torch.where(samples, norm, self.lowest)
        self.count = self.count.masked_fill(samples, 0)

    def step(self, fz: Tensor, residual: Tensor, norm: Tensor, slow: Tensor) -> Tensor:
        """The next iterate: a combination for slow samples when it is their turn."""
        slot = self.pushed % self.values.shape[1]
        torch.sub(residual, self.residual, out=self.residuals[:, slot])
        torch.sub(fz, self.fz, out=self.values[:, slot])
        self.pushed, self.count = self.pushed + 1, self.count + 1
        turn = slow & ((self.count % 3 == 0) | ~(norm < 2 * self.norm))
        self.fz, self.residual, self.norm = fz, residual, norm
        if not bool(turn.any()):
            return fz
        older = torch.where(norm < self.lowest, 0, self.age + 1)
        self.age = torch.where(turn, older, self.age)
        self.lowest = torch.where(turn, norm.minimum(self.lowest), self.lowest)
        stagnant = turn & (self.age > self.values.shape[1])
        if bool(stagnant.any()):
            self._forget(stagnant)
        weights = (self._weights() * turn[:, None]).to(fz.dtype)
        if not math.isfinite(weights.sum().item()):
            weights = weights.nan_to_num(0, 0, 0)
        return fz - (weights[:, :, None] * self.values).sum(dim=1)

    def _forget(self, samples: Tensor) -> None:
        self.residuals[samples] = 0
        self.values[samples] = 0
        self.age = self.age.masked_fill(samples, 0)

    def _weights(self) -> Tensor:
        """Solve the normal equations, scaled to unit diagonal; 0 for empty slots."""
        gram = (self.residuals @ self.residuals.mT).double()
        right = (self.residuals * self.residual[:, None]).sum(dim=2).double()
        diagonal = gram.diagonal(dim1=1, dim2=2)
        # what is so small beside the residual is rounding, to be blown up by no weight
        told = diagonal > (self.noise * self.norm.double()[:, None]) ** 2
        scale = torch.where(told, diagonal.rsqrt(), 0)
        gram = gram * scale[:, :, None] * scale[:, None]
        gram.diagonal(dim1=1, dim2=2).fill_(1 + self.ridge)
        solved = torch.linalg.solve_ex(gram, scale * right)[0]
        return scale * solved


class _RankOneTerms:
    """The unit matrix plus rank-one terms: an approximate inverse for each sample."""

    def __init__(self, z: Tensor, memory: int) -> None:
        self.left, self.right = z.new_zeros(2, len(z), memory, z.shape[1])
        self.used = 0

    def update(
        self, step: Tensor, direction: Tensor, residual: Tensor, moved: Tensor
    ) -> Tensor:
        """Take in a step, for samples that moved; the next direction.

        `direction` is the inverse applied to the residual before the step, and
        `residual` is the one after it.
        """
        if self.used == self.left.shape[1]:
            self.used = 0
            return residual
        turned = self._product(self.right, residual, self.left) + residual
        change = direction - turned
        scale = (step * change).sum(dim=1)
        # where the residual hardly changed there is only rounding to learn from
        noise = 100 * torch.finfo(step.dtype).eps * (step * step).sum(dim=1)
        usable = moved & (scale.abs() > noise)
        factor = torch.where(usable, 1 / scale, 0)[:, None]
        self.left[:, self.used] = (step - change) * factor
        self.right[:, self.used] = self._product(self.left, step, self.right) + step
        term = (self.right[:, self.used] * residual).sum(dim=1, keepdim=True)
        turned = turned + self.left[:, self.used] * term
        self.used += 1
        return turned

    def _product(self, first: Tensor, vector: Tensor, second: Tensor) -> Tensor:
        """The sum over terms of `second` times the product of `first` and `vector`."""
        first, second = first[:, : self.used], second[:, : self.used]
        return ((first @ vector[:, :, None]).mT @ second)[:, 0]


class _NewtonMatrices:
    """LU factors of I - J, made anew only for the samples that ask for it."""

    def __init__(self, run: _Run, jacobian: Map | None) -> None:
        self.run, self.jacobian = run, jacobian
        self.factors: tuple[Tensor, Tensor] | None = None

    def factor(self, z: Tensor, samples: Tensor) -> None:
        """Factor I - J at z for the given samples; a singular matrix ends a sample."""
        if not bool(samples.any()):
            return
        everyone = bool(samples.all())
        matrix = self._jacobian_at(z)
        matrix = -matrix if everyone else -matrix[samples]
        matrix.diagonal(dim1=1, dim2=2).add_(1)
        factors, pivots, singular = torch.linalg.lu_factor_ex(matrix)
        bad = (singular > 0) | ~factors.isfinite().all(dim=2).all(dim=1)
        if bool(bad.any()):
            self.run.give_up(samples.masked_scatter(samples, bad))
            factors[bad] = torch.eye(len(factors[0]), dtype=z.dtype, device=z.device)
        if everyone:
            self.factors = factors, pivots
            return
        if self.factors is None:
            self.factors = self._unit(z)
        self.factors[0][samples], self.factors[1][samples] = factors, pivots

    def solve(self, right: Tensor) -> Tensor:
        """Multiply by the inverse, sample by sample."""
        if self.factors is None:
            return right
        return torch.linalg.lu_solve(*self.factors, right[:, :, None])[:, :, 0]

    def _unit(self, z: Tensor) -> tuple[Tensor, Tensor]:
        batch, size = z.shape
        unit = torch.eye(size, dtype=z.dtype, device=z.device)
        pivots = torch.arange(1, size + 1, dtype=torch.int32, device=z.device)
        return unit.repeat(batch, 1, 1), pivots.repeat(batch, 1)

    def _jacobian_at(self, z: Tensor) -> Tensor:
        batch, size = z.shape
        point = z.view(self.run.z0.shape)
        if self.jacobian is not None:
            matrix = self.jacobian(point)
            if matrix.shape != (batch, size, size):
                raise ValueError(
                    f"jacobian gave shape {tuple(matrix.shape)}: expected "
                    f"{(batch, size, size)}, one matrix a sample"
                )
            return matrix
        with on_tape(point) as point:
            value = flat(self.run.f(point))
            if not value.requires_grad:
                return torch.zeros(batch, size, size, dtype=z.dtype, device=z.device)
            unit = torch.eye(size, dtype=z.dtype, device=z.device)
            rows = grad(
                value,
                point,
                unit[:, None].expand(size, batch, size),
                is_grads_batched=True,
                materialize_grads=True,
            )[0]
        return rows.reshape(size, batch, size).transpose(0, 1)


def flat(z: Tensor) -> Tensor:
    """A batch (B, ...) as (B, d); a view where the memory allows it."""
    return z.reshape(len(z), math.prod(z.shape[1:]))


@contextmanager
def on_tape(z: Tensor) -> Iterator[Tensor]:
    """Record what is done to a copy of z, in `no_grad` and `inference_mode` too."""
    with torch.inference_mode(False), torch.enable_grad():
        # a tensor made in inference mode can be on no tape, but its clone can
        yield (z.clone() if z.is_inference() else z).detach().requires_grad_()


def is_finite(z: Tensor) -> bool:
    """Whether all entries are finite numbers."""
    # a finite sum is quicker to see than finite entries
    return math.isfinite(z.sum().item()) or bool(z.isfinite().all())


def _largest_finite(norm: Tensor) -> float:
    finite = norm[norm < math.inf]
    return finite.amax().item() if len(finite) else math.inf


def _choose(samples: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The first batch for the given samples, the second for the others."""
    return torch.where(samples[:, None], first, second)


def refuse_bad_batch(name: str, z: Tensor) -> None:
    """Raise if z is not a batch of finite floating-point numbers."""
    refuse_bad_numbers(name, z)
    if z.ndim == 0:
        raise ValueError(
            f"{name} has no dimension: the first one is the batch, (B, ...)"
        )


def refuse_bad_numbers(name: str, x: object) -> None:
    """Raise if x is not a tensor of finite floating-point numbers."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        what = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} is {what}: give a floating-point tensor")
    if not is_finite(x):
        raise ValueError(f"{name} holds a NaN or an infinity")


def refuse_bad_output(fz: object, z0: Tensor) -> None:
    """Raise if f(z0) is no batch like z0."""
    if not isinstance(fz, Tensor):
        raise TypeError(f"f returned {type(fz).__name__}: it must return a tensor")
    for what in ("shape", "dtype", "device"):
        got, expected = getattr(fz, what), getattr(z0, what)
        if got != expected:
            raise ValueError(
                f"f(z0) has {what} {got} and z0 {expected}: f must keep it"
            )


def _refuse_negative(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value}")


def refuse_bad_count(name: str, value: int, least: int = 1) -> None:
    """Raise if a count is no whole number, or too small."""
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number from {least}, got {value!r}")
