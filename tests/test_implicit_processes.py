"""Two processes that share a batch arrive at the gradient of one that has it all."""

import time

import pytest
import torch
from torch import distributed, multiprocessing, nn

from implicit_layers import implicit_fixed_point

PROCESSES, SAMPLES, SECONDS = 2, 6, 120
pytestmark = pytest.mark.skipif(
    not distributed.is_available() or not distributed.is_gloo_available(),
    reason="needs the gloo backend of torch.distributed",
)


class Network(nn.Module):
    """Two linear layers around z = tanh(W z + x)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.hidden, self.last = (
            nn.Linear(n, m).double() for n, m in ((3, 5), (5, 5), (5, 1))
        )

    def forward(self, inputs):
        x = self.first(inputs)
        z, _ = implicit_fixed_point(
            lambda z: torch.tanh(self.hidden(z) + x),
            torch.zeros_like(x),
            atol=1e-13,
            rtol=1e-13,
            on_failure="raise",
        )
        return self.last(z)


def backward(network, inputs):
    """Twice, since the first pass of a distributed module is not like the others."""
    for _ in range(2):
        network.zero_grad()
        network(inputs).square().mean().backward()


def all_inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(SAMPLES, 3, generator=generator, dtype=torch.float64)


def work(rank, folder):
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=PROCESSES,
    )
    network = Network()
    if rank:  # it must be given the weights of the other one
        with torch.no_grad():
            network.hidden.weight.zero_()
    backward(
        nn.parallel.DistributedDataParallel(network),
        all_inputs().chunk(PROCESSES)[rank],
    )
    gradients = {name: p.grad for name, p in network.named_parameters()}
    torch.save(gradients, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_have_the_gradient_of_one(tmp_path, monkeypatch):
    # two processes with a pool of threads each would fight for the same cores
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    started = multiprocessing.spawn(work, (tmp_path,), PROCESSES, join=False)
    deadline = time.monotonic() + SECONDS
    try:
        while not started.join(timeout=1):  # raises what a process raised
            assert time.monotonic() < deadline, f"no end after {SECONDS} s"
    finally:
        for process in started.processes:
            process.kill()
    alone = Network()
    backward(alone, all_inputs())
    for rank in range(PROCESSES):
        gradients = torch.load(tmp_path / f"{rank}.pt")
        for name, parameter in alone.named_parameters():
            assert parameter.grad.abs().max() > 0
            torch.testing.assert_close(
                gradients[name], parameter.grad, rtol=1e-10, atol=1e-12
            )
