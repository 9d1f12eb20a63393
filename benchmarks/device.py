"""What the protocol asks of a device: its name and free memory, timers, peak memory, launches, and its two ceilings."""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch

from reprdpo.ops import native

# A batch of calls between two events is at least this long, so that the events' own cost does not show.
BATCH_SECONDS = 1e-3
# Of a call that takes longer than its whole budget, three rounds must do.
MIN_ROUNDS, MAX_ROUNDS = 5, 1000
# What the profiler itself puts beside the kernels.
_NO_LAUNCH = ("Activity Buffer Request", "Context Sync", "Event Sync", "Stream Sync")


def synchronise(device: str) -> None:
    """Wait until the device has done what it was asked."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def device_name(device: str) -> str:
    """The device as it is stamped on a result."""
    return torch.cuda.get_device_name(device) if device != "cpu" else _cpu_name()


def free_bytes(device: str) -> int:
    """Memory that can still be had on the device; a very large number where the system does not say."""
    if device != "cpu":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    kibibytes = [line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemAvailable:")]
    return int(kibibytes[0]) * 1024 if kibibytes else 2**62


def rotation_bytes(device: str) -> int:
    """How much input a rotation must hold for no cache to keep it between two calls on the same set."""
    return 2**28 if device == "cpu" else 3 * torch.cuda.get_device_properties(device).L2_cache_size


def seconds(call: Callable[[], Any], device: str) -> float:
    """Wall time of one call and of what it asked of the device."""
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - start


def rounds_for(once: float, budget: float) -> int:
    """How many rounds of ``once`` seconds fill the budget, within reason."""
    if once > budget:
        return 3
    return int(min(MAX_ROUNDS, max(MIN_ROUNDS, budget / max(once, 1e-9))))


def event_seconds(call: Callable[[], Any], device: str, budget: float) -> list[float]:
    """Seconds a call takes on a CUDA device when calls follow each other as in training: the longer of device and host.

    Timed by events around batches of calls, nothing waiting in between.
    """
    once = seconds(call, device)
    batch = max(1, round(BATCH_SECONDS / max(once, 1e-9)))
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds_for(once * batch, budget))]
    for start, end in marks:
        start.record()
        for _ in range(batch):
            call()
        end.record()
    synchronise(device)
    return [start.elapsed_time(end) / 1e3 / batch for start, end in marks]


def graph_seconds(calls: Sequence[Callable[[], Any]], device: str, budget: float) -> list[float]:
    """Seconds of each of ``calls``, captured one after another in one CUDA graph: the device alone, no host."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for call in calls[:3]:
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return [each / len(calls) for each in event_seconds(graph.replay, device, budget)]


def host_seconds(call: Callable[[], Any], device: str) -> float:
    """Median time until a call returns, its work queued on an idle device but not awaited."""
    times = []
    for _ in range(3 if seconds(call, device) > 0.05 else 20):
        synchronise(device)
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    synchronise(device)
    return statistics.median(times)


def device_events(call: Callable[[], Any], device: str) -> list[tuple[str, float]]:
    """Names and seconds of the kernels, copies and fills that one call puts on a CUDA device, by the profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        synchronise(device)
    events: Any = profile.events()
    on_device = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    kept = [event for event in on_device if not event.is_user_annotation and event.name not in _NO_LAUNCH]
    return [(event.name, event.time_range.elapsed_us() / 1e6) for event in kept]


def launches(call: Callable[[], Any], device: str) -> int | None:
    """How many :func:`device_events` one call has; None where the profiler cannot count them."""
    try:
        return len(device_events(call, device)) or None
    except RuntimeError:
        return None


class PeakMemory:
    """``bytes``: the most that a block had at once, beyond what was there before.

    That is from torch's allocator, and on the CPU from our native library too, whose large memory is its own: the sum
    of both peaks, whenever each was.
    """

    bytes = 0

    def __init__(self, device: str) -> None:
        self._device = device
        self._before = 0
        self._profile: Any = None

    def __enter__(self) -> "PeakMemory":
        if self._device != "cpu":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            cpu = [torch.profiler.ProfilerActivity.CPU]
            self._before = native.large_memory().used
            native.reset_most_used()
            self._profile = torch.profiler.profile(activities=cpu, profile_memory=True).__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._device != "cpu":
            synchronise(self._device)
            self.bytes = torch.cuda.max_memory_allocated(self._device) - self._before
            return
        self._profile.__exit__(*exception)
        events = self._profile.profiler.kineto_results.events()
        changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
        alive = itertools.accumulate(change for _, change in sorted(changes, key=lambda change: change[0]))
        self.bytes = max(0, *alive) if changes else 0
        self.bytes += native.large_memory().most_used - self._before


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """:class:`PeakMemory` of one call."""
    with PeakMemory(device) as memory:
        run()
    return memory.bytes


@cache
def gemm_seconds(m: int, n: int, k: int, dtype: torch.dtype, device: str) -> float:
    """Time of the fastest (M, K) x (K, N) matmul in ``dtype``: any layout of its sides, on CUDA float32 output too."""
    outputs: list[dict[str, Any]] = [{}]
    if device != "cpu" and dtype.itemsize == 2:
        outputs.append({"out_dtype": torch.float32})
    times = []
    for left_turned, right_turned in itertools.product((False, True), repeat=2):
        left = _random(k, m, dtype, device).T if left_turned else _random(m, k, dtype, device)
        right = _random(n, k, dtype, device).T if right_turned else _random(k, n, dtype, device)
        times += [_median_seconds(partial(torch.mm, left, right, **options), device) for options in outputs]
    return min(times)


@cache
def copy_bandwidth(device: str) -> float:
    """Bytes a second, read and written together, of copying a tensor that fits no cache."""
    source = torch.randint(256, (2**27 if device == "cpu" else 2**30,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _median_seconds(lambda: target.copy_(source), device)


def _median_seconds(call: Callable[[], Any], device: str) -> float:
    once = seconds(call, device)
    if device != "cpu":
        return statistics.median(event_seconds(call, device, budget=0.1))
    return statistics.median(seconds(call, device) for _ in range(3 if once > 0.1 else 9))


def _random(rows: int, columns: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.randn(rows, columns, device=device).to(dtype)


@cache
def _cpu_name() -> str:
    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return names[0] if names else "CPU"


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8") as file:
            return file.readlines()
    except OSError:
        return []
