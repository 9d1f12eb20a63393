"""Named settings: what a preset, or no preset, gives the fields that were left unset."""

from typing import Any

DEFAULTS: dict[str, Any] = {
    "beta": 0.1,
    "learning_rate": 1e-6,
    "per_device_train_batch_size": 8,
    "alpha": "auto",
    "reward_margin": 1.0,
}

PRESETS: dict[str, dict[str, Any]] = {
    # The appendix of arXiv 2503.10093 (A.3).
    "paper": {
        "beta": 1.5,
        "learning_rate": 1e-5,
        "per_device_train_batch_size": 4,
        "alpha": 7.5,
        "reward_margin": 1.0,
    },
}


def preset_values(preset: str | None) -> dict[str, Any]:
    """What the fields that were left unset get under a preset, or (None) under none."""
    return DEFAULTS | PRESETS.get(preset or "", {})
