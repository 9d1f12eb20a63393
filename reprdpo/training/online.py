"""Online DPO: every round, fresh pairs drawn from the current policy replace the old ones."""

import copy
import itertools
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel

from reprdpo import costs, files
from reprdpo.errors import UserError
from reprdpo.models import evaluating
from reprdpo.training.config import OnlineDPOConfig
from reprdpo.training.trainer import ReprDPOTrainer

Resample = Callable[[PreTrainedModel, int], Dataset]

_ROUNDS_FOLDER = "rounds"


class OnlineDPOTrainer(ReprDPOTrainer):
    """DPO on pairs that ``resample(policy, round)`` draws, scores and pairs at the start of every round.

    A round lasts ``resample_steps`` optimizer steps (its pairs are gone through again, reshuffled, where they do not
    last that long) or, with "epoch", until its pairs are used up. Reference log-probs of the new pairs come from the
    reference. Each round is kept in ``OUTPUT_DIR/rounds``, from where a resumed run takes it again. The draw has a
    random stream of its own, fixed by seed and round, so that neither disturbs the other.

    Args:
        resample: called with the policy in evaluation mode, under no_grad; gives preference data, raw or tokenised.
        ref_model: the reference; without it a copy is made of the policy as it is handed over, unless that is the base
            under ``use_peft``.

    Raises:
        UserError: more than one process; a round without pairs.
    """

    args: OnlineDPOConfig

    def __init__(self, model: PreTrainedModel, args: OnlineDPOConfig, *, resample: Resample, **kwargs: Any) -> None:
        if args.world_size > 1:
            raise UserError("online DPO runs in one process; start it without a launcher")
        if kwargs.get("ref_model") is None and not args.use_peft:  # under adapters the base is there still
            kwargs["ref_model"] = copy.deepcopy(model)
        super().__init__(model, args, **kwargs)
        self._resample = resample
        self._rounds = _Rounds(self._batches)
        self.train_dataset = self._rounds

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of the rounds, each made when its step is due: looking ahead would draw from an older policy."""
        return DataLoader(self._rounds, batch_size=None)

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        """All batches of the run; on resume those before the checkpoint's step are empty, to be skipped."""
        done = self.state.global_step
        if done >= self.args.max_steps:
            return
        if done == 0:
            shutil.rmtree(self._rounds_folder(), ignore_errors=True)
        steps = 0
        for number in itertools.count():
            pairs = self._round(number)
            for rows in itertools.islice(self._steps_of(len(pairs), number), self.args.max_steps - steps):
                for batch in rows:
                    yield {} if steps < done else self.data_collator([pairs[index] for index in batch])
                steps += 1
            if steps == self.args.max_steps:
                return

    def _steps_of(self, num_pairs: int, number: int) -> Iterator[list[list[int]]]:
        """For each optimizer step of a round, the indices of its micro-batches."""
        size, accumulate = self._train_batch_size, self.args.gradient_accumulation_steps
        limit = self.args.resample_steps
        steps = math.ceil(num_pairs / (size * accumulate)) if limit == "epoch" else int(limit or 1)
        batches = self._micro_batches(num_pairs, size, number)
        for _ in range(steps):
            yield list(itertools.islice(batches, accumulate))

    def _micro_batches(self, num_pairs: int, size: int, number: int) -> Iterator[list[int]]:
        """Shuffled batches without end, each pass over the pairs in an order of its own."""
        for repeat in itertools.count():
            generator = torch.Generator().manual_seed(_stream(self.args.data_seed, number, repeat))
            order = torch.randperm(num_pairs, generator=generator).tolist()
            yield from (order[start : start + size] for start in range(0, num_pairs, size))

    def _round(self, number: int) -> Dataset:
        path = self._rounds_folder() / f"round-{number:05d}.jsonl"
        if not path.exists():
            files.write_jsonl(path, self._draw(number))
        return Dataset.from_list([row for _, row in files.read_jsonl(path)])

    def _draw(self, number: int) -> Dataset:
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with evaluating(self.model), torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(_stream(self.args.seed, number))
            with costs.part("sampling"):
                drawn = self._resample(self.model, number)
            pairs = self._prepare(drawn, f"round {number}")
        if pairs is None or len(pairs) == 0:
            raise UserError(f"round {number}: resampling gave no pairs; draw more responses or lower the smallest gap")
        return pairs

    def _rounds_folder(self) -> Path:
        return Path(self.args.output_dir) / _ROUNDS_FOLDER


class _Rounds(IterableDataset[dict[str, Tensor]]):
    """Batches from a function called anew at every iteration."""

    def __init__(self, batches: Callable[[], Iterator[dict[str, Tensor]]]) -> None:
        self._make = batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self._make()


def _stream(*values: Any) -> int:
    """A seed for the random stream named by ``values``."""
    return int(files.content_hash(*values), 16) % (1 << 63)
