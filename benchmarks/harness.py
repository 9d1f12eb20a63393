"""The protocol of every benchmark: check, measure memory, warm up, time over rotating buffers, compare to the floor.

A wrong result is never timed: `measure` compares with the float64 oracle first and fails the benchmark where it is off.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

# Enough copies of the inputs that no cache keeps them all between two calls.
ROTATION_BYTES = 2**28
SECONDS = 1.0
MIN_ROUNDS, MAX_ROUNDS = 5, 1000


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
) -> None:
    """Check ``run`` against ``oracle`` on the same inputs, then time it and write every column of the protocol.

    Args:
        run: the implementation, called with one set of inputs.
        make_inputs: a seed to a set of inputs.
        oracle: the same inputs to the exact result, in float64: a tensor, or as many as ``run`` gives.
        max_error: largest relative error, in the norm of a tensor, that still counts as right.
        work: what is counted.
    """
    inputs = make_inputs(0)
    results = zip(_tensors(run(*inputs)), _tensors(oracle(*inputs)), strict=True)
    error = float(torch.stack([_relative_error(*pair) for pair in results]).max())  # a NaN stays one
    if not error <= max_error:
        pytest.fail(f"wrong result: relative error {error:.2g}, at most {max_error:.2g} allowed; not timed")
    extra_bytes = peak_bytes(lambda: run(*inputs), device)
    copies = max(2, ROTATION_BYTES // max(1, sum(_nbytes(value) for value in inputs)) + 1)
    rotation = itertools.cycle([make_inputs(seed) for seed in range(min(copies, 32))])
    seconds = _time(benchmark, run, rotation, device)
    low, median, high = np.quantile(seconds, (0.2, 0.5, 0.8)).tolist()
    floor = work.floor_seconds(dtype, device)
    benchmark.extra_info.update(
        {
            "p20_s": low,
            "p50_s": median,
            "p80_s": high,
            "peak_bytes": extra_bytes,
            "flop": work.flop,
            "bytes": work.bytes,
            "floor_s": floor,
            "floor_share": floor / median,
            "error": error,
            "dtype": str(dtype).removeprefix("torch."),
            "device": device_name(device),
            "threads": torch.get_num_threads(),
        }
    )


def _tensors(result: Any) -> Sequence[Tensor]:
    return (result,) if isinstance(result, Tensor) else result


def _relative_error(found: Tensor, exact: Tensor) -> Tensor:
    exact = exact.double().cpu()
    return (found.detach().double().cpu() - exact).norm() / exact.norm().clamp(min=1e-30)


def _time(benchmark: BenchmarkFixture, run: Callable[..., Any], rotation: Any, device: str) -> list[float]:
    def call() -> None:
        run(*next(rotation))
        synchronise(device)

    call()
    once = _seconds(call)
    rounds = int(min(MAX_ROUNDS, max(MIN_ROUNDS, SECONDS / max(once, 1e-9))))
    benchmark.pedantic(call, rounds=rounds, warmup_rounds=1)
    return list(benchmark.stats.stats.data) if benchmark.stats else [once]


@cache
def gemm_seconds(m: int, n: int, k: int, dtype: torch.dtype, device: str) -> float:
    """Median time of one (M, K) x (K, N) matmul in ``dtype``."""
    left, right = (torch.randn(*shape, device=device).to(dtype) for shape in ((m, k), (k, n)))

    def call() -> None:
        left @ right
        synchronise(device)

    call()
    return sorted(_seconds(call) for _ in range(5))[2]


@cache
def copy_bandwidth(device: str) -> float:
    """Bytes a second, read and written together, of copying a tensor that fits no cache."""
    source = torch.zeros(2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def call() -> None:
        target.copy_(source)
        synchronise(device)

    call()
    return 2 * source.numel() / sorted(_seconds(call) for _ in range(5))[2]


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """The most bytes that ``run`` had allocated at once, beyond what was there before."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    results: Any = profile.profiler.kineto_results
    changes = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    alive = itertools.accumulate(change for _, change in sorted(changes, key=lambda change: change[0]))
    return max(0, *alive) if changes else 0


def synchronise(device: str) -> None:
    """Wait until the device has done what it was asked."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def device_name(device: str) -> str:
    """The device as it is stamped on a result."""
    return torch.cuda.get_device_name(device) if device != "cpu" else _cpu_name()


@cache
def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else "CPU"


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _nbytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(_nbytes(item) for item in value) if isinstance(value, (list, tuple)) else 0
