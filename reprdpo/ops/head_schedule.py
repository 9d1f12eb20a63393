"""The order of passes over an lm_head within a budget of bytes: what a forward keeps, what a backward makes again.

Shape suffixes: N tokens, R rows planned for (those scored), n tokens of a tile, D hidden size, V vocabulary.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from reprdpo.ops import reference
from reprdpo.ops.backend import Backend
from reprdpo.ops.head_tiles import (
    GradientSum,
    HeadTiles,
    Needs,
    TileCost,
    TileRows,
    default_tile_bytes,
    empty_residual,
    exact_matmuls,
    gather_rows,
    hidden_product,
    tile_cost,
    triton_kernels,
)
from reprdpo.ops.reference import HALF_RESIDUAL_SCALE, Head, TokenResidual
from reprdpo.ops.sparse_product import sparse_hidden_product

# Fewer rows at once than this, and reading the weight for every tile costs more than making logits twice.
_FEW_ROWS = 128


class Plan(NamedTuple):
    """What a forward keeps, rows of a tile, bytes for upcast blocks, and rows of a tile with its residual.

    keep: ``residual`` [R, V], for two matmuls in the backward whatever the gradients of the log-probs; ``rows`` [R, D],
    the unscaled gradients of hidden states, where nothing else asks; ``nothing``: no gradient is asked, or the
    residual is too large and the backward makes tiles of it again, unless a preference loss takes it by ``pairs``.
    """

    keep: Literal["nothing", "residual", "rows", "pairs"]
    rows: int
    upcast_bytes: int
    residual_rows: int


def plan_head(
    kind: Backend,
    hidden_ND: Tensor,
    head: Head,
    num_rows: int,
    needs: Needs,
    *,
    entropy: bool,
    max_tile_bytes: int | None,
) -> Plan:
    """The cheapest schedule whose logits, residuals, temporaries and upcast blocks fit the budget.

    Raises:
        ValueError: the budget holds not even one row, or one upcast row of the weight.
    """
    budget = default_tile_bytes(hidden_ND.device) if max_tile_bytes is None else max_tile_bytes
    cost = tile_cost(kind, hidden_ND, head, entropy=entropy)
    any_grad = needs.hidden or needs.weight or needs.bias
    least = needed = _one_row(cost, any_grad=any_grad)
    if kind == "native" and entropy and any_grad:  # an entropy's gradient is the reference's work
        needed = max(least, _one_row(tile_cost("reference", hidden_ND, head, entropy=True), any_grad=True))
    if budget < needed:
        raise ValueError(
            f"max_tile_bytes = {budget} is too small for one row of logits over a vocabulary of "
            f"{head.weight.shape[0]}; give at least {needed}"
        )
    upcast_bytes = 0
    if cost.upcast:
        upcast_bytes = max(cost.upcast, min(budget // 4, budget - least + cost.upcast))
        upcast_bytes = min(upcast_bytes, head.weight.shape[0] * cost.upcast)
    budget -= upcast_bytes
    plan = Plan("nothing", cost.rows(budget, residual=False), upcast_bytes, cost.rows(budget, residual=True))
    if not any_grad:
        return plan
    if not (needs.weight or needs.bias):
        return plan._replace(keep="rows", rows=plan.residual_rows)
    if (rows := _rows_beside_residual(cost, budget, num_rows)) is not None:
        return plan._replace(keep="residual", rows=rows)
    return plan


def _one_row(cost: TileCost, *, any_grad: bool) -> int:
    return cost.logits + cost.work + (cost.residual if any_grad else 0) + cost.upcast


def _rows_beside_residual(cost: TileCost, budget: int, num_rows: int) -> int | None:
    """Rows of a tile that fits beside the residual of all rows; None where it would be too few."""
    left = budget - num_rows * cost.residual
    if left < 0:
        return None
    whole = cost.rows(left, residual=False)
    if whole >= num_rows:
        return whole
    in_parts = cost.rows(left, residual=True)
    # In the compute dtype the residual lies in the logits, which then must all fit.
    return in_parts if cost.residual and in_parts >= _FEW_ROWS else None


class HeadForward(NamedTuple):
    """Per token, 0 where not scored, and for the backward by scored row; empty where not asked for or not kept."""

    logp: Tensor
    entropy: Tensor
    top1: Tensor
    mean_logit: Tensor
    row_stats: Tensor  # [3, R]: max z, S_-y, S
    residual: Tensor  # [R, V]
    hidden_rows: Tensor  # [R, D]


def empty_forward(
    kind: Backend,
    hidden_ND: Tensor,
    vocabulary: int,
    num_rows: int,
    plan: Plan,
    needs: Needs,
    *,
    entropy: bool,
    stats: bool,
) -> HeadForward:
    """The outputs of a forward by shape, those a token zero."""
    num_tokens, width = hidden_ND.shape
    dtype = reference.compute_dtype(hidden_ND)
    return HeadForward(
        hidden_ND.new_zeros(num_tokens, dtype=dtype),
        hidden_ND.new_zeros(num_tokens if entropy else 0, dtype=dtype),
        hidden_ND.new_zeros(num_tokens if stats else 0, dtype=dtype),
        hidden_ND.new_zeros(num_tokens if stats else 0, dtype=dtype),
        hidden_ND.new_empty(3, num_rows if any(needs) and plan.keep != "pairs" else 0, dtype=dtype),
        empty_residual(kind, hidden_ND, num_rows, vocabulary) if plan.keep == "residual" else hidden_ND.new_empty(0),
        hidden_ND.new_empty(num_rows, width) if plan.keep == "rows" else hidden_ND.new_empty(0),
    )


def fake_forward(
    kind: Backend,
    hidden_ND: Tensor,
    head: Head,
    labels_N: Tensor,
    scored_index: Tensor | None,
    needs: Needs,
    *,
    entropy: bool,
    stats: bool,
    max_tile_bytes: int | None,
) -> HeadForward:
    """What :func:`head_forward` returns, by shape alone."""
    num_rows = planned_rows(labels_N, scored_index)
    plan = plan_head(kind, hidden_ND, head, num_rows, needs, entropy=entropy, max_tile_bytes=max_tile_bytes)
    return empty_forward(kind, hidden_ND, head.weight.shape[0], num_rows, plan, needs, entropy=entropy, stats=stats)


def planned_rows(labels_N: Tensor, scored_index: Tensor | None) -> int:
    """How many rows at most are scored, as far as the shapes say."""
    return labels_N.shape[0] if scored_index is None else scored_index.shape[0]


def head_forward(
    kind: Backend,
    hidden_ND: Tensor,
    head: Head,
    labels_N: Tensor,
    scored_index: Tensor | None,
    needs: Needs,
    *,
    ignore_index: int,
    entropy: bool,
    stats: bool,
    max_tile_bytes: int | None,
    gradient_mass_eps: float | None = None,
) -> HeadForward:
    """One matmul over the scored rows; a second, or a sparse one, where hidden states alone ask for a gradient."""
    num_rows = planned_rows(labels_N, scored_index)
    plan = plan_head(kind, hidden_ND, head, num_rows, needs, entropy=entropy, max_tile_bytes=max_tile_bytes)
    no_residual = plan._replace(keep="nothing") if plan.keep == "residual" else plan
    out = empty_forward(
        kind, hidden_ND, head.weight.shape[0], num_rows, no_residual, needs, entropy=entropy, stats=stats
    )
    index_R = scored_rows(labels_N, scored_index, ignore_index)
    pieces = even_tiles(index_R.shape[0], plan.rows)
    tiles = HeadTiles(kind, head, min(plan.rows, index_R.shape[0]), plan.upcast_bytes, ignore_index)
    kept = _Residual(kind, hidden_ND, head, num_rows) if plan.keep == "residual" else None

    # A function, so that a tile's tensors are gone before the next tile's are made.
    def run(rows: slice) -> Tensor:
        tile_rows = gather_rows(kind, hidden_ND, labels_N, index_R[rows], ignore_index)
        tile = tiles.run(
            tile_rows,
            residual=plan.keep != "nothing",
            entropy=entropy,
            stats=stats,
            out=None if kept is None else kept.room(rows),
        )
        write_tokens(out, tile, tile_rows)
        if kept is not None:
            kept.put(rows, tile.residual)
        if plan.keep == "rows":
            product = tile.residual, head.weight
            if gradient_mass_eps is None:
                out.hidden_rows[rows] = hidden_product(kind, *product, plan.upcast_bytes)
            else:
                out.hidden_rows[rows] = sparse_hidden_product(kind, *product, gradient_mass_eps, plan.upcast_bytes)
        return tile.row_stats

    with exact_matmuls(hidden_ND.device):
        row_stats = [run(rows) for rows in pieces]
    if any(needs):
        out = out._replace(row_stats=_joined(row_stats, out.row_stats))
    return out if kept is None else out._replace(residual=kept.whole())


def _joined(parts: list[Tensor], whole_3R: Tensor) -> Tensor:
    """Row statistics of tiles side by side: a single tile's own, else in ``whole``."""
    if len(parts) == 1 and parts[0].shape == whole_3R.shape:
        return parts[0]
    if parts:
        torch.cat(parts, dim=1, out=whole_3R[:, : sum(part.shape[1] for part in parts)])
    return whole_3R


class _Residual:
    """The residual of all rows: a single tile's own, or several in one buffer."""

    def __init__(self, kind: Backend, hidden_ND: Tensor, head: Head, num_rows: int) -> None:
        self.kind, self.like, self.shape = kind, hidden_ND, (num_rows, head.weight.shape[0])
        self.in_place = kind != "native" and hidden_ND.dtype == reference.compute_dtype(hidden_ND)
        self.tensor: Tensor | None = None

    def room(self, rows: slice) -> Tensor | None:
        """Where a tile's residual may be written."""
        if not self.in_place and self.kind != "triton":
            return None
        if self.tensor is None:
            self.tensor = self._empty()
        return self.tensor[rows]

    def put(self, rows: slice, residual_nV: Tensor) -> None:
        if residual_nV.shape == self.shape:
            self.tensor = residual_nV
            return
        if self.tensor is None:
            self.tensor = self._empty()
        if residual_nV.data_ptr() != self.tensor[rows].data_ptr():
            self.tensor[rows] = residual_nV

    def whole(self) -> Tensor:
        return self._empty() if self.tensor is None else self.tensor

    def _empty(self) -> Tensor:
        return empty_residual(self.kind, self.like, *self.shape)


def write_tokens(out: HeadForward, tile: TokenResidual, rows: TileRows) -> None:
    """A tile's numbers a token to their places, 0 where ignored."""
    for whole_N, part_n in zip(out[:4], (tile.logp, tile.entropy, tile.top1, tile.mean_logit), strict=True):
        if whole_N.shape[0] and part_n.shape[0]:
            whole_N.index_copy_(
                0, rows.positions, part_n if rows.ignored is None else part_n.masked_fill(rows.ignored, 0)
            )


def head_backward(
    kind: Backend,
    grad_logp_N: Tensor | None,
    grad_entropy_N: Tensor | None,
    hidden_ND: Tensor,
    head: Head,
    labels_N: Tensor,
    scored_index: Tensor | None,
    entropy_N: Tensor,
    row_stats_3R: Tensor,
    residual_RV: Tensor,
    hidden_rows_RD: Tensor,
    needs: Needs,
    *,
    ignore_index: int,
    max_tile_bytes: int | None,
    sequence_ids_N: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Two matmuls from the residual, none from the rows, and from nothing kept three: tiles made again.

    With ``sequence_ids`` (on Triton) the log-probs' gradient is one a sequence, 0 for tokens of none. An entropy's
    gradient is no multiple of the residual's row: it takes the third way.
    """
    index_R = scored_rows(labels_N, scored_index, ignore_index)
    upstream = Upstream(kind, grad_logp_N, labels_N, sequence_ids_N, head, ignore_index)
    if grad_entropy_N is not None or (residual_RV.numel() == 0 and hidden_rows_RD.numel() == 0):
        return _recompute(
            kind,
            upstream,
            grad_entropy_N,
            hidden_ND,
            head,
            labels_N,
            index_R,
            entropy_N,
            row_stats_3R,
            needs,
            ignore_index=ignore_index,
            max_tile_bytes=max_tile_bytes,
            kept_bytes=residual_RV.nbytes,
        )
    row_count = index_R.shape[0]
    row_stats_3R = row_stats_3R[:, :row_count]
    if kind == "triton":  # whose kernels gather, and look at the labels, as they scale
        hidden_RD, scale_R = None, upstream.row_scale(index_R, None, row_stats_3R)
    else:
        rows = gather_rows(kind, hidden_ND, labels_N, index_R, ignore_index)
        hidden_RD, scale_R = rows.hidden, upstream.row_scale(index_R, rows, row_stats_3R)
    plan = plan_head(kind, hidden_ND, head, row_count, needs, entropy=False, max_tile_bytes=max_tile_bytes)
    total = GradientSum(kind, hidden_ND, head, needs, single_tile=True, upcast_bytes=plan.upcast_bytes)
    with exact_matmuls(hidden_ND.device):
        if hidden_rows_RD.numel() == 0:
            total.add(residual_RV[:row_count], scale_R, index_R, hidden_RD)
        elif needs.hidden:
            total.add_hidden(hidden_rows_RD[:row_count], scale_R, index_R)
    return total.finish()


class Upstream(NamedTuple):
    """The log-probs' gradient, by token or (on Triton, where ids are given) by sequence, and what scales rows by it."""

    kind: Backend
    grad_logp: Tensor | None
    labels: Tensor
    sequence_ids: Tensor | None
    head: Head
    ignore_index: int

    def row_scale(self, index_n: Tensor, rows: TileRows | None, row_stats_3n: Tensor) -> Tensor:
        """The row scales a of the residual of the rows at ``index``, 0 where ignored."""
        assert self.grad_logp is not None
        if self.kind == "triton":
            return triton_kernels("linear_logprob").row_scales(
                *(self.grad_logp, index_n, self.labels, row_stats_3n, self.head.logit_scale / self.head.temperature),
                ignore_index=self.ignore_index,
                sequence_ids_N=self.sequence_ids,
            )
        assert rows is not None
        return row_scale(self.grad_logp[index_n], rows, row_stats_3n, self.head)


def row_scale(grad_logp_n: Tensor, rows: TileRows, row_stats_3n: Tensor, head: Head) -> Tensor:
    """The row scales a of a tile's residual from the gradients of its own log-probs, 0 where ignored."""
    assert rows.ignored is not None
    return reference.residual_scale(
        grad_logp_n.masked_fill(rows.ignored, 0),
        row_stats_3n,
        rows.labels,
        head.weight.shape[0],
        head.logit_scale,
        head.temperature,
    )


def _recompute(
    kind: Backend,
    upstream: Upstream,
    grad_entropy_N: Tensor | None,
    hidden_ND: Tensor,
    head: Head,
    labels_N: Tensor,
    index_R: Tensor,
    entropy_N: Tensor,
    row_stats_3R: Tensor,
    needs: Needs,
    *,
    ignore_index: int,
    max_tile_bytes: int | None,
    kept_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits again, tile by tile, and a matmul for each of hidden and weight that asks."""
    with_entropy = grad_entropy_N is not None
    if with_entropy and kind == "native":
        kind = "reference"
    plan = plan_head(
        kind, hidden_ND, head, index_R.shape[0], needs, entropy=with_entropy, max_tile_bytes=max_tile_bytes
    )
    most = plan.residual_rows
    if with_entropy:
        budget = default_tile_bytes(hidden_ND.device) if max_tile_bytes is None else max_tile_bytes
        cost = tile_cost(kind, hidden_ND, head, entropy=True)
        row_bytes = cost.logits + cost.residual + cost.work
        most = max(1, (budget - kept_bytes - plan.upcast_bytes) // row_bytes)
    pieces = even_tiles(index_R.shape[0], most)
    tiles = HeadTiles(kind, head, min(most, index_R.shape[0]), plan.upcast_bytes, ignore_index)
    total = GradientSum(kind, hidden_ND, head, needs, single_tile=len(pieces) == 1, upcast_bytes=plan.upcast_bytes)

    def run(rows: slice) -> None:
        tile_rows = gather_rows(kind, hidden_ND, labels_N, index_R[rows], ignore_index)
        if grad_entropy_N is None:
            tile = tiles.run(tile_rows, residual=True)
            scale_n = upstream.row_scale(tile_rows.positions, tile_rows, tile.row_stats)
            total.add(tile.residual, scale_n, tile_rows.positions, tile_rows.hidden)
            return
        given = _LogitsUpstream(
            row_stats_3R[:, rows],
            None if upstream.grad_logp is None else upstream.grad_logp[tile_rows.positions],
            entropy_N[tile_rows.positions],
            grad_entropy_N[tile_rows.positions],
        )
        gradient = _triton_logits_gradient if kind == "triton" else _reference_logits_gradient
        residual_nV, scale_n = gradient(tiles, tile_rows, given)
        total.add(residual_nV, scale_n, tile_rows.positions, tile_rows.hidden)

    with exact_matmuls(hidden_ND.device):
        for rows in pieces:
            run(rows)
    return total.finish()


class _LogitsUpstream(NamedTuple):
    """What the gradient of a tile's logits is made of, by row."""

    row_stats: Tensor
    grad_logp: Tensor | None
    entropy: Tensor
    grad_entropy: Tensor


def _reference_logits_gradient(tiles: HeadTiles, rows: TileRows, given: _LogitsUpstream) -> tuple[Tensor, Tensor]:
    assert rows.ignored is not None
    grad_nV = reference.raw_logits_gradient(
        tiles.raw_logits(rows.hidden),
        rows.labels,
        *tiles.head[1:],
        given.row_stats,
        None if given.grad_logp is None else given.grad_logp.masked_fill_(rows.ignored, 0),
        given.entropy,
        given.grad_entropy.masked_fill_(rows.ignored, 0),
    )
    return _as_residual(grad_nV, rows.hidden.dtype)


def _triton_logits_gradient(tiles: HeadTiles, rows: TileRows, given: _LogitsUpstream) -> tuple[Tensor, Tensor]:
    raw_nV, dtype = tiles.raw_logits(rows.hidden), rows.hidden.dtype
    out_nV = torch.empty_like(raw_nV, dtype=dtype) if dtype == torch.bfloat16 else raw_nV
    grad_nV = triton_kernels("logprob").logits_gradient(
        *(raw_nV, rows.labels, *tiles.head[1:], given.row_stats, given.grad_logp),
        entropy_n=given.entropy,
        grad_entropy_n=given.grad_entropy,
        ignore_index=tiles.ignore_index,
        out=out_nV,
    )
    scored_n = rows.labels != tiles.ignore_index  # an ignored row of hidden states may hold anything
    if dtype != torch.float16:
        return grad_nV, scored_n.to(raw_nV.dtype)
    residual_nV, scale_n = _as_residual(grad_nV, dtype)
    return residual_nV, scale_n * scored_n


def _as_residual(grad_nV: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A gradient of raw logits as row scales and a residual in ``dtype``; consumes it."""
    scale_n = torch.ones_like(grad_nV[:, 0])
    if dtype == torch.float16:
        largest_n = torch.maximum(grad_nV.amax(1), -grad_nV.amin(1))
        scale_n = largest_n.masked_fill(largest_n == 0, 1)
        grad_nV *= (HALF_RESIDUAL_SCALE / scale_n).unsqueeze(1)
    return grad_nV.to(dtype), scale_n


def find_scored(labels_N: Tensor, ignore_index: int) -> Tensor | None:
    """Positions of scored labels, found once for both passes; None leaves it to each pass (compiling, capturing)."""
    if torch.compiler.is_compiling() or capturing(labels_N):
        return None
    return (labels_N != ignore_index).nonzero().squeeze(1)


def scored_rows(labels_N: Tensor, scored_index: Tensor | None, ignore_index: int) -> Tensor:
    """The rows to compute: those given, else those scored, under graph capture all."""
    if scored_index is not None:
        return scored_index
    if capturing(labels_N):
        return torch.arange(labels_N.shape[0], device=labels_N.device)
    return (labels_N != ignore_index).nonzero().squeeze(1)


def capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured, which no synchronisation survives."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def even_tiles(num_rows: int, most: int) -> list[slice]:
    """Rows in the fewest tiles of at most ``most``, of about one size."""
    count = -(-num_rows // most)
    size = -(-num_rows // count) if count else 0
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)] if count else []
