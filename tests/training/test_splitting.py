"""How a step is split into forwards, micro-batches and processes changes neither loss nor training, for any loss."""

from pathlib import Path
from typing import Any

import distributed
import pytest
import tiny_runs
import torch
from test_trainer import logged
from torch import Tensor

from reprdpo.ops.reference import PAIR_LOSSES
from reprdpo.training import ReprDPOTrainer

LOSSES = (*PAIR_LOSSES, "kto")
SPLIT = {"max_tokens_per_device": 30, "packing": "prefix", "max_row_tokens": 40}
Run = tuple[list[float], list[Tensor]]


def train(folder: str, loss_type: str, batch: int, accumulate: int = 1, **settings: Any) -> Run:
    """The logged losses and the policy at the end; eight pairs a step, so that the epochs' second batch has six."""
    config = tiny_runs.make_config(
        f"{folder}/{loss_type}",
        loss_type=loss_type,
        confidence_source="fixed",
        fixed_confidence=0.9,
        optim="sgd",
        lr_scheduler_type="constant",
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        **settings,
    )
    pairs = tiny_runs.make_pairs()
    for number, side in enumerate(("chosen", "rejected")):  # far below the policy's, so that no baseline is 0
        pairs = pairs.add_column(f"ref_{side}_logps", [-40.0 - number - 3 * (row % 4) for row in range(len(pairs))])
    trainer = ReprDPOTrainer(tiny_runs.make_model(), config, train_dataset=pairs)
    trainer.train()
    assert trainer._kto is None or trainer._kto.z > 1
    losses = [line["loss"] for line in logged(Path(config.output_dir))] if config.process_index == 0 else []
    return losses, [parameter.detach().clone() for parameter in trainer.model.parameters()]


def train_each(folder: str) -> dict[str, Run]:
    return {loss_type: train(folder, loss_type, 2, 2, **SPLIT) for loss_type in LOSSES}


def assert_same(found: Run, wanted: Run) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=1e-4, abs=1e-5)
    for value, other in zip(found[1], wanted[1], strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=2e-5)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_forwards_and_micro_batches(tmp_path: Path, loss_type: str) -> None:
    whole = train(str(tmp_path / "whole"), loss_type, 8, packing="padded")
    assert len(whole[0]) == 4
    assert len(set(whole[0])) == 4
    assert_same(train(str(tmp_path / "split"), loss_type, 2, 4, **SPLIT), whole)


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """Their tokens are uneven in every batch."""
    first, second = distributed.run(train_each, str(tmp_path / "two"))
    for loss_type in LOSSES:
        whole = train(str(tmp_path / "whole"), loss_type, 8, packing="padded")
        assert_same(first[loss_type], whole)
        for value, other in zip(first[loss_type][1], second[loss_type][1], strict=True):
            assert torch.equal(value, other)
