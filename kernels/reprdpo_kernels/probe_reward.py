"""probe_reward in one launch, hidden states to reward and gamma, and its gradients in another."""

import contextlib
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# B sequences, T tokens to choose from (padded length, or all of a packed batch), L layers, D hidden size, P pairs.

_SOFTMAX, _STATIC, _VOTE = (tl.constexpr(number) for number in range(3))
_GATES = {"softmax": 0, "static": 1, "vote": 2}
_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Config(NamedTuple):
    """Shapes of the programs: features of a row taken at once, the warps on them, sequences of a backward tile.

    The registers a thread may take with at most 32 layers are named, as the assembler left alone spills to fit one more
    block on a processor; mixing more layers, or gradients written an element at a time, takes whatever it needs.
    """

    forward_features: int = 4096
    forward_warps: int = 8
    forward_registers: int = 128
    backward_features: int = 256
    backward_warps: int = 4
    backward_registers: int = 168
    backward_sequences: int = 8


# By major compute capability; a newer device takes the newest. A forward program of this size has a whole row of 4096
# and its two weights in flight before it uses the first, 80 bytes a thread and operand at the most.
CONFIGS = {8: Config(), 9: Config(), 10: Config()}
_SMALL_ROW = 1024
# From here on the programs fill any device several times over, and each takes a few sequences of its layer, so that
# the layer's weights are read from the first-level cache for all but the first.
_MANY_PROGRAMS, _SEQUENCES = 4096, 4


@triton.jit
def _layer_address(addresses, layer):
    """The address of one layer's states: the one there is, or the layer's own of as many as there are layers."""
    address = addresses[0].to(tl.int64)
    for i in tl.static_range(1, len(addresses)):
        address = tl.where(layer == i, addresses[i].to(tl.int64), address)
    return address


@triton.jit
def _mix_layers(
    b, reward_ptr, scores_ptr, gate_ptr, gate_weight_ptr, gate_bias_ptr, L, GATE: tl.constexpr, BLOCK_L: tl.constexpr
):
    """The reward of sequence b from its scores and, where the gate reads the states, its logits in the gate's place."""
    at = tl.arange(0, BLOCK_L)
    inside = at < L
    s = tl.load(scores_ptr + b * L + at, mask=inside, other=0, cache_modifier=".cg")
    if GATE == _SOFTMAX:
        z = tl.load(gate_ptr + b * L + at, mask=inside, other=float("-inf"), cache_modifier=".cg")
        # Warps that hold copies of the logits must have read them before they are overwritten.
        tl.debug_barrier()
    else:
        z = tl.load(gate_bias_ptr + at, mask=inside, other=float("-inf")).to(tl.float32)
    if GATE == _VOTE:
        COLUMNS: tl.constexpr = 32 if BLOCK_L <= 128 else 4096 // BLOCK_L
        for start in range(0, L, COLUMNS):
            m = start + tl.arange(0, COLUMNS)
            s_m = tl.load(scores_ptr + b * L + m, mask=m < L, other=0, cache_modifier=".cg")
            votes = tl.load(
                gate_weight_ptr + at[:, None] * L + m[None, :], mask=inside[:, None] & (m < L)[None, :], other=0
            )
            z += tl.sum(votes.to(tl.float32) * s_m[None, :], axis=1)
        g = tl.sigmoid(z)
    else:
        e = tl.exp(z - tl.max(z, axis=0))
        e = tl.where(inside, e, 0)
        g = tl.div_rn(e, tl.zeros_like(e) + tl.sum(e, axis=0))
    tl.store(gate_ptr + b * L + at, g, mask=inside)
    reward = tl.sum(tl.where(inside, g * s, 0), axis=0)
    tl.store(reward_ptr + b, reward)
    return reward


@triton.jit(
    do_not_specialize=[
        "addresses", "B", "T", "L", "layer_stride", "sequence_stride", "token_stride", "feature_stride",
        "index_stride", "alpha", "floor", "squash", "reduce_batch",
    ]
)  # fmt: skip
def _probe_reward_fwd_kernel(
    addresses,
    index_ptr,
    probe_weight_ptr,
    probe_bias_ptr,
    gate_weight_ptr,
    gate_bias_ptr,
    reward_ptr,
    scores_ptr,
    gate_ptr,
    pooled_ptr,
    confidence_ptr,
    arrivals_ptr,
    B,
    T,
    L,
    D,
    layer_stride,
    sequence_stride,
    token_stride,
    feature_stride,
    index_stride,
    alpha,
    floor,
    squash,
    reduce_batch,
    DTYPE: tl.constexpr,
    GATE: tl.constexpr,
    ALIGNED: tl.constexpr,
    SEQUENCES: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """s_bl = w_l . h_bl + b_l, R_b = sum_l g_bl s_bl, gamma_p = sigma(alpha (R_p - R_{P+p})).

    A program takes SEQUENCES sequences of one layer. Who completes the scores of a sequence (of a pair, where gamma
    is asked) mixes its layers, from memory and always in one order, so which program it is changes no bit; who
    completes the last pair takes the mean over the batch. Each leaves its counter at zero.

    Bytes: B L D of states, 2 L D of weights, the rest is of order B L; B L D more where the pooled rows are kept.
    Layout: states at addresses[l] + (l layer_stride + b sequence_stride + index[b] token_stride + d feature_stride)
    elements, parameters and results dense, arrivals [1 + groups] int32 of zeros. ALIGNED: every row starts at a
    multiple of 16 bytes and its features follow one another.
    """
    blocks = tl.cdiv(B, SEQUENCES)
    layer = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(tl.int64) * SEQUENCES
    groups = B
    if confidence_ptr is not None:
        groups = B // 2
    base = _layer_address(addresses, layer) + layer * layer_stride * (DTYPE.primitive_bitwidth // 8)
    bias = tl.load(probe_bias_ptr + layer).to(tl.float32)
    gate_bias = tl.load(gate_bias_ptr + layer).to(tl.float32)

    for b in range(first, tl.minimum(first + SEQUENCES, B)):
        token = tl.zeros([], dtype=tl.int64)
        if index_ptr is not None:
            token = tl.load(index_ptr + b * index_stride).to(tl.int64)
        valid = (token >= 0) & (token < T)
        row = base + (b * sequence_stride + tl.where(valid, token, 0) * token_stride) * (DTYPE.primitive_bitwidth // 8)
        row_ptr = row.to(tl.pointer_type(DTYPE))
        if ALIGNED:
            row_ptr = tl.multiple_of(row_ptr, 16)

        readable = tl.where(valid, D, 0)
        score = tl.zeros([BLOCK_D], dtype=tl.float32)
        logit = tl.zeros([BLOCK_D], dtype=tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            inside = d < D
            # The weights first: they are on their way while the row's place is still being read.
            w = tl.load(probe_weight_ptr + layer * D + d, mask=inside, other=0).to(tl.float32)
            if GATE == _SOFTMAX:
                v = tl.load(gate_weight_ptr + layer * D + d, mask=inside, other=0).to(tl.float32)
            if ALIGNED:
                h = tl.load(row_ptr + d, mask=d < readable, other=0)
            else:
                h = tl.load(row_ptr + d.to(tl.int64) * feature_stride, mask=d < readable, other=0)
            if pooled_ptr is not None:
                kept = tl.where(valid, h, float("nan")).to(DTYPE)
                tl.store(pooled_ptr + (b * L + layer) * D + d, kept, mask=inside)
            score += h.to(tl.float32) * w
            if GATE == _SOFTMAX:
                logit += h.to(tl.float32) * v
        s = tl.where(valid, tl.sum(score, axis=0) + bias, float("nan"))
        tl.store(scores_ptr + b * L + layer, s)
        if GATE == _SOFTMAX:
            z = tl.where(valid, tl.sum(logit, axis=0) + gate_bias, float("nan"))
            tl.store(gate_ptr + b * L + layer, z)

        group = tl.where(b < groups, b, b - groups)
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals_ptr + 1 + group, 1, sem="acq_rel")
        if arrived == tl.where(groups < B, 2 * L, L) - 1:
            tl.store(arrivals_ptr + 1 + group, 0)
            reward = _mix_layers(
                group, reward_ptr, scores_ptr, gate_ptr, gate_weight_ptr, gate_bias_ptr, L, GATE, BLOCK_L
            )
            if confidence_ptr is not None:
                rejected = _mix_layers(
                    group + groups, reward_ptr, scores_ptr, gate_ptr, gate_weight_ptr, gate_bias_ptr, L, GATE, BLOCK_L
                )
                _store_confidence(
                    reward, rejected, group, groups, confidence_ptr, arrivals_ptr, alpha, floor, squash, reduce_batch
                )


@triton.jit
def _store_confidence(chosen, rejected, pair, P, confidence_ptr, arrivals_ptr, alpha, floor, squash, reduce_batch):
    """gamma of one pair, not below floor; with reduce_batch the last pair to come puts the mean in every place."""
    margin = chosen - rejected
    if squash != 0:
        margin = tl.sigmoid(chosen) - tl.sigmoid(rejected)
    gamma = tl.sigmoid(alpha * margin)
    gamma = tl.where(gamma < floor, floor, gamma)
    tl.store(confidence_ptr + pair, gamma)
    if reduce_batch != 0:
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel")
        if arrived == P - 1:
            tl.store(arrivals_ptr, 0)
            total = tl.zeros([128], dtype=tl.float32)
            for start in range(0, P, 128):
                p = start + tl.arange(0, 128)
                total += tl.load(confidence_ptr + p, mask=p < P, other=0, cache_modifier=".cg")
            mean = tl.sum(total, axis=0) / P
            # Warps that hold copies of the gammas must have read them before they are overwritten.
            tl.debug_barrier()
            for start in range(0, P, 128):
                p = start + tl.arange(0, 128)
                tl.store(confidence_ptr + p, mean + tl.zeros([128], dtype=tl.float32), mask=p < P)


@triton.jit
def _row_gradients(
    b,
    valid,
    layer,
    grad_reward_ptr,
    grad_scores_ptr,
    grad_gate_ptr,
    gate_weight_ptr,
    scores_ptr,
    gate_ptr,
    B,
    L,
    reward_stride,
    scores_strides,
    gate_strides,
    has_reward,
    has_scores,
    has_gate,
    GATE: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """d = dscore and dz = dlogit of one layer in the sequences b, 0 where not valid, and the scores of all layers.

    With G = dR, A and Q the upstream gradients of scores and gate and u = G s + Q: d = G g + A;
    softmax, static: dz = g (u - sum_m g_m u_m); vote: dz = g (1 - g) u and d += sum_m V_ml dz_m.
    """
    m = tl.arange(0, BLOCK_L)
    inside = valid[:, None] & (m < L)[None, :]
    at = b[:, None] * L + m[None, :]
    upstream = tl.load(grad_reward_ptr + b * reward_stride, mask=valid & (b < B * has_reward), other=0).to(tl.float32)
    s = tl.load(scores_ptr + at, mask=inside, other=0)
    g = tl.load(gate_ptr + at, mask=inside, other=0)
    grad_gate_at = b[:, None] * gate_strides[0] + m[None, :] * gate_strides[1]
    q = tl.load(grad_gate_ptr + grad_gate_at, mask=inside & (m < L * has_gate)[None, :], other=0).to(tl.float32)
    u = upstream[:, None] * s + q

    own_s = tl.load(scores_ptr + b * L + layer, mask=valid, other=0)
    own_g = tl.load(gate_ptr + b * L + layer, mask=valid, other=0)
    own_q = tl.load(
        grad_gate_ptr + b * gate_strides[0] + layer * gate_strides[1], mask=valid & (b < B * has_gate), other=0
    ).to(tl.float32)
    own_u = upstream * own_s + own_q
    d = upstream * own_g + tl.load(
        grad_scores_ptr + b * scores_strides[0] + layer * scores_strides[1], mask=valid & (b < B * has_scores), other=0
    ).to(tl.float32)
    if GATE == _VOTE:
        dz = own_g * (1 - own_g) * own_u
        votes = tl.load(gate_weight_ptr + m * L + layer, mask=m < L, other=0).to(tl.float32)
        d += tl.sum(g * (1 - g) * u * votes[None, :], axis=1)
    else:
        dz = own_g * (own_u - tl.sum(g * u, axis=1))
    return tl.where(valid, d, 0), tl.where(valid, dz, 0), s


@triton.jit(
    do_not_specialize=[
        "addresses", "B", "T", "L", "layer_stride", "sequence_stride", "token_stride", "index_stride",
        "reward_stride", "scores_strides", "gate_strides", "has_reward", "has_scores", "has_gate",
        "needs_probe", "needs_probe_bias", "needs_gate", "needs_gate_bias", "packed",
    ]
)  # fmt: skip
def _probe_reward_bwd_kernel(
    addresses,
    grad_reward_ptr,
    grad_scores_ptr,
    grad_gate_ptr,
    pooled_ptr,
    index_ptr,
    probe_weight_ptr,
    gate_weight_ptr,
    scores_ptr,
    gate_ptr,
    grad_probe_ptr,
    grad_probe_bias_ptr,
    grad_gate_weight_ptr,
    grad_gate_bias_ptr,
    B,
    T,
    L,
    D,
    pooled_sequence_stride,
    pooled_layer_stride,
    pooled_feature_stride,
    layer_stride,
    sequence_stride,
    token_stride,
    index_stride,
    reward_stride,
    scores_strides,
    gate_strides,
    has_reward,
    has_scores,
    has_gate,
    needs_probe,
    needs_probe_bias,
    needs_gate,
    needs_gate_bias,
    packed,
    DTYPE: tl.constexpr,
    GATE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dw_l = sum_b d_b h_bl, dv_l = sum_b dz_b h_bl (vote: dV_l = sum_b dz_b s_b), dh = d w + dz v

    And db = sum_b d, dc = sum_b dz. A program owns one layer and BLOCK_D features of it and takes the sequences in
    order: no sum is shared between programs, so there are no atomics and every run gives the same bits. Sequences that
    read one token of a packed batch each write the sum over all of them. Rows whose index is out of range give and
    get nothing.

    Bytes: B L D of pooled rows and 2 L D of gradients for the weights; B L D written, 2 L D read for the hidden
    states, whose other positions the launcher has zeroed (a fill of all their bytes). Layout: pooled by its strides,
    hidden gradients as the states in the forward, with features side by side; a parameter's gradient like the
    parameter, not touched where not needed. ALIGNED: rows of hidden gradients start at multiples of 16 bytes.
    """
    chunks = tl.cdiv(tl.maximum(D, 1), BLOCK_D)
    layer = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = (tl.program_id(0) % chunks).to(tl.int64)
    d_at = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d_at < D
    grad_probe = tl.zeros([BLOCK_D], dtype=tl.float32)
    grad_gate_weight = tl.zeros([BLOCK_D], dtype=tl.float32)
    grad_votes = tl.zeros([BLOCK_L], dtype=tl.float32)
    grad_bias = tl.zeros([BLOCK_B], dtype=tl.float32)
    grad_gate_bias = tl.zeros([BLOCK_B], dtype=tl.float32)
    if addresses is not None:
        base = _layer_address(addresses, layer) + layer * layer_stride * (DTYPE.primitive_bitwidth // 8)
        w = tl.load(probe_weight_ptr + layer * D + d_at, mask=inside, other=0).to(tl.float32)
        if GATE == _SOFTMAX:
            v = tl.load(gate_weight_ptr + layer * D + d_at, mask=inside, other=0).to(tl.float32)

    for start in range(0, B, BLOCK_B):
        b = (start + tl.arange(0, BLOCK_B)).to(tl.int64)
        token = tl.zeros([BLOCK_B], dtype=tl.int64)
        if index_ptr is not None:
            token = tl.load(index_ptr + b * index_stride, mask=b < B, other=-1).to(tl.int64)
        valid = (b < B) & (token >= 0) & (token < T)
        d, dz, s = _row_gradients(
            b, valid, layer, grad_reward_ptr, grad_scores_ptr, grad_gate_ptr, gate_weight_ptr, scores_ptr, gate_ptr,
            B, L, reward_stride, scores_strides, gate_strides, has_reward, has_scores, has_gate, GATE, BLOCK_L,
        )  # fmt: skip
        grad_bias += d
        grad_gate_bias += dz
        if GATE == _VOTE:
            grad_votes += tl.sum(dz[:, None] * s, axis=0)
        if pooled_ptr is not None:
            h = tl.load(
                pooled_ptr
                + (b * pooled_sequence_stride + layer * pooled_layer_stride)[:, None]
                + (d_at * pooled_feature_stride)[None, :],
                mask=valid[:, None] & inside[None, :],
                other=0,
            ).to(tl.float32)
            grad_probe += tl.sum(d[:, None] * h, axis=0)
            if GATE == _SOFTMAX:
                grad_gate_weight += tl.sum(dz[:, None] * h, axis=0)
        if addresses is not None:
            if packed != 0:
                sum_d = tl.zeros([BLOCK_B], dtype=tl.float32)
                sum_dz = tl.zeros([BLOCK_B], dtype=tl.float32)
                for other_start in range(0, B, BLOCK_B):
                    other = (other_start + tl.arange(0, BLOCK_B)).to(tl.int64)
                    other_token = tl.load(index_ptr + other * index_stride, mask=other < B, other=-1).to(tl.int64)
                    other_valid = (other < B) & (other_token >= 0) & (other_token < T)
                    other_d, other_dz, _ = _row_gradients(
                        other, other_valid, layer, grad_reward_ptr, grad_scores_ptr, grad_gate_ptr, gate_weight_ptr,
                        scores_ptr, gate_ptr, B, L, reward_stride, scores_strides, gate_strides, has_reward,
                        has_scores, has_gate, GATE, BLOCK_L,
                    )  # fmt: skip
                    same = token[:, None] == other_token[None, :]
                    sum_d += tl.sum(tl.where(same, other_d[None, :], 0), axis=1)
                    sum_dz += tl.sum(tl.where(same, other_dz[None, :], 0), axis=1)
                d = sum_d
                dz = sum_dz
            row = base + (b * sequence_stride + tl.where(valid, token, 0) * token_stride) * (
                DTYPE.primitive_bitwidth // 8
            )
            dh = d[:, None] * w[None, :]
            if GATE == _SOFTMAX:
                dh += dz[:, None] * v[None, :]
            row_ptr = row.to(tl.pointer_type(DTYPE))
            if ALIGNED:
                row_ptr = tl.multiple_of(row_ptr, 16)
            tl.store(row_ptr[:, None] + d_at[None, :], dh.to(DTYPE), mask=valid[:, None] & inside[None, :])

    tl.store(grad_probe_ptr + layer * D + d_at, grad_probe, mask=d_at < D * needs_probe)
    if GATE == _SOFTMAX:
        tl.store(grad_gate_weight_ptr + layer * D + d_at, grad_gate_weight, mask=d_at < D * needs_gate)
    first = tl.where(chunk == 0, 1, 0)
    if GATE == _VOTE:
        m = tl.arange(0, BLOCK_L)
        tl.store(grad_gate_weight_ptr + layer * L + m, grad_votes, mask=m < L * first * needs_gate)
    tl.store(grad_probe_bias_ptr + layer, tl.sum(grad_bias, axis=0), mask=first * needs_probe_bias != 0)
    tl.store(grad_gate_bias_ptr + layer, tl.sum(grad_gate_bias, axis=0), mask=first * needs_gate_bias != 0)


def probe_reward_forward(
    hidden_states: Sequence[Tensor],
    index: Tensor | None,
    probe_weight: Tensor,
    probe_bias: Tensor,
    gate_weight: Tensor | None,
    gate_bias: Tensor,
    gate: str,
    save_pooled: bool,
    alpha: float | None,
    squash: bool,
    floor: float | None,
    reduce_batch: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One launch: reward [B], layer_scores [B, L], layer_gate [B, L], pooled [B, L, D] or empty, gamma [P] or empty.

    The arguments are checked by reprdpo.ops; layers of unlike strides are made contiguous first. No copy to the
    device and no synchronisation: fit for CUDA graphs.
    """
    layers = _alike_layers(hidden_states)
    first = layers[0]
    B = first.shape[0] if index is None else index.shape[0]
    L, D = probe_weight.shape
    reward = first.new_empty(B, dtype=torch.float32)
    scores = first.new_empty(B, L, dtype=torch.float32)
    layer_gate = first.new_empty(B, L, dtype=torch.float32)
    pooled = first.new_empty((B, L, D) if save_pooled else 0)
    confidence = first.new_empty(0 if alpha is None else B // 2, dtype=torch.float32)
    if B == 0 or L == 0:
        return reward.zero_(), scores, layer_gate, pooled, confidence.fill_(max(0.5, floor or 0))
    layer_stride, sequence_stride, token_stride, feature_stride, T = _strides(first, index is not None)
    addresses = tuple([layer.data_ptr() for layer in layers])
    config = _config(first.device)
    small = D <= _SMALL_ROW
    sequences = _SEQUENCES if B * L >= _MANY_PROGRAMS else 1
    with _on(first.device):
        _probe_reward_fwd_kernel[(L * triton.cdiv(B, sequences),)](
            addresses,
            index,
            probe_weight.contiguous(),
            probe_bias.contiguous(),
            None if gate_weight is None else gate_weight.contiguous(),
            gate_bias.contiguous(),
            reward,
            scores,
            layer_gate,
            pooled if save_pooled else None,
            None if alpha is None else confidence,
            _arrivals(1 + (B if alpha is None else B // 2), first.device),
            B,
            T,
            L,
            D,
            layer_stride,
            sequence_stride,
            token_stride,
            feature_stride,
            0 if index is None else index.stride(0),
            0.0 if alpha is None else float(alpha),
            -1.0 if floor is None else float(floor),
            int(squash),
            int(reduce_batch),
            DTYPE=_TRITON_DTYPES[first.dtype],
            GATE=_GATES[gate],
            ALIGNED=feature_stride == 1 and _aligned(addresses, (layer_stride, sequence_stride, token_stride), first),
            SEQUENCES=sequences,
            BLOCK_L=_block(L),
            BLOCK_D=_SMALL_ROW if small else config.forward_features,
            num_warps=4 if small else config.forward_warps,
            maxnreg=_registers(config.forward_registers, L),
            enable_fp_fusion=True,
        )
    return reward, scores, layer_gate, pooled, confidence


def probe_reward_backward(
    grad_reward: Tensor | None,
    grad_scores: Tensor | None,
    grad_gate: Tensor | None,
    pooled: Tensor | None,
    index: Tensor | None,
    probe_weight: Tensor,
    gate_weight: Tensor | None,
    layer_scores: Tensor,
    layer_gate: Tensor,
    gate: str,
    hidden_shape: Sequence[int],
    hidden_count: int,
    hidden_dtype: torch.dtype,
    needs: Sequence[bool],
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """One launch: gradients of hidden states, probe_weight, probe_bias, gate_weight, gate_bias, those in ``needs``.

    What is not asked comes back empty. Gradients of unpooled hidden states are filled with zeros first.
    """
    needs_hidden, needs_probe, needs_probe_bias, needs_gate, needs_gate_bias = needs
    B, (L, D) = layer_scores.shape[0], probe_weight.shape
    hidden: list[Tensor] = []
    if needs_hidden:
        hidden = [probe_weight.new_empty(hidden_shape, dtype=hidden_dtype) for _ in range(hidden_count)]
        if index is not None:
            torch._foreach_zero_(hidden)
    gate_shape = () if gate_weight is None else gate_weight.shape
    shapes = (probe_weight.shape, (L,), gate_shape, (L,))
    grads = [probe_weight.new_empty(shape if need else 0) for shape, need in zip(shapes, needs[1:], strict=True)]
    if B == 0 or L == 0:
        return (hidden, *(grad.zero_() for grad in grads))  # type: ignore[return-value]
    strides = _strides(hidden[0], index is not None) if needs_hidden else (0, 0, 0, 1, 1)
    layer_stride, sequence_stride, token_stride, _, _ = strides
    addresses = tuple([grad.data_ptr() for grad in hidden]) or None
    weights = needs_probe or (needs_gate and gate == "softmax")
    assert pooled is not None or not weights
    pooled_strides = pooled.stride() if pooled is not None and weights else (0, 0, 1)
    config = _config(probe_weight.device)
    block_d = config.backward_features
    aligned = needs_hidden and _aligned(addresses or (), (layer_stride, sequence_stride, token_stride), hidden[0])
    with _on(probe_weight.device):
        _probe_reward_bwd_kernel[(L * max(1, triton.cdiv(D, block_d)),)](
            addresses,
            layer_scores if grad_reward is None else grad_reward,
            layer_scores if grad_scores is None else grad_scores,
            layer_scores if grad_gate is None else grad_gate,
            pooled if weights else None,
            index,
            probe_weight.contiguous(),
            None if gate_weight is None else gate_weight.contiguous(),
            layer_scores.contiguous(),
            layer_gate.contiguous(),
            *grads,
            B,
            hidden_shape[-2] if index is not None else 1,
            L,
            D,
            *pooled_strides,
            layer_stride,
            sequence_stride,
            token_stride,
            0 if index is None else index.stride(0),
            0 if grad_reward is None else grad_reward.stride(0),
            (0, 0) if grad_scores is None else grad_scores.stride(),
            (0, 0) if grad_gate is None else grad_gate.stride(),
            int(grad_reward is not None),
            int(grad_scores is not None),
            int(grad_gate is not None),
            int(needs_probe),
            int(needs_probe_bias),
            int(needs_gate),
            int(needs_gate_bias),
            int(index is not None and len(hidden_shape) == 2),
            DTYPE=_TRITON_DTYPES[hidden_dtype],
            GATE=_GATES[gate],
            ALIGNED=aligned,
            BLOCK_B=_rows(config, L),
            BLOCK_L=_block(L),
            BLOCK_D=block_d,
            num_warps=config.backward_warps,
            maxnreg=_registers(config.backward_registers, L, aligned or not needs_hidden),
            enable_fp_fusion=True,
        )
    return (hidden, *grads)  # type: ignore[return-value]


def _alike_layers(hidden_states: Sequence[Tensor]) -> Sequence[Tensor]:
    """The layers, copied where their strides are not all those of the first."""
    strides = [layer.stride() for layer in hidden_states]
    if strides.count(strides[0]) == len(strides):
        return hidden_states
    # Not contiguous(): that keeps any stride where the size is 1.
    return [layer.clone(memory_format=torch.contiguous_format) for layer in hidden_states]


def _strides(hidden: Tensor, has_tokens: bool) -> tuple[int, int, int, int, int]:
    """(layer, sequence, token, feature) strides in elements, and T; 0 where the form has no such dimension."""
    strides, shape = hidden.stride(), hidden.shape
    if not has_tokens:
        return strides[1], strides[0], 0, strides[2], 1
    if hidden.dim() == 4:
        return (*strides, shape[2])  # type: ignore[return-value]
    return 0, strides[0] if hidden.dim() == 3 else 0, strides[-2], strides[-1], shape[-2]


def _aligned(addresses: Sequence[int], strides: Sequence[int], like: Tensor) -> bool:
    """Whether every row starts at a multiple of 16 bytes, whichever the token."""
    together = 0
    for number in addresses:
        together |= number
    for stride in strides:
        together |= stride * like.element_size()
    return together % 16 == 0


def _block(L: int) -> int:
    return max(32, triton.next_power_of_2(L))


def _rows(config: Config, L: int) -> int:
    """Sequences of a backward tile, fewer where a tile of all their layers would not fit the registers."""
    return max(1, min(config.backward_sequences, 512 // _block(L)))


def _registers(named: int, L: int, aligned: bool = True) -> int:
    return named if _block(L) == 32 and aligned else 255


def _config(device: torch.device) -> Config:
    if device.type != "cuda":
        return CONFIGS[9]
    major = torch.cuda.get_device_capability(device)[0]
    return CONFIGS.get(major, CONFIGS[max(CONFIGS)])


def _on(device: torch.device) -> Any:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


# Counters of arrived programs: int32 zeros that every launch leaves at zero again, kept for each stream, so that
# launches that may overlap never share one. A launch captured in a graph, replayed on whichever stream, has its own:
# what is cut from a slab is never given back, and slabs that are used up stay, as graphs hold bare addresses of them.
_SLAB = 2**16
# Cuts of 128 bytes: a kernel is compiled for how its pointers are aligned, and none can be during a capture.
_CUT = 32
_slabs: dict[torch.device, list[Tensor]] = {}
_used: dict[torch.device, int] = {}
_by_stream: dict[tuple[torch.device, int], Tensor] = {}
_growing = threading.Lock()


def _arrivals(count: int, device: torch.device) -> Tensor:
    """At least ``count`` zeros, for one launch on the current stream of the current device."""
    stream, capturing = 0, False
    if device.type == "cuda":
        stream, capturing = torch.cuda.current_stream().cuda_stream, torch.cuda.is_current_stream_capturing()
    if capturing:
        return _take(count, device, capturing)
    counters = _by_stream.get((device, stream))
    if counters is None or counters.numel() < count:
        counters = _by_stream[device, stream] = _take(triton.next_power_of_2(max(count, 128)), device, capturing)
    return counters


def _take(count: int, device: torch.device, capturing: bool) -> Tensor:
    count = _CUT * triton.cdiv(count, _CUT)
    with _growing:
        slabs = _slabs.setdefault(device, [])
        used = _used.get(device, 0)
        if not slabs or used + count > slabs[-1].numel():
            if capturing:  # no room: zeros of the graph's own memory, one more node in it
                return torch.zeros(count, dtype=torch.int32, device=device)
            slabs.append(_zeros_outside_graph_pools(max(count, _SLAB), device))
            used = 0
        _used[device] = used + count
        return slabs[-1][used : used + count]


def _zeros_outside_graph_pools(count: int, device: torch.device) -> Tensor:
    """Memory that outlives any graph: a graph's pool is entered by thread, so another one allocates."""

    def make() -> Tensor:
        zeros = torch.zeros(count, dtype=torch.int32, device=device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return zeros

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()
