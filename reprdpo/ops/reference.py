"""The oracle: every op once in plain PyTorch, in the order of its formula; bf16 and fp16 are taken up to float32."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# B sequences, T padded length, N packed tokens, L layers, D hidden size, V vocabulary, P pairs, S = 2P sequences.


class ProbeRewardGradients(NamedTuple):
    """Gradients of ``probe_reward``; None for an input that asks none."""

    hidden_states: list[Tensor] | None
    probe_weight: Tensor | None
    probe_bias: Tensor | None
    gate_weight: Tensor | None
    gate_bias: Tensor | None


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype an op computes in: float64 where an input has it, float32 otherwise."""
    doubles = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if doubles else torch.float32


def last_token_index(attention_mask_BT: Tensor) -> Tensor:
    """``index_b = max{t : mask_bt != 0}``, -1 where there is none; int64 [B]."""
    B, T = attention_mask_BT.shape
    if T == 0:
        return torch.full((B,), -1, dtype=torch.int64, device=attention_mask_BT.device)
    positions = torch.arange(T, device=attention_mask_BT.device)
    return torch.where(attention_mask_BT != 0, positions, -1).amax(dim=1)


def pool_last_token(hidden_states: Sequence[Tensor], index_B: Tensor) -> Tensor:
    """``pooled_bl = hidden_states[l][b, index_b]`` [B, L, D]; NaN where the index is out of range.

    ``hidden_states`` are L tensors [B, T, D], or [N, D] with a flat index, or one [L, B, T, D].
    """
    layers = _layers(hidden_states)
    B, D, tokens = index_B.shape[0], layers[0].shape[-1], layers[0].shape[-2]
    if tokens == 0 or B == 0:
        return layers[0].new_full((B, len(layers), D), float("nan"))
    at = _positions(layers[0], index_B)
    rows_BLD = torch.stack([layer[at] for layer in layers], dim=1)
    return torch.where(_in_range(index_B, tokens)[:, None, None], rows_BLD, float("nan"))


def pool_last_token_backward(
    grad_BLD: Tensor, index_B: Tensor, hidden_shape: Sequence[int], hidden_count: int
) -> list[Tensor]:
    """The gradient of each of the ``hidden_count`` tensors of shape ``hidden_shape``: zero but at the pooled rows."""
    grads = [grad_BLD.new_zeros(hidden_shape) for _ in range(hidden_count)]
    layers = _layers(grads)
    tokens = layers[0].shape[-2]
    if tokens == 0 or index_B.shape[0] == 0:
        return grads
    at = _positions(layers[0], index_B)
    grad_BLD = torch.where(_in_range(index_B, tokens)[:, None, None], grad_BLD, 0)
    for layer, rows_BD in zip(layers, grad_BLD.unbind(1), strict=True):
        layer.index_put_(at, rows_BD, accumulate=True)
    return grads


def probe_reward(
    pooled_BLD: Tensor,
    probe_weight_LD: Tensor,
    probe_bias_L: Tensor,
    gate_weight: Tensor | None,
    gate_bias_L: Tensor,
    gate: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``R = sum_l g_l s_l`` with ``s_l = w_l . h_l + b_l``: (reward [B], layer_scores [B, L], layer_gate [B, L]).

    softmax: ``g = softmax_l(v_l . h_l + c_l)``; static: ``g = softmax(c)``; vote: ``g = sigma(V s + c)``.
    """
    dtype = compute_dtype(pooled_BLD, probe_weight_LD)
    h_BLD, w_LD, b_L, c_L = (x.to(dtype) for x in (pooled_BLD, probe_weight_LD, probe_bias_L, gate_bias_L))
    scores_BL = (h_BLD * w_LD).sum(-1) + b_L
    if gate == "softmax":
        assert gate_weight is not None
        gate_BL = torch.softmax((h_BLD * gate_weight.to(dtype)).sum(-1) + c_L, dim=-1)
    elif gate == "static":
        gate_BL = torch.softmax(c_L, dim=-1).expand_as(scores_BL).contiguous()
    else:
        assert gate_weight is not None
        gate_BL = torch.sigmoid((scores_BL[:, None, :] * gate_weight.to(dtype)).sum(-1) + c_L)
    return (gate_BL * scores_BL).sum(-1), scores_BL, gate_BL


def probe_reward_backward(
    grad_reward_B: Tensor | None,
    grad_scores_BL: Tensor | None,
    grad_gate_BL: Tensor | None,
    pooled_BLD: Tensor | None,
    index_B: Tensor | None,
    probe_weight_LD: Tensor,
    gate_weight: Tensor | None,
    scores_BL: Tensor,
    gate_BL: Tensor,
    gate: str,
    hidden_shape: Sequence[int],
    hidden_count: int,
    hidden_dtype: torch.dtype,
    needs: Sequence[bool],
) -> ProbeRewardGradients:
    """Gradients of :func:`probe_reward` on pooled or unpooled states; rows whose index is out of range give none.

    With G = dR, A and Q the upstream gradients of scores and gate, u = G s + Q and d = G g + A:
    softmax, static: ``dz = g (u - sum_l g_l u_l)``; vote: ``dz = g (1 - g) u`` and ``d += V^T dz``;
    ``dw_l = sum_b d_l h_l``, ``db = sum_b d``, ``dv_l = sum_b dz_l h_l`` (vote ``dV = sum_b dz s^T``),
    ``dc = sum_b dz``, ``dh_l = d_l w_l + dz_l v_l``.  ``needs`` follows the fields of the result; ``pooled`` is there
    where a weight that multiplies it needs a gradient.
    """
    dtype, parameter_dtype = scores_BL.dtype, probe_weight_LD.dtype
    needs_hidden, needs_probe, needs_probe_bias, needs_gate, needs_gate_bias = needs
    zero = scores_BL.new_zeros(())
    G_B1 = zero if grad_reward_B is None else grad_reward_B[:, None]
    u_BL = G_B1 * scores_BL + (zero if grad_gate_BL is None else grad_gate_BL)
    d_BL = G_B1 * gate_BL + (zero if grad_scores_BL is None else grad_scores_BL)
    if gate == "vote":
        assert gate_weight is not None
        dz_BL = gate_BL * (1 - gate_BL) * u_BL
        d_BL = d_BL + (dz_BL[:, :, None] * gate_weight.to(dtype)).sum(1)
    else:
        dz_BL = gate_BL * (u_BL - (gate_BL * u_BL).sum(-1, keepdim=True))
    if index_B is not None:
        valid_B1 = _in_range(index_B, hidden_shape[-2])[:, None]
        d_BL, dz_BL, scores_BL = (torch.where(valid_B1, x, 0) for x in (d_BL, dz_BL, scores_BL))

    probe_grad = gate_grad = hidden_grads = None
    if pooled_BLD is not None:
        h_BLD = pooled_BLD.to(dtype)
        if index_B is not None:
            h_BLD = torch.where(valid_B1[:, :, None], h_BLD, 0)
        if needs_probe:
            probe_grad = (d_BL[:, :, None] * h_BLD).sum(0)
        if needs_gate and gate == "softmax":
            gate_grad = (dz_BL[:, :, None] * h_BLD).sum(0)
    if needs_gate and gate == "vote":
        gate_grad = (dz_BL[:, :, None] * scores_BL[:, None, :]).sum(0)
    if needs_hidden:
        rows_BLD = d_BL[:, :, None] * probe_weight_LD.to(dtype)
        if gate == "softmax":
            assert gate_weight is not None
            rows_BLD = rows_BLD + dz_BL[:, :, None] * gate_weight.to(dtype)
        rows_BLD = rows_BLD.to(hidden_dtype)
        hidden_grads = [rows_BLD]
        if index_B is not None:
            hidden_grads = pool_last_token_backward(rows_BLD, index_B, hidden_shape, hidden_count)
    return ProbeRewardGradients(
        hidden_grads,
        None if probe_grad is None else probe_grad.to(parameter_dtype),
        d_BL.sum(0).to(parameter_dtype) if needs_probe_bias else None,
        None if gate_grad is None else gate_grad.to(parameter_dtype),
        dz_BL.sum(0).to(parameter_dtype) if needs_gate_bias else None,
    )


def preference_confidence(
    chosen_reward_P: Tensor,
    rejected_reward_P: Tensor,
    alpha: float,
    squash: bool,
    floor: float | None,
    reduce: str | None,
) -> Tensor:
    """``gamma = sigma(alpha (R_c - R_r))``, of ``sigma(R)`` with squash; then ``max(gamma, floor)``; then the mean."""
    dtype = compute_dtype(chosen_reward_P, rejected_reward_P)
    chosen_P, rejected_P = chosen_reward_P.to(dtype), rejected_reward_P.to(dtype)
    if squash:
        chosen_P, rejected_P = torch.sigmoid(chosen_P), torch.sigmoid(rejected_P)
    gamma_P = torch.sigmoid(alpha * (chosen_P - rejected_P))
    if floor is not None:
        gamma_P = gamma_P.clamp(min=floor)
    if reduce == "batch":
        gamma_P = gamma_P.mean().expand_as(gamma_P).contiguous()
    return gamma_P


def _layers(hidden_states: Sequence[Tensor]) -> Sequence[Tensor]:
    return hidden_states[0].unbind(0) if hidden_states[0].dim() == 4 else hidden_states


def _positions(layer: Tensor, index_B: Tensor) -> tuple[Tensor, ...]:
    """Where the pooled rows lie in a layer; an index out of range is moved inside, its row is selected away after."""
    inside_B = index_B.clamp(0, layer.shape[-2] - 1)
    if layer.dim() == 2:
        return (inside_B,)
    return (torch.arange(index_B.shape[0], device=index_B.device), inside_B)


def _in_range(index_B: Tensor, tokens: int) -> Tensor:
    return (index_B >= 0) & (index_B < tokens)


# Log-probabilities. A tensor that a docstring calls consumed is overwritten.


class Head(NamedTuple):
    """What makes logits of hidden states: ``z = softcap * tanh(logit_scale * (h W^T + b) / softcap) / temperature``."""

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0


class TokenLogprob(NamedTuple):
    """log p of each row's label [N], entropy [N], and for the backward [3, N]: max z, and S_-y and S relative to it."""

    logp: Tensor
    row_stats: Tensor
    entropy: Tensor | None


class TokenResidual(NamedTuple):
    """What one pass over raw logits yields a row; empty where not asked for. ``row_stats`` [3, N] is max z, S_-y, S.

    top1 is 1 where the label is the argmax, else 0; mean_logit is the mean z; residual is [N, V].
    """

    logp: Tensor
    row_stats: Tensor
    entropy: Tensor
    top1: Tensor
    mean_logit: Tensor
    residual: Tensor


# float16 cannot hold a softmax's tail: its residual is kept times this power of two.
HALF_RESIDUAL_SCALE = 4096.0


def head_logits(
    raw_NV: Tensor, bias_V: Tensor | None, logit_scale: float, softcap: float | None, temperature: float
) -> Tensor:
    """``z = softcap * tanh(logit_scale * (raw + b) / softcap) / temperature``, written over ``raw = h W^T``."""
    if bias_V is not None:
        raw_NV += bias_V
    if logit_scale != 1.0:
        raw_NV *= logit_scale
    if softcap is not None:
        raw_NV.div_(softcap).tanh_().mul_(softcap)
    if temperature != 1.0:
        raw_NV /= temperature
    return raw_NV


def token_residual(
    raw_NV: Tensor,
    labels_N: Tensor,
    bias_V: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    *,
    residual_dtype: torch.dtype | None,
    entropy: bool,
    stats: bool,
) -> TokenResidual:
    """Log-prob of each label and the **residual** G, from ``raw = h W^T`` in the compute dtype, which it consumes.

    ``G_iy = 1`` and ``G_ij = -exp(z_ij - m_i) / S_-y,i`` for j != y: minus the softmax over all but the label; with a
    softcap's tanh t times ``1 - t^2``. A log-prob's upstream gradient c_i reaches the raw logits as ``a_i G_i`` with
    ``a_i = c_i (S_-y,i / S_i) logit_scale / temperature`` (:func:`residual_scale`), where S_-y / S is 1 - p_y without
    the cancellation: hence ``dH = a * (G W)``, ``dW = G^T (a * H)``, ``db = G^T a``.

    ``residual_dtype`` None makes none; the compute dtype writes it over ``raw``; float16 is times 4096.
    """
    logits_NV = head_logits(raw_NV, bias_V, logit_scale, softcap, temperature)
    nothing = logits_NV.new_empty(0)
    slope_NV = None if residual_dtype is None else _softcap_slope(logits_NV, softcap, temperature)
    top1_N = (logits_NV.argmax(1) == labels_N).to(logits_NV.dtype) if stats else nothing
    mean_logit_N = logits_NV.mean(1) if stats else nothing
    logp_N, row_stats_3N, entropy_N = token_logprob(logits_NV, labels_N, entropy=entropy)
    entropy_N = nothing if entropy_N is None else entropy_N
    if residual_dtype is None:
        return TokenResidual(logp_N, row_stats_3N, entropy_N, top1_N, mean_logit_N, nothing)
    exp_other_NV, sum_other_N = logits_NV, row_stats_3N[1]  # token_logprob leaves exp(z - m) with 0 for the label
    # Where nothing else has mass, exp_other is 0 and so is the residual, not 0 / 0.
    negative_sum_N = -sum_other_N.clamp(min=torch.finfo(sum_other_N.dtype).tiny)
    residual_NV = exp_other_NV.div_(negative_sum_N.unsqueeze(1))
    residual_NV.scatter_(1, _targets(logits_NV, labels_N)[0], 1.0)
    if slope_NV is not None:
        residual_NV *= slope_NV
    if residual_dtype == torch.float16:
        residual_NV *= HALF_RESIDUAL_SCALE
    return TokenResidual(logp_N, row_stats_3N, entropy_N, top1_N, mean_logit_N, residual_NV.to(residual_dtype))


def residual_scale(
    grad_logp_N: Tensor, row_stats_3N: Tensor, labels_N: Tensor, vocabulary: int, logit_scale: float, temperature: float
) -> Tensor:
    """``a = c (S_-y / S) logit_scale / temperature`` of :func:`token_residual`; NaN for a label outside [0, V)."""
    _, sum_other_N, sum_all_N = row_stats_3N.unbind()
    scale_N = grad_logp_N * (sum_other_N / sum_all_N) * (logit_scale / temperature)
    return scale_N.masked_fill((labels_N < 0) | (labels_N >= vocabulary), torch.nan)


def mass_threshold(residual_NV: Tensor, mass: float) -> Tensor:
    """The largest tau [N] for which the ``|G_ij| < tau`` of a row sum to at most ``mass``; a NaN is under none."""
    size_NV = residual_NV.abs().double().sort(1).values
    over_NV = size_NV.cumsum(1) > mass
    first_N1 = over_NV.int().argmax(1, keepdim=True)
    threshold_N1 = size_NV.gather(1, first_N1).masked_fill_(~over_NV.any(1, keepdim=True), torch.inf)
    return threshold_N1.squeeze(1).to(compute_dtype(residual_NV))


def token_logprob(logits_NV: Tensor, labels_N: Tensor, *, entropy: bool = False) -> TokenLogprob:
    """``log p_y = -log1p(S_-y exp(m - z_y))``, m = max z, S_-y = sum over j != y of exp(z_j - m).

    S_-y is summed and never 1 - p_y, so log p keeps its relative precision as p_y goes to 1. Far below the maximum,
    where exp(m - z_y) would overflow, ``log p_y = z_y - m - log S``. A label outside [0, V) gives NaN in its row.
    Entropy is ``log S - sum_j e_j log(e_j) / S`` with e_j = exp(z_j - m).

    Consumes the logits: leaves e_j there, and 0 for the label.
    """
    target_N1, in_range_N = _targets(logits_NV, labels_N)
    row_max_N = logits_NV.amax(1)
    gap_N = row_max_N - logits_NV.gather(1, target_N1).squeeze(1)
    exp_NV = logits_NV.sub_(row_max_N.unsqueeze(1)).exp_()
    # entr(e) = -e log e is 0 at e = 0, where e (z - m) would be 0 * -inf.
    entr_sum_N = torch.special.entr(exp_NV).sum(1) if entropy else None
    exp_NV.scatter_(1, target_N1, 0.0)
    sum_other_N = exp_NV.sum(1)
    sum_all_N = sum_other_N + torch.exp(-gap_N)
    near_N = -torch.log1p(sum_other_N * torch.exp(gap_N))
    logp_N = torch.where(gap_N < 40.0, near_N, -gap_N - torch.log(sum_all_N))
    logp_N = torch.where(in_range_N, logp_N, torch.nan)
    entropy_N = None if entr_sum_N is None else torch.log(sum_all_N) + entr_sum_N / sum_all_N
    return TokenLogprob(logp_N, torch.stack([row_max_N, sum_other_N, sum_all_N]), entropy_N)


def token_logprob_backward(
    logits_NV: Tensor,
    labels_N: Tensor,
    row_stats_3N: Tensor,
    grad_logp_N: Tensor | None,
    *,
    entropy_N: Tensor | None = None,
    grad_entropy_N: Tensor | None = None,
) -> Tensor:
    """Gradient of the logits, written over them.

    With c and q the upstream gradients of log-prob and entropy H, and e_j = exp(z_j - m):
    ``dz_j = -c e_j / S - q (e_j / S) (log e_j - log S + H)`` for j != y, and for the target the first term is
    ``c S_-y / S``, which does not cancel as p_y goes to 1 where c (1 - p_y) would.
    """
    target_N1, in_range_N = _targets(logits_NV, labels_N)
    row_max_N, sum_other_N, sum_all_N = row_stats_3N.unbind()
    grad_NV = logits_NV.sub_(row_max_N.unsqueeze(1)).exp_()
    exp_target_N = grad_NV.gather(1, target_N1).squeeze(1)
    scale_N = torch.zeros_like(sum_all_N)
    target_grad_N = torch.zeros_like(sum_all_N)
    entr_NV = None
    if grad_logp_N is not None:
        scale_N = torch.where(in_range_N, -grad_logp_N / sum_all_N, torch.nan)
        target_grad_N = -scale_N * sum_other_N
    if grad_entropy_N is not None and entropy_N is not None:
        per_sum_N = grad_entropy_N / sum_all_N
        constant_N = per_sum_N * (torch.log(sum_all_N) - entropy_N)
        target_grad_N = target_grad_N + exp_target_N * constant_N + torch.special.entr(exp_target_N) * per_sum_N
        scale_N = scale_N + constant_N
        entr_NV = torch.special.entr(grad_NV).mul_(per_sum_N.unsqueeze(1))
    grad_NV *= scale_N.unsqueeze(1)
    if entr_NV is not None:
        grad_NV += entr_NV
    return grad_NV.scatter_(1, target_N1, target_grad_N.unsqueeze(1))


def raw_logits_gradient(
    raw_NV: Tensor,
    labels_N: Tensor,
    bias_V: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    row_stats_3N: Tensor,
    grad_logp_N: Tensor | None,
    entropy_N: Tensor,
    grad_entropy_N: Tensor,
) -> Tensor:
    """``dZ (1 - t^2) logit_scale / temperature``, dZ being :func:`token_logprob_backward`'s; written over ``raw``."""
    logits_NV = head_logits(raw_NV, bias_V, logit_scale, softcap, temperature)
    slope_NV = _softcap_slope(logits_NV, softcap, temperature)
    grad_NV = token_logprob_backward(
        logits_NV, labels_N, row_stats_3N, grad_logp_N, entropy_N=entropy_N, grad_entropy_N=grad_entropy_N
    )
    if slope_NV is not None:
        grad_NV *= slope_NV
    return grad_NV if logit_scale == temperature else grad_NV.mul_(logit_scale / temperature)


def _softcap_slope(logits_NV: Tensor, softcap: float | None, temperature: float) -> Tensor | None:
    """``1 - t^2`` with t the tanh that made these logits; None without a softcap."""
    if softcap is None:
        return None
    slope_NV = logits_NV * (temperature / softcap)
    return slope_NV.square_().neg_().add_(1.0)


def _targets(logits_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    vocabulary = logits_NV.shape[1]
    in_range_N = (labels_N >= 0) & (labels_N < vocabulary)
    return labels_N.clamp(0, vocabulary - 1).unsqueeze(1), in_range_N


# Sums over sequences


class Segments(NamedTuple):
    """Tokens by sequence: ``order`` [N] makes sequences contiguous (None: they are), ``offsets`` [S + 1] is bounds."""

    order: Tensor | None
    offsets: Tensor


def segments(num_tokens: int, num_sequences: int, sequence_ids: Tensor | None, cu_seqlens: Tensor | None) -> Segments:
    """Segments of the tokens; ids outside [0, S) belong to none, boundaries outside [0, N] or falling are clamped."""
    if cu_seqlens is not None:
        return Segments(None, cu_seqlens.long().clamp(0, num_tokens).cummax(0).values)
    assert sequence_ids is not None
    sorted_ids_N, order_N = sequence_ids.long().sort(stable=True)
    bounds_S1 = torch.arange(num_sequences + 1, device=sequence_ids.device)
    return Segments(order_N, torch.searchsorted(sorted_ids_N, bounds_S1))


def sequence_sum(token_logprob_N: Tensor, layout: Segments, *, average: bool = False) -> Tensor:
    """Sum of each sequence's tokens, added in float64 in token order; its mean where ``average``, 0/0 being 0."""
    values_N = token_logprob_N.double()
    if layout.order is not None:
        values_N = values_N[layout.order]
    # unsafe=True leaves out the check of the offsets, which would synchronise; they are clamped above.
    total_S = torch.segment_reduce(values_N, "sum", offsets=layout.offsets, unsafe=True, initial=0.0)
    if average:
        total_S = divide_or_zero(total_S, layout.offsets.diff())
    return total_S.to(compute_dtype(token_logprob_N))


def sequence_sum_backward(grad_S: Tensor, layout: Segments, num_tokens: int, *, average: bool = False) -> Tensor:
    """Gradient of the tokens: their sequence's, over its length where ``average``; 0 for tokens of no sequence."""
    if average:
        grad_S = divide_or_zero(grad_S, layout.offsets.diff())
    position_N = torch.arange(num_tokens, device=grad_S.device)
    sequence_N = torch.searchsorted(layout.offsets, position_N, right=True) - 1
    padded = torch.cat([grad_S, grad_S.new_zeros(1)])  # the last stands for tokens of no sequence
    grad_N = padded[torch.where(sequence_N < 0, grad_S.shape[0], sequence_N)]
    return grad_N if layout.order is None else torch.empty_like(grad_N).index_copy_(0, layout.order, grad_N)


def divide_or_zero(value: Tensor, count: Tensor) -> Tensor:
    """``value / count``, 0 where the count is 0."""
    return torch.where(count > 0, value / count.clamp(min=1), 0.0)


# Preference losses

# value, d value / d chosen score, d value / d rejected score
_Terms = tuple[Tensor, Tensor, Tensor]


class PairLoss(NamedTuple):
    """A loss l(a, b) of the scores of the chosen and the rejected response, and how log-probs become scores."""

    terms: Callable[[Tensor, Tensor, Tensor, float], _Terms]
    needs_reference: bool
    averages: bool


def _sigmoid(a: Tensor, b: Tensor, beta: Tensor, margin: float) -> _Terms:
    """``-log sigma(beta (a - b))``: DPO (arXiv 2305.18290, Eq. 7), and with confidence cDPO."""
    logits = beta * (a - b)
    slope = beta * torch.sigmoid(-logits)
    return -F.logsigmoid(logits), -slope, slope


def _ipo(a: Tensor, b: Tensor, beta: Tensor, margin: float) -> _Terms:
    """``(a - b - 1 / (2 beta))^2``: IPO (arXiv 2310.12036, Eq. 17), on averaged log-ratios."""
    gap = a - b - 1.0 / (2.0 * beta)
    return gap.square(), 2.0 * gap, -2.0 * gap


def _hinge(a: Tensor, b: Tensor, beta: Tensor, margin: float) -> _Terms:
    """``max(0, 1 - beta (a - b))``: SLiC (arXiv 2305.10425) on log-ratios, as in RSO (arXiv 2309.06657)."""
    gap = 1.0 - beta * (a - b)
    slope = torch.where(gap > 0, beta, torch.where(gap.isnan(), torch.nan, 0.0))
    return torch.relu(gap), -slope, slope


def _simpo(a: Tensor, b: Tensor, beta: Tensor, margin: float) -> _Terms:
    """``-log sigma(beta (a - b) - simpo_gamma)``: SimPO (arXiv 2405.14734, Eq. 6), on averaged log-probs."""
    logits = beta * (a - b) - margin
    slope = beta * torch.sigmoid(-logits)
    return -F.logsigmoid(logits), -slope, slope


def _orpo(a: Tensor, b: Tensor, beta: Tensor, margin: float) -> _Terms:
    """``-a - beta log sigma(o(a) - o(b))``, o(a) = a - log(1 - e^a): ORPO (arXiv 2403.07691, Eq. 6), averaged."""
    odds_a, slope_a = _log_odds(a)
    odds_b, slope_b = _log_odds(b)
    logits = odds_a - odds_b
    slope = beta * torch.sigmoid(-logits)
    return -a - beta * F.logsigmoid(logits), -1.0 - slope * slope_a, slope * slope_b


def _log_odds(a: Tensor) -> tuple[Tensor, Tensor]:
    # An empty response has a = 0, whose odds are infinite: they are held at probability 1 - eps.
    held = a.clamp(max=-torch.finfo(a.dtype).eps)
    other = -torch.expm1(held)
    return held - torch.log(other), torch.where(a > held, 0.0, 1.0 / other)


def _apo_zero(a: Tensor, b: Tensor, beta: Tensor, margin: float) -> _Terms:
    """``sigma(-beta a) + sigma(beta b)``: APO-zero (arXiv 2408.06266)."""
    keep_a, keep_b = torch.sigmoid(-beta * a), torch.sigmoid(beta * b)
    return keep_a + keep_b, -beta * keep_a * (1.0 - keep_a), beta * keep_b * (1.0 - keep_b)


def _apo_down(a: Tensor, b: Tensor, beta: Tensor, margin: float) -> _Terms:
    """``sigma(beta a) + sigma(-beta (a - b))``: APO-down (arXiv 2408.06266)."""
    keep_a, keep_gap = torch.sigmoid(beta * a), torch.sigmoid(-beta * (a - b))
    slope_gap = beta * keep_gap * (1.0 - keep_gap)
    return keep_a + keep_gap, beta * keep_a * (1.0 - keep_a) - slope_gap, slope_gap


def _sft(a: Tensor, b: Tensor, beta: Tensor, margin: float) -> _Terms:
    """``-a``: the chosen response's negative log-likelihood a token."""
    return -a, -torch.ones_like(a), torch.zeros_like(b)


PAIR_LOSSES = {
    "sigmoid": PairLoss(_sigmoid, needs_reference=True, averages=False),
    "ipo": PairLoss(_ipo, needs_reference=True, averages=True),
    "hinge": PairLoss(_hinge, needs_reference=True, averages=False),
    "robust": PairLoss(_sigmoid, needs_reference=True, averages=False),
    "simpo": PairLoss(_simpo, needs_reference=False, averages=True),
    "orpo": PairLoss(_orpo, needs_reference=False, averages=True),
    "gdpo": PairLoss(_sigmoid, needs_reference=True, averages=False),
    "apo_zero": PairLoss(_apo_zero, needs_reference=True, averages=False),
    "apo_down": PairLoss(_apo_down, needs_reference=True, averages=False),
    "sft": PairLoss(_sft, needs_reference=False, averages=True),
}


class PairBatch(NamedTuple):
    """What a preference loss is a function of, each [P]; references and lengths may be None."""

    chosen_logp: Tensor
    rejected_logp: Tensor
    ref_chosen_logp: Tensor | None
    ref_rejected_logp: Tensor | None
    confidence: Tensor
    chosen_length: Tensor | None
    rejected_length: Tensor | None


class PairTerms(NamedTuple):
    """Loss, rewards and the loss's derivatives by the two log-probs, each [P]."""

    loss: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor
    chosen_slope: Tensor
    rejected_slope: Tensor


def preference_terms(
    batch: PairBatch, *, beta: float, loss_types: list[str], loss_weights: list[float], simpo_gamma: float
) -> PairTerms:
    """``sum over types of weight * [gamma l(a, b) + (1 - gamma) l(b, a)]`` and its derivatives by the log-probs.

    robust: ``[gamma l(a, b) - (1 - gamma) l(b, a)] / (2 gamma - 1)``; gdpo: ``l(a, b)`` with beta (2 gamma - 1).
    The rewards are beta times the scores of the first type. A confidence outside [0, 1] gives NaN in its pair.
    """
    batch = _in_compute_dtype(batch)
    outside = (batch.confidence < 0) | (batch.confidence > 1)
    gamma = torch.where(outside, torch.nan, batch.confidence)
    loss = chosen_slope = rejected_slope = torch.zeros_like(gamma)
    rewards: list[tuple[Tensor, Tensor]] = []
    for name, type_weight in zip(loss_types, loss_weights, strict=True):
        form = PAIR_LOSSES[name]
        a = _score(form, batch.chosen_logp, batch.ref_chosen_logp, batch.chosen_length)
        b = _score(form, batch.rejected_logp, batch.ref_rejected_logp, batch.rejected_length)
        rewards.append((beta * a, beta * b))
        value, by_a, by_b = _mixed(name, a, b, gamma, beta, simpo_gamma)
        loss = loss + type_weight * value
        chosen_slope = chosen_slope + type_weight * _by_logp(form, by_a, batch.chosen_length)
        rejected_slope = rejected_slope + type_weight * _by_logp(form, by_b, batch.rejected_length)
    return PairTerms(loss, *rewards[0], chosen_slope, rejected_slope)


def _mixed(name: str, a: Tensor, b: Tensor, gamma: Tensor, beta: float, simpo_gamma: float) -> _Terms:
    form = PAIR_LOSSES[name]
    if name == "gdpo":
        return form.terms(a, b, beta * (2.0 * gamma - 1.0), simpo_gamma)
    keep, flip = gamma, 1.0 - gamma
    if name == "robust":
        keep, flip = gamma / (2.0 * gamma - 1.0), (gamma - 1.0) / (2.0 * gamma - 1.0)
    betas = torch.full_like(gamma, beta)
    value, by_a, by_b = form.terms(a, b, betas, simpo_gamma)
    flipped, flipped_by_b, flipped_by_a = form.terms(b, a, betas, simpo_gamma)
    return (
        _times(keep, value) + _times(flip, flipped),
        _times(keep, by_a) + _times(flip, flipped_by_a),
        _times(keep, by_b) + _times(flip, flipped_by_b),
    )


def _times(weight: Tensor, value: Tensor) -> Tensor:
    """``weight * value``, 0 where the weight is 0, an infinite flipped form included."""
    return torch.where(weight == 0, 0.0, weight * value)


def _score(form: PairLoss, logp: Tensor, ref_logp: Tensor | None, length: Tensor | None) -> Tensor:
    score = logp - ref_logp if form.needs_reference and ref_logp is not None else logp
    return divide_or_zero(score, length) if form.averages and length is not None else score


def _by_logp(form: PairLoss, by_score: Tensor, length: Tensor | None) -> Tensor:
    return divide_or_zero(by_score, length) if form.averages and length is not None else by_score


def _in_compute_dtype(batch: PairBatch) -> PairBatch:
    dtype = compute_dtype(batch.chosen_logp)
    return PairBatch(*(None if value is None else value.to(dtype) for value in batch))  # type: ignore[arg-type]
