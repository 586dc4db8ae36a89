"""The training loop against loops written by hand, and what it must leave alone."""

import math
import sys
import time
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from implicit_layers.training import error_rate, fit, train_epoch

N, FEATURES, CLASSES = 25, 6, 3


def samples(count=N, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, FEATURES, generator=generator, dtype=dtype)
    return inputs, torch.randint(CLASSES, (count,), generator=generator)


def network(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    layers = nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, CLASSES)
    return nn.Sequential(*layers).to(dtype)


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def order(epoch, count=N):
    return torch.randperm(count, generator=torch.Generator().manual_seed(epoch))


def train(model, *, epochs=2, learning_rate=lambda epoch: 0.5 / epoch, **options):
    """Fit to the samples in batches of 10, 10 and 5."""
    options = {"train": samples(), "test": samples(9, seed=1)} | options
    options = {"batch_size": 10, "epochs": epochs} | options
    return fit(model, learning_rate=learning_rate, **options)


@pytest.fixture
def unwatched(monkeypatch):
    """Nobody looks at this process: no terminal, no notebook front end, no Colab."""
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_those_of_plain_sgd_bit_by_bit(dtype):
    model, twin = network(dtype), network(dtype)
    inputs, labels = samples(dtype=dtype)
    train(model, train=(inputs, labels), test=samples(9, dtype))
    for epoch in (1, 2):
        for rows in order(epoch).split(10):
            parameters = list(twin.parameters())
            loss = cross_entropy(twin(inputs[rows]), labels[rows])
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.sub_(gradient, alpha=0.5 / epoch)
    assert same(weights(model), weights(twin))
    assert not same(weights(model), weights(network(dtype)))


def test_softmax_regression_agrees_with_gradients_derived_by_hand():
    model = nn.Linear(FEATURES, CLASSES, bias=False).double()
    inputs, labels = samples(dtype=torch.float64)
    x, one_hot = inputs.numpy(), np.eye(CLASSES)[labels.numpy()]
    w = model.weight.detach().numpy().copy()
    (epoch,) = train(
        model, epochs=1, train=(inputs, labels), test=samples(9, torch.float64)
    )
    losses, norms = [], []
    for rows in np.split(order(1).numpy(), [10, 20]):
        exponentials = np.exp(x[rows] @ w.T)
        chances = exponentials / exponentials.sum(axis=1, keepdims=True)
        losses.append(-np.log((chances * one_hot[rows]).sum(axis=1)).mean())
        gradient = (chances - one_hot[rows]).T @ x[rows] / len(rows)
        norms.append(np.sqrt((gradient**2).sum()))
        w -= 0.5 * gradient
    np.testing.assert_allclose(model.weight.detach().numpy(), w, rtol=1e-12)
    np.testing.assert_allclose(epoch.loss, np.mean(losses), rtol=1e-12)
    np.testing.assert_allclose(epoch.gradient_norms, norms, rtol=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_update_that_is_not_finite_is_skipped_and_counted(value):
    model = network()
    calls = []

    def spoil_second(gradient):
        calls.append(gradient)
        return torch.full_like(gradient, value) if len(calls) == 2 else gradient

    model[0].bias.register_hook(spoil_second)
    (epoch,) = train(model, epochs=1, monitor=lambda: weights(model))
    first, second, third = epoch.records
    assert not same(first, second)
    assert same(second, third)
    assert not same(third, weights(model))
    assert epoch.skipped == 1
    assert [math.isfinite(norm) for norm in epoch.gradient_norms] == [True, False, True]
    assert math.isfinite(epoch.loss)


def test_batch_with_a_nan_leaves_no_trace_in_the_weights():
    model = network()
    before = weights(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    inputs, labels = samples()
    epoch = train_epoch(model, [(inputs * math.nan, labels)], optimizer)
    assert (epoch.skipped, same(before, weights(model))) == (1, True)
    assert not optimizer.state
    assert math.isnan(epoch.loss)
    assert math.isnan(epoch.test_error)
    assert epoch.records == []


def test_monitor_sees_each_gradient_before_its_step():
    model = network()

    def monitor():
        return weights(model), [p.grad.clone() for p in model.parameters()]

    history = train(model, monitor=monitor, learning_rate=lambda epoch: 0.5)
    records = [record for epoch in history for record in epoch.records]
    assert [len(epoch.records) for epoch in history] == [3, 3]
    ends = [before for before, _ in records[1:]] + [weights(model)]
    for (start, gradients), end in zip(records, ends, strict=True):
        pairs = zip(start, gradients, strict=True)
        assert same([w.sub(g, alpha=0.5) for w, g in pairs], end)


def test_parameter_without_a_gradient_is_left_alone():
    model = network()
    model[0].requires_grad_(False)
    before = weights(model[0])
    history = train(model)
    assert same(before, weights(model[0]))
    assert min(history[0].gradient_norms) > 0


def test_stop_ends_after_the_epoch_it_is_shown():
    seen = []

    def stop(epoch):
        seen.append(epoch)
        return len(seen) == 2

    history = train(network(), epochs=5, stop=stop)
    assert len(history) == 2
    assert all(a is b for a, b in zip(history, seen, strict=True))


def test_learning_rate_is_asked_once_an_epoch_counted_from_one():
    asked = []
    train(network(), epochs=3, learning_rate=lambda epoch: asked.append(epoch) or 0.1)
    assert asked == [1, 2, 3]


def test_two_models_see_the_same_batches_whatever_the_global_seed():
    seen = []
    for seed, model in enumerate([network(), nn.Linear(FEATURES, CLASSES)]):
        batches = []
        model.register_forward_pre_hook(
            lambda model, inputs, into=batches: (
                into.append(inputs[0]) if model.training else None
            )
        )
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        train(model)
        assert torch.equal(state, torch.get_rng_state())
        seen.append(batches)
    assert len(seen[0]) == 6
    assert same(*seen)
    assert not same(seen[0][:3], seen[0][3:])


def test_each_epoch_is_tested_in_evaluation_mode_and_trained_in_training_mode():
    model = nn.Sequential(nn.Dropout(0.9), network())
    inputs, labels = samples(250, seed=1)
    counts = []

    def stop(epoch):
        with torch.no_grad():
            predicted = model[1](inputs).argmax(dim=1).tolist()
        pairs = zip(predicted, labels.tolist(), strict=True)
        counts.append(sum(guess != label for guess, label in pairs))
        return False

    history = train(
        model, test=(inputs, labels), stop=stop, monitor=lambda: model.training
    )
    assert [epoch.test_error for epoch in history] == [count / 250 for count in counts]
    assert [epoch.records for epoch in history] == [[True] * 3] * 2


def test_seconds_hold_the_training_but_not_the_test(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    model = network()
    model.register_forward_hook(
        lambda model, *_: clock.append(clock.pop() + (1 if model.training else 100))
    )
    assert [epoch.seconds for epoch in train(model)] == [3.0, 3.0]


@pytest.mark.parametrize("count", [1, 100, 101, 250])
def test_error_rate_is_the_direct_count(count):
    logits, labels = samples(count)
    labels = labels % 2  # so that some are right and some are wrong
    wrong = sum(
        max(range(FEATURES), key=row.__getitem__) != label
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True)
    )
    assert error_rate(nn.Identity(), logits, labels) == wrong / count


def test_error_rate_needs_no_gradient_and_evaluates_at_most_100_at_once():
    model, seen = network(), []
    model.register_forward_hook(
        lambda model, _, out: seen.append(
            (len(out), model.training, out.requires_grad, torch.is_grad_enabled())
        )
    )
    error_rate(model, *samples(250))
    assert seen == [(size, False, False, False) for size in (100, 100, 50)]


@pytest.mark.usefixtures("unwatched")
def test_nothing_is_printed_where_nobody_watches(monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)  # importing it may warn
    train(network())
    assert tuple(capfd.readouterr()) == ("", "")


@pytest.mark.usefixtures("unwatched")
@pytest.mark.parametrize("watcher", ["notebook", "terminal", "colab"])
def test_progress_shows_where_a_person_watches(watcher, monkeypatch, capsys):
    if watcher == "notebook":
        monkeypatch.setenv("JPY_SESSION_NAME", "book.ipynb")
    elif watcher == "colab":
        monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    else:
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    watched, alone = network(), network()
    train(watched)
    printed = capsys.readouterr()
    assert printed.out == ""
    for part in ("epoch 1/2", "epoch 2/2", "0/3"):
        assert part in printed.err
    monkeypatch.setattr("implicit_layers.training._progress", lambda data, *_: data)
    train(alone)
    assert same(weights(watched), weights(alone))


INPUTS, LABELS = samples()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size is 0: pass 1 or more"),
        ({"train": (INPUTS[:0], LABELS[:0])}, r"shape \(0, 6\) has no rows"),
        ({"test": (INPUTS[:0], LABELS[:0])}, r"shape \(0, 6\) has no rows"),
        ({"train": (INPUTS, LABELS[1:])}, r"\[25, 24\] rows"),
        ({"test": (INPUTS, LABELS[1:])}, r"\[25, 24\] rows"),
        ({"learning_rate": lambda _: math.nan}, r"learning_rate\(1\) is nan"),
        ({"learning_rate": lambda _: math.inf}, r"learning_rate\(1\) is inf"),
        ({"learning_rate": lambda _: -0.1}, r"learning_rate\(1\) is -0.1"),
    ],
)
def test_bad_argument_is_refused_before_any_step(options, message):
    model = network()
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        train(model, **options)
    assert same(before, weights(model))


def test_epoch_without_a_batch_is_refused():
    model = network()
    with pytest.raises(ValueError, match="data holds no batch"):
        train_epoch(model, [], torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS[:, None], r"labels has shape \(25, 1\)"),  # would broadcast
        (LABELS[0], r"labels has shape \(\)"),
        (LABELS[1:], r"\[25, 24\] rows"),
    ],
)
def test_error_rate_refuses_what_is_not_one_label_a_sample(labels, message):
    with pytest.raises(ValueError, match=message):
        error_rate(network(), INPUTS, labels)


def test_a_long_gradient_is_scaled_to_the_largest_norm_and_recorded_unscaled() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    before = [p.detach().clone() for p in model.parameters()]
    data = [(100 * torch.randn(8, 3), torch.randint(2, (8,)))]
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    epoch = train_epoch(model, data, sgd, max_norm=0.5)
    steps = [(b - p).flatten() for b, p in zip(before, model.parameters(), strict=True)]
    assert epoch.gradient_norms[0] > 5
    assert torch.cat(steps).norm().item() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan])
def test_a_largest_norm_that_is_not_positive_is_refused(max_norm: float) -> None:
    data = (torch.randn(4, 3), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="max_norm must be positive"):
        fit(
            nn.Linear(3, 2),
            data,
            data,
            epochs=1,
            learning_rate=lambda epoch: 0.1,
            max_norm=max_norm,
        )
