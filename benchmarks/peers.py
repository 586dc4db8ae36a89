"""The same gradients by TorchDEQ, jaxopt and optimistix, in `.venv-bench` alone.

What compiles a JAX method serves the differential equations of ode_peers.py as well.
"""

import importlib.metadata
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import jaxopt
import lineax
import numpy as np
import optimistix
import torch
from cases import GROUPS, ODES, Case
from equilibrium import Layer
from jax.lax import conv_general_dilated
from jaxopt.linear_solve import solve_bicgstab, solve_normal_cg
from methods import BOTH, TANH, Map, Method, Solve
from torch import Tensor
from torchdeq import get_deq

VERSIONS = {
    name: importlib.metadata.version(name)
    for name in (
        *("torchdeq", "torchdiffeq", "torchode"),
        *("jax", "jaxlib", "jaxopt", "optimistix", "lineax", "diffrax"),
        *("qpth", "cvxpylayers"),
    )
}


@cache
def deq(solver: str, tolerance: float, max_iter: int, **modes: Any) -> Any:
    """A TorchDEQ model, made once as in a network; implicit gradient if not told."""
    forward = {"f_solver": solver, "f_tol": tolerance, "f_max_iter": max_iter}
    backward = {"b_solver": solver, "b_tol": tolerance, "b_max_iter": max_iter}
    modes = {"ift": True, "f_stop_mode": "rel", "b_stop_mode": "rel", **modes}
    return get_deq(**forward, **backward, **modes)


def torchdeq(solver: str, **modes: Any) -> Solve:
    """TorchDEQ with the same solver forward and backward; off the tape it evaluates."""

    def solve(case: Case, f: Map, tolerance: float) -> Tensor:
        model = deq(solver, tolerance, case.max_iter, **modes)
        model.train(torch.is_grad_enabled())
        return model(f, torch.zeros_like(case.x))[0][0]

    return solve


SOLVERS = {
    ("TorchDEQ", "fixed point"): "fixed_point_iter",
    ("TorchDEQ", "Anderson"): "anderson",
    ("TorchDEQ", "Broyden"): "broyden",
}
#: As in `methods.METHODS`.
TORCHDEQ: list[Method] = [(*key, BOTH, torchdeq(s)) for key, s in SOLVERS.items()]
#: As in `equilibrium.LAYERS`; `grad` is the number of steps on the tape.
TORCHDEQ_LAYERS: list[Layer] = [
    (*key, torchdeq(s), torchdeq(s, ift=False, grad=1)) for key, s in SOLVERS.items()
]


def jax_map(kind: str) -> Callable[..., Any]:
    """The map of a case as f(z, parameters, x), or f(t, z, parameters) of an ODE."""
    if kind in ODES:
        return lambda t, z, p: jnp.tanh(z @ p[0].T + p[1]) @ p[2].T + p[3]
    if kind == "tanh":
        return lambda z, parameters, x: jnp.tanh(z @ parameters[0].T + x)

    def conv(z: Any, kernel: Any) -> Any:
        layout = ("NHWC", "HWIO", "NHWC")
        return conv_general_dilated(z, kernel, (1, 1), "SAME", dimension_numbers=layout)

    def block(z: Any, parameters: Any, x: Any) -> Any:
        first, second = parameters
        z = x + conv(jax.nn.silu(conv(z, first)), second)
        groups = z.reshape(*z.shape[:3], GROUPS, -1)
        groups = groups - groups.mean(axis=(1, 2, 4), keepdims=True)
        variance = (groups**2).mean(axis=(1, 2, 4), keepdims=True)
        return (groups / jnp.sqrt(variance + 1e-5)).reshape(z.shape)

    return block


def to_jax(tensor: Tensor, kernel: bool) -> Any:
    """A JAX array; images get their channels last, which XLA is fast with."""
    tensor = tensor.detach()
    if tensor.ndim == 4:
        tensor = tensor.permute(2, 3, 1, 0) if kernel else tensor.permute(0, 2, 3, 1)
    return jnp.asarray(tensor.numpy())


def to_torch(array: Any, kernel: bool) -> Tensor:
    """The way back."""
    tensor = torch.tensor(np.asarray(array))
    if tensor.ndim == 4:
        tensor = tensor.permute(3, 2, 0, 1) if kernel else tensor.permute(0, 3, 1, 2)
    return tensor


def with_jaxopt(solver: Callable[..., Any], linear: Callable[..., Any]) -> Any:
    """A jaxopt solver with a linear solver for its implicit differentiation.

    The linear solver's tolerance is relative and the other's is not, hence the size.
    """

    def solve(f: Any, case: Case, size: float, leaves: Any, tolerance: Any) -> Any:
        *parameters, x = leaves
        adjoint = partial(linear, tol=tolerance, maxiter=case.max_iter)
        found = solver(
            f,
            maxiter=case.max_iter,
            tol=size * tolerance,
            implicit_diff_solve=adjoint,
        ).run(jnp.zeros_like(x), parameters, x)
        return found.params, found.state.iter_num

    return solve


def with_optimistix(
    f: Any, case: Case, size: float, leaves: Any, tolerance: Any
) -> Any:
    """Optimistix's plain iteration of each sample, by vmap.

    Its default adjoint forms the Jacobian and factors it. For images that is out of
    the question, and of its iterative ones GMRES is the one that does not break down.
    """
    *parameters, x = leaves
    adjoint = optimistix.ImplicitAdjoint()
    if case.kind == "conv":
        gmres = lineax.GMRES(rtol=tolerance, atol=tolerance)
        adjoint = optimistix.ImplicitAdjoint(linear_solver=gmres)

    def one(x: Any) -> Any:
        found = optimistix.fixed_point(
            lambda z, _: f(z[None], parameters, x[None])[0],
            optimistix.FixedPointIteration(rtol=tolerance, atol=tolerance),
            jnp.zeros_like(x),
            max_steps=case.max_iter,
            adjoint=adjoint,
            throw=False,
        )
        return found.value, found.stats["num_steps"]

    z, steps = jax.vmap(one)(x)
    return z, steps.max()


#: Group, name, kinds of map, and solve(f, case, size, leaves, tolerance). Normal CG
#: squares the condition number: on the images it would run for seconds, in vain.
JAX: list[Method] = [
    (
        "jaxopt",
        "fixed point, normal CG",
        TANH,
        with_jaxopt(jaxopt.FixedPointIteration, solve_normal_cg),
    ),
    (
        "jaxopt",
        "fixed point, BiCGStab",
        BOTH,
        with_jaxopt(jaxopt.FixedPointIteration, solve_bicgstab),
    ),
    (
        "jaxopt",
        "Anderson, BiCGStab",
        BOTH,
        with_jaxopt(jaxopt.AndersonAcceleration, solve_bicgstab),
    ),
    ("Optimistix", "fixed point, vmapped", BOTH, with_optimistix),
]


class Compiled:
    """A case's gradient as one compiled JAX function of the tolerance."""

    def __init__(self, case: Case, size: float, solve: Any) -> None:
        kernels = [to_jax(leaf, kernel=True) for leaf in case.parameters]
        self.leaves = [*kernels, to_jax(case.x, kernel=False)]
        v = to_jax(case.v, kernel=False)
        self.solve = partial(solve, jax_map(case.kind), case, size)

        def loss(leaves: Any, tolerance: Any) -> Any:
            z, iterations = self.solve(leaves, tolerance)
            return (z * v).sum(), iterations

        self.gradient = jax.jit(jax.grad(loss, has_aux=True))

    def __call__(self, tolerance: float) -> Any:
        """Run to the end: gradients, and iterations of the forward pass."""
        return jax.block_until_ready(self.gradient(self.leaves, tolerance))

    def saved(self, tolerance: float) -> int:
        """Bytes kept from a forward pass for its backward pass, leaves excluded."""
        _, vjp = jax.vjp(lambda leaves: self.solve(leaves, tolerance)[0], self.leaves)
        known = {leaf.unsafe_buffer_pointer() for leaf in self.leaves}
        kept = {
            array.unsafe_buffer_pointer(): array.nbytes
            for array in jax.tree.leaves(vjp)
            if isinstance(array, jax.Array)
        }
        return sum(size for place, size in kept.items() if place not in known)


def as_tensors(arrays: Any) -> tuple[Tensor, ...]:
    """Gradients for the parameters and x as torch tensors, in torch's layout."""
    *kernels, x = arrays
    parameters = [to_torch(kernel, kernel=True) for kernel in kernels]
    return (*parameters, to_torch(x, kernel=False))
