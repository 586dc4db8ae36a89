"""Bytes against sizes known in closed form, seconds against a clock set by hand."""

import gc
import time
import weakref

import pytest
import torch
from torch import nn

from implicit_layers.measure import median_seconds, saved_bytes

B, N = 7, 11
SIZE = B * N * 4  # bytes of one (B, N) tensor in float32


def leaf():
    return torch.linspace(-1, 1, B * N).reshape(B, N).requires_grad_()


def chain(x, steps):
    for _ in range(steps):
        x = torch.tanh(x)
    return x


@pytest.mark.parametrize("steps", [0, 1, 2, 30])
def test_chain_of_tanh_keeps_each_output(steps):
    x = leaf()
    assert saved_bytes(lambda: chain(x, steps)) == steps * SIZE


def test_size_follows_the_number_format():
    x = leaf().double().detach().requires_grad_()
    assert saved_bytes(lambda: chain(x, 3)) == 3 * 2 * SIZE


def test_caller_without_gradients_measures_the_same():
    x = leaf()
    with torch.no_grad():
        assert saved_bytes(lambda: chain(x, 3)) == 3 * SIZE
        assert not torch.is_grad_enabled()


def test_views_of_one_storage_count_once_and_whole():
    x = leaf()
    assert saved_bytes(lambda: x[0] * x[1] * x.T[2, 0]) == SIZE + N * 4
    assert saved_bytes(lambda: x * x) == SIZE


def test_excluded_tensors_do_not_count():
    x, layer = leaf(), nn.Linear(N, N)

    def forward():
        return torch.tanh(layer(x))

    weight = N * N * 4
    assert saved_bytes(forward) == SIZE + SIZE + weight
    assert saved_bytes(forward, exclude=[x]) == SIZE + weight
    assert saved_bytes(forward, exclude=layer.parameters()) == SIZE + SIZE
    assert saved_bytes(forward, exclude=[x[1:3], *layer.parameters()]) == SIZE


def test_address_that_is_used_again_counts_again():
    x = leaf()

    def forward():
        for _ in range(20):
            torch.tanh(x)  # freed at once, and the next one may lie in its place

    assert saved_bytes(forward) == 20 * SIZE


class Swish(torch.autograd.Function):
    """Saves its input and its output, and keeps a third tensor behind its back."""

    @staticmethod
    def forward(ctx, x):
        y = x * torch.sigmoid(x)
        ctx.save_for_backward(x, y)
        ctx.hidden = y + 1
        return y

    @staticmethod
    def backward(ctx, gradient):
        x, y = ctx.saved_tensors
        sigmoid = torch.sigmoid(x)
        return gradient * (y + sigmoid * (1 - y))


def test_custom_function_counts_what_it_saved_for_backward():
    x = leaf()
    assert saved_bytes(lambda: Swish.apply(x)) == 2 * SIZE
    assert saved_bytes(lambda: Swish.apply(x), exclude=[x]) == SIZE


@pytest.mark.parametrize("function", [torch.tanh, Swish.apply])
def test_measured_pass_can_be_differentiated(function):
    x, outputs = leaf(), []
    saved_bytes(lambda: outputs.append(function(x)))
    (measured,) = torch.autograd.grad(outputs[0].sum(), x, create_graph=True)
    (plain,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    assert torch.equal(measured, plain)
    seconds = [torch.autograd.grad(g.sum(), x)[0] for g in (measured, plain)]
    assert torch.equal(*seconds)


def test_nothing_is_kept_after_the_measurement():
    x, references = leaf(), []

    def forward():
        y = torch.tanh(x)
        references.append(weakref.ref(y))
        return y

    saved_bytes(forward)
    gc.collect()
    assert [reference() for reference in references] == [None]


def test_forward_is_called_once():
    calls = []
    assert saved_bytes(lambda: calls.append(1)) == 0
    assert calls == [1]


class Clock:
    """A clock that runs on by a given number of seconds at each call of a run."""

    def __init__(self, monkeypatch):
        self.now, self.calls = 0.0, []
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def run(self, name, durations):
        remaining = iter(durations)

        def call():
            self.calls.append(name)
            self.now += next(remaining)

        return call


def test_runs_take_turns_after_one_warm_up_and_report_the_median(monkeypatch):
    clock = Clock(monkeypatch)
    slow, fast = clock.run("slow", [900, 10, 70, 20]), clock.run("fast", [1, 5, 3, 4])
    seconds = median_seconds({"slow": slow, "fast": fast}, repeats=3)
    assert list(seconds.items()) == [("slow", 20), ("fast", 4)]
    assert clock.calls == ["slow", "fast"] * 4


def test_even_number_of_repeats_takes_the_middle_of_two(monkeypatch):
    run = Clock(monkeypatch).run("one", [100, 8, 2, 1, 6])
    assert median_seconds({"one": run}, repeats=4) == {"one": 4}


def test_seven_repeats_unless_told_otherwise():
    calls = []
    median_seconds({"one": lambda: calls.append(1)})
    assert len(calls) == 1 + 7


def test_clock_is_read_only_when_the_device_has_finished(monkeypatch):
    events = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("wait"))
    monkeypatch.setattr(time, "perf_counter", lambda: events.append("clock") or 0.0)
    median_seconds({"one": lambda: events.append("run")}, repeats=1)
    assert events == ["run", "wait", "clock", "run", "wait", "clock"]


@pytest.mark.parametrize("repeats", [0, -1])
def test_no_repeat_is_refused_before_any_run(repeats):
    calls = []
    with pytest.raises(ValueError, match=f"repeats must be at least 1, got {repeats}"):
        median_seconds({"one": lambda: calls.append(1)}, repeats=repeats)
    assert calls == []


def test_nothing_to_run_is_refused():
    with pytest.raises(ValueError, match="runs is empty"):
        median_seconds({})
