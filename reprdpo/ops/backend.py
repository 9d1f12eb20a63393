"""Which implementation serves an op: triton on CUDA, native on CPU where built, reference otherwise."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from reprdpo.ops import native

Backend = Literal["triton", "native", "reference"]
Request = Literal["auto", "triton", "native", "reference"]

_IMPLEMENTED: dict[str, set[Backend]] = {}
_requested: Request | None = None


class BackendStatus(NamedTuple):
    """Whether a backend can serve here, and why (not)."""

    available: bool
    reason: str


def declare(op: str, *backends: Backend) -> None:
    """Say which backends, besides the reference, implement ``op``."""
    _IMPLEMENTED[op] = {"reference", *backends}


def backends() -> dict[str, BackendStatus]:
    """What can serve on this machine, and why the rest cannot: ``{"triton": ..., "native": ..., "reference": ...}``."""
    return {
        "triton": _triton_status(),
        "native": BackendStatus(native.loaded(), native.status()),
        "reference": BackendStatus(True, "plain PyTorch, always there"),
    }


@contextlib.contextmanager
def use_backend(name: Request) -> Iterator[None]:
    """Serve every op from ``name`` inside the block; ``"auto"`` restores the default choice.

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


def select(op: str, tensor: Tensor) -> Backend:
    """The backend that serves ``op`` on ``tensor``'s device.

    Raises:
        ValueError: the backend asked for, by ``use_backend`` or ``REPRDPO_BACKEND``, cannot serve.
    """
    request = _requested or _from_environment()
    if request != "auto":
        if request not in _IMPLEMENTED[op]:
            served = ", ".join(sorted(_IMPLEMENTED[op]))
            raise ValueError(f"backend {request!r} has no {op}; it is served by: {served}")
        if not _serves_device(request, tensor.device):
            raise ValueError(f"backend {request!r} cannot serve {op} on {tensor.device.type} tensors")
        return request
    for candidate in ("triton", "native"):
        if (
            candidate in _IMPLEMENTED[op]
            and backends()[candidate].available
            and _serves_device(candidate, tensor.device)
        ):
            return candidate
    return "reference"


def _serves_device(backend: Backend, device: torch.device) -> bool:
    if backend == "triton":
        return device.type == "cuda" or (device.type == "cpu" and _interpreting())
    if backend == "native":
        return device.type == "cpu"
    return True


def _triton_status() -> BackendStatus:
    if importlib.util.find_spec("triton") is None:
        return BackendStatus(False, "triton is not installed")
    if _interpreting():
        return BackendStatus(True, "interpreted on the CPU (TRITON_INTERPRET=1)")
    if not torch.cuda.is_available():
        return BackendStatus(False, "no CUDA device")
    return BackendStatus(True, f"{torch.cuda.get_device_name()}")


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _from_environment() -> Request:
    name = os.environ.get("REPRDPO_BACKEND", "auto")
    _check_request(name, "REPRDPO_BACKEND")
    return name  # type: ignore[return-value]


def _check_request(name: str, argument: str) -> None:
    if name not in get_args(Request):
        raise ValueError(f"{argument} must be one of {', '.join(get_args(Request))}, not {name!r}")
    if name != "auto" and not (status := backends()[name]).available:
        raise ValueError(f"{argument}: backend {name!r} cannot serve here: {status.reason}")
