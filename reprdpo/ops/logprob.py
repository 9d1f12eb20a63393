"""Log-probabilities of labels under logits that exist already.

Shape suffixes: N tokens, n tokens of a tile, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from reprdpo.ops import backend, checks, reference
from reprdpo.ops.backend import Backend
from reprdpo.ops.head_tiles import default_tile_bytes, triton_kernels

backend.declare("logprob", cpu=("native",), cuda=("triton",))


def logprob(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
) -> Tensor:
    """Log-probability of each label under ``softmax(logits / temperature)``, computed in float32, 0 where ignored.

    ``log p_y = -log1p(S_-y exp(m - z_y))`` as in :func:`reprdpo.ops.linear_logprob`, which needs no logits.

    Args:
        logits: ``[..., V]`` float32, bfloat16, float16 or float64; upcast a tile of rows at a time.
        labels: ``[...]`` integers, aligned with ``logits`` (already shifted).
        ignore_index: rows with this label return 0 and get no gradient, whatever they hold.
        inplace_backward: write the gradient over the logits, which saves their size; for logits that nothing else reads
            after the backward begins. A second backward through them raises. Without effect under ``torch.compile``,
            which plans its own memory, and on logits that are not contiguous.

    Returns:
        ``[...]`` float32 (float64 from float64). A label outside [0, V) gives NaN in its row.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, or a non-finite scalar.
    """
    checks.check_float_dtype("logits", logits)
    checks.check_integer_dtype("labels", labels)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be [..., V] with V > 0, not {list(logits.shape)}")
    checks.check_shape("labels", labels, logits.shape[:-1], meaning="logits' without V")
    checks.check_same_device(logits=logits, labels=labels)
    checks.check_finite_scalar("temperature", temperature, positive=True)
    checks.check_integer("ignore_index", ignore_index)
    logp_N, _ = _logprob(
        logits.reshape(-1, logits.shape[-1]),
        labels.reshape(-1).long().contiguous(),
        float(temperature),
        ignore_index,
        inplace_backward and logits.is_contiguous() and not torch.compiler.is_compiling(),
    )
    return logp_N.reshape(labels.shape)


def _select(logits_NV: Tensor) -> Backend:
    """The backend; kernels read logits in rows."""
    kind = backend.select("logprob", logits_NV)
    return kind if logits_NV.stride(1) == 1 or logits_NV.shape[1] == 1 else "reference"


def _tiles(logits_NV: Tensor, labels_N: Tensor, ignore_index: int) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Rows, their logits as a fresh tensor in the compute dtype, labels, and where these are ignored (a zero row)."""
    dtype = reference.compute_dtype(logits_NV)
    step = max(1, default_tile_bytes(logits_NV.device) // (logits_NV.shape[1] * dtype.itemsize))
    for start in range(0, logits_NV.shape[0], step):
        rows = slice(start, start + step)
        ignored_n = labels_N[rows] == ignore_index
        tile_nV = logits_NV[rows].to(dtype, copy=True).masked_fill_(ignored_n.unsqueeze(1), 0)
        yield rows, tile_nV, labels_N[rows].masked_fill(ignored_n, 0), ignored_n


def _write_gradient(
    out_NV: Tensor,
    grad_logp_N: Tensor,
    logits_NV: Tensor,
    labels_N: Tensor,
    row_stats_3N: Tensor,
    temperature: float,
    ignore_index: int,
) -> None:
    """Gradient of the logits into ``out_NV``, which may be the logits themselves."""
    arguments = (grad_logp_N.contiguous(), logits_NV, labels_N, row_stats_3N, temperature, ignore_index, out_NV)
    kind = _select(logits_NV)
    if kind == "native":
        torch.ops.reprdpo_native.logprob_backward(*arguments)
        return
    if kind == "triton":
        triton_kernels("logprob").logprob_backward(*arguments)
        return
    for rows, tile_nV, labels_n, ignored_n in _tiles(logits_NV, labels_N, ignore_index):
        grad_nV = reference.token_logprob_backward(
            tile_nV.div_(temperature),
            labels_n,
            row_stats_3N[:, rows],
            grad_logp_N[rows].masked_fill(ignored_n, 0),
        )
        out_NV[rows] = grad_nV.div_(temperature)


@torch.library.custom_op("reprdpo::logprob", mutates_args=())
def _logprob(
    logits: Tensor, labels: Tensor, temperature: float, ignore_index: int, inplace_backward: bool
) -> tuple[Tensor, Tensor]:
    kind = _select(logits)
    if kind == "native":
        return torch.ops.reprdpo_native.logprob(logits, labels, temperature, ignore_index)
    if kind == "triton":
        return triton_kernels("logprob").logprob_forward(logits, labels, temperature, ignore_index)
    logp_N, row_stats_3N = _empty_outputs(logits)
    for rows, tile_nV, labels_n, ignored_n in _tiles(logits, labels, ignore_index):
        tile = reference.token_logprob(tile_nV.div_(temperature), labels_n)
        logp_N[rows] = tile.logp.masked_fill_(ignored_n, 0)
        row_stats_3N[:, rows] = tile.row_stats
    return logp_N, row_stats_3N


@_logprob.register_fake
def _(
    logits: Tensor, labels: Tensor, temperature: float, ignore_index: int, inplace_backward: bool
) -> tuple[Tensor, Tensor]:
    return _empty_outputs(logits)


def _empty_outputs(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    dtype, num_tokens = reference.compute_dtype(logits_NV), logits_NV.shape[0]
    return logits_NV.new_empty(num_tokens, dtype=dtype), logits_NV.new_empty(3, num_tokens, dtype=dtype)


@torch.library.custom_op("reprdpo::logprob_backward", mutates_args=())
def _logprob_backward(
    grad_logp: Tensor, logits: Tensor, labels: Tensor, row_stats: Tensor, temperature: float, ignore_index: int
) -> Tensor:
    grad_NV = torch.empty_like(logits)
    _write_gradient(grad_NV, grad_logp, logits, labels, row_stats, temperature, ignore_index)
    return grad_NV


@_logprob_backward.register_fake
def _(
    grad_logp: Tensor, logits: Tensor, labels: Tensor, row_stats: Tensor, temperature: float, ignore_index: int
) -> Tensor:
    return torch.empty_like(logits)


@torch.library.custom_op("reprdpo::logprob_backward_", mutates_args={"logits"})
def _logprob_backward_inplace(
    grad_logp: Tensor, logits: Tensor, labels: Tensor, row_stats: Tensor, temperature: float, ignore_index: int
) -> None:
    _write_gradient(logits, grad_logp, logits, labels, row_stats, temperature, ignore_index)


@_logprob_backward_inplace.register_fake
def _(
    grad_logp: Tensor, logits: Tensor, labels: Tensor, row_stats: Tensor, temperature: float, ignore_index: int
) -> None:
    return None


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, labels, *ctx.constants, ctx.inplace = inputs
    ctx.save_for_backward(logits, labels, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_logp: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    logits, labels, row_stats = ctx.saved_tensors
    if ctx.inplace and not torch.is_grad_enabled():  # what is written in place refuses no second derivative
        logits = logits.detach()
        _logprob_backward_inplace(grad_logp, logits, labels, row_stats, *ctx.constants)
        grad = logits
    else:
        grad = _logprob_backward(grad_logp, logits, labels, row_stats, *ctx.constants)
    return grad, None, None, None, None


_logprob.register_autograd(_backward, setup_context=_save)
checks.refuse_second_derivative("logprob", _logprob_backward)
