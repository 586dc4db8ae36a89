"""Layers whose output is an equilibrium, and what keeps one: a penalty, a proof."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from implicit_layers.implicit import Solver, implicit_fixed_point, pulled_back
from implicit_layers.solvers import (
    Map,
    Solution,
    anderson,
    on_tape,
    refuse_bad_batch,
    refuse_bad_count,
    refuse_bad_output,
)


class DEQ(nn.Module):
    """A deep equilibrium layer: the z with z = f(z, x), whatever block f is.

    What the solver said at the last call is in `solution`, None before the first; it is
    no part of a graph, nor of the layer's state.

    Parameters
    ----------
    f
        The block, called as f(z, x) with a state z (B, ...); gives the state's shape,
        each sample by itself. A module's parameters become those of the layer.
    solver, gradient, **options
        Go to `implicit_fixed_point`, options of the solver included. With `order=1`
        the layer keeps and computes less, and has no second derivatives.
    evaluation
        Settings that differ in evaluation mode, by name: `solver`, `gradient` or
        options, for example `{"rtol": 1e-3}`.

    Raises
    ------
    TypeError
        If f cannot be called, or `evaluation` is no mapping.
    ValueError
        If f holds batch normalisation, which couples the samples of a batch, or
        dropout, which makes f another map at each evaluation.

    Notes
    -----
    Bai, Kolter and Koltun (2019), section 3.
    """

    def __init__(
        self,
        f: Callable[[Tensor, Any], Tensor],
        *,
        solver: Solver = anderson,
        gradient: str = "implicit",
        evaluation: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        _refuse_bad_block(f)
        if not isinstance(evaluation, Mapping | None):
            raise TypeError(
                f"evaluation is {evaluation!r}: give a dictionary of settings"
            )
        self.f = f
        self.settings = {"solver": solver, "gradient": gradient, **options}
        self.evaluation = dict(evaluation or {})
        self.solution: Solution | None = None

    def forward(self, x: Any, z0: Tensor | None = None) -> Tensor:
        """Solve for the equilibrium.

        Parameters
        ----------
        x
            The input, handed to f as it is.
        z0
            Where to start, (B, ...); no gradient flows to it. None: zeros of the
            shape of x. A warm start is the z of an earlier `solution`.

        Returns
        -------
        Tensor
            The equilibrium with its gradient, of the shape of the start.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            If x gives no start, or from `implicit_fixed_point`.
        """
        if z0 is None:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(f"x is {kind} and gives no start: give z0 as well")
            z0 = torch.zeros_like(x)
        settings = self.settings if self.training else self.settings | self.evaluation
        z, solution = implicit_fixed_point(lambda z: self.f(z, x), z0, **settings)
        self.solution = replace(solution, factors=None)
        # what is done to the output must not change the solution
        return z.clone() if z is solution.z else z


def jacobian_penalty(
    f: Map, z: Tensor, *, samples: int = 1, generator: torch.Generator | None = None
) -> Tensor:
    """Estimate how large the Jacobian of f is at z, to be added to a loss.

    That is the squared Frobenius norm of the Jacobian over the d entries of a sample,
    averaged over the batch. The mean square of the Jacobian's eigenvalues is at most
    this. The estimate has no bias: with random signs v, the expectation of the squared
    norm of v^T J is the squared Frobenius norm of J.

    Parameters
    ----------
    f
        Maps a batch (B, ...) to the same shape, each sample by itself.
    z
        Where the Jacobian is taken, (B, ...); held constant.
    samples
        Vectors of random signs a sample of the batch, each one more product with the
        Jacobian; at least 1.
    generator
        Draws the signs, on the device of `z`; None: the default one.

    Returns
    -------
    Tensor
        The estimate, a scalar; with a gradient for what f touches except z.

    Raises
    ------
    TypeError
        If `z` is no floating-point tensor.
    ValueError
        If `z` has no batch dimension, no entry, or holds a NaN or an infinity, or
        `samples` is below 1.

    Notes
    -----
    Bai, Koltun and Kolter (2021), equation 6; the estimate is by Hutchinson (1990).
    """
    refuse_bad_batch("z", z)
    refuse_bad_count("samples", samples)
    if z.numel() == 0:
        raise ValueError(f"z has shape {tuple(z.shape)}: give at least one entry")
    tracked = torch.is_grad_enabled()
    with on_tape(z) as point:
        value = f(point)
    refuse_bad_output(value, z)
    if not value.requires_grad:
        return z.new_zeros(())
    total = z.new_zeros(())
    for _ in range(samples):
        signs = torch.empty_like(z).bernoulli_(generator=generator).mul_(2).sub_(1)
        total = total + pulled_back(value, point, signs, tracked).square().mean()
    return total / samples


class MonotoneLinear(nn.Module):
    """z -> W z with a W for which z = relu(W z + x) has one solution, whatever x is.

    W is (1 - margin) I - A^T A + B - B^T, with A and B free: the symmetric part of
    I - W is then at least margin times the unit matrix. That is all that is asked of
    W; its norm may be large.

    Parameters
    ----------
    features
        Entries of z, at least 1.
    margin
        Above 0.

    Raises
    ------
    ValueError
        If `features` is below 1 or `margin` not above 0.

    Notes
    -----
    Winston and Kolter (2020), proposition 1.
    """

    def __init__(self, features: int, *, margin: float = 0.1) -> None:
        super().__init__()
        refuse_bad_count("features", features)
        if not 0 < margin < float("inf"):
            raise ValueError(f"margin must be above 0 and finite, got {margin}")
        self.margin = margin
        self.a = nn.Parameter(torch.empty(features, features))
        self.b = nn.Parameter(torch.empty(features, features))
        for parameter in (self.a, self.b):
            nn.init.uniform_(parameter, -(features**-0.5), features**-0.5)

    @property
    def weight(self) -> Tensor:
        """W, (features, features)."""
        scaled = (1 - self.margin) * _identity(self.a)
        return scaled - self.a.T @ self.a + self.b - self.b.T

    def forward(self, z: Tensor) -> Tensor:
        """W times each row of z, (B, features) to the same shape."""
        return z @ self.weight.T


def peaceman_rachford(linear: MonotoneLinear, x: Tensor, *, step: float = 1.0) -> Map:
    """Give the map of Peaceman and Rachford: if u = T(u), relu(u) solves the layer.

    That is z = relu(W z + x). The map is a contraction for every step: its Lipschitz
    constant is at most the spectral norm of 2 V - I with V the inverse of
    I + step (I - W), which is below 1. So any solver finds u, plain iteration
    included, and `implicit_fixed_point` gives it a gradient for W and x.

    Parameters
    ----------
    linear
        Holds W.
    x
        Added to W z, (B, features).
    step
        Above 0; it changes the speed, not the solution z.

    Returns
    -------
    Callable
        T, from u (B, features) to the same shape; W was read and V computed once.

    Raises
    ------
    ValueError
        If `x` is not (B, features) or of another dtype than W, or `step` not above 0.

    Notes
    -----
    Winston and Kolter (2020), algorithm 2, seen as one map.
    """
    weight = linear.weight
    if x.ndim != 2 or x.shape[1] != len(weight):
        raise ValueError(f"x has shape {tuple(x.shape)}: give (B, {len(weight)})")
    if x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype} and W {weight.dtype}: give the same")
    if not 0 < step < float("inf"):
        raise ValueError(f"step must be above 0 and finite, got {step}")
    identity = _identity(weight)
    resolvent = torch.linalg.inv(identity + step * (identity - weight))

    def reflected(u: Tensor) -> Tensor:
        mirrored = 2 * u.relu() - u
        return 2 * (mirrored + step * x) @ resolvent.T - mirrored

    return reflected


def _identity(matrix: Tensor) -> Tensor:
    return torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def _refuse_bad_block(f: object) -> None:
    if not callable(f):
        raise TypeError(f"f is {f!r}: give a block that is called as f(z, x)")
    for name, module in f.named_modules() if isinstance(f, nn.Module) else ():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"the block holds batch normalisation ({name or 'itself'}), which "
                "makes a sample's equilibrium depend on its neighbours: use GroupNorm"
            )
        if _dropped(module) > 0:
            raise ValueError(
                f"the block holds dropout ({name or 'itself'}), which is another map "
                "at each evaluation: apply it to the input or the output of the layer"
            )


def _dropped(module: nn.Module) -> float:
    """The share of entries that a module of PyTorch drops in training mode."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p
    # these two drop without a module for it
    if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        return module.dropout
    return 0.0
