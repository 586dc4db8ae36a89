"""What the tests of layers share: random numbers, a contraction, and ways to solve."""

from functools import partial

import pytest
import torch

from implicit_layers import anderson, broyden, fixed_point_iteration, newton

SOLVERS = [fixed_point_iteration, anderson, broyden, newton]
MODES = ["implicit", "unrolled", "neumann", "jfb", "phantom"]
TIGHT = {"atol": 1e-13, "rtol": 1e-13, "max_iter": 1000}
# the solvers differ in how they solve, the other modes only in what follows
WAYS = [{"solver": solver} for solver in SOLVERS]
WAYS += [{"gradient": mode, "steps": 3} for mode in MODES[1:]]
agree = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
solvers = pytest.mark.parametrize("solver", SOLVERS)
ways = pytest.mark.parametrize(
    "way", WAYS, ids=[*(solver.__name__ for solver in SOLVERS), *MODES[1:]]
)


def numbers(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def contraction(size=4, seed=0, norm=0.7, dtype=torch.float64):
    """A matrix of the given spectral norm."""
    weight = numbers(size, size, seed=seed)
    return (norm * weight / torch.linalg.matrix_norm(weight, ord=2)).to(dtype)
