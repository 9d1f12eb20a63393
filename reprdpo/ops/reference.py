"""The oracle: every op once in plain PyTorch, in the order of its formula; bf16 and fp16 are taken up to float32."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# B sequences, T padded length, N packed tokens, L layers, D hidden size, P pairs.


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
