"""The Bradley-Terry reward model: it starts at 0, learns a visible preference, scores and reloads alike."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from reprdpo.errors import UserError
from reprdpo.files import read_jsonl
from reprdpo.training import BradleyTerryRewardModel, RewardModelConfig, train_reward_model

Make = Callable[..., Any]


@pytest.fixture
def visible() -> Dataset:
    """Pairs of which the chosen response holds token 9 and the rejected one token 30."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(24):
        prompt = torch.randint(3, 48, (2 + number % 3,), generator=generator).tolist()
        rows.append(
            {
                "chosen_input_ids": [*prompt, *[9] * (1 + number % 2), 2],
                "chosen_response_start": len(prompt),
                "rejected_input_ids": [*prompt, *[30] * (1 + number % 4), 2],
                "rejected_response_start": len(prompt),
                "pair_id": number,
            }
        )
    return Dataset.from_list(rows)


def rows_of(data: Dataset, side: str) -> list[dict[str, Any]]:
    ids, starts = data[f"{side}_input_ids"], data[f"{side}_response_start"]
    return [{"input_ids": i, "response_start": s} for i, s in zip(ids, starts, strict=True)]


def test_learns_scores_and_reloads(make_model: Make, make_config: Make, visible: Dataset, tmp_path: Path) -> None:
    base = make_model()
    before = [parameter.clone() for parameter in base.parameters()]
    config = make_config(RewardModelConfig, max_steps=30, per_device_train_batch_size=8, learning_rate=5e-3)
    model = train_reward_model(base, visible, config)
    assert all(torch.equal(*both) for both in zip(before, base.parameters(), strict=True))
    lines = [line for _, line in read_jsonl(Path(config.output_dir) / "metrics.jsonl")]
    assert lines[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert lines[0]["accuracy"] == 0
    assert lines[-1]["loss"] < 0.3

    chosen, rejected = (model.score(rows_of(visible, side), batch_size=5) for side in ("chosen", "rejected"))
    assert all(c > r for c, r in zip(chosen, rejected, strict=True))
    alone = [model.score([row])[0] for row in rows_of(visible, "chosen")]
    assert chosen == pytest.approx(alone, abs=1e-4)

    model.save_pretrained(tmp_path / "reward_model")
    again = BradleyTerryRewardModel.from_pretrained(tmp_path / "reward_model")
    assert again.score(rows_of(visible, "chosen"), batch_size=5) == chosen


def test_a_margin_is_asked_of_the_chosen_response(make_model: Make, make_config: Make, visible: Dataset) -> None:
    config = make_config(RewardModelConfig, max_steps=1, margin=0.5)
    train_reward_model(make_model(), visible, config)
    (line,) = [line for _, line in read_jsonl(Path(config.output_dir) / "metrics.jsonl") if "loss" in line]
    assert line["loss"] == pytest.approx(math.log1p(math.exp(0.5)), abs=1e-5)  # every reward starts at 0


@pytest.mark.parametrize("training", [False, True])
def test_scores_without_dropout_and_stays_in_its_mode(make_model: Make, visible: Dataset, training: bool) -> None:
    model = BradleyTerryRewardModel.from_causal_lm(make_model(attention_dropout=0.5)).train(training)
    torch.nn.init.normal_(model.head.weight)
    scores = model.score(rows_of(visible, "chosen"))
    assert model.training == training
    assert model.eval().score(rows_of(visible, "chosen")) == scores


def test_the_same_command_goes_on(make_model: Make, make_config: Make, visible: Dataset, tmp_path: Path) -> None:
    def run(name: str, steps: int) -> list[float]:
        saved = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant", "max_steps": steps}
        config = make_config(RewardModelConfig, output_dir=str(tmp_path / name), **saved)
        return train_reward_model(make_model(), visible, config).score(rows_of(visible, "chosen"))

    run("resumed", 3)
    assert run("resumed", 6) == run("straight", 6)


def test_a_folder_without_a_head_is_told(make_model: Make, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "lm")
    with pytest.raises(UserError, match=r"reward_head\.safetensors"):
        BradleyTerryRewardModel.from_pretrained(tmp_path / "lm")
