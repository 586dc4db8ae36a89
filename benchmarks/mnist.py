"""The layer of the first chapter on MNIST, with the weights that training gives it."""

from collections.abc import Callable

import torch
from cases import Case, tanh_case
from methods import Solve, unrolled
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from implicit_layers.data import batches, mnist
from implicit_layers.training import fit

EPOCHS, MAX_ITER = 3, 200


class TanhLayer(nn.Module):
    """z = tanh(W z + x) by any of the methods that are compared."""

    def __init__(self, solve: Solve, tolerance: float) -> None:
        super().__init__()
        self.linear = nn.Linear(100, 100, bias=False)
        self.solve, self.tolerance = solve, tolerance

    def forward(self, x: Tensor) -> Tensor:
        """Solve for a batch x (B, 100)."""
        weight = self.linear.weight
        case = Case("mnist", "", "tanh", (weight,), x, x, MAX_ITER)
        return self.solve(case, case.f, self.tolerance)


def classifier(solve: Solve, tolerance: float) -> nn.Sequential:
    """784 - 100 - layer - 10, as in the chapter."""
    torch.manual_seed(0)
    first, last = nn.Linear(784, 100), nn.Linear(100, 10)
    return nn.Sequential(nn.Flatten(), first, TanhLayer(solve, tolerance), last)


class Trained:
    """The chapter's classifier after a few epochs of the unrolled loop."""

    def __init__(self) -> None:
        self.train = mnist(train=True)
        model = classifier(unrolled, tolerance=1e-4)
        history = fit(
            model,
            self.train,
            mnist(train=False),
            epochs=EPOCHS,
            learning_rate=lambda epoch: 0.1,
            max_norm=5.0,
        )
        self.model, self.test_error = model, history[-1].test_error

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """The batches of one epoch that no training saw in this order."""
        return list(batches(*self.train, batch_size=100, seed=EPOCHS + 1))

    def case(self) -> Case:
        """What the layer has to solve for a typical batch of the first twenty.

        It is the one for which plain iteration takes the median number of steps.
        """
        flatten, first, layer, last = self.model
        weight = layer.linear.weight.detach()

        def steps(x: Tensor) -> int:
            z = torch.zeros_like(x)
            for number in range(1, MAX_ITER + 1):  # noqa: B007
                z, before = torch.tanh(z @ weight.T + x), z
                if (z - before).norm() < 1e-4:
                    break
            return number

        pairs = [(first(flatten(i)).detach(), y) for i, y in self.batches()[:20]]
        x, labels = sorted(pairs, key=lambda pair: steps(pair[0]))[len(pairs) // 2]
        z = layer(x).detach().requires_grad_()
        (v,) = torch.autograd.grad(cross_entropy(last(z), labels, reduction="sum"), z)
        return tanh_case("mnist", "MNIST, trained", weight, x, v, MAX_ITER)

    def steps(self, solve: Solve, tolerance: float, number: int) -> Callable[[], None]:
        """So many training steps with these weights, without the update."""
        model = classifier(solve, tolerance)
        model.load_state_dict(self.model.state_dict())
        chosen = self.batches()[:number]

        def run() -> None:
            for images, labels in chosen:
                model.zero_grad()
                cross_entropy(model(images), labels).backward()

        return run
