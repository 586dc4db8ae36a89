"""How much memory and time a computation takes, measured in a way that compares."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor


def saved_bytes(
    forward: Callable[[], object], *, exclude: Iterable[Tensor] = ()
) -> int:
    """Bytes that autograd keeps for the backward pass of one forward pass.

    Counts each storage once, however many saved tensors are views of it, and also
    those of a graph that is dropped within the pass. What a closure keeps alive (a
    backward hook, say) is not autograd's and is not counted.

    Parameters
    ----------
    forward
        Runs the forward pass; called once, with gradients enabled.
    exclude
        Tensors that exist anyhow, such as the parameters and the input: their
        storages do not count.

    Returns
    -------
    int
        Size in bytes.
    """
    sizes: dict[int, int] = {}
    known = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    # A storage freed during the pass could give its address to the next one.
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        # Kept as it is, an output would hold the graph that holds it, for ever.
        kept = tensor.detach()
        storage = kept.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(kept)
        return kept

    with (
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        forward()
    return sum(sizes.values())


def median_seconds(
    runs: Mapping[str, Callable[[], object]], *, repeats: int = 7
) -> dict[str, float]:
    """Median duration of each run, taken in turns so that drift hits all alike.

    Each run is called once to warm up, then `repeats` times: first of all runs,
    second of all runs, and so on.

    Parameters
    ----------
    runs
        Name and function of each run.
    repeats
        Counted calls of each, at least 1.

    Returns
    -------
    dict[str, float]
        Median wall-clock seconds of each run, in the order of `runs`.

    Raises
    ------
    ValueError
        If `repeats` is below 1 or there is nothing to run.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    if not runs:
        raise ValueError("runs is empty: give at least one function to measure")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name].append(_seconds(run))
    return {name: statistics.median(values) for name, values in seconds.items()}


def _seconds(run: Callable[[], object]) -> float:
    _wait_for_device()
    start = time.perf_counter()
    run()
    _wait_for_device()
    return time.perf_counter() - start


def _wait_for_device() -> None:
    """Let CUDA finish: it returns from a call before the work is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
