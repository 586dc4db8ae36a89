"""The shared module of the book *Deep Implicit Layers, executable*."""

from implicit_layers.deq import (
    DEQ,
    MonotoneLinear,
    jacobian_penalty,
    peaceman_rachford,
)
from implicit_layers.implicit import implicit_fixed_point, spectral_radius
from implicit_layers.ode import ODEError, ODEStatistics, odeint
from implicit_layers.qp import QPSolution, solve_qp
from implicit_layers.solvers import (
    Solution,
    anderson,
    broyden,
    fixed_point_iteration,
    newton,
)

__all__ = [
    "DEQ",
    "MonotoneLinear",
    "ODEError",
    "ODEStatistics",
    "QPSolution",
    "Solution",
    "anderson",
    "broyden",
    "fixed_point_iteration",
    "implicit_fixed_point",
    "jacobian_penalty",
    "newton",
    "odeint",
    "peaceman_rachford",
    "solve_qp",
    "spectral_radius",
]
