"""The benchmarks' protocol: a wrong result is never timed, a peer's is kept with its error, a floor is what it says."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.device import copy_bandwidth, free_bytes, gemm_seconds, peak_bytes, rounds_for
from benchmarks.harness import Work, gradients, import_peer, measure, relative_error, rms_error


class Timer:
    """Stands where pytest-benchmark's fixture does and counts the calls it would time."""

    def __init__(self, **params: Any) -> None:
        self.name = "test_timer"
        self.params = params or None
        self.extra_info: dict[str, Any] = {}
        self.stats: Any = None
        self.rounds = 0

    def pedantic(self, call: Any, rounds: int, warmup_rounds: int) -> None:
        self.rounds = rounds
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[float(n + 1) for n in range(rounds)]))
        call()


def measured(
    run: Any, *, timer: Timer | None = None, oracle: Any = lambda value: 2 * value.double(), **options: Any
) -> Timer:
    timer = timer or Timer()
    measure(
        timer,
        run,
        lambda seed: [torch.arange(1.0, 5.0) * (seed + 1)],
        oracle=oracle,
        max_error=1e-6,
        work=Work(bytes=32),
        dtype=torch.float32,
        **options,
    )
    return timer


def double(value: Tensor) -> Tensor:
    return value * 2


def test_every_column_is_there() -> None:
    timer = measured(double, timer=Timer(implementation="ours"), shape={"T": 4}, upstream=0.3, headline="kernel")
    info = timer.extra_info
    assert info["p20_s"] < info["p50_s"] < info["p80_s"]
    assert info["p50_s"] == (timer.rounds + 1) / 2
    assert info["error"] == 0
    assert info["kind"] == "exact"
    assert info["floor_share"] == pytest.approx(info["floor_s"] / info["p50_s"])
    assert (info["bytes"], info["flop"]) == (32, 0)
    assert (info["implementation"], info["shape"], info["upstream"]) == ("ours", {"T": 4}, 0.3)
    assert info["headline"] == "kernel"


@pytest.mark.parametrize("wrong", [lambda value: value, lambda value: value * float("nan")], ids=["off", "nan"])
def test_a_wrong_result_of_ours_is_not_timed(wrong: Any) -> None:
    timer = Timer()
    with pytest.raises(pytest.fail.Exception, match=r"wrong result: error (0\.5|nan), at most 1e-06"):
        measured(wrong, timer=timer)
    assert timer.rounds == 0
    assert "p50_s" not in timer.extra_info


@pytest.mark.parametrize("factors", [(float("nan"), 2.0), (2.0, float("nan"))])
def test_one_nan_among_several_results_is_wrong(factors: tuple[float, float]) -> None:
    def run(value: Tensor) -> tuple[Tensor, Tensor]:
        return value * factors[0], value * factors[1]

    with pytest.raises(pytest.fail.Exception, match="error nan"):
        measured(run, oracle=lambda value: (2 * value.double(), 2 * value.double()))


def test_a_result_too_few_is_an_error() -> None:
    with pytest.raises(ValueError, match="argument 2 is longer"):
        measured(double, oracle=lambda value: (2 * value.double(), value.double()))


def test_an_inexact_peer_is_timed_and_marked() -> None:
    info = measured(lambda value: value * 2.02, peer=True).extra_info
    assert info["kind"] == "rounded"
    assert info["error"] == pytest.approx(0.01, rel=1e-3)
    assert info["p50_s"] > 0


def raising(value: Tensor) -> Tensor:
    raise RuntimeError("no kernel image\nand a long trace")


@pytest.mark.parametrize(
    ("run", "reason"), [(lambda value: value / 0 * 0, "off by nan"), (raising, "raises RuntimeError: no kernel image$")]
)
def test_a_peer_that_cannot_serve_is_skipped(run: Any, reason: str) -> None:
    with pytest.raises(pytest.skip.Exception, match=reason):
        measured(run, peer=True)


def test_what_ours_raises_is_raised() -> None:
    with pytest.raises(RuntimeError, match="no kernel image"):
        measured(raising)


def test_a_shape_that_does_not_fit_is_skipped_before_anything_is_made() -> None:
    def oracle(value: Tensor) -> Tensor:
        raise AssertionError("was run")

    with pytest.raises(pytest.skip.Exception, match=r"needs about 1e\+09 GB; .* GB are free"):
        measured(double, oracle=oracle, needs_bytes=10**18)
    assert 2**20 < free_bytes("cpu") < 10**18


def test_inputs_or_an_oracle_too_large_are_skipped() -> None:
    def oracle(value: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("tried to allocate")

    with pytest.raises(pytest.skip.Exception, match="do not fit"):
        measured(double, oracle=oracle)


def test_the_oracle_is_shared_by_key_alone() -> None:
    runs = []

    def oracle(value: Tensor) -> Tensor:
        runs.append(value)
        return 2 * value.double()

    for key in ("a", "a", "b", None, None):
        measured(double, oracle=oracle, oracle_key=key)
    assert len(runs) == 4


def test_a_missing_peer_is_skipped_by_name(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(pytest.skip.Exception, match=r"^no_such_peer is not usable here: No module named"):
        import_peer("no_such_peer.ops")
    (tmp_path / "broken_peer.py").write_text("import torch\ntorch.no_such_name")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(pytest.skip.Exception, match=r"^broken_peer is not usable here: module 'torch' has no"):
        import_peer("broken_peer")


def test_inputs_rotate() -> None:
    seen: set[float] = set()

    def spy(value: Tensor) -> Tensor:
        seen.add(float(value[0]))
        return value * 2

    measured(spy)
    assert len(seen) >= 2


def test_gradients_are_of_the_upstream_asked_for() -> None:
    hidden, weight = (torch.tensor([2.0, 3.0], requires_grad=True) for _ in range(2))
    run = gradients(lambda h, w, scale: (h * w * scale).sum(), (0, 1), upstream=-0.5)
    assert [each.tolist() for each in run(hidden, weight, 10.0)] == [[-10.0, -15.0]] * 2


def test_errors() -> None:
    exact = torch.tensor([3.0, 4.0])
    assert float(relative_error(exact + torch.tensor([0.0, 0.5]), exact)) == pytest.approx(0.1)
    assert float(rms_error(exact + 0.5, exact)) == pytest.approx(0.5)
    assert torch.isfinite(relative_error(torch.zeros(2), torch.zeros(2)))


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


def test_rounds_fill_the_budget() -> None:
    assert [rounds_for(once, 1.0) for once in (0.0, 0.01, 0.5, 10.0)] == [1000, 100, 5, 3]


@pytest.mark.parametrize(("each", "rounds"), [(2.9, 3), (3.1, 1)])
def test_of_a_slow_call_the_first_two_are_rounds(monkeypatch: pytest.MonkeyPatch, each: float, rounds: int) -> None:
    monkeypatch.setattr(harness, "seconds", lambda call, device: each)
    timer = measured(double)
    assert timer.rounds == rounds
    assert (timer.extra_info["p50_s"] == each) == (rounds == 1)


def fail_to_capture(*arguments: Any) -> list[float]:
    raise RuntimeError("operation not permitted when stream is capturing\nmore")


@pytest.mark.parametrize(
    ("host", "capture", "asked", "expected"),
    [
        (9e-6, lambda *arguments: [2e-6], None, {"p20_s": 2e-6, "p50_s": 2e-6, "p80_s": 2e-6}),
        (9e-6, fail_to_capture, None, "cannot be captured: operation not permitted when stream is capturing"),
        (1e-6, fail_to_capture, None, None),  # the device is what takes the time: a graph would tell nothing
        (1e-6, lambda *arguments: [2e-6], True, {"p20_s": 2e-6, "p50_s": 2e-6, "p80_s": 2e-6}),
        (9e-6, fail_to_capture, False, None),
    ],
)
def test_on_cuda_a_call_that_waits_for_the_host_is_also_timed_in_a_graph(
    monkeypatch: pytest.MonkeyPatch, host: float, capture: Any, asked: bool | None, expected: Any
) -> None:
    stand_ins = {
        "device_name": "H200",
        "free_bytes": 1,
        "rotation_bytes": 1,
        "peak_bytes": 1,
        "seconds": 1e-3,
        "event_seconds": [8e-6, 9e-6, 10e-6],
        "host_seconds": host,
        "launches": 3,
        "copy_bandwidth": 32 / 1e-6,
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(f"benchmarks.harness.{name}", lambda *arguments, value=value: value)
    monkeypatch.setattr("benchmarks.harness.graph_seconds", capture)
    info = measured(double, device="cuda", graph=asked).extra_info
    assert (info["p50_s"], info["host_s"], info["launches"]) == (9e-6, host, 3)
    assert info["floor_share"] == pytest.approx(1 / 9)
    if isinstance(expected, dict):
        assert info["graph"] == expected | {"floor_share": 0.5}
    else:
        assert info.get("graph", {}).get("reason") == expected
