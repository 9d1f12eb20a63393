"""Which rows make a batch, on which process and in how many forwards: seeded, balanced, within a token budget.

A batch of ``batch_size`` rows a process is drawn at random over all processes, then dealt out by length: every process
gets as many rows as any other and nearly as many tokens. With a token budget each share is split into forwards of rows
of like length, as many on every process, so that collectives inside a forward meet. How a batch was dealt and split
does not change which rows it holds.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler

from reprdpo.errors import UserError

_MEGABATCH = 50
_COLUMNS = (("chosen_input_ids", "rejected_input_ids"), ("input_ids",))

Forwards = list[list[int]]
Ints = np.ndarray[Any, np.dtype[np.int64]]


class RowLengths(NamedTuple):
    """The longest sequence of each row, in tokens, and how many sequences a row has."""

    tokens: Ints
    sequences: int


class BalancedBatchSampler(Sampler[Forwards]):
    """For each batch, this process's rows: a list of forwards, each a list of row indices, the longest rows first.

    The last batch of an epoch holds the rows that are left, and up to ``num_replicas - 1`` of the epoch's first again
    where they cannot be shared out evenly.

    Args:
        lengths: the longest sequence of each row, in tokens.
        batch_size: rows of a batch on one process.
        sequences: sequences a row brings into a forward: 2 for a pair.
        max_tokens: most tokens, padding included, in a forward; None: a batch is one forward.
        num_replicas, rank: how many processes, and which one this is.
        seed: of the order, together with the epoch; None keeps the order of the data.
        drop_last: leave out rows that do not fill a batch.
        group_by_length: batches of rows of like length, drawn from stretches of fifty batches.

    Raises:
        UserError: a row over the budget, or fewer rows than processes.
    """

    def __init__(
        self,
        lengths: Sequence[int] | Ints,
        batch_size: int,
        *,
        sequences: int = 1,
        max_tokens: int | None = None,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int | None = 0,
        drop_last: bool = False,
        group_by_length: bool = False,
    ) -> None:
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._total = batch_size * num_replicas
        if len(self._lengths) < (self._total if drop_last else num_replicas):
            raise UserError(
                f"{len(self._lengths)} rows do not make a batch for {num_replicas} processes"
                f"{f' of {batch_size} rows' if drop_last else ''}; give more data or start fewer processes"
            )
        longest = int(self._lengths.max())
        if max_tokens is not None and longest * sequences > max_tokens:
            raise UserError(
                f"max_tokens_per_device: {max_tokens} does not hold row {int(self._lengths.argmax())}, {sequences} "
                f"sequences of up to {longest} tokens; raise it to {longest * sequences} or lower max_length"
            )
        self._sequences, self._max_tokens = sequences, max_tokens
        self._num_replicas, self._rank = num_replicas, rank
        self._seed, self._drop_last, self._group_by_length = seed, drop_last, group_by_length
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self._epoch = epoch

    def __len__(self) -> int:
        batches = len(self._lengths) / self._total
        return math.floor(batches) if self._drop_last else math.ceil(batches)

    def __iter__(self) -> Iterator[Forwards]:
        order = self._order()
        for start in range(0, len(self) * self._total, self._total):
            rows = order[start : start + self._total]
            missing = -len(rows) % self._num_replicas
            yield self.shares(np.concatenate([rows, order[:missing]]))[self._rank]

    def shares(self, rows: Sequence[int] | Ints) -> list[Forwards]:
        """The forwards of every process for a batch of ``rows``, a multiple of the processes."""
        dealt = self._dealt(np.asarray(rows))
        if self._max_tokens is None:
            return [[share] for share in dealt]
        split = [self._within_budget(share) for share in dealt]
        most = max(map(len, split))
        return [self._halved(forwards, most) for forwards in split]

    def _order(self) -> Ints:
        if self._seed is None:
            return np.arange(len(self._lengths))
        generator = np.random.default_rng((self._seed, self._epoch))
        order = generator.permutation(len(self._lengths))
        if not self._group_by_length:
            return order
        stretch = _MEGABATCH * self._total
        for start in range(0, len(order), stretch):
            rows = order[start : start + stretch]
            order[start : start + stretch] = rows[np.argsort(-self._lengths[rows], kind="stable")]
        whole = len(order) // self._total * self._total
        batches = generator.permutation(order[:whole].reshape(-1, self._total), axis=0)
        return np.concatenate([batches.flatten(), order[whole:]])

    def _dealt(self, rows: Ints) -> list[list[int]]:
        """Rows by process: of each next-longest few, the longest goes to whoever has the fewest tokens."""
        rows = rows[np.argsort(-self._lengths[rows], kind="stable")]
        shares: list[list[int]] = [[] for _ in range(self._num_replicas)]
        tokens = np.zeros(self._num_replicas, dtype=np.int64)
        for group in rows.reshape(-1, self._num_replicas):
            for process, row in zip(np.argsort(tokens, kind="stable"), group, strict=True):
                shares[process].append(int(row))
                tokens[process] += self._lengths[row]
        return shares

    def _within_budget(self, share: list[int]) -> Forwards:
        assert self._max_tokens is not None
        forwards: Forwards = []
        for row in share:
            # The first row of a forward is its longest.
            if forwards and (len(forwards[-1]) + 1) * self._padded(forwards[-1]) <= self._max_tokens:
                forwards[-1].append(row)
            else:
                forwards.append([row])
        return forwards

    def _halved(self, forwards: Forwards, count: int) -> Forwards:
        """``forwards`` with the largest split in two until there are ``count``."""
        forwards = list(forwards)
        while len(forwards) < count:
            cost = [(len(rows) > 1, len(rows) * self._padded(rows)) for rows in forwards]
            place = cost.index(max(cost))
            rows = forwards[place]
            middle = (len(rows) + 1) // 2
            forwards[place : place + 1] = [rows[:middle], rows[middle:]]
        return forwards

    def _padded(self, rows: list[int]) -> int:
        """Tokens that each row of a forward takes up, padding included."""
        return self._sequences * int(self._lengths[rows[0]])


class EvaluationSampler(Sampler[list[int]]):
    """One process's batches of the data in order, as many as any other process has, no row on two of them.

    Collectives in a forward must meet, so a process that runs out of rows goes through row 0 again: in the batches from
    number ``own_batches`` on, which are not to be counted.
    """

    def __init__(self, num_rows: int, batch_size: int, *, num_replicas: int = 1, rank: int = 0) -> None:
        mine = np.arange(rank, num_rows, num_replicas)
        count = math.ceil(math.ceil(num_rows / num_replicas) / batch_size)
        split = np.array_split(mine, count) if count else []
        self._batches: list[list[int]] = [batch.tolist() or [0] for batch in split]
        self.own_batches = min(len(mine), count)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)


class EvaluationLoader(DataLoader[Any]):
    """Batches of an :class:`EvaluationSampler`; those that are not to be counted have ``"repeated": True`` in them."""

    def __init__(
        self, dataset: Dataset, sampler: EvaluationSampler, collate: Callable[[list[Any]], Any], **options: Any
    ) -> None:
        self._own_batches = sampler.own_batches
        super().__init__(dataset, batch_sampler=sampler, collate_fn=collate, **options)

    def __iter__(self) -> Any:
        for number, batch in enumerate(super().__iter__()):
            yield batch if number < self._own_batches else batch | {"repeated": True}


class BatchLoader(DataLoader[Any]):
    """Batches of a :class:`BalancedBatchSampler`: each a list of what ``collate`` makes of a forward's rows."""

    def __init__(
        self, dataset: Dataset, sampler: BalancedBatchSampler, collate: Callable[[list[Any]], Any], **options: Any
    ) -> None:
        self._sampler = sampler
        super().__init__(
            _RowsOf(dataset),
            batch_sampler=sampler,
            collate_fn=_EachForward(collate),
            **options,
        )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self._sampler.set_epoch(epoch)


def row_lengths(dataset: Any) -> RowLengths | None:
    """Of a tokenised data set; None where they cannot be told."""
    if not isinstance(dataset, Dataset):
        return None
    names = next((names for names in _COLUMNS if set(names) <= set(dataset.column_names)), None)
    if names is None:
        return None
    table = dataset.select_columns(list(names)).with_format("arrow")[:]
    lengths = [pc.list_value_length(table[name]).to_numpy() for name in names]
    return RowLengths(np.maximum.reduce(lengths).astype(np.int64), len(names))


class _RowsOf(torch.utils.data.Dataset[list[Any]]):
    """Rows by a list of indices."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, indices: list[int]) -> list[Any]:
        return list(self._dataset.__getitems__(indices))


class _EachForward:
    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, forwards: list[list[Any]]) -> list[Any]:
        return [self._collate(rows) for rows in forwards]
