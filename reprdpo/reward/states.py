"""Pooled hidden states of tokenised rows: one inference pass over a data set.

Shapes: n rows, B sequences of a batch, T padded length, L decoder layers, D hidden size.
"""

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm import tqdm

from reprdpo import costs
from reprdpo.data import length_grouped_batches, pad_sequences
from reprdpo.errors import UserError
from reprdpo.models import decoder, evaluating, forward_flop
from reprdpo.reward.taps import Pool, PooledStateTap


def pool_states(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    pool: Pool = "last",
    pooled_mask: Tensor | None = None,
) -> Tensor:
    """The pooled states [B, L, D] of one padded batch [B, T], by a forward without gradient.

    Padding may be on either side; positions are counted from each row's first real token. ``pooled_mask`` [B, T] names
    the positions to pool, by default every real one.
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    padded_left = not bool(attention_mask[:, 0].all())
    if padded_left and "position_ids" in inspect.signature(decoder(model).forward).parameters:
        inputs["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
    pooled_mask = attention_mask if pooled_mask is None else pooled_mask
    with torch.no_grad(), PooledStateTap(model, pooled_mask, pool=pool) as tap:
        model(**inputs, logits_to_keep=1, use_cache=False)
    costs.count(forward_flop(model, input_ids.numel()))
    return tap.pooled


def extract_states(
    model: nn.Module,
    rows: Dataset | Sequence[dict[str, Any]],
    *,
    pad_token_id: int,
    batch_size: int = 32,
    pool: Pool = "last",
    response_only: bool = False,
    padding_side: Literal["left", "right"] = "right",
    progress: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The pooled states of every row, in the rows' order.

    The model runs in evaluation mode, in batches of like length, and is left in the mode it was in.

    Args:
        model: a causal LM of transformers, on the device to run on.
        rows: with ``input_ids``, lists of token ids, and for ``response_only`` with ``response_start``.
        pad_token_id: what fills the batches; never read.
        batch_size: sequences a forward.
        pool: "last" (non-padding token) or "mean" (over them).
        response_only: pool over the response's tokens alone, which the mean can tell.
        padding_side: where the batches are filled.
        progress: whether to show a bar.
        dtype: of the result.

    Returns:
        [n, L, D] on the CPU.

    Raises:
        UserError: no rows, no ``input_ids``, or a row without tokens.
    """
    sequences = _column(rows, "input_ids")
    starts = [int(row["response_start"]) for row in rows] if response_only else [0] * len(sequences)
    device = next(model.parameters()).device
    states: Tensor | None = None
    with (
        evaluating(model),
        tqdm(total=len(sequences), desc="hidden states", unit="row", disable=not progress, delay=2) as bar,
    ):
        for batch in length_grouped_batches([len(ids) for ids in sequences], batch_size):
            ids_BT, mask_BT = pad_sequences([sequences[i] for i in batch], pad_token_id, side=padding_side)
            start_B1 = torch.tensor([[starts[i]] for i in batch])
            pooled_mask_BT = mask_BT * (mask_BT.cumsum(1) > start_B1)
            pooled_BLD = pool_states(
                model, ids_BT.to(device), mask_BT.to(device), pool=pool, pooled_mask=pooled_mask_BT.to(device)
            )
            if states is None:
                states = torch.empty(len(sequences), *pooled_BLD.shape[1:], dtype=dtype)
            states[torch.tensor(batch)] = pooled_BLD.to("cpu", dtype)
            bar.update(len(batch))
    assert states is not None
    return states


def extract_pair_states(
    model: nn.Module, tokenized_preferences: Dataset | Sequence[dict[str, Any]], **options: Any
) -> tuple[Tensor, Tensor]:
    """The pooled states of both responses of every pair, ``(chosen [P, L, D], rejected [P, L, D])``.

    Args:
        model: as of :func:`extract_states`.
        tokenized_preferences: as :func:`~reprdpo.data.tokenize_preferences` gives them.
        options: the keyword arguments of :func:`extract_states`.

    Raises:
        UserError: as :func:`extract_states`.
    """
    both = [
        {"input_ids": ids}
        for name in ("chosen", "rejected")
        for ids in _column(tokenized_preferences, f"{name}_input_ids")
    ]
    if options.get("response_only"):
        rows = [(row, name) for name in ("chosen", "rejected") for row in tokenized_preferences]
        both = [
            {**item, "response_start": row[f"{name}_response_start"]}
            for item, (row, name) in zip(both, rows, strict=True)
        ]
    chosen, rejected = extract_states(model, both, **options).chunk(2)
    return chosen, rejected


def _column(rows: Dataset | Sequence[dict[str, Any]], name: str) -> list[list[int]]:
    if not len(rows):
        raise UserError("no rows to read hidden states from")
    if name not in (rows.column_names if isinstance(rows, Dataset) else rows[0]):
        raise UserError(f"rows have no column {name}; tokenise them first")
    sequences = list(rows[name]) if isinstance(rows, Dataset) else [row[name] for row in rows]
    if empty := [i for i, tokens in enumerate(sequences) if not len(tokens)]:
        raise UserError(f"row {empty[0]}: {name} is empty; every row needs a token to read the state of")
    return sequences
