"""Which implementation serves an op on a device: the first declared for it that is there, else the reference."""

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
_KERNELS: dict[str, dict[str, tuple[Backend, ...]]] = {}
_requested: Request | None = None
# Triton itself reads the variable once, when a kernel is decorated.
_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


class BackendStatus(NamedTuple):
    """Whether a backend can serve here, and why (not)."""

    available: bool
    reason: str


def declare(op: str, *, cpu: tuple[Backend, ...] = (), cuda: tuple[Backend, ...] = ()) -> None:
    """Say which backends, besides the reference, have a kernel for ``op`` on a device, the default one first.

    A kernel takes float32, bfloat16 and float16; float64 always goes to the reference. An op that is never
    declared, being plain PyTorch everywhere, asks no backend and so accepts any.
    """
    # The interpreter runs Triton's kernels on CPU tensors, for whoever asks for it by name.
    if _INTERPRETING and "triton" in cuda:
        cpu = (*cpu, "triton")
    _KERNELS[op] = {"cpu": cpu, "cuda": cuda}
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
    kernels = _KERNELS[op].get(device_type, ())
    if request == "auto":
        for candidate in kernels:
            if candidate == "triton" and device_type == "cpu":
                continue
            if dtype in _KERNEL_DTYPES and _status(candidate, device_type).available:
                return candidate
        return "reference"
    _check_request(request, "REPRDPO_BACKEND")
    if request == "reference":
        return "reference"
    anywhere = {name for names in _KERNELS[op].values() for name in names}
    if request not in anywhere:
        raise ValueError(
            f"backend {request!r} has no {op}; it is served by: {', '.join(('reference', *sorted(anywhere)))}"
        )
    if request not in kernels:
        raise ValueError(f"backend {request!r} cannot serve {op} on {device_type} tensors")
    if dtype not in _KERNEL_DTYPES:
        raise ValueError(f"backend {request!r} cannot serve {op} on {str(dtype).removeprefix('torch.')} tensors")
    if not (status := _status(request, device_type)).available:
        raise ValueError(f"backend {request!r} cannot serve {op} on {device_type} tensors: {status.reason}")
    return request


@functools.cache
def _status(backend: str, device_type: str | None = None) -> BackendStatus:
    """Whether a backend can serve, on one kind of device or (None) on any."""
    if backend == "reference":
        return BackendStatus(True, "plain PyTorch, always there")
    if backend == "native":
        kinds = ("cpu", "cuda") if device_type is None else (device_type,)
        reasons = [native.status(kind) if device_type else f"{kind}: {native.status(kind)}" for kind in kinds]
        return BackendStatus(any(map(native.loaded, kinds)), "; ".join(reasons))
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
