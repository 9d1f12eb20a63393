"""Log-probabilities of labels straight from hidden states and lm_head, the logits living one tile at a time.

Shape suffixes: N tokens, n tokens of a tile, D hidden size, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from reprdpo.ops import backend, checks
from reprdpo.ops.head_schedule import fake_forward, find_scored, head_backward, head_forward
from reprdpo.ops.head_tiles import Needs, select_head
from reprdpo.ops.reference import Head
from reprdpo.ops.sparse_product import check_mass_eps

backend.declare("linear_logprob", cpu=("native",), cuda=("triton",))


class LinearLogprob(NamedTuple):
    """Per token, 0 where ignored: log-prob, entropy in nats; detached: is the label the argmax (1 or 0), mean logit."""

    logprob: Tensor
    entropy: Tensor | None
    top1: Tensor | None
    mean_logit: Tensor | None


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    return_stats: bool = False,
    scored_index: Tensor | None = None,
    max_tile_bytes: int | None = None,
    gradient_mass_eps: float | None = None,
) -> Tensor | LinearLogprob:
    """Log-probability of each label under ``softmax(z)``, without holding the logits of more than a tile of rows.

    ``z = softcap * tanh(logit_scale * (h W^T + b) / softcap) / temperature``; ``log p_y = -log1p(S_-y exp(m - z_y))``
    with m = max z and S_-y the sum of exp(z_j - m) over j != y, so that log p does not cancel as p_y goes to 1. Nor do
    its gradients. The residual ``G_iy = 1, G_ij = -exp(z_ij - m_i) / S_-y,i`` (times ``1 - tanh^2`` of a softcap) does
    not depend on the upstream gradients c, which only scale rows: with ``a = c (S_-y / S) logit_scale / temperature``,
    ``dH = a * (G W)``, ``dW = G^T (a * H)`` and ``db = G^T a``.

    Matmuls over the scored rows: one without gradients; two with weight and bias frozen, which keeps ``G W``, the size
    of those rows; three where G, in the inputs' dtype, fits ``max_tile_bytes`` and is kept; else four, tiles of G made
    again in the backward. A gradient of the entropy takes the last way always.

    With ``gradient_mass_eps`` and a frozen head the second matmul is a sparse one: of each row of G, rounded to the
    inputs' dtype, columns are left out whose ``|G_ij|`` sum to at most eps. The log-probs stay exact, and

    ``||dH_i - exact dH_i|| <= eps |c_i| (1 - p_y) (|logit_scale| / temperature) max_j ||W_j||``,

    a softcap included. The more of 1 - p_y a few columns hold, the faster; on a CPU a row that needs more than V / 8 of
    them is multiplied whole, and on a GPU, where 128 rows that need about as many share theirs, flat rows cost as much
    as without it or more.

    Args:
        hidden: ``[..., D]`` float32, bfloat16, float16 or float64. Under autocast, hidden and weight (alone) take its
            dtype; where they differ, the half-precision one wins, as it would there.
        weight: ``[V, D]``, a plain tensor.
        labels: ``[...]`` integers, aligned with ``hidden`` (already shifted).
        bias: ``[V]`` or None.
        ignore_index: rows with this label cost no matmul, return 0 and get no gradient, whatever they hold.
        return_entropy: also return the entropy of each row's softmax, differentiable.
        return_stats: also return top-1 hits and mean logits.
        scored_index: flat, sorted, unique positions of all labels that are not ignored. Without it they are looked up,
            which synchronises once (under ``torch.compile`` once a pass); under CUDA graph capture all rows are
            computed, for which a tight budget may take kernels that a warm-up without them has not loaded, and none
            can be loaded then: pass the index, or that of all rows to the warm-up too.
        max_tile_bytes: bound on logits, what is made of them, and upcast blocks of a half-precision weight, all
            alive at once (gradients not counted); default 256 MiB on the CPU, and on CUDA the larger of 1 GiB and 1/32
            of the device's memory. The native backend keeps the memory for the next call (:func:`empty_cache`).
        gradient_mass_eps: None for the exact gradient, or the part of a row's gradient mass, in (0, 1), that hidden
            states may lose. Weight and bias must not require a gradient (there the bound would hold for the whole
            matrix, not for each row, which Adam would amplify). The reference backend drops the most columns the bound
            allows, the others may keep more; Triton's takes 5 V bytes for 128 rows beside the tile, and no
            synchronisation. A gradient of the entropy is exact.

    Returns:
        ``[...]`` float32 (float64 from float64), or :class:`LinearLogprob` where entropy or stats are asked for. A
        label outside [0, V) gives NaN in its row.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, a DTensor, a non-finite scalar,
            or a budget too small for one row, naming what would do.
    """
    check_head_arguments(hidden, weight, labels, bias, logit_scale, softcap, temperature, ignore_index, max_tile_bytes)
    checks.check_shape("labels", labels, hidden.shape[:-1], meaning="hidden's without D")
    check_scored_index(scored_index, labels)
    hidden, weight = as_autocast_would(hidden, weight)
    needs = gradient_needs(hidden, weight, bias)
    check_mass_eps(gradient_mass_eps, needs)
    flat_labels_N = labels.reshape(-1).long()
    if scored_index is None:
        scored_index = find_scored(flat_labels_N, ignore_index)
    logp_N, entropy_N, top1_N, mean_logit_N, *_ = _linear_logprob(
        token_rows(hidden, labels.numel()),
        weight,
        bias,
        flat_labels_N,
        scored_index,
        float(logit_scale),
        None if softcap is None else float(softcap),
        float(temperature),
        ignore_index,
        return_entropy,
        return_stats,
        max_tile_bytes,
        *needs,
        None if gradient_mass_eps is None else float(gradient_mass_eps),
    )
    logprob = logp_N.reshape(labels.shape)
    if not (return_entropy or return_stats):
        return logprob
    return LinearLogprob(
        logprob,
        entropy_N.reshape(labels.shape) if return_entropy else None,
        top1_N.reshape(labels.shape) if return_stats else None,
        mean_logit_N.reshape(labels.shape) if return_stats else None,
    )


def check_head_arguments(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    max_tile_bytes: int | None,
) -> None:
    """Refuse what no op over hidden states and lm_head can serve; the shape of ``labels`` is the caller's to check."""
    checks.check_float_dtype("hidden", hidden)
    checks.check_float_dtype("weight", weight)
    checks.check_integer_dtype("labels", labels)
    checks.check_rank("weight", weight, 2, meaning="[V, D]")
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden must be [..., D] with weight's D = {weight.shape[1]}, not {list(hidden.shape)}")
    if weight.shape[0] == 0:
        raise ValueError("weight must have at least one row, not an empty vocabulary")
    if bias is not None:
        checks.check_float_dtype("bias", bias)
        checks.check_shape("bias", bias, (weight.shape[0],), meaning="[V]")
    checks.check_same_device(hidden=hidden, weight=weight, labels=labels, bias=bias)
    checks.check_finite_scalar("logit_scale", logit_scale)
    checks.check_finite_scalar("temperature", temperature, positive=True)
    if softcap is not None:
        checks.check_finite_scalar("softcap", softcap, positive=True)
    checks.check_integer("ignore_index", ignore_index)
    if max_tile_bytes is not None:
        checks.check_integer("max_tile_bytes", max_tile_bytes, minimum=1)


def check_scored_index(scored_index: Tensor | None, labels: Tensor) -> None:
    """Refuse anything but int64 positions [n] on the labels' device; on the CPU, positions out of range too."""
    if scored_index is None:
        return
    checks.check_integer_dtype("scored_index", scored_index)
    checks.check_rank("scored_index", scored_index, 1, meaning="[n]")
    if scored_index.dtype != torch.int64:
        raise TypeError(f"scored_index must be int64, not {str(scored_index.dtype).removeprefix('torch.')}")
    checks.check_same_device(labels=labels, scored_index=scored_index)
    if scored_index.is_cpu and scored_index.numel() and not torch.compiler.is_compiling():
        low, high = scored_index.min().item(), scored_index.max().item()
        if low < 0 or high >= labels.numel():
            raise ValueError(f"scored_index must be in [0, {labels.numel()}), but holds {low}..{high}")


def token_rows(hidden: Tensor, num_tokens: int) -> Tensor:
    """``hidden`` as rows ``[N, D]`` of elements side by side, as kernels scale and scatter them."""
    hidden_ND = hidden.reshape(num_tokens, hidden.shape[-1])
    return hidden_ND if hidden_ND.stride(1) == 1 else hidden_ND.contiguous()


def as_autocast_would(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden and weight in one dtype: autocast's where it is on, else the half-precision one; float64 wins."""
    kind = hidden.device.type
    if torch.float64 in (hidden.dtype, weight.dtype):
        dtype = torch.float64
    elif kind != "meta" and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    elif hidden.dtype == weight.dtype or weight.dtype == torch.float32:
        dtype = hidden.dtype
    else:
        dtype = weight.dtype if hidden.dtype == torch.float32 else torch.float32
    return hidden.to(dtype), weight.to(dtype)


# Registration. A custom op cannot see whether its inputs ask for gradients: the wrapper says so.


def gradient_needs(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Needs:
    """Which inputs will get a gradient: none under ``torch.no_grad``."""
    on = torch.is_grad_enabled()
    return Needs(
        on and hidden.requires_grad, on and weight.requires_grad, on and bias is not None and bias.requires_grad
    )


@torch.library.custom_op("reprdpo::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scored_index: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    return_entropy: bool,
    return_stats: bool,
    max_tile_bytes: int | None,
    hidden_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
    gradient_mass_eps: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return head_forward(
        select_head("linear_logprob", hidden, weight),
        hidden,
        Head(weight, bias, logit_scale, softcap, temperature),
        labels,
        scored_index,
        Needs(hidden_grad, weight_grad, bias_grad),
        ignore_index=ignore_index,
        entropy=return_entropy,
        stats=return_stats,
        max_tile_bytes=max_tile_bytes,
        gradient_mass_eps=gradient_mass_eps,
    )


@_linear_logprob.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scored_index: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    return_entropy: bool,
    return_stats: bool,
    max_tile_bytes: int | None,
    hidden_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
    gradient_mass_eps: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return fake_forward(
        select_head("linear_logprob", hidden, weight),
        hidden,
        Head(weight, bias, logit_scale, softcap, temperature),
        labels,
        scored_index,
        Needs(hidden_grad, weight_grad, bias_grad),
        entropy=return_entropy,
        stats=return_stats,
        max_tile_bytes=max_tile_bytes,
    )


@torch.library.custom_op("reprdpo::linear_logprob_backward", mutates_args=())
def _linear_logprob_backward(
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scored_index: Tensor | None,
    entropy: Tensor,
    row_stats: Tensor,
    residual: Tensor,
    hidden_rows: Tensor,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    max_tile_bytes: int | None,
    hidden_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return head_backward(
        select_head("linear_logprob", hidden, weight),
        grad_logp,
        grad_entropy,
        hidden,
        Head(weight, bias, logit_scale, softcap, temperature),
        labels,
        scored_index,
        entropy,
        row_stats,
        residual,
        hidden_rows,
        Needs(hidden_grad, weight_grad, bias_grad),
        ignore_index=ignore_index,
        max_tile_bytes=max_tile_bytes,
    )


@_linear_logprob_backward.register_fake
def _(
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(hidden, weight, bias, *rest[-3:])


def empty_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a head's three inputs by shape alone, in their dtypes or one given, empty for what does not ask."""
    return (
        torch.empty_like(hidden, dtype=dtype) if hidden_grad else hidden.new_empty(0),
        weight.new_empty(weight.shape if weight_grad else 0, dtype=dtype if weight_grad else None),
        torch.empty_like(bias, dtype=dtype) if bias_grad and bias is not None else weight.new_empty(0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, scored_index, *constants, _, _, max_tile_bytes, _, _, _, _ = inputs
    _, entropy, top1, mean_logit, row_stats, residual, hidden_rows = output
    ctx.save_for_backward(hidden, weight, bias, labels, scored_index, entropy, row_stats, residual, hidden_rows)
    ctx.constants = (*constants, max_tile_bytes)
    ctx.has_entropy = entropy.shape == labels.shape
    ctx.mark_non_differentiable(top1, mean_logit, row_stats, residual, hidden_rows)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad[:3]
    if not ctx.has_entropy:
        grad_entropy = None
    if grad_logp is None and grad_entropy is None:
        return (None,) * 16
    grads = _linear_logprob_backward(grad_logp, grad_entropy, *ctx.saved_tensors, *ctx.constants, *needs)
    return (*(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), *[None] * 13)


_linear_logprob.register_autograd(_backward, setup_context=_save)
checks.refuse_second_derivative("linear_logprob", _linear_logprob_backward)
