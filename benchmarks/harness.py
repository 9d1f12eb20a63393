"""The protocol of every benchmark: check, measure memory, warm up, time over rotating buffers, compare to the floor.

A wrong result is never timed: `measure` compares with the float64 oracle first and fails the benchmark where it is off.
"""

import importlib
import itertools
import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, Literal

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.device import (
    copy_bandwidth,
    device_name,
    event_seconds,
    free_bytes,
    gemm_seconds,
    graph_seconds,
    host_seconds,
    launches,
    peak_bytes,
    rotation_bytes,
    rounds_for,
    seconds,
)

# What benchmarks choose their shapes and device by; hide the GPU (CUDA_VISIBLE_DEVICES=) to measure the CPU beside it.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SECONDS = 1.0
# Calls longer than this have been warmed up by the check; their first two count as rounds.
SLOW_SECONDS = 3.0
MAX_COPIES = 64


@dataclass(frozen=True)
class Work:
    """What a call must do at the least, counted: FLOP of its matmuls and bytes it must move.

    ``gemms`` are the (M, N, K) of its matmuls; the floor is their time at the fastest GEMM of the machine. Without
    matmuls it is the time of moving ``bytes`` at copy bandwidth.
    """

    bytes: int
    gemms: tuple[tuple[int, int, int], ...] = ()

    @property
    def flop(self) -> int:
        return sum(2 * m * n * k for m, n, k in self.gemms)

    def floor_seconds(self, dtype: torch.dtype, device: str) -> float:
        """The floor, measured in this process."""
        if not self.gemms:
            return self.bytes / copy_bandwidth(device)
        return sum(gemm_seconds(m, n, k, dtype, device) for m, n, k in self.gemms)


def relative_error(found: Tensor, exact: Tensor) -> Tensor:
    """||found - exact|| / ||exact||."""
    return (found - exact).norm() / exact.norm().clamp(min=1e-30)


def rms_error(found: Tensor, exact: Tensor) -> Tensor:
    """Root mean square of found - exact, in the unit of the result (nats a token for log-probs)."""
    return (found - exact).square().mean().sqrt()


def measure(
    benchmark: BenchmarkFixture,
    run: Callable[..., Any],
    make_inputs: Callable[[int], Sequence[Any]],
    *,
    oracle: Callable[..., Any],
    max_error: float,
    work: Work,
    dtype: torch.dtype,
    device: str = "cpu",
    peer: bool = False,
    implementation: str | None = None,
    shape: Mapping[str, int] | None = None,
    upstream: float = 1.0,
    error: Callable[[Tensor, Tensor], Tensor] = relative_error,
    oracle_key: Hashable = None,
    needs_bytes: int = 0,
    graph: bool | None = None,
    headline: Literal["kernel", "claim"] | None = None,
) -> None:
    """Check ``run`` against ``oracle`` on the same inputs, then time it and write every column of the protocol.

    Our own row fails when it is wrong. A peer's row is kept with its error, marked "rounded" above ``max_error``, and
    is skipped with the reason when the peer raises or its result is not finite.

    Args:
        run: the implementation, called with one set of inputs.
        make_inputs: a seed to a set of inputs.
        oracle: the same inputs to the exact result, in float64: a tensor, or as many as ``run`` gives.
        max_error: largest error of any result that still counts as right.
        work: what is counted.
        peer: not this library's.
        implementation: the row's name in tables and plots; the test's parameter of that name by default.
        shape: what a plot can run along, such as ``{"T": 512, "V": 32000}``.
        upstream: the upstream gradient that ``run`` uses, for the record (see `gradients`).
        error: of one result, both in float64.
        oracle_key: rows with an equal key and the same inputs share one evaluation of the oracle.
        needs_bytes: an estimate of all the memory a row needs; it is skipped where less is free.
        graph: also time ``run`` inside a CUDA graph; by default where the host is what limits the eager call.
        headline: the README's table in which the row's group stands.
    """
    torch.set_float32_matmul_precision("highest")  # no TF32, whatever a peer has set
    _forget_other_oracles(oracle_key)
    benchmark.extra_info.update(
        {
            "implementation": implementation or str((benchmark.params or {}).get("implementation", benchmark.name)),
            "peer": peer,
            "shape": dict(shape or {}),
            "upstream": upstream,
            "flop": work.flop,
            "bytes": work.bytes,
            "dtype": str(dtype).removeprefix("torch."),
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "headline": headline,
        }
    )
    if needs_bytes > (free := free_bytes(device)):
        pytest.skip(f"needs about {needs_bytes / 1e9:.3g} GB; {free / 1e9:.3g} GB are free on {device_name(device)}")
    try:
        inputs = make_inputs(0)
        exact = _exact(oracle, inputs, oracle_key)
    except torch.OutOfMemoryError as failure:
        pytest.skip(f"the inputs and the oracle do not fit {device_name(device)}: {_first_line(failure)}")
    try:
        errors = [float(error(*pair)) for pair in _pairs(run(*inputs), exact)]
        worst = math.nan if any(map(math.isnan, errors)) else max(errors)
        if peer and not math.isfinite(worst):
            pytest.skip(f"its result is off by {worst}")
        if not (peer or worst <= max_error):
            pytest.fail(f"wrong result: error {worst:.2g}, at most {max_error:.2g} allowed; not timed")
        columns = _timed(benchmark, run, make_inputs, inputs, device, graph)
    except Exception as failure:
        if not peer:
            raise
        pytest.skip(f"raises {type(failure).__name__}: {_first_line(failure)}")
    floor = work.floor_seconds(dtype, device)
    for row in (columns, columns.get("graph") or {}):
        if "p50_s" in row:
            row["floor_share"] = floor / row["p50_s"]
    columns |= {"error": worst, "errors": errors, "kind": "exact" if worst <= max_error else "rounded"}
    benchmark.extra_info.update(columns | {"floor_s": floor})


def count(benchmark: BenchmarkFixture, work: Work, *, flop: int | None = None, reason: str, **columns: Any) -> None:
    """A row that is counted and not measured, and says so: no run, no time. ``flop`` overrides the matmuls' own."""
    benchmark.extra_info.update({"flop": flop or work.flop, "bytes": work.bytes, "counted": reason, **columns})
    benchmark.pedantic(lambda: None)


def import_peer(module: str) -> ModuleType:
    """A peer's module; the row is skipped by name where it is missing or does not import here."""
    try:
        return importlib.import_module(module)
    except Exception as failure:
        pytest.skip(f"{module.split('.')[0]} is not usable here: {_first_line(failure)}")


def gradients(
    function: Callable[..., Tensor], arguments: Sequence[int], upstream: float = 1.0
) -> Callable[..., tuple[Tensor, ...]]:
    """A run that gives ``function``'s gradients for some of its arguments, with ``upstream`` for every result."""

    def run(*inputs: Any) -> tuple[Tensor, ...]:
        result = function(*inputs)
        return torch.autograd.grad(result, [inputs[at] for at in arguments], torch.full_like(result, upstream))

    return run


def _timed(
    benchmark: BenchmarkFixture,
    run: Callable[..., Any],
    make_inputs: Callable[[int], Sequence[Any]],
    inputs: Sequence[Any],
    device: str,
    graph: bool | None,
) -> dict[str, Any]:
    """Memory first, then times, on CUDA also launches, the host's share and, where asked or telling, a graph's time."""
    extra_bytes = peak_bytes(lambda: run(*inputs), device)
    copies = min(MAX_COPIES, max(2, rotation_bytes(device) // max(1, _nbytes(inputs)) + 1))
    sets = [inputs, *(make_inputs(seed) for seed in range(1, copies))]
    rotation = itertools.cycle(sets)

    def call() -> None:
        run(*next(rotation))

    warm_up = [seconds(call, device) for _ in range(2)]
    counted = warm_up if device == "cpu" and min(warm_up) > SLOW_SECONDS else []
    rounds = 1 if counted else rounds_for(min(warm_up), SECONDS) if device == "cpu" else 3
    benchmark.pedantic(lambda: seconds(call, device), rounds=rounds, warmup_rounds=0)
    wall = counted + list(benchmark.stats.stats.data) if benchmark.stats else warm_up
    common = {"peak_bytes": extra_bytes, "copies": copies}
    if device == "cpu":
        return common | _quantiles(wall)
    columns = common | _quantiles(event_seconds(call, device, SECONDS)) | {"wall_s": float(np.median(wall))}
    columns |= {"host_s": host_seconds(call, device), "launches": launches(call, device)}
    if graph or (graph is None and columns["p50_s"] < 1.5 * columns["host_s"]):
        try:
            columns["graph"] = _quantiles(graph_seconds([partial(run, *each) for each in sets], device, SECONDS))
        except Exception as failure:
            columns["graph"] = {"reason": f"cannot be captured: {_first_line(failure)}"}
    return columns


def _quantiles(times: list[float]) -> dict[str, Any]:
    low, median, high = np.quantile(times, (0.2, 0.5, 0.8)).tolist()
    return {"p20_s": low, "p50_s": median, "p80_s": high}


_last_exact: tuple[Hashable, Sequence[Tensor]] | None = None


def _forget_other_oracles(key: Hashable) -> None:
    """Only the last result is kept, as one of V = 128256 holds gigabytes."""
    global _last_exact
    if key is None or _last_exact is None or _last_exact[0] != key:
        _last_exact = None
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _exact(oracle: Callable[..., Any], inputs: Sequence[Any], key: Hashable) -> Sequence[Tensor]:
    """The oracle's result, or the one kept for ``key``."""
    global _last_exact
    if _last_exact is None:
        _last_exact = (key, [result.detach().double() for result in _tensors(oracle(*inputs))])
    return _last_exact[1]


def _pairs(found: Any, exact: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(each.detach().double(), right.to(each.device)) for each, right in zip(_tensors(found), exact, strict=True)]


def _tensors(result: Any) -> Sequence[Tensor]:
    return (result,) if isinstance(result, Tensor) else result


def _first_line(failure: Exception) -> str:
    """What went wrong, without the folders of this machine that an ImportError names."""
    line = (str(failure).strip().splitlines() or [type(failure).__name__])[0]
    return re.sub(r" \(/[^)]*\)", "", line)[:200]


def _nbytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(_nbytes(item) for item in value) if isinstance(value, (list, tuple)) else 0
