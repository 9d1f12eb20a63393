"""Stamps every result file with what it was measured on."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks.harness import device_name


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info.clear()  # pytest-benchmark's own stamp names the host
    machine_info.update(
        {
            "cpu": device_name("cpu"),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "cuda": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "versions": {name: _version(name) for name in ("torch", "triton", "transformers", "reprdpo")},
        }
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
