"""Tests of this folder need an NVIDIA GPU and are skipped where there is none.

But for those that say ``cuda_only``, their bodies also run on the CPU, in a session started with TRITON_INTERPRET=1.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from reprdpo.ops import use_backend

_HERE = Path(__file__).parent
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _HERE not in item.path.parents:
            continue
        item.add_marker(pytest.mark.gpu)
        if _INTERPRETED and "triton_device" in item.fixturenames and "cuda_only" not in item.fixturenames:
            item.add_marker(pytest.mark.interpreter)
        elif _INTERPRETED or not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def cuda_only() -> None:
    """For tests of streams, graphs, compilation and memory."""


@pytest.fixture
def triton_device() -> Iterator[torch.device]:
    """Where tensors lie that the Triton backend, chosen for the test, serves."""
    with use_backend("triton"):
        yield torch.device("cpu" if _INTERPRETED else "cuda")
