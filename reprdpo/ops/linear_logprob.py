"""Log-probabilities of labels straight from hidden states and lm_head, the logits living one tile at a time.

Shape suffixes: N tokens, n tokens of a tile, D hidden size, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reprdpo.ops import backend, checks, reference
from reprdpo.ops.reference import Head, HeadGradients

backend.declare("linear_logprob")


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
) -> Tensor | LinearLogprob:
    """Log-probability of each label under ``softmax(z)``, without holding the logits of more than a tile of rows.

    ``z = softcap * tanh(logit_scale * (h W^T + b) / softcap) / temperature``; ``log p_y = -log1p(S_-y exp(m - z_y))``
    with m = max z and S_-y the sum of exp(z_j - m) over j != y, so that neither log p nor its gradient
    ``dh = c (S_-y / S) W[y] - (c / S) sum over j != y of exp(z_j - m) W[j]`` cancels as p_y goes to 1.

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
            computed.
        max_tile_bytes: bound on logits, what is made of them, and upcast blocks of a half-precision weight, all
            alive at once (gradients not counted); default 256 MiB on the CPU, and on CUDA the larger of 1 GiB and 1/32
            of the device's memory.

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
    flat_labels_N = labels.reshape(-1).long()
    if scored_index is None:
        scored_index = find_scored(flat_labels_N, ignore_index)
    logp_N, entropy_N, top1_N, mean_logit_N, _ = _linear_logprob(
        hidden.reshape(-1, hidden.shape[-1]),
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
    check_integer("ignore_index", ignore_index)
    if max_tile_bytes is not None:
        check_integer("max_tile_bytes", max_tile_bytes, minimum=1)


def check_integer(name: str, value: Any, minimum: int | None = None) -> None:
    """``TypeError`` unless ``value`` is an int, ``ValueError`` where it is under ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, not {value}")


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


def as_autocast_would(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden and weight in one dtype: autocast's where it is on, else the half-precision one; float64 wins."""
    kind = hidden.device.type
    if torch.float64 in (hidden.dtype, weight.dtype):
        dtype = torch.float64
    elif torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    elif hidden.dtype == weight.dtype or weight.dtype == torch.float32:
        dtype = hidden.dtype
    else:
        dtype = weight.dtype if hidden.dtype == torch.float32 else torch.float32
    return hidden.to(dtype), weight.to(dtype)


def find_scored(labels_N: Tensor, ignore_index: int) -> Tensor | None:
    """Positions of scored labels, found once for both passes; None leaves it to each pass (compiling, capturing)."""
    if torch.compiler.is_compiling() or _capturing(labels_N):
        return None
    return (labels_N != ignore_index).nonzero().squeeze(1)


# The schedule: tiles of rows whose logits are made in the forward and made again in the backward


class TokenOutputs(NamedTuple):
    """Per token, 0 where not scored; a quantity not asked for is empty. ``row_stats`` is [3, N]: max z, S_-y, S."""

    logp: Tensor
    entropy: Tensor
    top1: Tensor
    mean_logit: Tensor
    row_stats: Tensor


def empty_outputs(hidden_ND: Tensor, *, entropy: bool, stats: bool) -> TokenOutputs:
    """The outputs of a forward over ``hidden_ND``, all zero."""
    num_tokens, dtype = hidden_ND.shape[0], reference.compute_dtype(hidden_ND)
    return TokenOutputs(
        hidden_ND.new_zeros(num_tokens, dtype=dtype),
        hidden_ND.new_zeros(num_tokens if entropy else 0, dtype=dtype),
        hidden_ND.new_zeros(num_tokens if stats else 0, dtype=dtype),
        hidden_ND.new_zeros(num_tokens if stats else 0, dtype=dtype),
        hidden_ND.new_zeros(3, num_tokens, dtype=dtype),
    )


def forward_tiles(
    hidden_ND: Tensor,
    head: Head,
    labels_N: Tensor,
    scored_index: Tensor | None,
    *,
    ignore_index: int,
    entropy: bool,
    stats: bool,
    max_tile_bytes: int | None,
) -> TokenOutputs:
    """One matmul over the scored rows, tile by tile."""
    out = empty_outputs(hidden_ND, entropy=entropy, stats=stats)
    plan = plan_tiles(hidden_ND, head, entropy=entropy, max_tile_bytes=max_tile_bytes)

    # A function, so that a tile's tensors are gone before the next tile's are made.
    def run(index_n: Tensor) -> None:
        hidden_nD, labels_n, ignored_n = _gather(hidden_ND, labels_N, index_n, ignore_index)
        logits_nV = reference.head_logits(hidden_nD, head, block=plan.weight_block)
        if stats:
            hit_n = (logits_nV.argmax(1) == labels_n).to(logits_nV.dtype)
            out.top1[index_n] = hit_n.masked_fill_(ignored_n, 0)
            out.mean_logit[index_n] = logits_nV.mean(1).masked_fill_(ignored_n, 0)
        tile = reference.token_logprob(logits_nV, labels_n, entropy=entropy)
        out.logp[index_n] = tile.logp.masked_fill_(ignored_n, 0)
        out.row_stats[:, index_n] = tile.row_stats
        if tile.entropy is not None:
            out.entropy[index_n] = tile.entropy.masked_fill_(ignored_n, 0)

    with torch.amp.autocast(hidden_ND.device.type, enabled=False):
        for index_n in _tile_rows(labels_N, scored_index, ignore_index, plan.rows):
            run(index_n)
    return out


def backward_tiles(
    grad_logp_N: Tensor | None,
    grad_entropy_N: Tensor | None,
    hidden_ND: Tensor,
    head: Head,
    labels_N: Tensor,
    scored_index: Tensor | None,
    entropy_N: Tensor,
    row_stats_3N: Tensor,
    *,
    ignore_index: int,
    max_tile_bytes: int | None,
    hidden_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits again, and a matmul for each of hidden and weight that asks; an empty tensor for what does not.

    Weight and bias gradients are added up over the tiles in the compute dtype and rounded once.
    """
    dtype, weight_VD, bias_V = row_stats_3N.dtype, head.weight, head.bias
    hidden_grad_ND = torch.zeros_like(hidden_ND) if hidden_grad else hidden_ND.new_empty(0)
    head_grads = HeadGradients(
        torch.zeros_like(weight_VD, dtype=dtype) if weight_grad else None,
        torch.zeros_like(bias_V, dtype=dtype) if bias_grad and bias_V is not None else None,
    )
    with_entropy = grad_entropy_N is not None
    plan = plan_tiles(hidden_ND, head, entropy=with_entropy, max_tile_bytes=max_tile_bytes)

    def run(index_n: Tensor) -> None:
        hidden_nD, labels_n, ignored_n = _gather(hidden_ND, labels_N, index_n, ignore_index)
        hidden_grad_nD = reference.linear_logprob_backward(
            hidden_nD,
            head,
            labels_n,
            row_stats_3N[:, index_n],
            None if grad_logp_N is None else grad_logp_N[index_n].masked_fill_(ignored_n, 0),
            head_grads,
            hidden_grad=hidden_grad,
            entropy_N=entropy_N[index_n] if with_entropy else None,
            grad_entropy_N=None if grad_entropy_N is None else grad_entropy_N[index_n].masked_fill_(ignored_n, 0),
            block=plan.weight_block,
        )
        if hidden_grad_nD is not None:
            hidden_grad_ND[index_n] = hidden_grad_nD.to(hidden_ND.dtype)

    with torch.amp.autocast(hidden_ND.device.type, enabled=False):
        for index_n in _tile_rows(labels_N, scored_index, ignore_index, plan.rows):
            run(index_n)
    weight_out, bias_out = head_grads
    return (
        hidden_grad_ND,
        weight_VD.new_empty(0) if weight_out is None else weight_out.to(weight_VD.dtype),
        weight_VD.new_empty(0) if bias_out is None or bias_V is None else bias_out.to(bias_V.dtype),
    )


class TilePlan(NamedTuple):
    """Rows whose logits are alive at once, and rows of a half-precision weight upcast at once."""

    rows: int
    weight_block: int


def plan_tiles(hidden_ND: Tensor, head: Head, *, entropy: bool, max_tile_bytes: int | None) -> TilePlan:
    """Tiles within the budget: a row holds its logits once, once more for a softcap's slope and for entropy each.

    Raises:
        ValueError: the budget holds not even one row, or one upcast row of the weight.
    """
    budget = default_tile_bytes(hidden_ND.device) if max_tile_bytes is None else max_tile_bytes
    vocabulary, width = head.weight.shape
    dtype = reference.compute_dtype(hidden_ND)
    upcast_bytes = 0 if hidden_ND.dtype == dtype else max(1, width) * dtype.itemsize
    row_bytes = vocabulary * dtype.itemsize * (1 + (head.softcap is not None) + entropy) + upcast_bytes
    if budget < row_bytes + upcast_bytes:
        raise ValueError(
            f"max_tile_bytes = {budget} is too small for one row of logits over a vocabulary of {vocabulary}; "
            f"give at least {row_bytes + upcast_bytes}"
        )
    block = vocabulary
    if upcast_bytes:
        block = min(vocabulary, max(1, min(budget // 4, budget - row_bytes) // upcast_bytes))
    return TilePlan((budget - block * upcast_bytes) // row_bytes, block)


def default_tile_bytes(device: torch.device) -> int:
    """256 MiB on the CPU; on CUDA the larger of 1 GiB and 1/32 of the device's memory."""
    if device.type == "cuda":
        return max(2**30, torch.cuda.get_device_properties(device).total_memory // 32)
    return 2**28


def _tile_rows(labels_N: Tensor, scored_index: Tensor | None, ignore_index: int, rows: int) -> Iterator[Tensor]:
    if scored_index is None:
        every_row = _capturing(labels_N)
        scored_index = (
            torch.arange(labels_N.shape[0], device=labels_N.device)
            if every_row
            else (labels_N != ignore_index).nonzero().squeeze(1)
        )
    yield from scored_index.split(rows) if scored_index.shape[0] else ()


def _gather(hidden_ND: Tensor, labels_N: Tensor, index_n: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of a tile; one whose label is ignored becomes a zero row of label 0, so that nothing in it can leak."""
    labels_n = labels_N[index_n]
    ignored_n = labels_n == ignore_index
    return hidden_ND[index_n].masked_fill_(ignored_n.unsqueeze(1), 0), labels_n.masked_fill_(ignored_n, 0), ignored_n


def _capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


# Registration


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    backend.select("linear_logprob", hidden)
    return forward_tiles(
        hidden,
        Head(weight, bias, logit_scale, softcap, temperature),
        labels,
        scored_index,
        ignore_index=ignore_index,
        entropy=return_entropy,
        stats=return_stats,
        max_tile_bytes=max_tile_bytes,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return empty_outputs(hidden, entropy=return_entropy, stats=return_stats)


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
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    max_tile_bytes: int | None,
    hidden_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    backend.select("linear_logprob", hidden)
    return backward_tiles(
        grad_logp,
        grad_entropy,
        hidden,
        Head(weight, bias, logit_scale, softcap, temperature),
        labels,
        scored_index,
        entropy,
        row_stats,
        ignore_index=ignore_index,
        max_tile_bytes=max_tile_bytes,
        hidden_grad=hidden_grad,
        weight_grad=weight_grad,
        bias_grad=bias_grad,
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
    hidden: Tensor, weight: Tensor, bias: Tensor | None, hidden_grad: bool, weight_grad: bool, bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a head's three inputs by shape alone, empty for what does not ask."""
    return (
        torch.empty_like(hidden) if hidden_grad else hidden.new_empty(0),
        torch.empty_like(weight) if weight_grad else weight.new_empty(0),
        torch.empty_like(bias) if bias_grad and bias is not None else weight.new_empty(0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, scored_index, *constants, _, _, max_tile_bytes = inputs
    _, entropy, top1, mean_logit, row_stats = output
    ctx.save_for_backward(hidden, weight, bias, labels, scored_index, entropy, row_stats)
    ctx.constants = (*constants, max_tile_bytes)
    ctx.has_entropy = entropy.shape == labels.shape
    ctx.mark_non_differentiable(top1, mean_logit, row_stats)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad[:3]
    grads = _linear_logprob_backward(
        grad_logp, grad_entropy if ctx.has_entropy else None, *ctx.saved_tensors, *ctx.constants, *needs
    )
    return (*(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), *[None] * 9)


_linear_logprob.register_autograd(_backward, setup_context=_save)
