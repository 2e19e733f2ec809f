from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_core() -> Iterator[None]:
    """The tensors are small: a second core costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def few_objects() -> Iterator[None]:
    """What was there before is left out of `gc.get_objects`, which is quick then."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
