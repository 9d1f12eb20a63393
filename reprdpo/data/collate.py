"""Collators: padded tensors from tokenised rows, labels shifted, the scored positions listed.

Padding is told by the attention mask alone, so the padding token may be the EOS token. Pad on the right for models
with absolute positions, which would otherwise count the padding.

Shape suffixes: S sequences (2P for P pairs: all chosen, then all rejected), T padded length, N scored positions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

IGNORE_INDEX = -100

Row = Mapping[str, Any]


@dataclass(frozen=True)
class _Padding:
    """What both collators are told."""

    pad_token_id: int
    padding_side: Literal["left", "right"] = "right"
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pad_token_id, int):
            raise TypeError(f"pad_token_id is {self.pad_token_id!r}; expected a token id (the EOS token will do)")
        if self.padding_side not in ("left", "right"):
            raise ValueError(f"padding_side is {self.padding_side!r}; expected 'left' or 'right'")
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of is {self.pad_to_multiple_of}; expected 1 or more")

    def _pad(self, sequences: Sequence[Any], starts: Sequence[int]) -> dict[str, Tensor]:
        if not sequences:
            raise ValueError("no rows to collate")
        check_starts(starts, [len(ids) for ids in sequences])
        input_ids_ST, mask_ST = pad_sequences(
            sequences, self.pad_token_id, side=self.padding_side, multiple_of=self.pad_to_multiple_of or 1
        )
        first_S1, length_S1 = mask_ST.argmax(1, keepdim=True), mask_ST.sum(1, keepdim=True)
        start_S1 = torch.tensor([[int(start)] for start in starts])
        position_T = torch.arange(mask_ST.shape[1])
        # Position t predicts token t + 1.
        scored_ST = (position_T >= first_S1 + start_S1 - 1) & (position_T < first_S1 + length_S1 - 1)
        labels_ST = input_ids_ST.roll(-1, dims=1).masked_fill_(~scored_ST, IGNORE_INDEX)
        return {
            "input_ids": input_ids_ST,
            "attention_mask": mask_ST,
            "labels": labels_ST,
            "scored_index": scored_ST.flatten().nonzero().flatten(),
            "last_token_index": (first_S1 + length_S1 - 1).flatten(),
        }


@dataclass(frozen=True)
class PreferenceCollator(_Padding):
    """Rows of :func:`~reprdpo.data.tokenize_preferences` -> a batch of P pairs, all chosen then all rejected.

    Returns input_ids, attention_mask, labels [2P, T] int64 (labels[s, t] is the token that position t predicts, -100
    where none is scored), scored_index [N] int64 (sorted flat positions s * T + t of the labels that are not -100),
    last_token_index [2P] int64, pair_id [P] int64, and where the rows have them ref_chosen_logps, ref_rejected_logps
    [P] float32.

    Raises:
        ValueError: no rows, or a response that starts at 0 or after its last token.
    """

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        batch = self._pad(
            [row[f"{name}_input_ids"] for name in ("chosen", "rejected") for row in rows],
            [row[f"{name}_response_start"] for name in ("chosen", "rejected") for row in rows],
        )
        return batch | self.pair_columns(rows)

    def pair_columns(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """What a batch holds for each of its pairs, whatever its layout."""
        columns = {"pair_id": torch.tensor([int(row["pair_id"]) for row in rows])}
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in rows[0]:
                columns[name] = torch.tensor([float(row[name]) for row in rows], dtype=torch.float32)
        return columns


@dataclass(frozen=True)
class ResponseCollator(_Padding):
    """Rows with input_ids and response_start -> a batch of S sequences, with the keys of :class:`PreferenceCollator`.

    Instead of pair_id there is row_id [S] int64, where the rows have one.

    Raises:
        ValueError: no rows, or a response that starts at 0 or after its last token.
    """

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        batch = self._pad([row["input_ids"] for row in rows], [row["response_start"] for row in rows])
        if "row_id" in rows[0]:
            batch["row_id"] = torch.tensor([int(row["row_id"]) for row in rows])
        return batch


def pad_sequences(
    sequences: Sequence[Any], pad_token_id: int, *, side: Literal["left", "right"] = "right", multiple_of: int = 1
) -> tuple[Tensor, Tensor]:
    """Token ids [S, T] of sequences of unequal length, and their attention mask (1 real, 0 padding), both int64."""
    length_S1 = torch.tensor([[len(ids)] for ids in sequences])
    padded = -(-int(length_S1.max()) // multiple_of) * multiple_of
    position_T = torch.arange(padded)
    real_ST = position_T >= padded - length_S1 if side == "left" else position_T < length_S1
    flat = torch.from_numpy(np.concatenate([np.asarray(ids, dtype=np.int64) for ids in sequences]))
    ids_ST = torch.full(real_ST.shape, pad_token_id).masked_scatter_(real_ST, flat)
    return ids_ST, real_ST.long()


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with its tensors on ``device``; what else it holds as it is."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def check_starts(starts: Sequence[int], lengths: Sequence[int]) -> None:
    """
    Raises:
        ValueError: a response start outside [1, length).
    """
    if not all(1 <= int(start) < length for start, length in zip(starts, lengths, strict=True)):
        raise ValueError("a response start is outside [1, length): a response needs a context and a token")


def length_grouped_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of like length, the longest first so that a batch too large fails at once; deterministic.

    Raises:
        ValueError: a batch size under 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected 1 or more")
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
