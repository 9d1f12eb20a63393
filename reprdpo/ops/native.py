"""Loads the native libraries built from csrc, each once, and says why where one cannot be."""

import functools
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent.parent / "lib"


def loaded(device_type: str = "cpu") -> bool:
    """Whether ``torch.ops.reprdpo_native`` serves tensors of this kind of device, "cpu" or "cuda"."""
    return device_type in ("cpu", "cuda") and _load(device_type) is None


def status(device_type: str = "cpu") -> str:
    """The library's path (and the instruction set it uses on the CPU), or the reason it is not loaded."""
    if (reason := _load(device_type)) is not None:
        return reason
    path = _path(device_type)
    return f"{path} ({torch.ops.reprdpo_native.cpu_capability()})" if device_type == "cpu" else str(path)


def _path(device_type: str) -> Path:
    return _FOLDER / f"libreprdpo_{device_type}.so"


@functools.cache
def _load(device_type: str) -> str | None:
    path = _path(device_type)
    if device_type == "cuda":
        # The CUDA library adds kernels to the schemas that the CPU library defines.
        if (reason := _load("cpu")) is not None:
            return reason
        if not torch.cuda.is_available():
            return "no CUDA device"
    if not path.exists():
        needed = "nvcc" if device_type == "cuda" else "a C++ compiler"
        return f"{path.name} is not built (run `make native`, or reinstall where {needed} is found)"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path} does not load: {error}"
    return None
