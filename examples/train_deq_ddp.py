"""Train a deep equilibrium classifier on MNIST with several processes.

    torchrun --standalone --nproc-per-node 2 examples/train_deq_ddp.py
    torchrun --standalone --nproc-per-node 2 examples/train_deq_ddp.py --check

Each process holds the whole model and solves for its share of every batch; gradients
are averaged, by gloo on CPUs and by NCCL on GPUs. The number of processes changes the
result by rounding alone, and `--check` holds that for one gradient.
"""

import argparse
import os
import sys
import time

import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from implicit_layers import DEQ
from implicit_layers.data import mnist


class Classifier(nn.Module):
    """Pictures (B, 1, 28, 28) -> equilibrium z = tanh(W z + x) -> ten logits."""

    def __init__(self, tolerance: float, units: int = 100) -> None:
        super().__init__()
        self.inject, self.out = nn.Linear(784, units), nn.Linear(units, 10)
        self.inner = nn.Linear(units, units, bias=False)
        options = {"atol": tolerance, "rtol": tolerance, "on_failure": "ignore"}
        self.deq = DEQ(self.block, **options)  # failures are counted, see train

    def block(self, z: Tensor, x: Tensor) -> Tensor:
        """Map a state and the input, both (B, units), to the next state."""
        return torch.tanh(self.inner(z) + x)

    def forward(self, pictures: Tensor) -> Tensor:
        """Classify."""
        return self.out(self.deq(self.inject(pictures.flatten(1))))


def share(batch: Tensor) -> Tensor:
    """Deal out a batch: the rows of this process."""
    return batch[distributed.get_rank() :: distributed.get_world_size()]


def waited(device: torch.device) -> float:
    """Wait until all are here, in seconds. A backward pass does so anyway, untimed."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    distributed.barrier()
    return time.perf_counter() - start


def train(pictures: Tensor, labels: Tensor, options: argparse.Namespace) -> nn.Module:
    """Train, and say how much each process has computed and waited."""
    model = Classifier(tolerance=1e-4).to(pictures)
    shared = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
    # one order for all processes, so that shares of the same rows add up to a batch
    generator = torch.Generator().manual_seed(options.seed)
    evaluations, failures, waiting, start = 0, 0, 0.0, time.perf_counter()
    for _ in range(options.updates):
        rows = torch.randint(len(labels), (options.batch_size,), generator=generator)
        rows = share(rows).to(labels.device)
        loss = cross_entropy(shared(pictures[rows]), labels[rows])
        evaluations += len(model.deq.solution.trace)
        failures += int((~model.deq.solution.converged).sum())
        waiting += waited(labels.device)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(
        f"process {distributed.get_rank()}: {evaluations / options.updates:.1f} "
        f"evaluations a batch, {failures} samples not converged, "
        f"waited {waiting:.2f} of {time.perf_counter() - start:.2f} s",
        flush=True,
    )
    return model


@torch.no_grad()
def test_error(model: nn.Module, pictures: Tensor, labels: Tensor) -> float:
    """Return the fraction of wrong answers; each process counts in its share."""
    wrong = torch.zeros((), device=labels.device)
    shares = share(pictures).split(500), share(labels).split(500)
    for some, right in zip(*shares, strict=True):
        wrong += (model(some).argmax(dim=1) != right).sum()
    distributed.all_reduce(wrong)
    return wrong.item() / len(labels)


def difference(pictures: Tensor, labels: Tensor) -> float:
    """Compare the averaged gradient with that of one process with all samples."""
    torch.manual_seed(distributed.get_rank())  # whose weights count? those of process 0
    model, alone = (Classifier(tolerance=1e-12).to(pictures) for _ in range(2))
    shared = DistributedDataParallel(model)
    alone.load_state_dict(model.state_dict())
    cross_entropy(shared(share(pictures)), share(labels)).backward()
    cross_entropy(alone(pictures), labels).backward()
    averaged, whole = (
        torch.cat(
            [p.grad.flatten() for p in network.parameters() if p.grad is not None]
        )
        for network in (model, alone)
    )
    gap = (averaged - whole).norm() / whole.norm()
    distributed.all_reduce(gap, distributed.ReduceOp.MAX)
    return gap.item()


def options_of(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="A DEQ on MNIST, started by torchrun.")
    parser.add_argument("--updates", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=128, help="of all processes")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument(
        "--check", action="store_true", help="compare gradients, float64"
    )
    options = parser.parse_args(arguments)
    if "RANK" not in os.environ:
        parser.error("start it by torchrun, which says how many processes there are")
    if options.updates < 1 or options.batch_size < 1:
        parser.error("--updates and --batch-size must be at least 1")
    if options.batch_size % int(os.environ["WORLD_SIZE"]):
        parser.error("--batch-size must be a multiple of the number of processes")
    return options


def main() -> int:
    """Run one of the processes."""
    options = options_of(sys.argv[1:])
    cuda = options.device == "cuda" or (
        options.device is None and torch.cuda.is_available()
    )
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        torch.manual_seed(options.seed)
        images, labels = mnist(train=True, device=device)
        if options.check:
            batch = images[: options.batch_size].double(), labels[: options.batch_size]
            gap = difference(*batch)
            if distributed.get_rank() == 0:
                print(f"gradients differ by {gap:.1e}, allowed is 1e-6", flush=True)
            return int(not gap < 1e-6)
        model = train(images, labels, options)
        error = test_error(model.eval(), *mnist(train=False, device=device))
        if distributed.get_rank() == 0:
            print(f"test error {error:.2%}", flush=True)
        return 0
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
