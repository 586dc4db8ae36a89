"""The training loop that every chapter shares: one epoch, and a fit with a history."""

import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from implicit_layers.data import batches


@dataclass(frozen=True)
class Epoch:
    """What one epoch of training did.

    Attributes
    ----------
    loss
        Mean cross-entropy over the training batches, in nats.
    seconds
        Wall-clock time of the training batches (not of the test).
    gradient_norms
        Euclidean norm of the whole gradient before clipping, one entry an update.
    records
        What `monitor` returned, one entry an update; empty without a monitor.
    test_error
        Fraction of the test samples classified wrong, from 0 to 1; NaN before a test.
    """

    loss: float
    seconds: float
    gradient_norms: list[float]
    records: list[Any]
    test_error: float = math.nan

    @property
    def skipped(self) -> int:
        """Number of updates left out because their gradient was not finite."""
        return sum(not math.isfinite(norm) for norm in self.gradient_norms)


def train_epoch(
    model: nn.Module,
    data: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    *,
    max_norm: float = math.inf,
    monitor: Callable[[], Any] | None = None,
) -> Epoch:
    """Train on each batch once with the cross-entropy loss.

    An update whose gradient holds a NaN or an infinity is skipped, and counted.

    Parameters
    ----------
    model
        Maps inputs (B, ...) to logits (B, classes).
    data
        Batches of inputs (B, ...) and labels (B,).
    optimizer
        Holds the parameters of `model`.
    max_norm
        A longer gradient is scaled down to this norm before the step.
    monitor
        Called after each backward pass, before the step; what it returns is kept in
        the records.

    Returns
    -------
    Epoch
        Loss, seconds, gradient norms and records; no test error yet.

    Raises
    ------
    ValueError
        If `data` holds no batch.
    """
    model.train()
    losses, norms, records = [], [], []
    start = time.perf_counter()
    for inputs, labels in data:
        loss = cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = get_total_norm(gradients)
        norms.append(norm.item())
        losses.append(loss.item())
        if monitor is not None:
            records.append(monitor())
        if math.isfinite(norms[-1]):
            if norms[-1] > max_norm:
                clip_grads_with_norm_(model.parameters(), max_norm, norm)
            optimizer.step()
    if not losses:
        raise ValueError("data holds no batch: give at least one (inputs, labels)")
    seconds = time.perf_counter() - start
    return Epoch(sum(losses) / len(losses), seconds, norms, records)


@torch.no_grad()
def error_rate(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Fraction of samples whose largest logit is not at their label.

    Parameters
    ----------
    model
        Maps inputs (B, ...) to logits (B, classes); evaluated in batches of 100.
    inputs, labels
        Tensors (N, ...) and (N,).

    Returns
    -------
    float
        From 0 to 1.

    Raises
    ------
    ValueError
        If `labels` is not one label for each of at least one input.
    """
    if labels.ndim != 1:
        shape = tuple(labels.shape)
        raise ValueError(f"labels has shape {shape}: give one class a sample, (N,)")
    model.eval()
    wrong = 0
    for batch, target in batches(inputs, labels, batch_size=100):
        wrong += int((model(batch).argmax(dim=1) != target).sum())
    return wrong / len(labels)


def fit(
    model: nn.Module,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    epochs: int,
    learning_rate: Callable[[int], float],
    batch_size: int = 100,
    max_norm: float = math.inf,
    monitor: Callable[[], Any] | None = None,
    stop: Callable[[Epoch], bool] | None = None,
) -> list[Epoch]:
    """Train with plain SGD and test after each epoch.

    The order of the samples depends on the epoch alone, so two models that are
    compared see the same batches. A progress bar shows only where a person watches.

    Parameters
    ----------
    model
        Maps inputs (B, ...) to logits (B, classes).
    train, test
        Inputs (N, ...) and labels (N,) of each set, on the model's device.
    epochs
        Largest number of epochs, at least 1.
    learning_rate
        The step size as a function of the epoch, counted from 1.
    batch_size
        Samples an update.
    max_norm, monitor
        See `train_epoch`.
    stop
        Called with each finished epoch; training ends early when it returns True.

    Returns
    -------
    list[Epoch]
        One entry for each epoch that was run, test error included.

    Raises
    ------
    TypeError
        If `batch_size` is no int, or a set holds something else than tensors.
    ValueError
        If `epochs` or `batch_size` is below 1, `max_norm` is not positive, a set is
        empty or has not as many labels as inputs, or a learning rate is negative or
        not finite.
    """
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    if not max_norm > 0:
        raise ValueError(f"max_norm must be positive, got {max_norm}")
    for inputs, labels in (train, test):
        batches(inputs, labels, batch_size=batch_size)  # refuses bad sets at once
    updates = math.ceil(len(train[0]) / batch_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    history: list[Epoch] = []
    for number in range(1, epochs + 1):
        rate = learning_rate(number)
        if not 0 <= rate < math.inf:
            raise ValueError(
                f"learning_rate({number}) is {rate}: return a finite number >= 0"
            )
        optimizer.param_groups[0]["lr"] = rate
        data = batches(*train, batch_size=batch_size, seed=number)
        shown = _progress(data, updates, f"epoch {number}/{epochs}")
        epoch = train_epoch(model, shown, optimizer, max_norm=max_norm, monitor=monitor)
        epoch = replace(epoch, test_error=error_rate(model, *test))
        history.append(epoch)
        if stop is not None and stop(epoch):
            break
    return history


def _progress(data: Iterable[Any], total: int, title: str) -> Iterable[Any]:
    """Wrap `data` in a progress bar if a person is watching, else leave it alone.

    Kernels that a notebook front end starts carry the name of the session; those
    that execute a notebook in batch do not, so stored outputs never hold a bar.
    """
    watched = (
        sys.stderr.isatty()
        or "JPY_SESSION_NAME" in os.environ
        or "google.colab" in sys.modules
    )
    if not watched:
        return data
    from tqdm.auto import tqdm  # warns on import where there is no widget support

    bar: Iterable[Any] = tqdm(data, total=total, desc=title, leave=False)
    return bar
