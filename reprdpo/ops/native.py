"""Loads the native library built from csrc, once, and says why where it cannot."""

import functools
from pathlib import Path

import torch

_LIBRARY = Path(__file__).parent.parent / "lib" / "libreprdpo_cpu.so"


def loaded() -> bool:
    """Whether ``torch.ops.reprdpo_native`` is there."""
    return _load() is None


def status() -> str:
    """The library's path and the instruction set it uses here, or the reason it is not loaded."""
    return _load() or f"{_LIBRARY} ({torch.ops.reprdpo_native.cpu_capability()})"


@functools.cache
def _load() -> str | None:
    if not _LIBRARY.exists():
        return "the native library is not built (run `make native`, or reinstall where a C++ compiler is found)"
    try:
        torch.ops.load_library(_LIBRARY)
    except OSError as error:
        return f"{_LIBRARY} does not load: {error}"
    return None
