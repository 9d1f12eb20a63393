"""The scalar stage of a preference loss: log-probs to loss, rewards and slopes, every loss type, in one launch.

Few numbers and long chains of exponentials and logarithms: all is computed in float64 and rounded once.
Shape suffixes: N tokens, P pairs, S = 2P sequences, all chosen and then all rejected.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from reprdpo_kernels.common import dense, log1p

# The order of the weights a kernel takes.
LOSS_TYPES = ("sigmoid", "ipo", "hinge", "robust", "simpo", "orpo", "gdpo", "apo_zero", "apo_down", "sft")
# A bit each.
_SIGMOID, _IPO, _HINGE, _ROBUST, _SIMPO, _ORPO, _GDPO, _APO_ZERO, _APO_DOWN, _SFT = (
    tl.constexpr(1 << at) for at in range(10)
)
_AVERAGING = tl.constexpr(_IPO.value | _SIMPO.value | _ORPO.value | _SFT.value)
_REFERENCE_FREE = tl.constexpr(_SIMPO.value | _ORPO.value | _SFT.value)
# Probability 1 has infinite odds: it is held at 1 - eps of float32.
_HELD_LOGP = tl.constexpr(-1.1920928955078125e-07)
_PAIR_BLOCK = 32
_TOKEN_BLOCK = 512


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def _log_sigmoid(x):
    return tl.where(x > 0.0, 0.0, x) - log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _log_odds(a):
    """o(a) = a - log(1 - e^a) and its slope 1 / (1 - e^a)."""
    held = tl.where(a > _HELD_LOGP, _HELD_LOGP, a)
    other = 1.0 - tl.exp(held)
    return held - tl.log(other), tl.where(a > held, 0.0, 1.0 / other)


@triton.jit
def _terms(a, b, beta, margin, KIND: tl.constexpr):
    """l(a, b) and its slopes by a and b, as :func:`reprdpo.ops.preference_loss` states them."""
    if KIND == _IPO:
        gap = a - b - 0.5 / beta
        value = gap * gap
        by_a = 2.0 * gap
        by_b = -by_a
    elif KIND == _HINGE:
        gap = 1.0 - beta * (a - b)
        value = tl.where(gap <= 0.0, 0.0, gap)
        by_b = tl.where(gap > 0.0, beta, tl.where(gap <= 0.0, 0.0, gap))
        by_a = -by_b
    elif KIND == _ORPO:
        odds_a, slope_a = _log_odds(a)
        odds_b, slope_b = _log_odds(b)
        value = -a - beta * _log_sigmoid(odds_a - odds_b)
        slope = beta * _sigmoid(odds_b - odds_a)
        by_a = -1.0 - slope * slope_a
        by_b = slope * slope_b
    elif KIND == _APO_ZERO:
        keep_a = _sigmoid(-beta * a)
        keep_b = _sigmoid(beta * b)
        value = keep_a + keep_b
        by_a = -beta * keep_a * _sigmoid(beta * a)
        by_b = beta * keep_b * _sigmoid(-beta * b)
    elif KIND == _APO_DOWN:
        keep_a = _sigmoid(beta * a)
        gap = beta * (a - b)
        by_b = beta * _sigmoid(-gap) * _sigmoid(gap)
        value = keep_a + _sigmoid(-gap)
        by_a = beta * keep_a * _sigmoid(-beta * a) - by_b
    elif KIND == _SFT:
        value = -a
        by_a = -1.0 + 0.0 * a
        by_b = 0.0 * a
    else:
        gap = beta * (a - b)
        if KIND == _SIMPO:
            gap -= margin
        value = -_log_sigmoid(gap)
        by_b = beta * _sigmoid(-gap)
        by_a = -by_b
    return value, by_a, by_b


@triton.jit
def _times(weight, value):
    """0 where the weight is 0, an infinite flipped form included."""
    return tl.where(weight == 0.0, 0.0, weight * value)


@triton.jit
def _score(logp, ref_logp, length, KIND: tl.constexpr):
    if (_REFERENCE_FREE & KIND) == 0:
        logp = logp - ref_logp
    return _per_token(logp, length, KIND)


@triton.jit
def _per_token(value, length, KIND: tl.constexpr):
    if _AVERAGING & KIND:
        value = tl.where(length > 0.0, value / tl.where(length > 0.0, length, 1.0), 0.0)
    return value


@triton.jit
def _add(sums, chosen, rejected, gamma, beta, margin, weight, TYPES: tl.constexpr, KIND: tl.constexpr):
    """Add ``weight [gamma l(a, b) + (1 - gamma) l(b, a)]`` and its slopes by the log-probs, for a type asked for."""
    loss, by_chosen, by_rejected = sums
    if KIND & TYPES:
        chosen_logp, ref_chosen, chosen_length = chosen
        rejected_logp, ref_rejected, rejected_length = rejected
        a = _score(chosen_logp, ref_chosen, chosen_length, KIND)
        b = _score(rejected_logp, ref_rejected, rejected_length, KIND)
        if KIND == _GDPO:
            value, by_a, by_b = _terms(a, b, beta * (2.0 * gamma - 1.0), margin, KIND)
        else:
            keep = gamma
            flip = 1.0 - gamma
            if KIND == _ROBUST:
                keep = gamma / (2.0 * gamma - 1.0)
                flip = (gamma - 1.0) / (2.0 * gamma - 1.0)
            value, by_a, by_b = _terms(a, b, beta, margin, KIND)
            flipped, flipped_by_b, flipped_by_a = _terms(b, a, beta, margin, KIND)
            value = _times(keep, value) + _times(flip, flipped)
            by_a = _times(keep, by_a) + _times(flip, flipped_by_a)
            by_b = _times(keep, by_b) + _times(flip, flipped_by_b)
        loss += weight * value
        by_chosen += weight * _per_token(by_a, chosen_length, KIND)
        by_rejected += weight * _per_token(by_b, rejected_length, KIND)
    return loss, by_chosen, by_rejected


@triton.jit
def _pair_terms(
    chosen, rejected, gamma, beta, margin, w0, w1, w2, w3, w4, w5, w6, w7, w8, w9,
    TYPES: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Loss, both rewards and both slopes of a pair from its (log-prob, reference, length) of each response."""
    beta = tl.full((), beta, tl.float64)
    margin = tl.full((), margin, tl.float64)
    gamma = tl.where((gamma < 0.0) | (gamma > 1.0), float("nan"), gamma)
    zero = 0.0 * gamma
    sums = (zero, zero, zero)
    sums = _add(sums, chosen, rejected, gamma, beta, margin, w0, TYPES, _SIGMOID)
    sums = _add(sums, chosen, rejected, gamma, beta, margin, w1, TYPES, _IPO)
    sums = _add(sums, chosen, rejected, gamma, beta, margin, w2, TYPES, _HINGE)
    sums = _add(sums, chosen, rejected, gamma, beta, margin, w3, TYPES, _ROBUST)
    sums = _add(sums, chosen, rejected, gamma, beta, margin, w4, TYPES, _SIMPO)
    sums = _add(sums, chosen, rejected, gamma, beta, margin, w5, TYPES, _ORPO)
    sums = _add(sums, chosen, rejected, gamma, beta, margin, w6, TYPES, _GDPO)
    sums = _add(sums, chosen, rejected, gamma, beta, margin, w7, TYPES, _APO_ZERO)
    sums = _add(sums, chosen, rejected, gamma, beta, margin, w8, TYPES, _APO_DOWN)
    sums = _add(sums, chosen, rejected, gamma, beta, margin, w9, TYPES, _SFT)
    loss, by_chosen, by_rejected = sums
    chosen_reward = beta * _score(chosen[0], chosen[1], chosen[2], FIRST)
    rejected_reward = beta * _score(rejected[0], rejected[1], rejected[2], FIRST)
    return loss, chosen_reward, rejected_reward, by_chosen, by_rejected


@triton.jit
def _optional(ptr, at, mask, GIVEN: tl.constexpr):
    """Float64 values, 0 where there are none."""
    value = at.to(tl.float64) * 0.0
    if GIVEN:
        value = tl.load(ptr + at, mask=mask, other=0.0).to(tl.float64)
    return value


@triton.jit(do_not_specialize=["pairs"])
def _preference_loss_kernel(
    chosen_ptr, rejected_ptr, ref_chosen_ptr, ref_rejected_ptr, confidence_ptr, chosen_length_ptr, rejected_length_ptr,
    loss_ptr, chosen_reward_ptr, rejected_reward_ptr, chosen_slope_ptr, rejected_slope_ptr,
    pairs, beta, margin, w0, w1, w2, w3, w4, w5, w6, w7, w8, w9,
    REFERENCE: tl.constexpr, LENGTHS: tl.constexpr, TYPES: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of pairs."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < pairs
    chosen = (
        _optional(chosen_ptr, at, mask, True),
        _optional(ref_chosen_ptr, at, mask, REFERENCE),
        _optional(chosen_length_ptr, at, mask, LENGTHS),
    )
    rejected = (
        _optional(rejected_ptr, at, mask, True),
        _optional(ref_rejected_ptr, at, mask, REFERENCE),
        _optional(rejected_length_ptr, at, mask, LENGTHS),
    )
    gamma = _optional(confidence_ptr, at, mask, True)
    terms = _pair_terms(
        chosen, rejected, gamma, beta, margin, w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, TYPES, FIRST
    )  # fmt: skip
    tl.store(loss_ptr + at, terms[0].to(tl.float32), mask=mask)
    tl.store(chosen_reward_ptr + at, terms[1].to(tl.float32), mask=mask)
    tl.store(rejected_reward_ptr + at, terms[2].to(tl.float32), mask=mask)
    tl.store(chosen_slope_ptr + at, terms[3].to(tl.float32), mask=mask)
    tl.store(rejected_slope_ptr + at, terms[4].to(tl.float32), mask=mask)


@triton.jit(do_not_specialize=["tokens", "pairs", "ignore_index"])
def _sequence_preference_kernel(
    logp_ptr, ids_ptr, labels_ptr, stats_ptr, ref_chosen_ptr, ref_rejected_ptr, confidence_ptr,
    loss_ptr, logp_out_ptr, length_ptr, reward_ptr, slope_ptr, means_ptr, tokens, pairs, ignore_index, beta, margin,
    w0, w1, w2, w3, w4, w5, w6, w7, w8, w9,
    REFERENCE: tl.constexpr, STATS: tl.constexpr, TYPES: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One pair, from its tokens wherever they lie: a program reads all ids and labels, 20 bytes a token from L2.

    Sums are in float64, in an order that depends on shapes alone.
    """
    pair = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    chosen_sum = tl.zeros([BLOCK], tl.float64)
    rejected_sum = tl.zeros([BLOCK], tl.float64)
    chosen_count = tl.zeros([BLOCK], tl.int32)
    rejected_count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, tokens, BLOCK):
        at = start + lane
        mask = at < tokens
        ids = tl.load(ids_ptr + at, mask=mask, other=-1)
        scored = mask & (tl.load(labels_ptr + at, mask=mask, other=0) != ignore_index)
        logp = tl.load(logp_ptr + at, mask=mask, other=0.0).to(tl.float64)
        is_chosen = scored & (ids == pair)
        is_rejected = scored & (ids == pair + pairs)
        chosen_sum += tl.where(is_chosen, logp, 0.0)
        rejected_sum += tl.where(is_rejected, logp, 0.0)
        chosen_count += is_chosen.to(tl.int32)
        rejected_count += is_rejected.to(tl.int32)
    chosen_logp = tl.sum(chosen_sum, axis=0)
    rejected_logp = tl.sum(rejected_sum, axis=0)
    chosen_length = tl.sum(chosen_count, axis=0).to(tl.float64)
    rejected_length = tl.sum(rejected_count, axis=0).to(tl.float64)
    if STATS:
        for i in tl.static_range(3):
            chosen_sum = tl.zeros([BLOCK], tl.float64)
            rejected_sum = tl.zeros([BLOCK], tl.float64)
            for start in range(0, tokens, BLOCK):
                at = start + lane
                mask = at < tokens
                ids = tl.load(ids_ptr + at, mask=mask, other=-1)
                scored = mask & (tl.load(labels_ptr + at, mask=mask, other=0) != ignore_index)
                value = tl.load(stats_ptr + i * tokens + at, mask=mask, other=0.0).to(tl.float64)
                chosen_sum += tl.where(scored & (ids == pair), value, 0.0)
                rejected_sum += tl.where(scored & (ids == pair + pairs), value, 0.0)
            means_row = means_ptr + i * 2 * pairs + pair
            tl.store(means_row, _per_token(tl.sum(chosen_sum, axis=0), chosen_length, _SFT).to(tl.float32))
            mean = _per_token(tl.sum(rejected_sum, axis=0), rejected_length, _SFT)
            tl.store(means_row + pairs, mean.to(tl.float32))

    chosen = (chosen_logp, _optional(ref_chosen_ptr, pair, True, REFERENCE), chosen_length)
    rejected = (rejected_logp, _optional(ref_rejected_ptr, pair, True, REFERENCE), rejected_length)
    gamma = tl.load(confidence_ptr + pair).to(tl.float64)
    loss, chosen_reward, rejected_reward, by_chosen, by_rejected = _pair_terms(
        chosen, rejected, gamma, beta, margin, w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, TYPES, FIRST
    )
    tl.store(loss_ptr + pair, loss.to(tl.float32))
    tl.store(logp_out_ptr + pair, chosen_logp.to(tl.float32))
    tl.store(logp_out_ptr + pairs + pair, rejected_logp.to(tl.float32))
    tl.store(length_ptr + pair, chosen_length.to(tl.float32))
    tl.store(length_ptr + pairs + pair, rejected_length.to(tl.float32))
    tl.store(reward_ptr + pair, chosen_reward.to(tl.float32))
    tl.store(reward_ptr + pairs + pair, rejected_reward.to(tl.float32))
    tl.store(slope_ptr + pair, by_chosen.to(tl.float32))
    tl.store(slope_ptr + pairs + pair, by_rejected.to(tl.float32))


class PairTerms(NamedTuple):
    """Loss, rewards and the loss's derivatives by the two log-probs, each [P] float32."""

    loss: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor
    chosen_slope: Tensor
    rejected_slope: Tensor


class SequenceTerms(NamedTuple):
    """Loss [P]; log-prob, length, reward and the loss's derivative by the log-prob, each [S]; means [3, S] or empty."""

    loss: Tensor
    logp: Tensor
    length: Tensor
    reward: Tensor
    slope: Tensor
    means: Tensor


def preference_loss_forward(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None,
    ref_rejected_logp: Tensor | None,
    confidence: Tensor,
    chosen_length: Tensor | None,
    rejected_length: Tensor | None,
    *,
    beta: float,
    loss_types: Sequence[str],
    loss_weights: Sequence[float],
    simpo_gamma: float,
) -> PairTerms:
    """Everything a preference loss is, of log-probs [P] of whole responses; formulas and dtypes as the public op."""
    pairs = chosen_logp.shape[0]
    terms = PairTerms(*(chosen_logp.new_empty(pairs, dtype=torch.float32) for _ in PairTerms._fields))
    if pairs:
        types, first, weights = _encode(loss_types, loss_weights)
        tensors = (chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, confidence)
        block = min(_PAIR_BLOCK, triton.next_power_of_2(pairs))
        with torch.cuda.device_of(chosen_logp):
            _preference_loss_kernel[(triton.cdiv(pairs, block),)](
                *dense(*tensors, chosen_length, rejected_length), *terms,
                pairs, float(beta), float(simpo_gamma), *weights,
                REFERENCE=ref_chosen_logp is not None, LENGTHS=chosen_length is not None,
                TYPES=types, FIRST=first, BLOCK=block, num_warps=1, enable_fp_fusion=True,
            )  # fmt: skip
    return terms


def sequence_preference_loss_forward(
    token_logp_N: Tensor,
    sequence_ids_N: Tensor,
    labels_N: Tensor,
    ref_chosen_logp: Tensor | None,
    ref_rejected_logp: Tensor | None,
    confidence: Tensor,
    *,
    beta: float,
    loss_types: Sequence[str],
    loss_weights: Sequence[float],
    simpo_gamma: float,
    ignore_index: int = -100,
    token_stats_3N: Tensor | None = None,
) -> SequenceTerms:
    """The same from token log-probs, without sorting them: tokens of id s that are not ignored are sequence s.

    Costs P N reads of 20 bytes, from L2: for up to some 10^8 of them less than the sort it replaces.
    ``token_stats`` are averaged over each sequence's tokens, 0 where it has none.
    """
    pairs, tokens = confidence.shape[0], token_logp_N.shape[0]
    # A tensor each: what an op returns may not share memory.
    shapes: list[Any] = [pairs, *[2 * pairs] * 4, (3, 2 * pairs) if token_stats_3N is not None else 0]
    out = SequenceTerms(*(token_logp_N.new_empty(shape, dtype=torch.float32) for shape in shapes))
    if pairs:
        types, first, weights = _encode(loss_types, loss_weights)
        tensors = (
            token_logp_N, sequence_ids_N, labels_N, token_stats_3N, ref_chosen_logp, ref_rejected_logp, confidence
        )  # fmt: skip
        with torch.cuda.device_of(token_logp_N):
            _sequence_preference_kernel[(pairs,)](
                *dense(*tensors), *out,
                tokens, pairs, ignore_index, float(beta), float(simpo_gamma), *weights,
                REFERENCE=ref_chosen_logp is not None, STATS=token_stats_3N is not None,
                TYPES=types, FIRST=first, BLOCK=_TOKEN_BLOCK, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return out


def _encode(loss_types: Sequence[str], loss_weights: Sequence[float]) -> tuple[int, int, list[float]]:
    """The types' bits, the first one's, and every type's weight."""
    weights = [0.0] * len(LOSS_TYPES)
    types = 0
    for name, weight in zip(loss_types, loss_weights, strict=True):
        at = LOSS_TYPES.index(name)
        types |= 1 << at
        weights[at] += weight
    return types, 1 << LOSS_TYPES.index(loss_types[0]), weights
