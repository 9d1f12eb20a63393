"""Settings: presets fill what was left unset, mistakes are named with their cure, the parser reads every field."""

from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser

from reprdpo.errors import UserError
from reprdpo.training import OnlineDPOConfig, ReprDPOConfig, ReprSFTConfig, RewardModelConfig


def test_paper_preset_fills_only_what_was_left_unset(tmp_path: Path) -> None:
    config = ReprDPOConfig(output_dir=str(tmp_path), preset="paper", beta=0.1)
    got = (config.beta, config.learning_rate, config.per_device_train_batch_size, config.alpha, config.reward_margin)
    assert got == (0.1, 1e-5, 4, 7.5, 1.0)


def test_defaults_cost_no_synchronisation_and_no_network(tmp_path: Path) -> None:
    config = ReprDPOConfig(output_dir=str(tmp_path), seed=5)
    assert (config.beta, config.alpha, config.data_seed) == (0.1, "auto", 5)
    assert config.logging_nan_inf_filter is False
    assert config.report_to == []


@pytest.mark.parametrize("cls", [ReprDPOConfig, OnlineDPOConfig, ReprSFTConfig, RewardModelConfig])
def test_every_field_of_ours_has_help(cls: Any) -> None:
    parser = HfArgumentParser(cls)
    assert all(action.help for action in parser._actions)
    parser.format_help()


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("2.5", 2.5)])
def test_command_line(tmp_path: Path, text: str, value: Any) -> None:
    words = ["--output_dir", str(tmp_path), "--alpha", text, "--beta", "0.3", "--confidence_source", "fixed"]
    (config,) = HfArgumentParser(ReprDPOConfig).parse_args_into_dataclasses(words)
    assert (config.alpha, config.beta, config.confidence_source) == (value, 0.3, "fixed")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("preset", "papper"),
        ("beta", 0.0),
        ("beta", float("nan")),
        ("alpha", "often"),
        ("alpha", -1.0),
        ("fixed_confidence", 1.5),
        ("confidence_floor", -0.1),
        ("reward_learning_rate", 0.0),
        ("max_prompt_length", 2048),
        ("remove_unused_columns", True),
        ("loss_type", "sigmoidal"),
        ("loss_type", "robust"),
        ("precompute_ref_batch_size", 0),
    ],
)
def test_mistakes_name_the_field(tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises(UserError, match=field):
        ReprDPOConfig(output_dir=str(tmp_path), **{field: value})


@pytest.mark.parametrize("splits", [{"max_tokens_per_device": 512}, {"gradient_accumulation_steps": 2}])
def test_a_batch_in_parts_has_no_mean_gamma(tmp_path: Path, splits: dict[str, int]) -> None:
    ReprDPOConfig(output_dir=str(tmp_path), **splits)
    with pytest.raises(UserError, match=f"confidence_reduce: a batch that {next(iter(splits))} splits has no gamma"):
        ReprDPOConfig(output_dir=str(tmp_path), confidence_reduce="batch", **splits)


@pytest.mark.parametrize("settings", [{"resample_steps": "often"}, {"resample_steps": 0}, {"max_steps": -1}])
def test_online_mistakes(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        OnlineDPOConfig(output_dir=str(tmp_path), **{"max_steps": 10, **settings})


def test_online_reads_steps_from_text(tmp_path: Path) -> None:
    assert OnlineDPOConfig(output_dir=str(tmp_path), max_steps=10, resample_steps="25").resample_steps == 25
