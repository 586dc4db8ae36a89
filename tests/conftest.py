"""What the tests of several modules share."""

import gc
from collections.abc import Callable, Iterator

import pytest
import torch


@pytest.fixture
def without_collector() -> Iterator[None]:
    """Only what refers back to itself is still there when its last name is gone."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def live_tensors(without_collector: None) -> Callable[[], int]:
    """Count the tensors there are, of which the collector takes none."""

    def count() -> int:
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    return count
