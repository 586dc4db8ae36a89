"""Measure this book's solvers beside the usual code and the peers, in one process.

    .venv-bench/bin/python benchmarks/run.py [--cases NAME ...] [--rounds N]

`make bench` sets the environment up and runs everything: it writes results.json,
results.md and the figures of the page "How fast is it?". With --cases only those parts
are measured, and printed instead of written.
"""

import argparse
import datetime
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import equilibrium
import ode
import ode_peers
import qp
import qp_peers
import report
import torch
from cases import (
    CASES,
    DOPRI5,
    ODES,
    Case,
    differential_equation,
    init,
    reference,
    symmetric,
)
from measuring import (
    LADDER,
    LIMIT,
    gradient,
    in_turns,
    kept_bytes,
    measure,
    prepare_torch,
    spread,
)
from methods import DEFAULT, METHODS, Map, Method, select, unrolled
from mnist import Trained
from peers import JAX, TORCHDEQ, TORCHDEQ_LAYERS, VERSIONS, deq
from torch import Tensor

from implicit_layers import fixed_point_iteration, implicit_fixed_point

PLACE = Path(__file__).resolve().parent
TORCH = METHODS + TORCHDEQ
ODE_TORCH = ode.METHODS + ode_peers.TORCH

NEWTON, HOOK = ("ours", "Newton"), ("usual code", "Newton and hook")
PLAIN, UNROLLED = ("ours", "plain iteration"), ("usual code", "plain loop, unrolled")
FIXED_POINT = ("TorchDEQ", "fixed point")
JAXOPT = ("jaxopt", "fixed point, BiCGStab")


def machine() -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    model = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        lines = cpuinfo.read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if "model name" in line]
        model = names[0] if names else model
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": model,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "load at the start": round(os.getloadavg()[0], 2),
        "system": platform.system(),
        "versions": {
            "Python": platform.python_version(),
            "torch": torch.__version__,
            **VERSIONS,
        },
    }


def measured_case(case: Case, rounds: int) -> dict[str, Any]:
    """All methods on one case."""
    exact = reference(case)
    rows = measure(case, exact, TORCH, JAX, rounds)
    return {"title": case.title, "rate": exact.rate, "rows": rows}


def measured_mnist(rounds: int) -> dict[str, Any]:
    """All methods on a batch of the trained layer, then training steps of some."""
    trained = Trained()
    result = measured_case(trained.case(), rounds)
    tolerances = {(r["group"], r["name"]): r.get("tolerance") for r in result["rows"]}
    chosen = select(TORCH, DEFAULT, PLAIN, NEWTON, UNROLLED, HOOK, FIXED_POINT)
    steps, number = {}, 20
    for group, name, _, solve in chosen:
        steps[group, name] = trained.steps(solve, tolerances[group, name], number)
    seconds = in_turns(steps, max(rounds // 6, 1))
    result["test error"] = trained.test_error
    result["steps"] = [
        {"group": group, "name": name, **spread([s / number for s in times])}
        for (group, name), times in seconds.items()
    ]
    return result


def measured_growth(rounds: int) -> list[dict[str, Any]]:
    """Some methods on the default weight, at growing width and growing batch."""
    names = (DEFAULT, NEWTON, UNROLLED, HOOK, FIXED_POINT)
    small = select(TORCH, *names)
    large = [method for method in small if method[:2] not in (NEWTON, HOOK)]
    cases = [("width", width, init(width)) for width in (25, 50, 100, 200, 400, 800)]
    cases += [("batch", b, init(batch=b)) for b in (1, 10, 100, 1000, 3000)]
    points = []
    for along, size, case in cases:
        # at width 800 the matrices alone take 256 MB, a factorisation seconds
        methods = large if (along, size) == ("width", 800) else small
        rows = measure(case, reference(case), methods, select(JAX, JAXOPT), rounds)
        points.append({"along": along, "size": size, "rows": rows})
    return points


def ours_for_ever(case: Case, f: Map, tolerance: float) -> Tensor:
    """Plain iteration and plain adjoint iteration that only max_iter ends."""
    solver = partial(fixed_point_iteration, atol=0.0, rtol=0.0, max_iter=case.max_iter)
    z0 = torch.zeros_like(case.x)
    return implicit_fixed_point(
        f, z0, solver=solver, backward_solver=solver, on_failure="ignore"
    )[0]


def torchdeq_for_ever(case: Case, f: Map, tolerance: float) -> Tensor:
    """The same in TorchDEQ."""
    model = deq("fixed_point_iter", 0.0, case.max_iter)
    return model(f, torch.zeros_like(case.x))[0][0]


def measured_iterations(rounds: int) -> list[dict[str, Any]]:
    """Time and memory when every solver is held to a number of iterations."""
    methods = {
        PLAIN: ours_for_ever,
        UNROLLED: unrolled,
        FIXED_POINT: torchdeq_for_ever,
    }
    points = []
    for number in (10, 20, 40, 80, 160, 320):
        case = replace(symmetric(), max_iter=number)
        runs = {key: partial(gradient, case, m, 0.0) for key, m in methods.items()}
        seconds = in_turns(runs, rounds)
        rows = [
            {
                "group": group,
                "name": name,
                "bytes": kept_bytes(partial(m, case, case.f, 0.0), case.leaves),
                **spread(seconds[group, name]),
            }
            for (group, name), m in methods.items()
        ]
        points.append({"along": "iterations", "size": number, "rows": rows})
    return points


def without_solver(case: Case, evaluations: int, products: int) -> Callable[[], None]:
    """The evaluations and products of a method, with no solver between them.

    Two evaluations are on the tape, as ours has it, and the last product reaches the
    parameters.
    """
    f, v = case.f, case.v

    def run() -> None:
        z = torch.zeros_like(case.x)
        with torch.no_grad():
            for _ in range(evaluations - 2):
                z = f(z)
        z = z.requires_grad_()
        f(z)
        value = f(z)
        for _ in range(products - 1):
            torch.autograd.grad(value, z, v, retain_graph=True)
        torch.autograd.grad(value, case.leaves, v)

    return run


def shares(
    case: Case,
    methods: Sequence[Method],
    alone: Callable[[Case, int, int], Callable[[], object]],
    rounds: int,
) -> list[dict[str, Any]]:
    """The share of the time of each method that is spent outside of f."""
    exact = reference(case)
    runs: dict[tuple[str, str, str], Callable[[], object]] = {}
    for group, name, _, solve in methods:
        row, runs[group, name, "all"] = prepare_torch(case, exact, solve)
        steps = row["evaluations"], row["products"]
        runs[group, name, "map"] = alone(case, *steps)
    seconds = in_turns(runs, rounds)
    rows = []
    for group, name, part in runs:
        if part == "all":
            whole = spread(seconds[group, name, "all"])
            bare = spread(seconds[group, name, "map"])["ms"]
            share = 1 - bare / whole["ms"]
            row = {"group": group, "name": name, **whole, "alone": bare}
            rows.append({**row, "share": share})
    return rows


def measured_overhead(rounds: int) -> list[dict[str, Any]]:
    """The share of the time on the convolutional map that is spent outside of it."""
    names = (DEFAULT, PLAIN, FIXED_POINT, ("TorchDEQ", "Anderson"))
    return shares(CASES["conv"](), select(TORCH, *names), without_solver, rounds)


def measured_equilibrium(rounds: int) -> list[dict[str, Any]]:
    """The passes of a convolutional equilibrium, each by itself."""
    layers = equilibrium.LAYERS + TORCHDEQ_LAYERS
    return equilibrium.measured(equilibrium.problem(), layers, rounds)


def measured_odes(rounds: int) -> dict[str, Any]:
    """All methods on a differential equation, and what its tolerance costs."""
    measured: dict[str, Any] = {}
    for kind in ODES:
        case = differential_equation(kind)
        rows = measure(case, reference(case), ODE_TORCH, ode_peers.JAX, rounds)
        measured[kind] = {"title": case.title, "rows": rows}
    few = (ode.BACKPROP, ode.CHECKPOINT, ode.ADJOINT, *ode.TORCHDIFFEQ)
    chosen, compiled = select(ODE_TORCH, *few), select(ode_peers.JAX, ode.DIFFRAX)
    case = differential_equation(DOPRI5)
    exact, fewer = reference(case), max(rounds // 4, 1)
    measured["overhead"] = shares(case, chosen, ode.alone, rounds)
    measured["tolerances"] = []
    for tolerance in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
        at = replace(case, tolerance=tolerance)
        rows = measure(at, exact, chosen, compiled, fewer)
        measured["tolerances"].append({"tolerance": tolerance, "rows": rows})
    return measured


def measured_programs(rounds: int) -> list[dict[str, Any]]:
    """All methods on batches of quadratic programs."""
    measured = []
    for n, m, q, batch, shared in qp.CASES:
        given = qp.programs(n, m, q, batch, shared)
        rows = qp.measured(given, qp.METHODS + qp_peers.PEERS, rounds)
        measured.append({"title": given.title, "batch": batch, "rows": rows})
    return measured


PARTS: dict[str, Callable[[int], Any]] = {
    **{
        name: lambda rounds, make=make: measured_case(make(), rounds)
        for name, make in CASES.items()
    },
    "conv": lambda rounds: measured_case(CASES["conv"](), max(rounds // 4, 1)),
    "mnist": measured_mnist,
    "overhead": measured_overhead,
    "equilibrium": lambda rounds: measured_equilibrium(max(rounds // 4, 1)),
    "iterations": lambda rounds: measured_iterations(max(rounds // 2, 1)),
    "odes": measured_odes,
    "qp": measured_programs,
    "growth": lambda rounds: measured_growth(max(rounds // 4, 1)),
}


def rounded(value: Any) -> Any:
    """Floats with four significant digits, however deep they lie."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    """Measure what was asked for, and write or print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=PARTS, metavar="NAME")
    parser.add_argument("--rounds", type=int, default=20)
    asked = parser.parse_args()
    if asked.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {asked.rounds}")
    results: dict[str, Any] = {
        "machine": machine(),
        "rounds": asked.rounds,
        "limit": LIMIT,
        "tolerances": [LADDER[0], LADDER[-1]],
    }
    if results["machine"]["load at the start"] > 0.5:
        print("bench: the machine is busy, so times will be off", file=sys.stderr)
    gc.freeze()  # what is there now need not be searched for tensors again and again
    start = time.monotonic()
    for name in asked.cases or PARTS:
        results[name] = PARTS[name](asked.rounds)
        print(f"bench: {name}, {time.monotonic() - start:.0f} s", file=sys.stderr)
    results["minutes"] = (time.monotonic() - start) / 60
    results = rounded(results)
    if asked.cases:
        print(report.markdown(results))
    else:
        (PLACE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        report.write(results)


if __name__ == "__main__":
    main()
