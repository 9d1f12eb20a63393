"""What the reward cost a run, against what online sampling would have cost it (arXiv 2503.10093, section 4.9)."""

from collections.abc import Mapping
from typing import Any

from reprdpo import costs

OVERHEAD_FILE = "overhead.json"
Stages = Mapping[str, Mapping[str, Any]]

# FLOP a pair in units of N T: the policy's forward and backward over two responses, and the extra of online sampling.
_POLICY, _ONLINE = 2 * 6, costs.online_flop(1, 1)


def overhead(stages: Stages) -> dict[str, Any] | None:
    """Ratios of a run's costs, each with its formula in words; None where no training moved a reward.

    Args:
        stages: the stages of ``run.json``.
    """
    trained = [stage for name, stage in stages.items() if name.startswith("train ") and _flop(stage, "reward")]
    if not trained:
        return None
    reward, policy = (_total(trained, part) for part in ("reward", "policy"))
    once = [stages[name] for name in ("fit", "sample") if name in stages]
    once_seconds, once_flop = (sum(stage.get(key, 0) for stage in once) for key in ("seconds", "flop"))
    online_flop = policy["flop"] * _ONLINE / _POLICY
    found: dict[str, Any] = {
        "reward_seconds": reward["seconds"],
        "training_seconds": reward["seconds"] + policy["seconds"],
        "reward_share": reward["seconds"] / (reward["seconds"] + policy["seconds"]),
        "one_off_seconds": once_seconds,
        "marginal_counted": online_flop / reward["flop"],
        "whole_run_counted": online_flop / (reward["flop"] + once_flop),
    }
    measured = _measured_online(stages)
    if measured is not None:
        found["marginal_measured"] = measured / (reward["seconds"] / len(trained))
    return found | {"lines": _in_words(found)}


def _in_words(found: Mapping[str, Any]) -> list[str]:
    lines = [
        f"Reward (score, confidence, update): {found['reward_share']:.2%} of training "
        f"({found['reward_seconds']:.2f} of {found['training_seconds']:.1f} s); "
        f"once before it: {found['one_off_seconds']:.1f} s to fit it and to sample and rank the pairs.",
        f"Extra cost a pair, online sampling / ours, counted in FLOP: {found['marginal_counted']:,.0f} "
        "(draw, score and learn from two responses / score and update the reward).",
        f"The same over the whole run, the one-off part counted in with ours: {found['whole_run_counted']:.3g}.",
    ]
    if "marginal_measured" in found:
        lines.append(
            f"Extra time of the online system's sampling and scoring / ours, as measured in this run: "
            f"{found['marginal_measured']:,.0f}."
        )
    return lines


def _measured_online(stages: Stages) -> float | None:
    """Seconds an online training spent on drawing and scoring its pairs."""
    online = [stage for name, stage in stages.items() if name.startswith("train online ")]
    if not online:
        return None
    return _total(online, "sampling")["seconds"] / len(online)


def _flop(stage: Mapping[str, Any], part: str) -> float:
    return stage.get("parts", {}).get(part, {}).get("flop", 0.0)


def _total(stages: list[Mapping[str, Any]], part: str) -> dict[str, float]:
    parts = [stage.get("parts", {}).get(part, {}) for stage in stages]
    return {key: sum(cost.get(key, 0.0) for cost in parts) for key in ("seconds", "flop")}
