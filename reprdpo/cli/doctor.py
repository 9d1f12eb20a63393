"""`reprdpo doctor`: versions, devices, active backends and why the others are not."""

import argparse
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import reprdpo
from reprdpo.ops import backends

PACKAGES = ("triton", "transformers", "datasets", "accelerate", "safetensors", "peft", "flash-attn", "trl")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="reprdpo doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    findings = examine()
    if parser.parse_args(argv).json:
        print(json.dumps(findings, indent=2))
        return
    for heading, rows in findings.items():
        print(heading)
        for name, value in rows.items():
            print(f"  {name:<14}{value}")


def examine() -> dict[str, dict[str, Any]]:
    """What is installed, which devices there are, which backends serve and why the others do not."""
    return {
        "versions": {"reprdpo": reprdpo.__version__, "python": platform.python_version(), "torch": torch.__version__}
        | {name: _version(name) for name in PACKAGES},
        "devices": _devices(),
        "backends": {
            name: f"{'active' if status.available else 'off'}: {status.reason}" for name, status in backends().items()
        },
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> dict[str, str]:
    found = {"cpu": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return found
