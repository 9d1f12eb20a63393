"""Tiles of whole pairs: a pair's gradients are finished while its residual is alive, three matmuls at any batch size.

Shape suffixes: N tokens, R rows scored, n rows of a group or tile, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from reprdpo.ops.backend import Backend
from reprdpo.ops.head_schedule import (
    HeadForward,
    Plan,
    capturing,
    empty_forward,
    even_tiles,
    planned_rows,
    row_scale,
    scored_rows,
    write_tokens,
)
from reprdpo.ops.head_tiles import GradientSum, HeadTiles, Needs, TileRows, exact_matmuls, gather_rows, triton_kernels
from reprdpo.ops.reference import Head, TokenResidual

# Log-probs, sequences and labels [n] of the rows of some pairs, to the loss's derivatives by those log-probs [n].
Slopes = Callable[[Tensor, Tensor, Tensor, slice], Tensor]


class PairGroup(NamedTuple):
    """Some pairs: their rows, and each row's sequence, chosen ones first, counted within the group (outside: none)."""

    pairs: slice
    rows: Tensor
    sequence_ids: Tensor


def pair_forward(
    kind: Backend,
    hidden_ND: Tensor,
    head: Head,
    labels_N: Tensor,
    scored_index: Tensor | None,
    sequence_ids_N: Tensor,
    num_sequences: int,
    slopes: Slopes,
    plan: Plan,
    needs: Needs,
    *,
    ignore_index: int,
    stats: bool,
) -> tuple[HeadForward, tuple[Tensor, Tensor, Tensor]]:
    """Log-probs, and the gradients of hidden, weight and bias for an upstream gradient of 1.

    Pairs that fit a tile together cost three matmuls; one that fits none is made twice, which is four. float16
    gradients stay in float32, for a loss scale to lift them first. Where the rows of each pair lie is read on the
    host, one synchronisation; under CUDA graph capture all pairs are one group.
    """
    num_rows = planned_rows(labels_N, scored_index)
    out = empty_forward(kind, hidden_ND, head.weight.shape[0], num_rows, plan, needs, entropy=stats, stats=stats)
    index_R = scored_rows(labels_N, scored_index, ignore_index)
    groups = pair_groups(index_R, sequence_ids_N[index_R], num_sequences, plan.rows)
    pieces = [even_tiles(group.rows.shape[0], plan.rows) for group in groups]
    largest = max((rows.stop - rows.start for parts in pieces for rows in parts), default=0)
    tiles = HeadTiles(kind, head, largest, plan.upcast_bytes, ignore_index)
    total = GradientSum(
        kind,
        hidden_ND,
        head,
        needs,
        single_tile=sum(map(len, pieces)) == 1,
        upcast_bytes=plan.upcast_bytes,
        dtype=kept_dtype(hidden_ND.dtype),
    )

    # Functions, so that a tile's tensors are gone before the next tile's are made.
    def make(index_n: Tensor, *, residual: bool, outputs: bool) -> tuple[TokenResidual, TileRows]:
        rows = gather_rows(kind, hidden_ND, labels_N, index_n, ignore_index)
        with_stats = outputs and stats
        tile = tiles.run(rows, residual=residual, entropy=with_stats, stats=with_stats)
        if outputs:
            write_tokens(out, tile, rows)
        return tile, rows

    def add(tile: TokenResidual, rows: TileRows, grad_n: Tensor) -> None:
        if kind == "triton":
            factor = head.logit_scale / head.temperature
            scale_n = triton_kernels("linear_logprob").row_scales(
                grad_n, None, rows.labels, tile.row_stats, factor, ignore_index=ignore_index
            )
        else:
            scale_n = row_scale(grad_n, rows, tile.row_stats, head)
        total.add(tile.residual, scale_n, rows.positions, rows.hidden)

    def token_gradients(group: PairGroup) -> Tensor:
        return slopes(out.logp[group.rows], group.sequence_ids, labels_N[group.rows], group.pairs)

    with exact_matmuls(hidden_ND.device):
        for group, parts in zip(groups, pieces, strict=True):
            if len(parts) == 1:
                made = make(group.rows, residual=True, outputs=True)
                add(*made, token_gradients(group))
                del made
                continue
            for rows in parts:
                make(group.rows[rows], residual=False, outputs=True)
            grad_n = token_gradients(group)
            for rows in parts:
                add(*make(group.rows[rows], residual=True, outputs=False), grad_n[rows])
    return out, total.finish()


def kept_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """The dtype of gradients whose upstream gradient is yet to come, where it is not their input's."""
    return torch.float32 if dtype == torch.float16 else None


def pair_groups(index_R: Tensor, sequence_ids_R: Tensor, num_sequences: int, most: int) -> list[PairGroup]:
    """Pairs side by side as long as their rows are at most ``most``; rows of no sequence are in none."""
    pairs = num_sequences // 2
    if capturing(index_R):
        return [PairGroup(slice(0, pairs), index_R, sequence_ids_R)]
    inside_R = (sequence_ids_R >= 0) & (sequence_ids_R < num_sequences)
    index_n, sequence_ids_n = index_R[inside_R], sequence_ids_R[inside_R]
    if index_n.shape[0] == 0:
        return []
    pair_n, order_n = (sequence_ids_n % pairs).sort(stable=True)
    index_n, sequence_ids_n = index_n[order_n], sequence_ids_n[order_n]
    bounds = torch.searchsorted(pair_n, torch.arange(pairs + 1, device=pair_n.device)).tolist()
    groups, start = [], 0
    while start < pairs:
        stop = start + 1
        while stop < pairs and bounds[stop + 1] - bounds[start] <= most:
            stop += 1
        rows = slice(bounds[start], bounds[stop])
        # chosen p is (p - start)-th, rejected P + p comes after the group's chosen ones
        within_n = sequence_ids_n[rows] - start
        within_n = torch.where(within_n < stop - start, within_n, within_n - pairs + (stop - start))
        groups.append(PairGroup(slice(start, stop), index_n[rows], within_n))
        start = stop
    return groups
