"""A trajectory as a layer: how an ODE is solved, and how its gradient is found."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function, grad
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.linalg import vector_norm
from torch.utils.weak import WeakTensorKeyDictionary

from implicit_layers.implicit import implicit_fixed_point
from implicit_layers.solvers import (
    flat,
    is_finite,
    newton,
    refuse_bad_batch,
    refuse_bad_count,
    refuse_bad_output,
)

#: The right-hand side f(t, y) of dy/dt = f(t, y), for a batch y of shape (B, ...).
Derivative = Callable[[Tensor, Tensor], Tensor]


@dataclass
class ODEStatistics:
    """What a solver of an ODE did.

    Attributes
    ----------
    evaluations
        Calls of f on the way forward.
    backward_evaluations
        Calls of f in backward passes so far.
    accepted, rejected
        Steps that were kept, and steps that were tried and were too inexact.
    steps
        The sizes of the accepted steps in the unit of time, negative where time falls.
    reached_end
        Whether the last time was reached.
    """

    evaluations: int = 0
    backward_evaluations: int = 0
    accepted: int = 0
    rejected: int = 0
    steps: list[float] = field(default_factory=list)
    reached_end: bool = False


class ODEError(RuntimeError):
    """A solver that could not reach the last time.

    Attributes
    ----------
    time
        The time reached.
    statistics
        What happened until then.
    """

    time: float
    statistics: ODEStatistics

    def __init__(self, message: str, time: float, statistics: ODEStatistics) -> None:
        super().__init__(message)
        self.time = time
        self.statistics = statistics


def odeint(
    f: Derivative,
    y0: Tensor,
    t: Tensor,
    *,
    method: str = "dopri5",
    rtol: float = 1e-5,
    atol: float = 1e-6,
    gradient: str = "backprop",
    params: Iterable[Tensor] | Tensor | None = None,
    step_size: float | None = None,
    max_steps: int = 10_000,
) -> tuple[Tensor, ODEStatistics]:
    """Solve dy/dt = f(t, y) from y(t[0]) = y0, and give the trajectory a gradient.

    Gradients reach `y0`, `t` and every tensor that f touches, closed over or not; with
    `gradient="adjoint"`, which cannot see those, `params` in their place.

    Parameters
    ----------
    f
        Called as f(t, y) with a number t, a tensor without dimensions, and a batch y of
        shape (B, ...), each sample of which it treats by itself. Returns dy/dt, of the
        same shape. It is called again in backward passes (but for `"backprop"`), and
        must then return the same.
    y0
        The state at t[0], (B, ...), float32 or float64.
    t
        The times at which the state is wanted, (T,) with T at least 2, rising or
        falling.
    method
        - `"dopri5"`: order 5, with an estimate of the error that chooses the steps. The
          batch has one step size, and a step is kept only if the worst sample meets its
          tolerance. Times between two steps are interpolated, so asking for more of
          them changes no step (Dormand and Prince 1980; Hairer, Nørsett and Wanner
          1993, sections II.4 to II.6);
        - `"euler"`, `"midpoint"`, `"rk4"`: order 1, 2 and 4, with given steps;
        - `"implicit_euler"`: order 1, with given steps, each of which is solved by
          `newton`: for stiff problems.
    rtol, atol
        A step of `"dopri5"` is accepted if the root mean square over a sample's entries
        of error / (atol + rtol * abs(y)) is at most 1. For `"implicit_euler"` the
        tolerances of `newton`.
    gradient
        - `"backprop"`: through every operation of the accepted steps, with the memory
          of all of them;
        - `"checkpoint"`: the same numbers with the memory of one state a step, whose
          inside is computed again in the backward pass (Griewank and Walther 2008,
          chapter 12);
        - `"adjoint"`: solves the adjoint equation backwards in time, with a memory
          that depends on neither the steps nor f, and an error of the size of the
          tolerances. Its steps are chosen by y and its adjoint alone (Chen et al. 2018;
          Kidger, Chen and Lyons 2021).
    params
        For `"adjoint"`: the tensors whose gradients are wanted, or one. None: the
        parameters of f, which is then an `nn.Module`.
    step_size
        For the methods with given steps: each interval of t is cut into equal steps
        that are not longer. None: the intervals themselves.
    max_steps
        Largest number of steps, rejected ones included.

    Returns
    -------
    tuple[Tensor, ODEStatistics]
        The states at the times t, (T, B, ...), and what the solver did.

    Raises
    ------
    TypeError
        If y0 is not of float32 or float64, t no floating-point tensor, or `params`
        holds something else than tensors.
    ValueError
        If an argument is out of its range or unknown, f returns another shape, dtype or
        device than y has, or `"adjoint"` would lose the gradient of a tensor that f
        touches and `params` lacks.
    RuntimeError
        In the backward pass, if the adjoint itself is to be differentiated.
    ODEError
        If there are too many steps, a step becomes too small for the clock, or the
        state or its derivative is no longer finite.
    """
    _refuse_arguments(y0, t, method, rtol, atol, gradient, step_size, max_steps)
    statistics = ODEStatistics()
    derivative = _Counted(f, statistics, "evaluations")
    run = _Integrator(derivative, method, rtol, atol, step_size, max_steps, statistics)
    if gradient == "adjoint":
        chosen = _parameters(f, params)
        if torch.is_grad_enabled():
            _refuse_lost_gradients(derivative, y0, t, chosen)
        ys: Tensor = _Adjoint.apply(run, t, y0, *chosen)
    else:
        if gradient == "checkpoint" and torch.is_grad_enabled():
            run.again = _Counted(f, statistics, "backward_evaluations")
        on_tape = t.requires_grad and torch.is_grad_enabled()
        times = t.to("cpu", torch.double).unbind() if on_tape else t.tolist()
        ys = _trajectory(run, y0, times)
    statistics.reached_end = True
    return ys, statistics


class _Counted:
    """f(t, y) for a time that may be a number, with a count of the calls."""

    def __init__(self, f: Derivative, statistics: ODEStatistics, name: str) -> None:
        self.f, self.statistics, self.name = f, statistics, name

    def __call__(self, t: Any, y: Tensor) -> Tensor:
        count = getattr(self.statistics, self.name)
        setattr(self.statistics, self.name, count + 1)
        dy = self.f(t.to(y) if isinstance(t, Tensor) else y.new_full((), t), y)
        if count == 0:
            refuse_bad_output(dy, y)
        return dy


class _Tableau(NamedTuple):
    """An explicit Runge-Kutta method: stage i is f(t + nodes[i] h, y + h rows[i] k)."""

    nodes: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


_DOPRI5 = _Tableau(
    (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1),
    (
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0),
)
# the weights less those of the embedded method of order 4
_DOPRI5_ERROR = (
    71 / 57600,
    0,
    -71 / 16695,
    71 / 1920,
    -17253 / 339200,
    22 / 525,
    -1 / 40,
)
# what the cubic through both ends lacks: Hairer, Nørsett and Wanner (1993), II.6
_DOPRI5_BETWEEN = (
    -12715105075 / 11282082432,
    0,
    87487479700 / 32700410799,
    -10690763975 / 1880347072,
    701980252875 / 199316789632,
    -1453857185 / 822651844,
    69997945 / 29380423,
)
_EXPLICIT = {
    "euler": _Tableau((0,), ((),), (1,)),
    "midpoint": _Tableau((0, 1 / 2), ((), (1 / 2,)), (0, 1)),
    "rk4": _Tableau(
        (0, 1 / 2, 1 / 2, 1),
        ((), (1 / 2,), (0, 1 / 2), (0, 0, 1)),
        (1 / 6, 1 / 3, 1 / 3, 1 / 6),
    ),
    "dopri5": _DOPRI5,
}
_METHODS = (*_EXPLICIT, "implicit_euler")


class _Step(NamedTuple):
    """An accepted step; times and sizes are numbers, or tensors if t has a gradient."""

    start: Any
    h: Any
    y: Tensor
    stages: list[Tensor]
    end: Tensor


@dataclass
class _Integrator:
    """The steps of one call of odeint."""

    f: Derivative
    method: str
    rtol: float
    atol: float
    step_size: float | None
    max_steps: int
    statistics: ODEStatistics
    again: Derivative | None = None  # f for backward, where stages are forgotten
    h: float | None = None  # the step size that the last accepted step suggests
    forgetful: "_Forgetful" = field(default_factory=lambda: _Forgetful())

    def steps(self, y: Tensor, start: Any, stop: Any) -> Iterator[_Step]:
        """The accepted steps from start to stop."""
        adaptive = self.method == "dopri5"
        return (self._chosen if adaptive else self._given)(y, start, stop)

    def _given(self, y: Tensor, start: Any, stop: Any) -> Iterator[_Step]:
        length = abs(_number(stop) - _number(start))
        number = 1
        if self.step_size is not None:  # rounding must not add a step
            number = max(math.ceil(length / self.step_size * (1 - 1e-12)), 1)
        h = (stop - start) / number
        for i in range(number):
            now = start + i * h
            self._refuse_too_many(now, stop, h)
            step = _Step(now, h, y, *self._attempt(now, h, y, None))
            y = step.end
            if not is_finite(y):
                raise self._not_finite(now)
            self._accept(_number(h))
            yield step

    def _chosen(self, y: Tensor, start: Any, stop: Any) -> Iterator[_Step]:
        now, end = start, _number(stop)
        k = self._first_slope(now, y)
        h = self._first_size(now, end, y, k) if self.h is None else self.h
        rejected = False
        while True:
            # a rest that rounding leaves is no step of its own
            last = abs(h) * (1 + 1e-9) >= abs(end - _number(now))
            self._refuse_too_many(now, stop, h)
            size = stop - now if last else h
            step = _Step(now, size, y, *self._attempt(now, size, y, k))
            error = self._error(step)
            factor = 10.0 if error == 0 else 0.9 * error**-0.2
            if error <= 1:
                self._accept(_number(size))
                wanted = _number(size) * min(factor, 1.0 if rejected else 10.0)
                self.h = max(h, wanted, key=abs) if last else wanted
                yield step
                if last:
                    return
                now, y, k, h = now + size, step.end, step.stages[-1], self.h
            else:
                self.statistics.rejected += 1
                finite = math.isfinite(error)
                h = _number(size) * (max(factor, 0.2) if finite else 0.2)
                self._refuse_too_small(now, end, h, finite)
            rejected = error > 1 or math.isnan(error)

    def _first_slope(self, now: Any, y: Tensor) -> Tensor:
        if self.again is None:
            k = self.f(now, y)
        else:
            again = self.again
            k = self.forgetful(lambda: self.f(now, y), lambda y: again(now, y), y)
        if not is_finite(k):
            raise self._not_finite(now)
        return k

    @torch.no_grad()
    def _first_size(self, now: Any, end: float, y: Tensor, k: Tensor) -> float:
        """A step whose error should be a hundredth of what the tolerances allow."""
        scale = self.atol + self.rtol * y.abs()
        length = end - _number(now)
        size, slope = _worst(y / scale), _worst(k / scale)
        if not math.isfinite(slope):  # its square is too large for the dtype
            return 1e-6 * length
        h = 1e-6 if min(size, slope) < 1e-5 else 0.01 * size / slope
        h = math.copysign(min(h, abs(length)), length)
        later = torch.tensor(_number(now) + h, dtype=torch.double)
        bend = _worst((self.f(later, _combined(y, h, (1,), [k])) - k) / scale)
        largest = max(slope, bend / abs(h))
        better = (0.01 / largest) ** 0.2 if largest > 1e-15 else abs(h) * 1e3
        better = better if math.isfinite(better) else abs(h)
        return math.copysign(min(100 * abs(h), better, abs(length)), length)

    @torch.no_grad()
    def _error(self, step: _Step) -> float:
        """Estimated error of the worst sample, in units of its tolerance."""
        h = _number(step.h)
        error = _combined(torch.zeros_like(step.y), h, _DOPRI5_ERROR, step.stages)
        allowed = torch.maximum(step.y.abs(), step.end.abs())
        allowed.mul_(self.rtol).add_(self.atol)
        return _worst(error / allowed)

    def _attempt(
        self, now: Any, h: Any, y: Tensor, k: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        """The stages of a step and the state after it; k is the first one if known."""
        if self.again is None or not torch.is_grad_enabled():
            return self._stages(self.f, now, h, y, k)
        again, on_tape = self.again, None if k is None else k.requires_grad

        def rerun(y: Tensor) -> object:
            first = None
            if on_tape is not None:  # the last stage of the step before is not kept
                with torch.no_grad(), saved_tensors_hooks(_apart, _itself):
                    first = again(now, y).detach().requires_grad_(on_tape)
            return self._stages(again, now, h, y, first)

        return self.forgetful(lambda: self._stages(self.f, now, h, y, k), rerun, y)

    def _stages(
        self, f: Derivative, now: Any, h: Any, y: Tensor, k: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        if self.method == "implicit_euler":
            return [], self._solved(f, now + h, h, y)
        rule = _EXPLICIT[self.method]
        stages, point = [f(now, y) if k is None else k], y
        for node, row in zip(rule.nodes[1:], rule.rows[1:], strict=True):
            point = _combined(y, h, row, stages)
            stages.append(f(now + node * h, point))
        if rule.weights[-1] == 0:  # the last stage stands at the end of the step
            return stages, point
        return stages, _combined(y, h, rule.weights, stages)

    def _solved(self, f: Derivative, t: Any, h: Any, y: Tensor) -> Tensor:
        """The z = y + h f(t, z) of an implicit Euler step: an implicit layer."""
        try:
            z, _ = implicit_fixed_point(
                lambda z: _combined(y, h, (1,), [f(t, z)]),
                y.detach(),
                solver=newton,
                rtol=self.rtol,
                atol=self.atol,
                on_failure="raise",
            )
        except RuntimeError as error:
            raise self._failure(
                f"implicit Euler found no state for t = {_number(t):.4g}: {error}; or "
                "take smaller steps",
                t,
            ) from error
        return z

    def _accept(self, h: float) -> None:
        self.statistics.accepted += 1
        self.statistics.steps.append(h)

    def _refuse_too_many(self, now: Any, stop: Any, h: Any) -> None:
        if self.statistics.accepted + self.statistics.rejected >= self.max_steps:
            raise self._failure(
                f"{self.max_steps} steps led to t = {_number(now):.4g}, not to "
                f"{_number(stop):.4g}; the next one has the size {_number(h):.1e}. "
                "Raise max_steps or loosen the tolerances; if small steps are needed "
                "although the solution is smooth, the problem is stiff: take "
                "method='implicit_euler'",
                now,
            )

    def _refuse_too_small(self, now: Any, end: float, h: float, finite: bool) -> None:
        if abs(h) > 16 * math.ulp(max(abs(_number(now)), abs(end))):
            return
        if not finite:
            raise self._not_finite(now)
        raise self._failure(
            f"at t = {_number(now):.4g} no step is small enough for the tolerances: "
            "the solution may blow up or jump there, or they are below what the dtype "
            "can resolve; loosen them, take float64, or stop before",
            now,
        )

    def _not_finite(self, now: Any) -> ODEError:
        return self._failure(
            f"the derivative, or the state that it leads to, is not finite after "
            f"t = {_number(now):.4g}: the solution may blow up there, f may be "
            "undefined, or the steps may be too long",
            now,
        )

    def _failure(self, message: str, now: Any) -> ODEError:
        return ODEError(message, _number(now), self.statistics)


def _combined(
    y: Tensor, h: Any, weights: Sequence[float], stages: Sequence[Tensor]
) -> Tensor:
    """The sum y + h (weights[0] stages[0] + ...); more stages than weights are left."""
    sum_ = y
    for weight, k in zip(weights, stages, strict=False):
        if weight == 0:
            continue
        if isinstance(h, Tensor):
            sum_ = sum_ + (h * weight) * k
        elif sum_ is y:
            sum_ = torch.add(y, k, alpha=h * weight)
        else:  # in place: addition keeps nothing for the backward pass
            sum_.add_(k, alpha=h * weight)
    return sum_


def _worst(x: Tensor) -> float:
    """Root mean square over the entries of each sample, of the sample with most."""
    if x.numel() == 0:
        return 0.0
    rows = flat(x)
    return vector_norm(rows, dim=1).amax().item() / math.sqrt(rows.shape[1])


def _number(time: Any) -> float:
    return time.item() if isinstance(time, Tensor) else time


def _trajectory(run: _Integrator, y0: Tensor, times: Sequence[Any]) -> Tensor:
    """The states at the given times, (T, B, ...)."""
    ys = [y0]
    if run.method != "dopri5":
        for start, stop in pairwise(times):
            for step in run.steps(ys[-1], start, stop):
                end = step.end
            ys.append(end)
        return torch.stack(ys)
    ahead = deque(times[1:-1])
    for step in run.steps(y0, times[0], times[-1]):
        inside = []
        while ahead and abs(ahead[0] - step.start) <= abs(step.h):
            inside.append((ahead.popleft() - step.start) / step.h)
        if inside:
            ys.extend(_between(step, inside).unbind())
        end = step.end
    return torch.stack([*ys, end])


def _between(step: _Step, fractions: Sequence[Any]) -> Tensor:
    """The states at some fractions of a step of dopri5, to order 4."""
    y = step.y
    theta = torch.stack([torch.as_tensor(x, dtype=torch.double) for x in fractions])
    theta = theta[:, None]
    weights, more = (theta.new_tensor(w) for w in (_DOPRI5.weights, _DOPRI5_BETWEEN))
    first, last = theta.new_zeros(7), theta.new_zeros(7)
    first[0] = last[-1] = 1
    # a cubic with the states and slopes of both ends, and a quartic that keeps them
    weights = theta**2 * (3 - 2 * theta) * weights
    weights = weights + theta * (1 - theta) ** 2 * first - theta**2 * (1 - theta) * last
    weights = weights + theta**2 * (1 - theta) ** 2 * more
    moved = torch.tensordot(weights.to(y), torch.stack(step.stages), 1)
    return y + step.h * moved


class _Forgetful:
    """Calls on the tape that save one state each; a second call brings back the rest.

    As `torch.utils.checkpoint`, with less to do for each tensor. What is brought back
    stays until it is another call's turn, since a backward pass may ask for it twice.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.whose: object = None

    def __call__(
        self, run: Callable[[], Any], rerun: Callable[[Tensor], object], y: Tensor
    ) -> Any:
        """Return run(); in a backward pass, rerun(y) does the same again."""
        kept = _Keep.apply(y, y.new_empty(0, requires_grad=True)).grad_fn
        fresh: list[Tensor] = []  # for an f that itself takes gradients
        count = 0

        def forget(x: Tensor) -> int:
            nonlocal count
            fresh.append(x)
            count += 1
            return count - 1

        def remember(number: int) -> Tensor:
            if fresh:
                return fresh[number]
            if self.whose is not kept:
                self.tensors, self.whose = [], kept
                with torch.enable_grad(), saved_tensors_hooks(self._keep, _itself):
                    rerun(kept.saved_tensors[0])
            return self.tensors[number]

        with saved_tensors_hooks(forget, remember):
            result = run()
        fresh.clear()
        return result

    def _keep(self, x: Tensor) -> Tensor:
        self.tensors.append(_apart(x))
        return self.tensors[-1]


def _apart(x: Tensor) -> Tensor:
    # kept as it is, an output would hold the graph that holds it, for ever
    return x.detach()


def _itself(x: Tensor) -> Tensor:
    return x


class _Keep(Function):
    """Saves a tensor where autograd saves its own, for all to see."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, on_tape: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return on_tape.clone()

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        raise NotImplementedError("what is kept is read, not differentiated")


class _Backwards:
    """The adjoint equation as a right-hand side, for states and adjoints side by side.

    dy/dt = f(t, y), and da/dt = -a df/dy.
    """

    def __init__(self, f: Derivative, like: Tensor, keep: bool) -> None:
        self.f, self.shape, self.keep = f, like.shape, keep
        # each slope's f with its graph and a, for the gradients of the parameters
        self.graphs = WeakTensorKeyDictionary()

    def __call__(self, t: Any, state: Tensor) -> Tensor:
        y, a = (half.view(self.shape) for half in state.chunk(2, dim=1))
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            dy = self.f(t, y)
        pull = None
        if dy.requires_grad:
            (pull,) = grad(dy, y, a, retain_graph=self.keep, allow_unused=True)
        pull = torch.zeros_like(y) if pull is None else pull
        slope = torch.cat([flat(dy.detach()), flat(pull).neg()], dim=1)
        if self.keep and dy.requires_grad:
            self.graphs[slope] = dy, a
        return slope


class _Adjoint(Function):
    """The trajectory, with a backward pass that solves the adjoint equation."""

    @staticmethod
    def forward(
        ctx: Any, run: _Integrator, t: Tensor, y0: Tensor, *params: Tensor
    ) -> Tensor:
        ys = _trajectory(run, y0, t.tolist())
        ctx.run = run
        ctx.save_for_backward(t, ys, *params)
        return ys

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "gradient='adjoint' has no second derivative (create_graph=True): take "
                "'checkpoint' or 'backprop'"
            )
        t, ys, *params = ctx.saved_tensors
        times, ys = t.tolist(), ys.detach()
        f = _Counted(ctx.run.f.f, ctx.run.statistics, "backward_evaluations")
        wanted = [p for p in params if p.requires_grad]
        field = _Backwards(f, ys[0], bool(wanted))
        run = replace(ctx.run, f=field, statistics=ODEStatistics(), h=None)
        # the adjoint is linear in v, and its tolerance should be relative to v
        unit = max(_worst(v.transpose(0, 1)), torch.finfo(v.dtype).tiny)
        a = torch.zeros_like(v[0])
        total = [torch.zeros_like(p) for p in wanted]
        for i in range(len(times) - 1, 0, -1):
            a = a + v[i] / unit
            state = torch.cat([flat(ys[i]), flat(a)], dim=1)
            for step in run.steps(state, times[i], times[i - 1]):
                _add_quadrature(total, step, field, wanted, run.method)
            a = step.end.chunk(2, dim=1)[1].view_as(a)
        of_t = None
        if ctx.needs_input_grad[1]:
            slopes = torch.stack([f(s, y) for s, y in zip(times, ys, strict=True)])
            moved = torch.cat([-unit * a[None], v[1:]])
            of_t = (moved * slopes).flatten(1).sum(1).to(t)
        of_params = iter(x * unit for x in total)
        return (
            None,
            of_t,
            unit * a + v[0],
            *(next(of_params) if p.requires_grad else None for p in params),
        )


def _add_quadrature(
    total: list[Tensor],
    step: _Step,
    field: _Backwards,
    params: Sequence[Tensor],
    method: str,
) -> None:
    """Add the integral of a df/dparams over a step, by the step's own weights."""
    slopes, pulls = [], []
    for weight, stage in zip(_EXPLICIT[method].weights, step.stages, strict=True):
        if weight != 0 and stage in field.graphs:
            dy, a = field.graphs[stage]
            slopes.append(dy)
            pulls.append(a * (-weight * step.h))
    if not slopes:
        return
    pieces = grad(slopes, params, pulls, retain_graph=True, allow_unused=True)
    for sum_, piece in zip(total, pieces, strict=True):
        if piece is not None:
            sum_ += piece


def _parameters(
    f: Derivative, params: Iterable[Tensor] | Tensor | None
) -> tuple[Tensor, ...]:
    if params is None:
        if not isinstance(f, nn.Module):
            raise ValueError(
                "gradient='adjoint' needs the tensors whose gradients are wanted, and "
                "f is no nn.Module: give params, (W, b) for example, or () if there "
                "are none"
            )
        params = f.parameters()
    chosen = (params,) if isinstance(params, Tensor) else tuple(params)
    for p in chosen:
        if not isinstance(p, Tensor):
            raise TypeError(f"params holds {type(p).__name__}: give tensors")
    return chosen


def _refuse_lost_gradients(
    f: Derivative, y0: Tensor, t: Tensor, params: Sequence[Tensor]
) -> None:
    """Raise if f touches a tensor with a gradient that is not among params."""
    with torch.enable_grad():
        y0 = y0.detach().requires_grad_()
        dy = f(t[0].detach(), y0)
    if not dy.requires_grad:
        return
    node: Any = get_gradient_edge(dy).node
    known = {id(y0), *(id(p) for p in params)}
    todo, seen = [node], {p.grad_fn for p in params}
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in known:
            raise ValueError(
                "f touches a tensor of shape "
                f"{tuple(variable.shape)} that requires a gradient and is not in "
                "params, where the adjoint would lose it: add it, detach it, or take "
                "gradient='checkpoint'"
            )
        todo.extend(following for following, _ in node.next_functions)


def _refuse_arguments(
    y0: Tensor,
    t: Tensor,
    method: str,
    rtol: float,
    atol: float,
    gradient: str,
    step_size: float | None,
    max_steps: int,
) -> None:
    refuse_bad_batch("y0", y0)
    if y0.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"y0 is {y0.dtype}: give float32 or float64")
    _refuse_bad_times(t)
    for name, given, all_ in (
        ("method", method, _METHODS),
        ("gradient", gradient, ("backprop", "checkpoint", "adjoint")),
    ):
        if given not in all_:
            raise ValueError(f"{name} is {given!r}: give one of {', '.join(all_)}")
    if not (0 <= rtol < math.inf and 0 < atol < math.inf):
        raise ValueError(
            f"rtol is {rtol} and atol {atol}: both must be finite, rtol not negative, "
            "atol positive"
        )
    if step_size is not None and method == "dopri5":
        raise ValueError("dopri5 chooses its steps: leave step_size out, or take rk4")
    if step_size is not None and not 0 < step_size < math.inf:
        raise ValueError(f"step_size must be positive and finite, got {step_size}")
    if method == "implicit_euler" and gradient == "adjoint":
        raise ValueError(
            "the adjoint runs the trajectory backwards, where a stiff problem is "
            "unstable: with implicit_euler take gradient='checkpoint'"
        )
    refuse_bad_count("max_steps", max_steps)


def _refuse_bad_times(t: Tensor) -> None:
    if not isinstance(t, Tensor) or not t.is_floating_point():
        what = str(t.dtype) if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"t is {what}: give a floating-point tensor of times")
    if t.ndim != 1 or len(t) < 2:
        raise ValueError(
            f"t has the shape {tuple(t.shape)}: give at least two times, (T,)"
        )
    differences = t.detach().diff()
    if not bool(t.isfinite().all()) or not (
        bool((differences > 0).all()) or bool((differences < 0).all())
    ):
        raise ValueError("t must be finite and strictly rising or strictly falling")
