"""SFT: the loss is the token mean over responses, however an optimizer step is cut into batches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from reprdpo.files import read_jsonl
from reprdpo.training import ReprSFTConfig, ReprSFTTrainer, last_checkpoint

Make = Callable[..., Any]


@pytest.fixture
def responses(pairs: Dataset) -> Dataset:
    return pairs.select_columns(["chosen_input_ids", "chosen_response_start"]).rename_columns(
        {"chosen_input_ids": "input_ids", "chosen_response_start": "response_start"}
    )


def losses(config: ReprSFTConfig) -> list[float]:
    return [line["loss"] for _, line in read_jsonl(Path(config.output_dir) / "metrics.jsonl")]


def test_loss_is_cross_entropy_of_the_response(make_model: Make, make_config: Make, responses: Dataset) -> None:
    config = make_config(ReprSFTConfig, max_steps=1, per_device_train_batch_size=len(responses))
    model, total, count = make_model(), 0.0, 0
    for row in responses:
        logits = model(torch.tensor([row["input_ids"]])).logits[0, row["response_start"] - 1 : -1]
        target = torch.tensor(row["input_ids"][row["response_start"] :])
        total, count = total + F.cross_entropy(logits, target, reduction="sum").item(), count + len(target)
    ReprSFTTrainer(model, config, train_dataset=responses).train()
    assert losses(config)[0] == pytest.approx(total / count, abs=1e-5)


def test_accumulating_equals_the_larger_batch(
    make_model: Make, make_config: Make, responses: Dataset, tmp_path: Path
) -> None:
    """Batches of unequal token counts weigh by their tokens."""
    runs = []
    for name, size, accumulate in (("large", 7, 1), ("small", 3, 3)):
        config = make_config(
            ReprSFTConfig,
            output_dir=str(tmp_path / name),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            train_sampling_strategy="sequential",
            optim="sgd",
            learning_rate=0.5,
            max_steps=1,
        )
        trainer = ReprSFTTrainer(make_model(), config, train_dataset=responses.select(range(7)))
        trainer.train()
        runs.append((list(trainer.model.parameters()), losses(config)))
    assert runs[0][1] == pytest.approx(runs[1][1], abs=1e-5)
    assert all(torch.allclose(*both, atol=1e-5) for both in zip(runs[0][0], runs[1][0], strict=True))


def test_learns_and_resumes(make_model: Make, make_config: Make, responses: Dataset, tmp_path: Path) -> None:
    def run(name: str, steps: int, **settings: Any) -> ReprSFTConfig:
        shape = {"max_steps": steps, "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 4}
        config = make_config(ReprSFTConfig, output_dir=str(tmp_path / name), **shape, **settings)
        trainer = ReprSFTTrainer(make_model(), config, train_dataset=responses)
        trainer.train(resume_from_checkpoint=last_checkpoint(config.output_dir))
        return config

    straight = losses(run("straight", 8))
    run("resumed", 4)
    assert losses(run("resumed", 8)) == straight
    assert straight[-1] < straight[0]


@pytest.mark.parametrize("batch_size", [3, 14])
def test_evaluation_is_the_token_mean(make_model: Make, make_config: Make, responses: Dataset, batch_size: int) -> None:
    config = make_config(ReprSFTConfig, per_device_eval_batch_size=batch_size, max_steps=1)
    trainer = ReprSFTTrainer(make_model(), config, eval_dataset=responses)
    got = trainer.evaluate()["eval_loss"]
    config = make_config(ReprSFTConfig, per_device_train_batch_size=len(responses), max_steps=1)
    ReprSFTTrainer(make_model(), config, train_dataset=responses).train()
    assert got == pytest.approx(losses(config)[0], abs=1e-5)
