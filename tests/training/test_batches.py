"""Balanced batches: what they hold, how even they are, and that splitting them changes no training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from test_trainer import logged, parameters, untied

from reprdpo.errors import UserError
from reprdpo.training import ReprDPOTrainer
from reprdpo.training.batches import BalancedBatchSampler, EvaluationLoader, EvaluationSampler, RowLengths, row_lengths

Make = Callable[..., Any]

# Long-tailed, as responses are; 997 is prime, so that no batch size divides it.
LENGTHS = np.random.default_rng(0).lognormal(5, 0.8, 997).astype(int) + 2


def epoch_of(number: int, **settings: Any) -> list[list[list[list[int]]]]:
    """For each batch and process, its forwards."""
    samplers = [BalancedBatchSampler(LENGTHS, rank=rank, **settings) for rank in range(settings["num_replicas"])]
    for sampler in samplers:
        sampler.set_epoch(number)
    return [list(shares) for shares in zip(*samplers, strict=True)]


def flat(nested: Any) -> list[int]:
    return [nested] if isinstance(nested, int) else [row for part in nested for row in flat(part)]


@pytest.mark.parametrize("replicas", [1, 2, 3, 8])
@pytest.mark.parametrize("grouped", [False, True])
def test_every_process_gets_as_many_rows_forwards_and_nearly_tokens(replicas: int, grouped: bool) -> None:
    settings = {"batch_size": 16, "num_replicas": replicas, "max_tokens": 4096, "sequences": 2}
    batches = epoch_of(3, group_by_length=grouped, **settings)
    assert len(batches) == len(BalancedBatchSampler(LENGTHS, **settings))
    for shares in batches:
        assert len({len(flat(share)) for share in shares}) == 1
        assert len({len(share) for share in shares}) == 1
        assert all(share for share in flat_forwards(shares))
        tokens = [LENGTHS[flat(share)].sum() for share in shares]
        assert max(tokens) - min(tokens) <= LENGTHS[flat(shares)].max()
    for forward in flat_forwards(batches):
        assert len(forward) * 2 * LENGTHS[forward].max() <= 4096
    rows = flat(batches)
    assert set(rows) == set(range(997))
    assert len(rows) < 997 + replicas


def flat_forwards(nested: Any) -> list[list[int]]:
    return [nested] if isinstance(nested[0], int) else [forward for part in nested for forward in flat_forwards(part)]


def test_the_rows_of_a_batch_hang_on_the_seed_and_the_epoch_alone() -> None:
    def rows(epoch: int, **settings: Any) -> list[list[int]]:
        return [sorted(flat(shares)) for shares in epoch_of(epoch, **settings)][:-1]

    one = rows(0, batch_size=8, num_replicas=1, seed=5)
    assert rows(0, batch_size=4, num_replicas=2, seed=5, max_tokens=9000) == one
    assert rows(1, batch_size=8, num_replicas=1, seed=5) != one
    assert rows(0, batch_size=8, num_replicas=1, seed=6) != one


def test_like_lengths_together_pad_less() -> None:
    def padding(**settings: Any) -> float:
        forwards = flat_forwards(epoch_of(0, batch_size=8, num_replicas=1, **settings))
        return sum(len(forward) * LENGTHS[forward].max() for forward in forwards) / LENGTHS.sum()

    assert padding(group_by_length=True) < 1.1 < 1.2 < padding(max_tokens=2000) < 1.8 < padding()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"max_tokens": 10}, "max_tokens_per_device: 10 does not hold row 1, 2 sequences of up to 7 tokens"),
        ({"num_replicas": 4}, "3 rows do not make a batch for 4 processes"),
        ({"drop_last": True}, "3 rows do not make a batch for 1 processes of 4 rows"),
    ],
)
def test_what_cannot_be_shared_out_is_told(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        BalancedBatchSampler([3, 7, 5], 4, sequences=2, **settings)


def test_lengths_of_selected_rows() -> None:
    rows = {"chosen_input_ids": [[1], [1, 2, 3], [1]], "rejected_input_ids": [[1, 2], [1], [1]]}
    lengths, sequences = row_lengths(Dataset.from_dict(rows).select([1, 0]))
    assert lengths.tolist() == [3, 2]
    assert sequences == 2
    assert row_lengths(Dataset.from_dict({"other": [1]})) is None


def test_training_reads_its_lengths_once(
    make_model: Make, make_config: Make, pairs: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Dataset] = []

    def counted(dataset: Dataset) -> RowLengths | None:
        read.append(dataset)
        return row_lengths(dataset)

    for module in ("base", "trainer", "reference"):
        monkeypatch.setattr(f"reprdpo.training.{module}.row_lengths", counted)
    config = make_config(confidence_source="fixed", max_tokens_per_device=34)
    trainer = ReprDPOTrainer(make_model(), config, train_dataset=pairs)
    rows = sum(len(forward["pair_id"]) for batch in trainer.get_train_dataloader() for forward in batch)
    assert (rows, len(read)) == (len(pairs), 1)
    trainer.train_dataset = trainer.train_dataset.select(range(5))
    rows = sum(len(forward["pair_id"]) for batch in trainer.get_train_dataloader() for forward in batch)
    assert (rows, len(read)) == (5, 2), "another data set has lengths of its own"


def test_a_token_budget_changes_no_training(
    make_model: Make, make_reward: Make, make_config: Make, pairs: Dataset, tmp_path: Path
) -> None:
    """Fourteen pairs in batches of 4: split unevenly, accumulated, and with a last batch of two."""
    ends = []
    whole = {"per_device_train_batch_size": 8}
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_tokens_per_device": 34}
    for name, settings in (("whole", whole), ("split", split)):
        reward = make_reward()
        config = make_config(output_dir=str(tmp_path / name), max_steps=4, optim="sgd", **settings)
        trainer = ReprDPOTrainer(make_model(), config, train_dataset=pairs, reward=reward)
        forwards = [len(batch) for batch in trainer.get_train_dataloader()]
        assert (max(forwards) > 1) == (name == "split")
        trainer.train()
        ends.append((parameters(trainer.model) + parameters(reward), logged(config.output_dir)))
    for one, other in zip(ends[0][0], ends[1][0], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    for one, other in zip(untied(ends[0][1]), untied(ends[1][1]), strict=True):
        assert other == pytest.approx(one, abs=1e-4)


def test_the_order_of_the_data_hangs_on_the_runs_seed(make_model: Make, make_config: Make, pairs: Dataset) -> None:
    def order(**seeds: int) -> list[int]:
        config = make_config(confidence_source="fixed", **seeds)
        loader = ReprDPOTrainer(make_model(), config, train_dataset=pairs).get_train_dataloader()
        return [pair for (batch,) in loader for pair in batch["pair_id"].tolist()]

    one = order(seed=1)
    assert order(seed=1) == one == order(seed=2, data_seed=1)
    assert len({tuple(each) for each in (one, order(seed=2), order(seed=1, data_seed=3))}) == 3


@pytest.mark.parametrize("replicas", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_evaluation_counts_every_row_once(replicas: int, batch_size: int) -> None:
    for rows in (0, 1, 2, 3, 7, 16, 31):
        counted, lengths = [], []
        for rank in range(replicas):
            sampler = EvaluationSampler(rows, batch_size, num_replicas=replicas, rank=rank)
            data: Any = [[row] for row in range(rows)]
            loader = EvaluationLoader(data, sampler, lambda batch: {"rows": flat(batch)})
            batches = list(loader)
            assert len(batches) == len(sampler)
            assert all(1 <= len(batch["rows"]) <= batch_size for batch in batches)
            counted += [row for batch in batches if "repeated" not in batch for row in batch["rows"]]
            lengths.append(len(batches))
        assert sorted(counted) == list(range(rows))
        assert len(set(lengths)) == 1
        assert lengths[0] == -(-rows // (replicas * batch_size))
