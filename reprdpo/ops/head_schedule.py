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
    default_tile_bytes,
    empty_residual,
    exact_matmuls,
    hidden_product,
    scaled_rows,
    tile_cost,
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
    least = cost.logits + cost.work + (cost.residual if any_grad else 0) + cost.upcast
    if budget < least:
        raise ValueError(
            f"max_tile_bytes = {budget} is too small for one row of logits over a vocabulary of "
            f"{head.weight.shape[0]}; give at least {least}"
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
        hidden_ND.new_zeros(3, num_rows if any(needs) and plan.keep != "pairs" else 0, dtype=dtype),
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
    tiles = HeadTiles(kind, head, min(plan.rows, index_R.shape[0]), plan.upcast_bytes)
    kept = _Residual(kind, hidden_ND, head, num_rows) if plan.keep == "residual" else None

    # A function, so that a tile's tensors are gone before the next tile's are made.
    def run(rows: slice) -> None:
        index_n = index_R[rows]
        hidden_nD, labels_n, ignored_n = gather_rows(hidden_ND, labels_N, index_n, ignore_index)
        tile = tiles.run(
            hidden_nD,
            labels_n,
            residual=plan.keep != "nothing",
            entropy=entropy,
            stats=stats,
            out=None if kept is None else kept.room(rows),
        )
        write_tokens(out, tile, index_n, ignored_n)
        if any(needs):
            out.row_stats[:, rows] = tile.row_stats
        if kept is not None:
            kept.put(rows, tile.residual)
        if plan.keep == "rows":
            product = tile.residual, head.weight
            if gradient_mass_eps is None:
                out.hidden_rows[rows] = hidden_product(*product, plan.upcast_bytes)
            else:
                out.hidden_rows[rows] = sparse_hidden_product(kind, *product, gradient_mass_eps, plan.upcast_bytes)

    with exact_matmuls(hidden_ND.device):
        for rows in even_tiles(index_R.shape[0], plan.rows):
            run(rows)
    return out if kept is None else out._replace(residual=kept.whole())


class _Residual:
    """The residual of all rows: a single tile's own, or several in one buffer."""

    def __init__(self, kind: Backend, hidden_ND: Tensor, head: Head, num_rows: int) -> None:
        self.kind, self.like, self.shape = kind, hidden_ND, (num_rows, head.weight.shape[0])
        self.in_place = hidden_ND.dtype == reference.compute_dtype(hidden_ND)
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


def write_tokens(out: HeadForward, tile: TokenResidual, index_n: Tensor, ignored_n: Tensor) -> None:
    """A tile's numbers a token to their places, 0 where ignored."""
    for whole_N, part_n in zip(out[:4], (tile.logp, tile.entropy, tile.top1, tile.mean_logit), strict=True):
        if whole_N.shape[0] and part_n.shape[0]:
            whole_N.index_copy_(0, index_n, part_n.masked_fill(ignored_n, 0))


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Two matmuls from the residual, none from the rows, and from nothing kept three: tiles made again.

    An entropy's gradient is no multiple of the residual's row: it takes the third way.
    """
    index_R = scored_rows(labels_N, scored_index, ignore_index)
    if grad_entropy_N is not None or (residual_RV.numel() == 0 and hidden_rows_RD.numel() == 0):
        return _recompute(
            kind,
            grad_logp_N,
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
    hidden_RD, labels_R, ignored_R = gather_rows(hidden_ND, labels_N, index_R, ignore_index)
    assert grad_logp_N is not None
    scale_R = row_scale(grad_logp_N[index_R], ignored_R, labels_R, row_stats_3R[:, :row_count], head)
    plan = plan_head(kind, hidden_ND, head, row_count, needs, entropy=False, max_tile_bytes=max_tile_bytes)
    total = GradientSum(kind, hidden_ND, head, needs, single_tile=True, upcast_bytes=plan.upcast_bytes)
    with exact_matmuls(hidden_ND.device):
        if hidden_rows_RD.numel() == 0:
            total.add(residual_RV[:row_count], scale_R, hidden_RD, index_R)
        elif needs.hidden:
            total.hidden.index_copy_(0, index_R, scaled_rows(hidden_rows_RD[:row_count], scale_R, hidden_ND.dtype))
    return total.finish()


def row_scale(grad_logp_n: Tensor, ignored_n: Tensor, labels_n: Tensor, row_stats_3n: Tensor, head: Head) -> Tensor:
    """The row scales a of a tile's residual, 0 where ignored."""
    return reference.residual_scale(
        grad_logp_n.masked_fill(ignored_n, 0),
        row_stats_3n,
        labels_n,
        head.weight.shape[0],
        head.logit_scale,
        head.temperature,
    )


def _recompute(
    kind: Backend,
    grad_logp_N: Tensor | None,
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
    kind = "reference" if with_entropy else kind
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
    tiles = HeadTiles(kind, head, min(most, index_R.shape[0]), plan.upcast_bytes)
    total = GradientSum(kind, hidden_ND, head, needs, single_tile=len(pieces) == 1, upcast_bytes=plan.upcast_bytes)

    def run(rows: slice) -> None:
        index_n = index_R[rows]
        hidden_nD, labels_n, ignored_n = gather_rows(hidden_ND, labels_N, index_n, ignore_index)
        if grad_entropy_N is None:
            assert grad_logp_N is not None
            tile = tiles.run(hidden_nD, labels_n, residual=True)
            scale_n = row_scale(grad_logp_N[index_n], ignored_n, labels_n, tile.row_stats, head)
            total.add(tile.residual, scale_n, hidden_nD, index_n)
            return
        grad_nV = reference.raw_logits_gradient(
            tiles.raw_logits(hidden_nD),
            labels_n,
            *head[1:],
            row_stats_3R[:, rows],
            None if grad_logp_N is None else grad_logp_N[index_n].masked_fill_(ignored_n, 0),
            entropy_N[index_n],
            grad_entropy_N[index_n].masked_fill_(ignored_n, 0),
        )
        total.add(*_as_residual(grad_nV, hidden_ND.dtype), hidden_nD, index_n)

    with exact_matmuls(hidden_ND.device):
        for rows in pieces:
            run(rows)
    return total.finish()


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


def gather_rows(
    hidden_ND: Tensor, labels_N: Tensor, index_n: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of a tile; one whose label is ignored becomes a zero row of label 0, so that nothing in it can leak."""
    labels_n = labels_N[index_n]
    ignored_n = labels_n == ignore_index
    return hidden_ND[index_n].masked_fill_(ignored_n.unsqueeze(1), 0), labels_n.masked_fill_(ignored_n, 0), ignored_n


def even_tiles(num_rows: int, most: int) -> list[slice]:
    """Rows in the fewest tiles of at most ``most``, of about one size."""
    count = -(-num_rows // most)
    size = -(-num_rows // count) if count else 0
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)] if count else []
