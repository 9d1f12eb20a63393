"""Which implementation serves an op: triton on CUDA, native on CPU where built, reference otherwise."""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from reprdpo.ops import native

Backend = Literal["triton", "native", "reference"]
Request = Literal["auto", "triton", "native", "reference"]

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_KERNELS: dict[str, tuple[Backend, ...]] = {}
_requested: Request | None = None
# Triton itself reads the variable once, when a kernel is decorated.
_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


class BackendStatus(NamedTuple):
    """Whether a backend can serve here, and why (not)."""

    available: bool
    reason: str


def declare(op: str, *kernels: Backend) -> None:
    """Say which backends, besides the reference, have a kernel for ``op``.

    A kernel takes float32, bfloat16 and float16; float64 always goes to the reference. An op that is never
    declared (one that only computes indices, say) asks no backend and so accepts any.
    """
    _KERNELS[op] = kernels
    _choose.cache_clear()


def backends() -> dict[str, BackendStatus]:
    """What can serve on this machine, and why the rest cannot: ``{"triton": ..., "native": ..., "reference": ...}``."""
    return {name: _status(name) for name in get_args(Backend)}


@contextlib.contextmanager
def use_backend(name: Request) -> Iterator[None]:
    """Serve every op from ``name`` inside the block; ``"auto"`` restores the default choice.

    The choice holds for the whole process, as backward passes run on threads of their own.

    Raises:
        ValueError: ``name`` is none of "auto", "triton", "native", "reference", or cannot serve on this machine.
    """
    global _requested
    _check_request(name, "use_backend")
    previous, _requested = _requested, name
    try:
        yield
    finally:
        _requested = previous


def select(op: str, tensor: Tensor, *, dtype: torch.dtype | None = None) -> Backend:
    """The backend that serves ``op`` on ``tensor``'s device, computing in ``dtype`` (``tensor``'s unless given).

    Raises:
        ValueError: the backend asked for, by ``use_backend`` or ``REPRDPO_BACKEND``, cannot serve.
    """
    request = _requested or os.environ.get("REPRDPO_BACKEND", "auto")
    return _choose(op, request, tensor.device.type, dtype or tensor.dtype)


@functools.cache
def _choose(op: str, request: str, device_type: str, dtype: torch.dtype) -> Backend:
    kernels = _KERNELS[op]
    if request == "auto":
        for candidate in kernels:
            if _why_not(candidate, device_type, dtype) is None and _status(candidate).available:
                return candidate
        return "reference"
    _check_request(request, "REPRDPO_BACKEND")
    if request not in ("reference", *kernels):
        raise ValueError(f"backend {request!r} has no {op}; it is served by: {', '.join(('reference', *kernels))}")
    if (reason := _why_not(request, device_type, dtype)) is not None:
        raise ValueError(f"backend {request!r} cannot serve {op} on {reason}")
    return request


def _why_not(backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    devices = {"triton": ("cuda", "cpu") if _INTERPRETING else ("cuda",), "native": ("cpu",)}
    if backend == "reference":
        return None
    if device_type not in devices[backend]:
        return f"{device_type} tensors"
    if dtype not in _KERNEL_DTYPES:
        return f"{str(dtype).removeprefix('torch.')} tensors"
    return None


@functools.cache
def _status(backend: str) -> BackendStatus:
    if backend == "reference":
        return BackendStatus(True, "plain PyTorch, always there")
    if backend == "native":
        return BackendStatus(native.loaded(), native.status())
    if importlib.util.find_spec("triton") is None:
        return BackendStatus(False, "triton is not installed")
    if _INTERPRETING:
        return BackendStatus(True, "interpreted on the CPU (TRITON_INTERPRET=1)")
    if not torch.cuda.is_available():
        return BackendStatus(False, "no CUDA device")
    return BackendStatus(True, torch.cuda.get_device_name())


def _check_request(name: str, argument: str) -> None:
    if name not in get_args(Request):
        raise ValueError(f"{argument} must be one of {', '.join(get_args(Request))}, not {name!r}")
    if name != "auto" and not (status := _status(name)).available:
        raise ValueError(f"{argument}: backend {name!r} cannot serve here: {status.reason}")
