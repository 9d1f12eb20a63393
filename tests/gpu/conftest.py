"""Tests of this folder need an NVIDIA GPU and are skipped where there is none.

But for those that say ``cuda_only``, their bodies also run on the CPU, in a session started with TRITON_INTERPRET=1.
"""

import os
import sys
from collections.abc import Generator, Iterator
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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure that leaves no usable CUDA context ends its process, in which every later test would fail too."""
    report = yield
    if report.failed and item.get_closest_marker("gpu") and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as lost:
            print(
                f"{report.longreprtext}\n{item.nodeid} lost the CUDA context: {lost}", file=sys.__stderr__, flush=True
            )
            os._exit(70)  # under pytest-xdist the test counts as failed, and another process takes the others
    return report


@pytest.fixture
def cuda_only() -> None:
    """For tests of streams, graphs, compilation and memory."""


@pytest.fixture
def triton_device() -> Iterator[torch.device]:
    """Where tensors lie that the Triton backend, chosen for the test, serves."""
    with use_backend("triton"):
        yield torch.device("cpu" if _INTERPRETED else "cuda")
