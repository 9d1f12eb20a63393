"""Loads the native libraries built from csrc, each once, and says why where one cannot be."""

import functools
import hashlib
from pathlib import Path
from typing import NamedTuple

import torch

from reprdpo import __version__

_PACKAGE = Path(__file__).parent.parent
_FOLDER = _PACKAGE / "lib"
_SCHEMAS = _PACKAGE.parent / "csrc" / "library.cpp"  # there in a source tree alone


def loaded(device_type: str = "cpu") -> bool:
    """Whether ``torch.ops.reprdpo_native`` serves tensors of this kind of device, "cpu" or "cuda"."""
    return device_type in ("cpu", "cuda") and _load(device_type) is None


def status(device_type: str = "cpu") -> str:
    """The library's path (and the instruction set it uses on the CPU), or the reason it is not loaded."""
    if (reason := _load(device_type)) is not None:
        return reason
    path = _path(device_type)
    return f"{path} ({torch.ops.reprdpo_native.cpu_capability()})" if device_type == "cpu" else str(path)


class LargeMemory(NamedTuple):
    """Bytes of large CPU results and working sets: in use, the most at once since the last reset, kept for the next."""

    used: int
    most_used: int
    kept: int


def large_memory() -> LargeMemory:
    """What the native library holds beside torch's allocator; see csrc/common/large_memory.h."""
    return LargeMemory(*torch.ops.reprdpo_native.large_memory()) if loaded() else LargeMemory(0, 0, 0)


def reset_most_used() -> None:
    """Count ``large_memory().most_used`` from now on."""
    if loaded():
        torch.ops.reprdpo_native.reset_most_used()


def empty_cache() -> None:
    """Give the CPU memory of freed residuals and weight gradients back to the system.

    As ``torch.cuda.empty_cache`` does on a GPU. At most 512 MiB are kept for the next call, and a system short of
    memory takes them by itself (``MADV_FREE``).
    """
    if loaded():
        torch.ops.reprdpo_native.release_kept_memory()


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
        return _why_missing(path.name, "nvcc" if device_type == "cuda" else "a C++ compiler")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path} does not load: {error}"
    built, wanted = _build(device_type), _wanted_build()
    if not built.startswith(wanted):
        return f"{path} was built for {built}, not for {wanted}: run `make native`, or reinstall"
    _, _, unfit = built.partition("; ")
    return f"{path} cannot serve here: {unfit}" if unfit else None


def _why_missing(name: str, needed: str) -> str:
    """Why the installation left a library out, as setup.py wrote it down."""
    notes = _FOLDER / "build.txt"
    for line in notes.read_text(encoding="utf-8").splitlines() if notes.exists() else ():
        if line.startswith(f"{name}: "):
            return f"{name} is not built: {line.removeprefix(f'{name}: ')}"
    return f"{name} is not built (run `make native`, or reinstall where {needed} is found)"


def _build(device_type: str) -> str:
    """The package's version and the digest of the schemas of a loaded library; after "; " why it cannot serve here."""
    try:
        return getattr(torch.ops.reprdpo_native, f"{device_type}_build")()
    except (AttributeError, NotImplementedError, RuntimeError):
        return "an older version"


def _wanted_build() -> str:
    if not _SCHEMAS.exists():
        return f"{__version__} "
    return f"{__version__} {hashlib.sha256(_SCHEMAS.read_bytes()).hexdigest()[:12]}"
