"""Two processes of TRL's trainer with the method in it: losses, metrics and reward of one with all the pairs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import distributed
import pytest
import torch
from datasets import Dataset
from torch import Tensor

from reprdpo.errors import UserError

pytest.importorskip("trl")


PAD = 0  # of the tests' tokenizer
EVALUATED = {"one": 1, "five": 5, "all": 8}  # of batches of two a process: odd, fewer than processes, even
Numbers = dict[str, float]


def counted(prediction: Any) -> Numbers:
    """Over all sequences that were evaluated, how many there are, and sums of their tokens' ids and logits."""
    padding = prediction.label_ids == -100
    real = ~padding & (prediction.label_ids != PAD)
    largest = prediction.predictions.max(-1)[real]
    return {"sequences": len(padding), "ids": float(prediction.label_ids[real].sum()), "logits": float(largest.sum())}


def train(
    folder: str, model_dir: str, rows: list[dict[str, str]], size: int
) -> tuple[list[list[float]], dict[str, Tensor], dict[str, Numbers]]:
    from trl import DPOConfig

    from reprdpo.integrations.trl import RepresentationDPOTrainer
    from reprdpo.models import load_causal_lm

    config = DPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        max_steps=3,
        per_device_train_batch_size=size,
        per_device_eval_batch_size=2,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=3,
        optim="sgd",
        save_only_model=False,
    )
    trainer = RepresentationDPOTrainer(
        model=load_causal_lm(model_dir),
        args=config,
        train_dataset=Dataset.from_list(rows),
        eval_dataset={name: Dataset.from_list(rows[:count]) for name, count in EVALUATED.items()},
        processing_class=None,
        reward=str(Path(folder) / "reward"),
        compute_metrics=counted,
    )
    assert trainer.processing_class.pad_token_id == PAD
    trainer.train()
    names = ("loss", "rewards/margins", "hybrid/nll", "confidence/min", "num_tokens")
    lines = [[line[name] for name in names] for line in trainer.state.log_history if "loss" in line]
    assert trainer.reward is not None
    trainer.state.log_history.clear()
    trainer.evaluate()
    took = ("_runtime", "_per_second")
    evaluated = {
        name: {metric: value for metric, value in line.items() if not metric.endswith(took)}
        for name, line in zip(EVALUATED, trainer.state.log_history, strict=True)
    }
    return lines, trainer.reward.state_dict(), evaluated


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path, model_dir: str, pairs: Dataset, make_reward: Callable[..., Any]) -> None:
    arguments = (str(tmp_path), model_dir, list(pairs))
    make_reward().save_pretrained(tmp_path / "reward")
    (first, reward, evaluated), (second, other, _) = distributed.run(train, *arguments, 2)
    lines, alone, evaluated_alone = train(*arguments, 4)
    torch.testing.assert_close(torch.tensor(first), torch.tensor(lines), rtol=1e-4, atol=1e-5)
    assert first == second
    for name, value in alone.items():
        assert torch.equal(reward[name], other[name])
        torch.testing.assert_close(reward[name], value, rtol=1e-4, atol=1e-5)
    for name, wanted in evaluated_alone.items():
        assert f"eval_{name}_loss" in wanted
        # TRL's means of the means of batches, which are others here
        assert wanted[f"eval_{name}_sequences"] == 2 * EVALUATED[name]
        weighted = ("eval_entropy", "eval_logits/", "eval_mean_token_accuracy")
        kept = {metric: value for metric, value in wanted.items() if not metric.startswith(weighted)}
        assert {metric: evaluated[name][metric] for metric in kept} == pytest.approx(kept, rel=1e-4, abs=1e-4), name


def build(folder: str, model_dir: str, rows: list[dict[str, str]]) -> str:
    from trl import DPOConfig

    from reprdpo.integrations.trl import RepresentationDPOTrainer

    config = DPOConfig(output_dir=folder, use_cpu=True, bf16=False, report_to="none")
    reward = str(Path(folder) / f"reward-{torch.distributed.get_rank()}")
    with pytest.raises(UserError) as told:
        RepresentationDPOTrainer(model=model_dir, args=config, train_dataset=Dataset.from_list(rows), reward=reward)
    return str(told.value)


@pytest.mark.slow
def test_a_reward_of_its_own_on_a_process_is_refused(
    tmp_path: Path, model_dir: str, pairs: Dataset, make_reward: Callable[..., Any]
) -> None:
    reward = make_reward()
    for rank in range(2):
        reward.save_pretrained(tmp_path / f"reward-{rank}")
        torch.nn.init.zeros_(reward.probe_bias)
    for told in distributed.run(build, str(tmp_path), model_dir, list(pairs)):
        assert told.startswith("reward: is another one on process 1 than on process 0")
