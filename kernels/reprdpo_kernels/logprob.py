"""Log-probs of labels under logits, and the residuals and gradients that follow from them, a row a program.

Shape suffixes: n rows (tokens), V vocabulary.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from reprdpo_kernels.common import HALF_RESIDUAL_SCALE, capability, check_rows, dense, log1p

_LOG2E = tl.constexpr(1.4426950408889634)
# Below every float32 logit but -inf: a maximum that starts here never makes inf - inf.
_LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _tanh(x):
    """tanh x and 1 - tanh^2 x = 4 e / (1 + e)^2, e = exp(-2 |x|), neither of which cancels."""
    size = tl.abs(x)
    e = tl.exp2(size * (-2.0 * _LOG2E))
    inverse = 1.0 / (1.0 + e)
    s = x * x
    series = -0.33333331 + s * (0.13332924 + s * (-0.053875137 + s * (0.021116216 - s * 0.0062763891)))
    value = tl.where(size < 0.6, size + size * s * series, (1.0 - e) * inverse)
    return tl.where(x < 0.0, -value, value), 4.0 * e * inverse * inverse


@triton.jit
def _score(x, inner, outer, SOFTCAP: tl.constexpr):
    """z = inner x, or outer tanh(inner x); and the derivative of z without its constant factor."""
    if SOFTCAP:
        value, slope = _tanh(x * inner)
        z = value * outer
    else:
        z = x * inner
        slope = 1.0
    return z, slope


@triton.jit
def _load_scores(
    row_ptr, bias_ptr, cols, vocabulary, inner, outer, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
    EVICT: tl.constexpr,
):  # fmt: skip
    """Scores of some columns and their slopes."""
    mask = cols < vocabulary if MASKED else None
    x = tl.load(row_ptr + cols, mask=mask, eviction_policy=EVICT).to(tl.float32)
    if BIAS:
        x += tl.load(bias_ptr + cols, mask=mask, eviction_policy="evict_last").to(tl.float32)
    return _score(x, inner, outer, SOFTCAP)


@triton.jit
def _accumulate(
    lanes, z, cols, label, vocabulary, MASKED: tl.constexpr, ENTROPY: tl.constexpr, STATS: tl.constexpr
):  # fmt: skip
    """Add a block of scores to the lanes' running sums over the columns but the label's, each at its own maximum.

    With d = z - maximum one exponential serves both cases: ``e = exp(-|d|)`` scales the old sum down where the maximum
    rises, and is the new term where it does not.
    """
    maximum, total, weighted, before, score_sum = lanes
    inside = cols < vocabulary if MASKED else cols >= 0
    other = tl.where(inside & (cols != label), z, float("-inf"))
    d = other - maximum
    e = tl.exp2(-tl.abs(d) * _LOG2E)
    rises = d > 0.0
    if ENTROPY:
        d = tl.where(e == 0.0, 0.0, d)
        weighted = tl.where(rises, e * (weighted - d * total), weighted + e * d)
    total = tl.where(rises, total * e + 1.0, total + e)
    maximum = tl.maximum(maximum, other)
    if STATS:
        before = tl.maximum(before, tl.where(cols < label, other, float("-inf")))
        score_sum += tl.where(inside, z, 0.0)
    return maximum, total, weighted, before, score_sum


@triton.jit
def _store_residual(
    row_ptr, cols, z, slope, label, vocabulary, maximum, inverse, MASKED: tl.constexpr, RESIDUAL_SCALE: tl.constexpr
):  # fmt: skip
    share = tl.exp2((z - maximum) * _LOG2E) * inverse
    residual = tl.where(cols == label, 1.0, -share) * slope * RESIDUAL_SCALE
    mask = cols < vocabulary if MASKED else None
    tl.store(row_ptr + cols, residual.to(row_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def _token_residual_kernel(
    logits_ptr, labels_ptr, bias_ptr, residual_ptr, logp_ptr, stats_ptr, entropy_ptr, top1_ptr, mean_ptr,
    rows, vocabulary, logits_stride, residual_stride, inner, outer, ignore_index,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, IGNORE: tl.constexpr, RESIDUAL: tl.constexpr,
    RESIDUAL_SCALE: tl.constexpr, ENTROPY: tl.constexpr, STATS: tl.constexpr, HOLD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row u [V]: ``z = inner (u + b)`` or ``outer tanh(inner (u + b))``, then with y the label

    ``m = max z``, ``S_-y = sum over j != y of exp(z_j - m)``, ``S = S_-y + exp(z_y - m)``,
    ``log p = -log1p(S_-y exp(m - z_y))``, ``G_y = 1``, ``G_j = -exp(z_j - m) / S_-y``, times ``1 - tanh^2``.

    The sums are taken at the maximum over j != y, so that G keeps its precision where S_-y underflows beside p_y.

    Layout: a row's columns lie side by side in logits and residual (which may be the logits), rows at any stride.
    Bytes an element: its logit read, and the residual written; with HOLD (the row stays in registers) no more, else
    the logit is read again, from L2 as far as the row still lies there: the second pass runs backwards.
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row).to(tl.int64)
    logits_row = logits_ptr + row * logits_stride
    residual_row = residual_ptr + row * residual_stride
    if IGNORE:  # noqa: SIM102 (known when compiled, and not)
        if label == ignore_index:
            tl.store(logp_ptr + row, 0.0)
            tl.store(stats_ptr + row, 0.0)
            tl.store(stats_ptr + rows + row, 0.0)
            tl.store(stats_ptr + 2 * rows + row, 1.0)
            if ENTROPY:
                tl.store(entropy_ptr + row, 0.0)
            if STATS:
                tl.store(top1_ptr + row, 0.0)
                tl.store(mean_ptr + row, 0.0)
            if RESIDUAL:
                nothing = tl.zeros([BLOCK], residual_ptr.dtype.element_ty)
                for start in range(0, vocabulary, BLOCK):
                    cols = start + tl.arange(0, BLOCK)
                    tl.store(residual_row + cols, nothing, mask=cols < vocabulary)
            return

    valid = (label >= 0) & (label < vocabulary)
    target = tl.load(logits_row + label, mask=valid, other=0.0).to(tl.float32)
    if BIAS:
        target += tl.load(bias_ptr + label, mask=valid, other=0.0).to(tl.float32)
    target = _score(target, inner, outer, SOFTCAP)[0]
    target = tl.where(valid, target, float("-inf"))
    label = tl.where(valid, label, -1).to(tl.int32)

    cols = tl.arange(0, BLOCK)
    full = vocabulary // BLOCK
    lanes = (
        tl.full([BLOCK], _LOWEST, tl.float32),
        tl.zeros([BLOCK], tl.float32),
        tl.zeros([BLOCK], tl.float32),
        tl.full([BLOCK], float("-inf"), tl.float32),
        tl.zeros([BLOCK], tl.float32),
    )
    weighted = 0.0
    before = 0.0
    score_sum = 0.0
    if HOLD:
        z, slope = _load_scores(
            logits_row, bias_ptr, cols, vocabulary, inner, outer, BIAS, SOFTCAP, True, "evict_first"
        )
        inside = cols < vocabulary
        other = tl.where(inside & (cols != label), z, float("-inf"))
        maximum = tl.maximum(tl.max(other, axis=0), _LOWEST)
        e = tl.exp2((other - maximum) * _LOG2E)
        total = tl.sum(e, axis=0)
        if ENTROPY:
            weighted = tl.sum(tl.where(e == 0.0, 0.0, e * (other - maximum)), axis=0)
        if STATS:
            before = tl.max(tl.where(cols < label, other, float("-inf")), axis=0)
            score_sum = tl.sum(tl.where(inside, z, 0.0), axis=0)
    else:
        for i in range(full):
            here = i * BLOCK + cols
            z = _load_scores(logits_row, bias_ptr, here, vocabulary, inner, outer, BIAS, SOFTCAP, False, "evict_last")[
                0
            ]
            lanes = _accumulate(lanes, z, here, label, vocabulary, False, ENTROPY, STATS)
        if full * BLOCK < vocabulary:
            here = full * BLOCK + cols
            z = _load_scores(logits_row, bias_ptr, here, vocabulary, inner, outer, BIAS, SOFTCAP, True, "evict_last")[0]
            lanes = _accumulate(lanes, z, here, label, vocabulary, True, ENTROPY, STATS)
        lane_maximum, lane_total, lane_weighted, lane_before, lane_sum = lanes
        maximum = tl.max(lane_maximum, axis=0)
        d = tl.where(lane_total == 0.0, 0.0, lane_maximum - maximum)
        e = tl.exp2(d * _LOG2E)
        total = tl.sum(lane_total * e, axis=0)
        if ENTROPY:
            weighted = tl.sum(e * (lane_weighted + lane_total * d), axis=0)
        if STATS:
            before = tl.max(lane_before, axis=0)
            score_sum = tl.sum(lane_sum, axis=0)

    if RESIDUAL:
        inverse = tl.where(total == 0.0, 0.0, 1.0 / total)
        if HOLD:
            _store_residual(residual_row, cols, other, slope, label, vocabulary, maximum, inverse, True, RESIDUAL_SCALE)
        else:
            if full * BLOCK < vocabulary:
                here = full * BLOCK + cols
                z, slope = _load_scores(
                    logits_row, bias_ptr, here, vocabulary, inner, outer, BIAS, SOFTCAP, True, "evict_first"
                )
                _store_residual(residual_row, here, z, slope, label, vocabulary, maximum, inverse, True, RESIDUAL_SCALE)
            for i in range(full):
                here = (full - 1 - i) * BLOCK + cols
                z, slope = _load_scores(
                    logits_row, bias_ptr, here, vocabulary, inner, outer, BIAS, SOFTCAP, False, "evict_first"
                )
                _store_residual(
                    residual_row, here, z, slope, label, vocabulary, maximum, inverse, False, RESIDUAL_SCALE
                )

    gap = maximum - target
    near = -log1p(total * tl.exp2(gap * _LOG2E))
    far = -gap - tl.log(total + tl.exp2(-gap * _LOG2E))
    logp = tl.where(gap <= 0.0, near, far)
    top = tl.maximum(maximum, target)
    share = tl.exp2((maximum - top) * _LOG2E)
    target_exp = tl.exp2((target - top) * _LOG2E)
    sum_other = total * share
    sum_all = sum_other + target_exp
    if ENTROPY:
        shift = tl.where(total == 0.0, 0.0, maximum - top)
        entr = share * (weighted + total * shift) + tl.where(target_exp == 0.0, 0.0, target_exp * (target - top))
        log_all = tl.where(gap <= 0.0, log1p(sum_other), tl.log(sum_all))
        tl.store(entropy_ptr + row, log_all - entr / sum_all)
    if STATS:
        tl.store(top1_ptr + row, ((target > before) & (target >= maximum)).to(tl.float32))
        tl.store(mean_ptr + row, score_sum / vocabulary)
    tl.store(logp_ptr + row, tl.where(valid, logp, float("nan")))
    tl.store(stats_ptr + row, top)
    tl.store(stats_ptr + rows + row, sum_other)
    tl.store(stats_ptr + 2 * rows + row, tl.where(valid, sum_all, float("nan")))


@triton.jit(do_not_specialize=["rows", "chunks", "ignore_index"])
def _logits_gradient_kernel(
    logits_ptr, labels_ptr, bias_ptr, stats_ptr, grad_logp_ptr, entropy_ptr, grad_entropy_ptr, out_ptr,
    rows, vocabulary, chunks, logits_stride, out_stride, inner, outer, factor, ignore_index,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, IGNORE: tl.constexpr, LOGP: tl.constexpr, ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A chunk of one row of dU: with c and q the upstream gradients of log-prob and entropy H, p_j = exp(z_j - m) / S,

    ``dU_j = factor (1 - t_j^2) (-c p_j - q p_j (log p_j + H))``, and for the label ``c S_-y / S`` for the first term.

    Layout as in the forward; ``out`` may be the logits. Bytes an element: its logit read, its gradient written.
    """
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64)
    cols = (program % chunks) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < vocabulary
    label = tl.load(labels_ptr + row).to(tl.int64)
    out_row = out_ptr + row * out_stride
    if IGNORE:  # noqa: SIM102 (known when compiled, and not)
        if label == ignore_index:
            tl.store(out_row + cols, tl.zeros([BLOCK], out_ptr.dtype.element_ty), mask=mask)
            return
    valid = (label >= 0) & (label < vocabulary)
    top = tl.load(stats_ptr + row)
    sum_other = tl.load(stats_ptr + rows + row)
    sum_all = tl.load(stats_ptr + 2 * rows + row)
    z, slope = _load_scores(
        logits_ptr + row * logits_stride, bias_ptr, cols, vocabulary, inner, outer, BIAS, SOFTCAP, True, "evict_first"
    )
    d = z - top
    p = tl.exp2(d * _LOG2E) / sum_all
    grad = tl.zeros([BLOCK], tl.float32)
    if LOGP:
        c = tl.where(valid, tl.load(grad_logp_ptr + row).to(tl.float32), float("nan"))
        grad = tl.where(cols == label, c * (sum_other / sum_all), -c * p)
    if ENTROPY:
        q = tl.load(grad_entropy_ptr + row).to(tl.float32)
        entropy = tl.load(entropy_ptr + row)
        grad -= tl.where(p == 0.0, 0.0 * q, q * p * (d - tl.log(sum_all) + entropy))
    tl.store(out_row + cols, (grad * slope * factor).to(out_ptr.dtype.element_ty), mask=mask)


class Config(NamedTuple):
    """Longest rows (powers of two) held in registers, plain and with more to keep; block and warps of a loop."""

    hold: int
    hold_more: int
    block: int
    warps: int


# By compute capability. A held row costs 4 B read and 2 B written an element (bf16 residual); 512 threads with 64
# columns each fill the registers. A looped row is read twice: 2048 threads with 16 B each in flight keep one or two
# rows on a multiprocessor, so that of the second 4 B those come from L2 that it can hold (at V = 32000 all, in 50 MB;
# at V = 256000 the last fifth). Chosen by bytes, registers and spills, not yet by measurement on a device.
CONFIGS = {80: Config(32768, 8192, 4096, 32), 90: Config(32768, 8192, 4096, 32), 100: Config(32768, 8192, 4096, 32)}
_GRADIENT_BLOCK = 4096


class TokenResidual(NamedTuple):
    """Per row: log p, (max z, S_-y, S) [3, n], entropy, top-1 hit, mean logit, residual [n, V]; empty if not asked."""

    logp: Tensor
    row_stats: Tensor
    entropy: Tensor
    top1: Tensor
    mean_logit: Tensor
    residual: Tensor


def token_residual(
    logits_nV: Tensor,
    labels_n: Tensor,
    bias_V: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    *,
    residual_dtype: torch.dtype | None,
    entropy: bool,
    stats: bool,
    ignore_index: int | None = None,
    out: Tensor | None = None,
) -> TokenResidual:
    """One pass over raw head outputs u: ``z = softcap tanh(logit_scale (u + b) / softcap) / temperature`` and the rest.

    The residual is G with ``G_y = 1`` and ``G_j = -exp(z_j) / sum over k != y of exp(z_k)``, times ``1 - tanh^2`` of a
    softcap and, in float16, times 4096; ``c S_-y / S logit_scale / temperature G`` is then a log-prob's gradient.

    Args:
        logits_nV: ``[n, V]`` float32 (without a residual also bfloat16, float16), columns side by side.
        labels_n: ``[n]`` integers; one outside [0, V) makes log p and S NaN in its row.
        residual_dtype: None for no residual; float32 is written over the logits, unless ``out`` says where.
        ignore_index: rows with this label are not read: log p, entropy, statistics and residual are 0, S is 1.
        out: where the residual goes, ``[n, V]`` of ``residual_dtype``, columns side by side.
    """
    rows, vocabulary = logits_nV.shape
    check_rows(logits=logits_nV)
    residual_nV = logits_nV.new_empty(0)
    if residual_dtype is not None:
        if out is None:
            in_place = residual_dtype == logits_nV.dtype
            out = logits_nV if in_place else logits_nV.new_empty(rows, vocabulary, dtype=residual_dtype)
        residual_nV = out
        check_rows(out=residual_nV)
    # A tensor each: what an op returns may not share memory.
    shapes: list[Any] = [rows, (3, rows), rows if entropy else 0, rows if stats else 0, rows if stats else 0]
    per_row = [logits_nV.new_empty(shape, dtype=torch.float32) for shape in shapes]
    result = TokenResidual(per_row[0], per_row[1], per_row[2], per_row[3], per_row[4], residual_nV)
    if rows == 0:
        return result
    inner, outer, _ = _scales(logit_scale, softcap, temperature)
    more = bias_V is not None or softcap is not None or entropy or stats
    strides = (logits_nV.stride(0), residual_nV.stride(0) if residual_dtype is not None else 0)
    aligned = all(number % 16 == 0 for number in (vocabulary, *strides))
    hold, block, warps = plan(vocabulary, capability(logits_nV), more=more, aligned=aligned)
    with torch.cuda.device_of(logits_nV):
        _token_residual_kernel[(rows,)](
            logits_nV, *dense(labels_n, bias_V), residual_nV, *per_row,
            rows, vocabulary, logits_nV.stride(0), residual_nV.stride(0), inner, outer,
            0 if ignore_index is None else ignore_index,
            BIAS=bias_V is not None, SOFTCAP=softcap is not None, IGNORE=ignore_index is not None,
            RESIDUAL=residual_dtype is not None,
            RESIDUAL_SCALE=HALF_RESIDUAL_SCALE if residual_dtype == torch.float16 else 1.0,
            ENTROPY=entropy, STATS=stats, HOLD=hold, BLOCK=block, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    return result


def logits_gradient(
    logits_nV: Tensor,
    labels_n: Tensor,
    bias_V: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    row_stats_3n: Tensor,
    grad_logp_n: Tensor | None,
    *,
    entropy_n: Tensor | None = None,
    grad_entropy_n: Tensor | None = None,
    ignore_index: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Gradient of the raw head outputs from the upstream gradients of log-prob and entropy, either of them None.

    Arguments as in :func:`token_residual`, whose ``row_stats`` and ``entropy`` these are. ``out`` may be the logits; it
    decides the dtype, the logits' where it is None.
    """
    rows, vocabulary = logits_nV.shape
    grad_nV = torch.empty_like(logits_nV) if out is None else out
    check_rows(logits=logits_nV, out=grad_nV)
    if rows == 0:
        return grad_nV
    inner, outer, factor = _scales(logit_scale, softcap, temperature)
    block = min(_GRADIENT_BLOCK, max(128, triton.next_power_of_2(vocabulary)))
    chunks = triton.cdiv(vocabulary, block)
    with torch.cuda.device_of(logits_nV):
        _logits_gradient_kernel[(rows * chunks,)](
            logits_nV, *dense(labels_n, bias_V, row_stats_3n, grad_logp_n, entropy_n, grad_entropy_n), grad_nV,
            rows, vocabulary, chunks, logits_nV.stride(0), grad_nV.stride(0), inner, outer, factor,
            0 if ignore_index is None else ignore_index,
            BIAS=bias_V is not None, SOFTCAP=softcap is not None, IGNORE=ignore_index is not None,
            LOGP=grad_logp_n is not None, ENTROPY=grad_entropy_n is not None,
            BLOCK=block, num_warps=block // 512 if block > 512 else 1, enable_fp_fusion=True,
        )  # fmt: skip
    return grad_nV


def logprob_forward(
    logits_nV: Tensor, labels_n: Tensor, temperature: float = 1.0, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """log p [n], 0 where ignored, and (max z, S_-y, S) [3, n], of float32, bfloat16 or float16 logits [n, V]."""
    result = token_residual(
        logits_nV, labels_n, None, 1.0, None, temperature,
        residual_dtype=None, entropy=False, stats=False, ignore_index=ignore_index,
    )  # fmt: skip
    return result.logp, result.row_stats


def logprob_backward(
    grad_logp_n: Tensor,
    logits_nV: Tensor,
    labels_n: Tensor,
    row_stats_3n: Tensor,
    temperature: float = 1.0,
    ignore_index: int = -100,
    out: Tensor | None = None,
) -> Tensor:
    """Gradient [n, V] of the logits, 0 where ignored; ``out`` may be the logits themselves."""
    return logits_gradient(
        logits_nV, labels_n, None, 1.0, None, temperature, row_stats_3n, grad_logp_n, ignore_index=ignore_index, out=out
    )


def plan(vocabulary: int, capability: int, *, more: bool, aligned: bool) -> tuple[bool, int, int]:
    """Whether a row is held, the block, and the warps of a program.

    ``more``: it keeps more than the logits; ``aligned``: rows begin and end at multiples of 16 elements. A thread holds
    16, 32 or, for the longest plain rows, 64 columns.
    """
    config = CONFIGS[max(known for known in CONFIGS if known <= max(capability, min(CONFIGS)))]
    whole = max(128, triton.next_power_of_2(vocabulary))
    limit = config.hold_more if more else config.hold if aligned else config.hold // 2
    if whole <= limit:
        return True, whole, min(16, max(1, whole // (512 if more else 1024)))
    # Half the threads may have twice the registers, and as many rows are in flight.
    return (False, config.block // 2, config.warps // 2) if more else (False, config.block, config.warps)


def _scales(logit_scale: float, softcap: float | None, temperature: float) -> tuple[float, float, float]:
    """inner and outer of ``z = outer tanh(inner u)`` or ``inner u``, and the constant factor of dz/du."""
    factor = logit_scale / temperature
    if softcap is None:
        return factor, 1.0, factor
    return logit_scale / softcap, softcap / temperature, factor
