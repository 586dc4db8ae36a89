"""The problems that are solved, and the gradient that each method has to reproduce.

A case is a function f with parameters, an input x, and fixed weights v. For a map every
method starts at zero and solves z = f(z). For an ordinary differential equation it
starts at x and follows dz/dt = f(t, z) from t = 0 to t = 1, and z is where it arrives.
Then it computes the gradients of the sum of v * z for the parameters and for x.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, group_norm, linear, silu

GROUPS = 4
#: The kinds of case that are differential equations: the method that steps.
DOPRI5, RK4 = "dopri5", "rk4"
ODES = (DOPRI5, RK4)
#: Equal steps of rk4 in the case of that kind.
STEPS = 20


@dataclass(frozen=True)
class Case:
    """A problem in float32, or with `reference` in float64.

    Attributes
    ----------
    name, title
        As on the command line, and as in the tables.
    kind
        "tanh": z = tanh(W z + x), parameters (weight,), z (B, n).
        "conv": z = norm(x + conv(silu(conv(z)))), two kernels, z (B, C, H, W).
        "dopri5", "rk4": dz/dt is a net of two linear layers with tanh between them,
        parameters (weight, bias, weight, bias), z (B, n).
    parameters, x
        Leaves that require a gradient.
    v
        Weights of the loss, of the shape of z.
    max_iter
        Limit of every solver, in iterations or in steps.
    tolerance
        Of every method; None chooses it such that the gradient is exact enough.
    """

    name: str
    title: str
    kind: str
    parameters: tuple[Tensor, ...]
    x: Tensor
    v: Tensor
    max_iter: int
    tolerance: float | None = None

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What the gradient is taken for: the parameters, then x."""
        return (*self.parameters, self.x)

    @property
    def f(self) -> Callable[..., Tensor]:
        """The map f(z), or the derivative f(t, z), as anyone would write it."""
        if self.kind in ODES:
            *inner, weight, bias = self.parameters
            return lambda t, z: linear(linear(z, *inner).tanh(), weight, bias)
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


def differential_equation(method: str, width: int = 100, batch: int = 100) -> Case:
    """A net of two default layers as the derivative, normal states to start from.

    The tolerance is the relative one of dopri5; rk4 has no use for it.
    """
    torch.manual_seed(0)
    layers = [nn.Linear(width, width) for _ in range(2)]
    x, v = torch.randn(2, batch, width)
    parameters = tuple(p for layer in layers for p in layer.parameters())
    title = f"ODE, {STEPS} steps of RK4" if method == RK4 else "ODE, Dormand-Prince"
    return Case(method, title, method, parameters, x.requires_grad_(), v, 1000, 1e-5)


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
        Factor by which the residual of plain iteration falls a step, in the end; none
        for a differential equation.
    """

    gradients: tuple[Tensor, ...]
    size: float
    rate: float | None = None


def reference(case: Case) -> Reference:
    """Gradients by autograd through a converged unroll in float64.

    Raises
    ------
    ValueError
        If plain iteration does not converge to rounding, or the steps of a
        differential equation are too long: then it is no reference.
    """
    case = case.to(torch.float64)
    if case.kind in ODES:
        return fine_steps(case)
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


def fine_steps(case: Case, number: int = 50) -> Reference:
    """Gradients by autograd through short steps of the classical Runge-Kutta method.

    Steps half as long must give the same, or else it is no reference.
    """
    coarse, fine = (runge_kutta(case, count) for count in (number, 2 * number))
    change = gradient_error(coarse.gradients, fine.gradients)
    if not change <= 1e-8:
        raise ValueError(
            f"{case.name}: {number} and {2 * number} steps of the reference differ "
            f"by {change:.1e}"
        )
    return fine


def runge_kutta(case: Case, number: int) -> Reference:
    """So many equal steps from 0 to 1, all of them on the tape."""
    f, z, h = case.f, case.x, 1 / number
    for step in range(number):
        t = step * h
        a = f(t, z)
        b = f(t + h / 2, z + h / 2 * a)
        c = f(t + h / 2, z + h / 2 * b)
        d = f(t + h, z + h * c)
        z = z + h / 6 * (a + 2 * (b + c) + d)
    gradients = torch.autograd.grad((z * case.v).sum(), case.leaves)
    return Reference(gradients, z.norm().item())


def gradient_error(gradients: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """Larger of the relative errors for the parameters together and for x."""
    pairs = [(g.double(), e) for g, e in zip(gradients, exact, strict=True)]

    def relative(pairs: list[tuple[Tensor, Tensor]]) -> float:
        off = sum((g - e).square().sum() for g, e in pairs)
        size = sum(e.square().sum() for _, e in pairs)
        return float((off / size) ** 0.5)

    return max(relative(pairs[:-1]), relative(pairs[-1:]))
