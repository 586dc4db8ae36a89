"""How a method is measured: at which tolerance, how long, how many steps and bytes."""

import gc
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from cases import Case, Reference, gradient_error
from methods import IN_PLACE, LIMIT_ROW, Method, Solve, bare_products
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Key = TypeVar("Key")

#: The largest relative error of a gradient that counts as equally exact.
LIMIT = 1e-4
#: Tolerances to choose from, loosest first, eight a decade.
LADDER = tuple(10.0 ** (-k / 8) for k in range(8, 57))
#: A turn lasts about this many seconds, once to warm up and once counted.
TURN = 0.005


def choose_tolerance(error_at: Callable[[float], float]) -> tuple[float, float]:
    """The loosest tolerance whose gradient is exact enough, and its error.

    Found by bisection: the next looser one was not exact enough. If none is, the one
    tried with the smallest error: the caller must look at it.
    """
    tried: dict[int, float] = {}
    fails, exact = -1, len(LADDER)
    while exact - fails > 1:
        middle = (fails + exact) // 2
        error = error_at(LADDER[middle])
        tried[middle] = math.inf if math.isnan(error) else error
        if error <= LIMIT:
            exact = middle
        else:
            fails = middle
    chosen = min(tried, key=lambda rung: tried[rung]) if exact not in tried else exact
    return LADDER[chosen], tried[chosen]


def settle(case: Case, error_at: Callable[[float], float]) -> tuple[float, float]:
    """The case's own tolerance, or the one that is chosen for it; and its error."""
    if case.tolerance is None:
        return choose_tolerance(error_at)
    return case.tolerance, error_at(case.tolerance)


def in_turns(
    runs: Mapping[Key, Callable[[], object]], rounds: int
) -> dict[Key, list[float]]:
    """Seconds of one call of each run, in every round.

    A turn first repeats the run uncounted until `TURN` seconds are over: threads of
    another library that still wait for work have gone to sleep by then, and the caches
    hold what they hold in a loop. Then the same, counted. A run that is much longer
    than that needs no such care, but for its very first call.
    """
    seconds: dict[Key, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            if not seconds[name] or seconds[name][-1] < 10 * TURN:
                _repeat(run)
            seconds[name].append(_repeat(run))
    return seconds


def _repeat(run: Callable[[], object]) -> float:
    start, calls = time.perf_counter(), 0
    while True:
        run()
        calls += 1
        elapsed = time.perf_counter() - start
        if elapsed > TURN:
            return elapsed / calls


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the rounds, in milliseconds."""
    low, middle, high = (
        statistics.quantiles(seconds, n=4, method="inclusive")
        if len(seconds) > 1
        else [seconds[0]] * 3
    )
    return {"ms": 1e3 * middle, "low": 1e3 * low, "high": 1e3 * high}


class _Count(TorchDispatchMode):
    """Counts the operations that reach the dispatcher, backward passes included."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.name().split("::")[1].split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def count(kind: str, run: Callable[[], object]) -> dict[str, int]:
    """Evaluations of the map, products with its transposed Jacobian, factorisations."""
    with _Count() as counted:
        run()
    calls = counted.calls
    if kind == "conv":
        steps = calls["native_group_norm"], calls["native_group_norm_backward"]
    else:
        steps = calls["tanh"] + calls["tanh_"], calls["tanh_backward"]
    factored = calls["linalg_lu_factor_ex"] + calls["_linalg_solve_ex"]
    names = ("evaluations", "products", "factorisations")
    return dict(zip(names, (*steps, factored), strict=True))


def kept_bytes(forward: Callable[[], object], exclude: Sequence[Tensor]) -> int:
    """Bytes that a forward pass leaves in memory for its backward pass.

    What autograd saves, and what Python objects such as the closure of a hook hold;
    each storage once.
    """
    gc.collect()
    known = {tensor.untyped_storage().data_ptr() for tensor in (*exclude, *_alive())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        # as it is, an output would hold the graph that holds it
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = forward()
    for tensor in _alive():
        if tensor is not output:
            note(tensor)
    return sum(kept.values())


def _alive() -> list[Tensor]:
    things = [thing for thing in gc.get_objects() if type(thing) is Tensor]
    return [thing for thing in things if thing.layout == torch.strided]


def gradient(case: Case, solve: Solve, tolerance: float) -> tuple[Tensor, ...]:
    """Forward and backward pass of a torch method."""
    z = solve(case, case.f, tolerance)
    return torch.autograd.grad((z * case.v).sum(), case.leaves)


def prepare_torch(
    case: Case, exact: Reference, solve: Solve
) -> tuple[dict[str, Any], Callable[[], object]]:
    """What a torch method does at the tolerance that it needs, and a run of it."""

    def error_at(tolerance: float) -> float:
        return gradient_error(gradient(case, solve, tolerance), exact.gradients)

    tolerance, error = settle(case, error_at)

    def run() -> object:
        return gradient(case, solve, tolerance)

    row = {"tolerance": tolerance, "error": error, **count(case.kind, run)}
    row["bytes"] = kept_bytes(
        lambda: solve(case, case.f, tolerance), exclude=case.leaves
    )
    return row, run


def prepare_jax(
    case: Case, exact: Reference, solve: Any
) -> tuple[dict[str, Any], Callable[[], object]]:
    """The same for a JAX method, compiled first."""
    from peers import Compiled, as_tensors  # absent outside .venv-bench

    compiled = Compiled(case, exact.size, solve)

    def error_at(tolerance: float) -> float:
        return gradient_error(as_tensors(compiled(tolerance)[0]), exact.gradients)

    tolerance, error = settle(case, error_at)
    row = {"tolerance": tolerance, "error": error, "bytes": compiled.saved(tolerance)}
    row["evaluations"] = int(compiled(tolerance)[1])
    return row, lambda: compiled(tolerance)


def measure(
    case: Case,
    exact: Reference,
    methods: Sequence[Method],
    jax_methods: Sequence[Method],
    rounds: int,
) -> list[dict[str, Any]]:
    """Measure all methods that are made for a case, in turns; one row each."""
    rows, runs = {}, {}
    for prepare, chosen in ((prepare_torch, methods), (prepare_jax, jax_methods)):
        for group, name, kinds, solve in chosen:
            if case.kind in kinds:
                row, runs[group, name] = prepare(case, exact, solve)
                rows[group, name] = {"group": group, "name": name, **row}
    if IN_PLACE in rows:
        counted = rows[IN_PLACE]
        number = counted["evaluations"] + counted["products"] + 1
        runs[LIMIT_ROW] = bare_products(case, number)
        rows[LIMIT_ROW] = dict(zip(("group", "name"), LIMIT_ROW, strict=True))
        rows[LIMIT_ROW]["evaluations"] = number
    seconds = in_turns(runs, rounds)
    measured = [{**row, **spread(seconds[key])} for key, row in rows.items()]
    return sorted(measured, key=lambda row: row["group"] == "limit")
