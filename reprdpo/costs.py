"""What work costs: FLOP counted where it is done, seconds and peak memory by stage and by part of a stage.

FLOP are the multiply-adds of matmuls, two each: 2 a parameter and token for a forward, 4 more for its backward.
Embedding look-ups and attention's own products are left out, as in arXiv 2503.10093.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

_HIGH_WATER, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Cost:
    """Seconds and FLOP."""

    seconds: float = 0.0
    flop: float = 0.0

    def add(self, seconds: float = 0.0, flop: float = 0.0) -> None:
        self.seconds += seconds
        self.flop += flop


@dataclass
class StageCost(Cost):
    """The cost of a stage, and of the parts of it that were measured apart; ``peak_bytes`` is None where unknown."""

    peak_bytes: int | None = None
    parts: dict[str, Cost] = field(default_factory=dict)

    def part(self, name: str) -> Cost:
        return self.parts.setdefault(name, Cost())

    def to_json(self, before: Mapping[str, Any]) -> dict[str, Any]:
        """As JSON-able values, added to what an earlier start of the stage cost."""
        parts: dict[str, Any] = before.get("parts", {})
        return {
            **_added(before, self),
            "peak_bytes": max((peak for peak in (before.get("peak_bytes"), self.peak_bytes) if peak), default=None),
            "parts": parts | {name: _added(parts.get(name, {}), cost) for name, cost in self.parts.items()},
        }


def _added(before: Mapping[str, Any], cost: Cost) -> dict[str, float]:
    return {"seconds": before.get("seconds", 0.0) + round(cost.seconds, 3), "flop": before.get("flop", 0) + cost.flop}


_stages: list[StageCost] = []
_parts: list[str] = []


@contextlib.contextmanager
def stage() -> Iterator[StageCost]:
    """Measure a block: its seconds, the FLOP counted inside, the most memory allocated (on CUDA; else resident)."""
    found = StageCost()
    _reset_peak()
    _stages.append(found)
    start = time.perf_counter()
    try:
        yield found
    finally:
        found.seconds = time.perf_counter() - start
        found.peak_bytes = peak_bytes()
        _stages.remove(found)


@contextlib.contextmanager
def part(name: str) -> Iterator[None]:
    """Time a block, whose work must be done when it ends, and count its FLOP as a part of the stage it runs in."""
    start = time.perf_counter()
    _parts.append(name)
    try:
        yield
    finally:
        _parts.pop()
        for found in _stages:
            found.part(name).add(seconds=time.perf_counter() - start)


def count(flop: float, part: str | None = None) -> None:
    """Add ``flop`` to every stage under way, and to ``part`` of it (default: the innermost :func:`part` block)."""
    name = part or (_parts[-1] if _parts else None)
    for found in _stages:
        found.add(flop=flop)
        if name is not None:
            found.part(name).add(flop=flop)


def count_seconds(seconds: float, part: str) -> None:
    """Add time that a :class:`Stopwatch` took to ``part`` of every stage under way."""
    for found in _stages:
        found.part(part).add(seconds=seconds)


class Stopwatch:
    """Seconds that a device spends on blocks of work, without waiting for it until they are read."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []
        self._start: Any = None

    def start(self) -> None:
        self._start = self._mark()

    def stop(self) -> None:
        self._spans.append((self._start, self._mark()))

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def read(self) -> float:
        """The seconds since the last call; waits for the last block to end."""
        spans, self._spans = self._spans, []
        if not self._on_cuda:
            return sum(end - start for start, end in spans)
        if spans:
            spans[-1][1].synchronize()
        return sum(start.elapsed_time(end) for start, end in spans) / 1000

    def _mark(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def reward_flop(num_layers: int, hidden_size: int, *, sequences: int, gradients: bool = False) -> int:
    """Scoring ``sequences``: two dot products a layer, 4 L D each; as much again for the parameters' ``gradients``."""
    return (1 + gradients) * 4 * num_layers * hidden_size * sequences


def reward_step_flop(num_layers: int, hidden_size: int) -> int:
    """Adam's dozen operations on each of the reward's 2 L (D + 1) parameters, once an optimizer step."""
    return 12 * 2 * num_layers * (hidden_size + 1)


def online_flop(parameters: int, tokens: int, *, responses: int = 2) -> int:
    """Online sampling for a pair, with N ``parameters`` in the policy and as many in a reward model of its size.

    ``responses`` of ``tokens`` tokens are drawn (2 N a token) and scored (2 N); the reward model is trained on the two
    that make the pair (6 N).
    """
    return responses * 4 * parameters * tokens + 2 * 6 * parameters * tokens


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            _CLEAR.write_text("5", encoding="ascii")


def peak_bytes() -> int | None:
    """The most memory in use since the stage began: allocated on the CUDA device, else resident; None where unknown."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        for line in _HIGH_WATER.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None
