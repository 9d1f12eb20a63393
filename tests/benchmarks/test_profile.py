"""benchmarks.profile: every case is an op that runs, and a report says where the time goes."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks import profile
from benchmarks.logprob_peers import HeadShape

TIMES = profile.Times(
    floor=80e-6,
    matmul_floor=80e-6,
    pass_floor=5e-6,
    call=125e-6,
    graph=None,
    host=30e-6,
    kernels=[
        ("nvjet_tst_128x256", 60e-6),
        ("sm90_xmma_gemm_f32", 30e-6),
        ("_token_residual_kernel", 15e-6),
        ("fill", 5e-6),
    ],
)


def test_the_parts_of_a_report_are_the_whole_call() -> None:
    text = profile.report("an op", TIMES)
    parts = {
        label.strip(): float(us) for label, us in re.findall(r"^  (\w[^0-9]*?) +([0-9.]+) us +[0-9.]+%", text, re.M)
    }
    assert parts == {
        "matmuls": 90.0,
        "own passes": 15.0,
        "other kernels, copies, fills": 5.0,
        "the device waits": 15.0,
    }
    assert "1.56 times its floor of 80.0 us; cannot be captured; host 30.0 us, 4 launches" in text
    assert text.splitlines()[-4].split() == ["60.0", "us", "1", "x", "nvjet_tst_128x256"]


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("_packed_product_kernel", "matmul"),
        ("void reprdpo::probe_reward::(anonymous namespace)::forward_kernel<float, 1, true, true>(...)", "own"),
        ("_probe_reward_bwd_kernel", "own"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>(int)", "other"),
        ("Memset (Device)", "other"),
    ],
)
def test_kinds_of_kernels(kernel: str, kind: str) -> None:
    assert profile.kind_of(kernel) == kind


def test_every_case_runs_and_one_that_fails_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def graph_seconds(*_: object) -> list[float]:
        raise RuntimeError("operation not permitted when stream is capturing")

    for name, stub in {
        "device_events": lambda call, device: [call(), *TIMES.kernels][1:],
        "copy_bandwidth": lambda device: 1e12,
        "graph_seconds": graph_seconds,
        "event_seconds": lambda call, device, budget: [1e-3, 2e-3, 3e-3],
    }.items():
        monkeypatch.setattr(profile, name, stub)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(profile.Work, "floor_seconds", lambda *_: 1e-3)
    small = {"plain": HeadShape(1, 8, 16, 64), "capped": HeadShape(1, 8, 16, 64, softcap=3.0)}
    broken = profile.Case("broken", lambda: 1 // 0, profile.Work(bytes=1), 1)
    every = [broken, *profile.cases(small, 2, 16)]
    assert profile.run(every, tmp_path / "out" / "profile.txt", once=False) == 1
    text = (tmp_path / "out" / "profile.txt").read_text(encoding="utf-8")
    assert "broken: failed: ZeroDivisionError" in text
    assert text.count("2000.0 us, ") == len(every) - 1 >= 10
    assert capsys.readouterr().out.count("the device waits") == len(every) - 1
    assert profile.run(every[1:], None, once=True) == 0


def test_without_a_device_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if profile.DEVICE == "cuda":
        pytest.skip("there is a CUDA device")
    assert profile.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err
