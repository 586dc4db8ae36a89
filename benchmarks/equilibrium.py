"""A convolutional equilibrium: the forward pass, and what either gradient adds to it.

All methods stop by one rule, forward and backward: the norm of f(z) - z is at most
`TOLERANCE` times that of f(z), in each sample.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from cases import Case, convolutional, reference
from measuring import in_turns, prepare_torch, spread
from methods import DEFAULT, Map, Solve, ours
from torch import Tensor

from implicit_layers import anderson, fixed_point_iteration

TOLERANCE = 1e-5
#: Of every solver; some of TorchDEQ's allocate for all of them.
MAX_ITER = 60

#: Group, name, and the method with its exact and with its one-step gradient.
Layer = tuple[str, str, Solve, Solve]


def problem(batch: int = 32) -> Case:
    """The block of two convolutions, with the tolerance that all methods share."""
    return replace(convolutional(batch), max_iter=MAX_ITER, tolerance=TOLERANCE)


def loop(case: Case, f: Map, tolerance: float) -> Tensor:
    """The plain loop, until the worst sample has converged."""
    z = torch.zeros_like(case.x)
    for _ in range(case.max_iter):
        z, before = f(z), z
        change = (z - before).detach().flatten(1).norm(dim=1)
        if bool((change <= tolerance * z.detach().flatten(1).norm(dim=1)).all()):
            break
    return z


def last_step(case: Case, f: Map, tolerance: float) -> Tensor:
    """The same off the tape, then f once on it."""
    with torch.no_grad():
        z = loop(case, f, tolerance)
    return f(z)


ANDERSON_1, PLAIN = ("ours", "Anderson, order=1"), ("ours", "plain iteration")
PLAIN_1, UNROLLED = ("ours", "plain iteration, order=1"), ("usual code", "plain loop")

LAYERS: list[Layer] = [
    *(
        (*key, ours(solver, order=order), ours(solver, gradient="jfb"))
        for key, solver, order in (
            (DEFAULT, anderson, 2),
            (ANDERSON_1, anderson, 1),
            (PLAIN, fixed_point_iteration, 2),
            (PLAIN_1, fixed_point_iteration, 1),
        )
    ),
    (*UNROLLED, loop, last_step),
]


@torch.no_grad()
def forward(case: Case, solve: Solve) -> Tensor:
    """The equilibrium without a gradient."""
    return solve(case, case.f, TOLERANCE)


def measured(case: Case, layers: Sequence[Layer], rounds: int) -> list[dict[str, Any]]:
    """Time of all three, and what there is to say of the gradients; one row each."""
    truth, rows, runs = reference(case), {}, {}
    for group, name, exact, cheap in layers:
        row: dict[str, Any] = {"group": group, "name": name, "forward": {}}
        runs[group, name, "forward"] = partial(forward, case, exact)
        for what, solve in (("exact", exact), ("one step", cheap)):
            row[what], runs[group, name, what] = prepare_torch(case, truth, solve)
        rows[group, name] = row
    for (group, name, what), seconds in in_turns(runs, rounds).items():
        rows[group, name][what].update(spread(seconds))
    return list(rows.values())
