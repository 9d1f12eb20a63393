"""The ratios of a run's costs."""

from pathlib import Path

import pytest

from reprdpo.experiments.overhead import overhead
from reprdpo.files import read_json
from reprdpo.report import summary_table


def stage(seconds: float, flop: float = 0.0, **parts: tuple[float, float]) -> dict:
    return {
        "status": "done",
        "seconds": seconds,
        "flop": flop,
        "parts": {name: {"seconds": s, "flop": f} for name, (s, f) in parts.items()},
    }


STAGES = {
    "fit": stage(2.0, 1e6),
    "sample": stage(3.0, 9e6),
    "train dpo seed 0": stage(9.0, policy=(9.0, 1.2e9)),
    "train reprdpo seed 0": stage(10.0, policy=(9.9, 1.2e9), reward=(0.1, 1e3)),
    "train reprdpo seed 1": stage(10.0, policy=(9.7, 1.2e9), reward=(0.3, 3e3)),
    "train online seed 0": stage(50.0, policy=(9.0, 1.2e9), sampling=(40.0, 1e9)),
}


def test_ratios():
    found = overhead(STAGES)
    assert found is not None
    assert found["reward_share"] == pytest.approx(0.4 / 20)
    assert found["one_off_seconds"] == 5.0
    # 20 N T extra an online pair against 12 N T of the policy's own step
    assert found["marginal_counted"] == pytest.approx(2.4e9 * 20 / 12 / 4e3)
    assert found["whole_run_counted"] == pytest.approx(2.4e9 * 20 / 12 / (1e7 + 4e3))
    assert found["marginal_measured"] == pytest.approx(40 / 0.2)
    assert "2.00% of training (0.40 of 20.0 s)" in found["lines"][0]


def test_a_run_without_a_moving_reward_has_none():
    assert overhead({name: cost for name, cost in STAGES.items() if "reprdpo" not in name}) is None


def test_a_run_carries_its_own_costs(tiny_run: Path):
    stages = read_json(tiny_run / "run.json")["stages"]
    for name in ("sft", "fit", "sample", "train reprdpo seed 0", "evaluate base seed 0"):
        assert stages[name]["flop"] > 0, name
        assert stages[name]["peak_bytes"] is None or stages[name]["peak_bytes"] > 2**20
    trained = stages["train reprdpo seed 0"]
    assert set(trained["parts"]) == {"reference", "policy", "reward"}
    assert sum(part["seconds"] for part in trained["parts"].values()) <= trained["seconds"] + 1e-3
    assert trained["flop"] == sum(part["flop"] for part in trained["parts"].values())
    assert {"sampling", "policy"} <= set(stages["train online seed 0"]["parts"])
    found = read_json(tiny_run / "overhead.json")
    assert found["marginal_counted"] > found["whole_run_counted"] > 0
    assert all(line in summary_table(tiny_run) for line in found["lines"])
