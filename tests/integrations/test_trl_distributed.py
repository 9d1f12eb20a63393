"""Two processes of TRL's trainer with the method in it: the losses and the reward of one process with all the pairs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import distributed
import pytest
import torch
from datasets import Dataset
from torch import Tensor

pytest.importorskip("trl")


def train(folder: str, model_dir: str, rows: list[dict[str, str]], size: int) -> tuple[list[float], dict[str, Tensor]]:
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
        processing_class=None,
        reward=str(Path(folder) / "reward"),
    )
    trainer.train()
    names = ("loss", "rewards/margins", "hybrid/nll", "confidence/min", "num_tokens")
    lines = [[line[name] for name in names] for line in trainer.state.log_history if "loss" in line]
    assert trainer.reward is not None
    return lines, trainer.reward.state_dict()


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path, model_dir: str, pairs: Dataset, make_reward: Callable[..., Any]) -> None:
    arguments = (str(tmp_path), model_dir, list(pairs))
    make_reward().save_pretrained(tmp_path / "reward")
    (first, reward), (second, other) = distributed.run(train, *arguments, 2)
    lines, alone = train(*arguments, 4)
    torch.testing.assert_close(torch.tensor(first), torch.tensor(lines), rtol=1e-4, atol=1e-5)
    assert first == second
    for name, value in alone.items():
        assert torch.equal(reward[name], other[name])
        torch.testing.assert_close(reward[name], value, rtol=1e-4, atol=1e-5)
