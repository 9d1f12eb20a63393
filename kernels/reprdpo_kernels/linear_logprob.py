"""What rides on rows of the lm_head's two gradient products: the scale of each row, gathered or scattered as it goes.

With the residual G of :mod:`reprdpo_kernels.logprob`, ``dH = a * (G W)``, ``dW = G^T (a * H)`` and ``db = G^T a``.
Shape suffixes: N tokens, n scored rows, D hidden size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from reprdpo_kernels.common import check_rows, dense

_SCALE_BLOCK = 256
_ROW_BLOCK = 4096


# Tiles begin at any position: how index is aligned is not asked, so that no tile needs a kernel of its own.
@triton.jit(
    do_not_specialize=["rows", "stats_stride", "tokens", "sequences", "ignore_index"],
    do_not_specialize_on_alignment=["index_ptr"],
)
def _row_scales_kernel(
    grad_logp_ptr, index_ptr, labels_ptr, stats_ptr, ids_ptr, out_ptr, rows, stats_stride, tokens, sequences, factor,
    ignore_index,
    INDEX: tl.constexpr, SEQUENCES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``a = c S_-y / S factor``: a few bytes a row."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    position = row.to(tl.int64)
    if INDEX:
        position = tl.load(index_ptr + row, mask=inside, other=0)
    known = inside & (position >= 0) & (position < tokens)
    label = tl.load(labels_ptr + position, mask=known, other=0).to(tl.int64)
    if SEQUENCES:
        sequence = tl.load(ids_ptr + position, mask=known, other=0).to(tl.int64)
        inside_any = known & (sequence >= 0) & (sequence < sequences)
        c = tl.load(grad_logp_ptr + sequence, mask=inside_any, other=0.0).to(tl.float32)
        c = tl.where(known, c, float("nan"))
    else:
        c = tl.load(grad_logp_ptr + position, mask=known, other=float("nan")).to(tl.float32)
    sum_other = tl.load(stats_ptr + stats_stride + row, mask=inside, other=0.0)
    sum_all = tl.load(stats_ptr + 2 * stats_stride + row, mask=inside, other=1.0)
    scale = c * (sum_other / sum_all) * factor
    tl.store(out_ptr + row, tl.where(known & (label == ignore_index), 0.0, scale), mask=inside)


@triton.jit(do_not_specialize=["chunks", "tokens"], do_not_specialize_on_alignment=["index_ptr"])
def _scale_rows_kernel(
    rows_ptr, index_ptr, scale_ptr, power_ptr, out_ptr, width, chunks, tokens, rows_stride, out_stride,
    GATHER: tl.constexpr, SCATTER: tl.constexpr, POWER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A chunk of ``out = a * rows``, the row read or written at its position among the tokens; 0 where a is 0.

    Layout: a row's columns lie side by side. Bytes an element: one read and one written in their dtypes.
    """
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64)
    cols = (program % chunks) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(scale_ptr + row)
    if POWER:
        scale *= tl.load(power_ptr)
    source = row
    target = row
    readable = width
    writable = width
    if GATHER or SCATTER:
        position = tl.load(index_ptr + row)
        known = (position >= 0) & (position < tokens)
        if GATHER:
            source = position
            readable = tl.where(known, width, 0)
        if SCATTER:
            target = position
            writable = tl.where(known, width, 0)
    x = tl.load(rows_ptr + source * rows_stride + cols, mask=cols < readable, other=float("nan")).to(tl.float32)
    scaled = tl.where(scale == 0.0, 0.0, x * scale)
    tl.store(out_ptr + target * out_stride + cols, scaled.to(out_ptr.dtype.element_ty), mask=cols < writable)


def row_scales(
    grad_logp_N: Tensor,
    index_n: Tensor | None,
    labels_N: Tensor,
    row_stats_3n: Tensor,
    factor: float,
    ignore_index: int = -100,
    sequence_ids_N: Tensor | None = None,
) -> Tensor:
    """``a = c S_-y / S * factor`` [n] float32 of the rows at ``index`` (None: all): 0 where ignored, NaN as S is.

    ``factor`` is logit_scale / temperature, over 4096 for a float16 residual. With ``sequence_ids`` the gradient is one
    a sequence [S], which all its tokens have; tokens of an id outside [0, S) have 0.
    """
    rows = row_stats_3n.shape[1]
    scale_n = grad_logp_N.new_empty(rows, dtype=torch.float32)
    if rows:
        stats = row_stats_3n if row_stats_3n.stride(1) == 1 else row_stats_3n.contiguous()
        with torch.cuda.device_of(grad_logp_N):
            _row_scales_kernel[(triton.cdiv(rows, _SCALE_BLOCK),)](
                *dense(grad_logp_N, index_n, labels_N), stats, *dense(sequence_ids_N), scale_n, rows, stats.stride(0),
                labels_N.shape[0], grad_logp_N.shape[0], factor, ignore_index,
                INDEX=index_n is not None, SEQUENCES=sequence_ids_N is not None, BLOCK=_SCALE_BLOCK, num_warps=4,
                enable_fp_fusion=True,
            )  # fmt: skip
    return scale_n


def scale_hidden(
    hidden_ND: Tensor,
    index_n: Tensor | None,
    scale_n: Tensor,
    out_dtype: torch.dtype,
    *,
    power: Tensor | None = None,
) -> Tensor:
    """``a * H[index]`` [n, D] in one pass, the other operand of dW; a row whose a is 0 is 0, whatever it holds.

    ``power`` (a float32 power of two on the device) multiplies all rows, for a dtype of few exponents.
    """
    out_nD = hidden_ND.new_empty(scale_n.shape[0], hidden_ND.shape[1], dtype=out_dtype)
    _scale_rows(hidden_ND, index_n, scale_n, power, out_nD, hidden_ND.shape[0], gather=index_n is not None)
    return out_nD


def scatter_hidden_grad(product_nD: Tensor, index_n: Tensor | None, scale_n: Tensor, out_ND: Tensor) -> Tensor:
    """``out[index] = a * product``, rounded once to the dtype of ``out`` [N, D], whose other rows stay."""
    _scale_rows(product_nD, index_n, scale_n, None, out_ND, out_ND.shape[0], scatter=index_n is not None)
    return out_ND


def _scale_rows(
    rows_nD: Tensor,
    index_n: Tensor | None,
    scale_n: Tensor,
    power: Tensor | None,
    out_nD: Tensor,
    tokens: int,
    *,
    gather: bool = False,
    scatter: bool = False,
) -> None:
    width = rows_nD.shape[1]
    if scale_n.shape[0] == 0 or width == 0:
        return
    check_rows(rows=rows_nD, out=out_nD)
    block = min(_ROW_BLOCK, max(128, triton.next_power_of_2(width)))
    chunks = triton.cdiv(width, block)
    with torch.cuda.device_of(rows_nD):
        _scale_rows_kernel[(scale_n.shape[0] * chunks,)](
            rows_nD, *dense(index_n, scale_n), power, out_nD,
            width, chunks, tokens, rows_nD.stride(0), out_nD.stride(0),
            GATHER=gather, SCATTER=scatter, POWER=power is not None, BLOCK=block, num_warps=max(1, block // 1024),
            enable_fp_fusion=True,
        )  # fmt: skip
