"""The benchmarks' protocol: a wrong result is never timed, memory and floors are what they say."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import Work, copy_bandwidth, gemm_seconds, measure, peak_bytes


class Timer:
    """Stands where pytest-benchmark's fixture does and counts the calls it would time."""

    def __init__(self) -> None:
        self.name = "test_timer"
        self.params: dict[str, Any] | None = None
        self.extra_info: dict[str, Any] = {}
        self.stats: Any = None
        self.rounds = 0

    def pedantic(self, call: Any, rounds: int, warmup_rounds: int) -> None:
        self.rounds = rounds
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[float(n + 1) for n in range(rounds)]))
        call()


def measured(run: Any, inputs_seen: set[int] | None = None) -> Timer:
    timer = Timer()

    def make_inputs(seed: int) -> list[Tensor]:
        return [torch.full((4,), float(seed + 1))]

    def spy(value: Tensor) -> Tensor:
        if inputs_seen is not None:
            inputs_seen.add(int(value[0]))
        return run(value)

    measure(
        timer,
        spy,
        make_inputs,
        oracle=lambda value: 2 * value.double(),
        max_error=1e-6,
        work=Work(bytes=32),
        dtype=torch.float32,
    )
    return timer


def test_every_column_is_there() -> None:
    info = measured(lambda value: value * 2).extra_info
    assert info["p20_s"] <= info["p50_s"] <= info["p80_s"]
    assert info["error"] == 0
    assert info["floor_share"] == pytest.approx(info["floor_s"] / info["p50_s"])
    assert info["bytes"] == 32
    assert info["flop"] == 0


def test_a_wrong_result_is_not_timed() -> None:
    timer = Timer()
    with pytest.raises(pytest.fail.Exception, match=r"wrong result: error 0\.5"):
        measure(
            timer,
            lambda value: value,
            lambda seed: [torch.ones(3)],
            oracle=lambda value: 2 * value,
            max_error=1e-6,
            work=Work(bytes=1),
            dtype=torch.float32,
        )
    assert timer.rounds == 0
    assert "p50_s" not in timer.extra_info


def test_nan_is_wrong() -> None:
    with pytest.raises(pytest.fail.Exception, match="wrong result"):
        measured(lambda value: value * float("nan"))


def test_inputs_rotate() -> None:
    seen: set[int] = set()
    measured(lambda value: value * 2, seen)
    assert len(seen) >= 2


def test_peak_bytes_counts_what_is_alive_at_once() -> None:
    megabyte = 2**18  # float32 values

    def run() -> None:
        for _ in range(3):
            torch.empty(4 * megabyte).fill_(1.0)
        kept = [torch.empty(megabyte), torch.empty(megabyte)]
        kept.clear()

    assert peak_bytes(run, "cpu") == 4 * 2**20


def test_floors() -> None:
    work = Work(bytes=2**20, gemms=((64, 32, 16), (8, 4, 2)))
    assert work.flop == 2 * (64 * 32 * 16 + 8 * 4 * 2)
    expected = gemm_seconds(64, 32, 16, torch.float32, "cpu") + gemm_seconds(8, 4, 2, torch.float32, "cpu")
    assert work.floor_seconds(torch.float32, "cpu") == expected
    assert Work(bytes=2**20).floor_seconds(torch.float32, "cpu") == 2**20 / copy_bandwidth("cpu")
