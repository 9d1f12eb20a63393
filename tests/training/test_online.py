"""Online DPO: rounds come when they are due, from the policy of that step, and a resumed run takes the same ones."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from test_trainer import logged

from reprdpo.errors import UserError
from reprdpo.files import read_jsonl
from reprdpo.training import OnlineDPOConfig, OnlineDPOTrainer, last_checkpoint

Make = Callable[..., Any]


class Resample:
    """Pairs whose first response token is drawn anew each round; remembers when and from which weights."""

    def __init__(self, pairs: Dataset, size: int = 6) -> None:
        self.pairs, self.size = pairs, size
        self.calls: list[tuple[int, float, bool]] = []

    def __call__(self, model: torch.nn.Module, number: int) -> Dataset:
        self.calls.append((number, model.lm_head.weight.sum().item(), model.training))
        fresh = torch.randint(3, 48, (1,)).item()

        def renew(row: dict[str, Any]) -> dict[str, Any]:
            start = row["chosen_response_start"]
            return {"chosen_input_ids": [*row["chosen_input_ids"][:start], fresh, 2]}

        return self.pairs.select(range(self.size)).map(renew)


def config_of(make_config: Make, **settings: Any) -> OnlineDPOConfig:
    shape = {"max_steps": 7, "resample_steps": 3, "per_device_train_batch_size": 2, "confidence_source": "fixed"}
    return make_config(OnlineDPOConfig, **{**shape, **settings})


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, [0, 3, 6]),
        ({"resample_steps": 5}, [0, 5]),
        ({"resample_steps": "epoch", "per_device_train_batch_size": 4}, [0, 2, 4, 6]),
        ({"resample_steps": 3, "gradient_accumulation_steps": 2}, [0, 3, 6]),
    ],
)
def test_rounds_are_drawn_from_the_policy_of_their_step(
    make_model: Make, make_config: Make, pairs: Dataset, settings: dict[str, Any], steps: list[int]
) -> None:
    resample = Resample(pairs)
    model = make_model()
    trainer = OnlineDPOTrainer(model, config_of(make_config, **settings), resample=resample)
    weights = [model.lm_head.weight.sum().item()]
    original = trainer.training_step

    def training_step(*args: Any) -> torch.Tensor:
        while len(weights) <= trainer.state.global_step:
            weights.append(model.lm_head.weight.sum().item())
        return original(*args)

    trainer.training_step = training_step
    trainer.train()
    assert [number for number, _, _ in resample.calls] == list(range(len(steps)))
    assert [weight for _, weight, _ in resample.calls] == [weights[step] for step in steps]
    assert not any(training for _, _, training in resample.calls)
    assert len(logged(trainer.args.output_dir)) == 7


def test_step_0_costs_log_2_and_later_rounds_keep_the_reference(
    make_model: Make, make_config: Make, pairs: Dataset
) -> None:
    config = config_of(make_config, learning_rate=0.05)
    OnlineDPOTrainer(make_model(), config, resample=Resample(pairs)).train()
    lines = logged(config.output_dir)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(lines[3]["rewards/chosen"]) > 1e-3


@pytest.mark.parametrize("settings", [{}, {"resample_steps": "epoch"}, {"gradient_accumulation_steps": 2}])
@pytest.mark.parametrize("killed_at", [4, 6])
def test_resuming_changes_no_bit(
    make_model: Make, make_config: Make, pairs: Dataset, tmp_path: Path, settings: dict[str, Any], killed_at: int
) -> None:
    """Killed after a round was drawn that no checkpoint has seen: the round is taken again, not drawn again."""
    saved = {"save_strategy": "steps", "save_steps": 2, **settings}

    def run(name: str) -> tuple[OnlineDPOTrainer, Resample]:
        resample = Resample(pairs)
        config = config_of(make_config, output_dir=str(tmp_path / name), **saved)
        return OnlineDPOTrainer(make_model(), config, resample=resample), resample

    straight, _ = run("straight")
    straight.train()
    killed, first = run("killed")
    original = killed.training_step

    def training_step(*args: Any) -> torch.Tensor:
        if killed.state.global_step == killed_at:
            raise KeyboardInterrupt
        return original(*args)

    killed.training_step = training_step
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed, second = run("killed")
    resumed.train(resume_from_checkpoint=last_checkpoint(resumed.args.output_dir))
    assert logged(resumed.args.output_dir) == logged(straight.args.output_dir)
    numbers = [number for number, _, _ in first.calls + second.calls]
    assert numbers == sorted(set(numbers))
    for got, expected in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(got, expected)


def test_resuming_a_finished_run_trains_no_further(make_model: Make, make_config: Make, pairs: Dataset) -> None:
    config = config_of(make_config, save_strategy="steps", save_steps=7)
    OnlineDPOTrainer(make_model(), config, resample=Resample(pairs)).train()
    lines, again = logged(config.output_dir), Resample(pairs)
    OnlineDPOTrainer(make_model(), config, resample=again).train(resume_from_checkpoint=True)
    assert (logged(config.output_dir), again.calls) == (lines, [])


def test_a_new_run_keeps_no_old_round(make_model: Make, make_config: Make, pairs: Dataset) -> None:
    for _ in range(2):
        resample = Resample(pairs)
        OnlineDPOTrainer(make_model(), config_of(make_config), resample=resample).train()
        assert len(resample.calls) == 3


def test_draws_hang_on_the_seed_and_the_round_alone(
    make_model: Make, make_config: Make, pairs: Dataset, tmp_path: Path
) -> None:
    def drawn(name: str, **settings: Any) -> list[int]:
        """The token drawn in each of three rounds."""
        config = config_of(make_config, output_dir=str(tmp_path / name), max_steps=3, resample_steps=1, **settings)
        OnlineDPOTrainer(make_model(), config, resample=Resample(pairs)).train()
        rounds = [next(read_jsonl(path))[1] for path in sorted((tmp_path / name / "rounds").iterdir())]
        return [row["chosen_input_ids"][row["chosen_response_start"]] for row in rounds]

    one = drawn("one", seed=1)
    assert len(set(one)) == 3
    torch.rand(5)
    assert drawn("batch", seed=1, per_device_train_batch_size=3, disable_dropout=False) == one
    assert drawn("other", seed=2) != one


def test_each_pass_over_a_round_has_an_order_of_its_own(make_model: Make, make_config: Make, pairs: Dataset) -> None:
    config = config_of(make_config, max_steps=9, resample_steps=6)
    loader = OnlineDPOTrainer(make_model(), config, resample=Resample(pairs)).get_train_dataloader()
    rows = [row for batch in loader for row in batch["pair_id"].tolist()]
    passes = [rows[start : start + 6] for start in (0, 6, 12)]  # two of the first round, one of the second
    assert [sorted(each) for each in passes] == [list(range(6))] * 3
    assert len(set(map(tuple, passes))) == 3


def test_a_round_without_pairs_is_told(make_model: Make, make_config: Make, pairs: Dataset) -> None:
    trainer = OnlineDPOTrainer(make_model(), config_of(make_config), resample=Resample(pairs, size=0))
    with pytest.raises(UserError, match="round 0"):
        trainer.train()
