"""The maps that are solved, and the gradient that each method has to reproduce.

A case is a map f with parameters and an input x, and fixed weights v. Every method
starts at zero, solves z = f(z), and computes the gradients of the sum of v * z for the
parameters and for x.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, group_norm, silu

GROUPS = 4


@dataclass(frozen=True)
class Case:
    """A fixed-point problem in float32, or with `reference` in float64.

    Attributes
    ----------
    name, title
        As on the command line, and as in the tables.
    kind
        "tanh": z = tanh(W z + x), parameters (weight,), z (B, n).
        "conv": z = norm(x + conv(silu(conv(z)))), two kernels, z (B, C, H, W).
    parameters, x
        Leaves that require a gradient.
    v
        Weights of the loss, of the shape of z.
    max_iter
        Limit of every solver.
    """

    name: str
    title: str
    kind: str
    parameters: tuple[Tensor, ...]
    x: Tensor
    v: Tensor
    max_iter: int

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What the gradient is taken for: the parameters, then x."""
        return (*self.parameters, self.x)

    @property
    def f(self) -> Callable[[Tensor], Tensor]:
        """The map, as anyone would write it."""
        x = self.x
        if self.kind == "tanh":
            (weight,) = self.parameters
            return lambda z: torch.tanh(z @ weight.T + x)
        first, second = self.parameters
        return lambda z: group_norm(
            x + conv2d(silu(conv2d(z, first, padding=1)), second, padding=1), GROUPS
        )

    def to(self, dtype: torch.dtype) -> "Case":
        """The same problem with leaves of its own in another precision."""
        leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in self.leaves]
        parameters = tuple(leaves[:-1])
        return replace(self, parameters=parameters, x=leaves[-1], v=self.v.to(dtype))


def tanh_case(
    name: str, title: str, weight: Tensor, x: Tensor, v: Tensor, max_iter: int
) -> Case:
    """A tanh map with the given weight, input and loss weights, as float32 leaves."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (weight, x)]
    return Case(name, title, "tanh", (leaves[0],), leaves[1], v.detach(), max_iter)


def default_weight(width: int) -> Tensor:
    """Weight that `nn.Linear` starts with."""
    torch.manual_seed(0)
    return nn.Linear(width, width, bias=False).weight.detach()


def with_norm(weight: Tensor, norm: float) -> Tensor:
    """The weight scaled to a spectral norm."""
    return norm * weight / torch.linalg.matrix_norm(weight, ord=2)


def init(width: int = 100, batch: int = 100) -> Case:
    """PyTorch's default initialisation, normal inputs."""
    weight = default_weight(width)
    x, v = torch.randn(2, batch, width)
    return tanh_case("init", "default W", weight, x, v, max_iter=100)


def twice() -> Case:
    """Twice the default weight: far from a contraction, still solved by iteration."""
    weight = 2 * default_weight(100)
    x, v = torch.randn(2, 100, 100)
    return tanh_case("gain2", "2 x default W", weight, x, v, max_iter=500)


def contraction(norm: float) -> Case:
    """The default weight scaled to a spectral norm below 1."""
    weight = with_norm(default_weight(100), norm)
    x, v = torch.randn(2, 100, 100)
    return tanh_case(f"norm{norm}", f"norm {norm}", weight, x, v, max_iter=100)


def symmetric() -> Case:
    """A symmetric weight with spectral norm 0.99; small inputs, where tanh is steep."""
    weight = default_weight(100)
    weight = with_norm(weight + weight.T, 0.99)
    x, v = torch.randn(2, 100, 100)
    return tanh_case("sym0.99", "symmetric 0.99", weight, 0.1 * x, v, max_iter=1000)


def convolutional(batch: int = 32) -> Case:
    """A residual block of two 3 x 3 convolutions on 16 channels of 16 x 16."""
    torch.manual_seed(0)
    kernels = [torch.randn(16, 16, 3, 3) / 11 for _ in range(2)]
    x, v = torch.randn(2, batch, 16, 16, 16)
    leaves = [leaf.requires_grad_() for leaf in (*kernels, x)]
    return Case("conv", "convolutions", "conv", tuple(leaves[:2]), leaves[2], v, 200)


#: Cases by name, except the one that takes training to make.
CASES: dict[str, Callable[[], Case]] = {
    "init": init,
    "norm0.5": lambda: contraction(0.5),
    "norm0.9": lambda: contraction(0.9),
    "sym0.99": symmetric,
    "gain2": twice,
    "conv": convolutional,
}


@dataclass(frozen=True)
class Reference:
    """What is true of a case, in float64.

    Attributes
    ----------
    gradients
        For the parameters, then for x.
    size
        Norm of the solution, over the whole batch.
    rate
        Factor by which the residual of plain iteration falls a step, in the end.
    """

    gradients: tuple[Tensor, ...]
    size: float
    rate: float


def reference(case: Case) -> Reference:
    """Gradients by autograd through a converged unroll in float64.

    Raises
    ------
    ValueError
        If plain iteration does not converge to rounding: then it is no reference.
    """
    case = case.to(torch.float64)
    f, z, changes = case.f, torch.zeros_like(case.x), [math.inf]
    while changes[-1] > 1e-13 and len(changes) <= 5 * case.max_iter:
        z, before = f(z), z
        changes.append(((z - before).norm() / z.norm()).item())
    if not changes[-1] <= 1e-13:
        raise ValueError(
            f"{case.name}: after {len(changes) - 1} steps the reference still changes "
            f"by {changes[-1]:.1e}"
        )
    gradients = torch.autograd.grad((z * case.v).sum(), case.leaves)
    tail = [c for c in changes if 1e-12 < c < 1e-6]
    rate = (tail[-1] / tail[0]) ** (1 / (len(tail) - 1))
    return Reference(gradients, z.norm().item(), rate)


def gradient_error(gradients: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """Larger of the relative errors for the parameters together and for x."""
    pairs = [(g.double(), e) for g, e in zip(gradients, exact, strict=True)]

    def relative(pairs: list[tuple[Tensor, Tensor]]) -> float:
        off = sum((g - e).square().sum() for g, e in pairs)
        size = sum(e.square().sum() for _, e in pairs)
        return float((off / size) ** 0.5)

    return max(relative(pairs[:-1]), relative(pairs[-1:]))
