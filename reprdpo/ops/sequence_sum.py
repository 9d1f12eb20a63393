"""Sums or means of token values over the sequences of a packed batch.

Shape suffixes: N tokens, S sequences.
"""

from typing import Any

import torch
from torch import Tensor

from reprdpo.ops import checks, reference


def sequence_sum(
    token_logprob: Tensor,
    *,
    sequence_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_sequences: int | None = None,
    average: bool = False,
) -> Tensor:
    """Sum, or mean, of each sequence's tokens; an empty sequence has 0, its mean too.

    The same numbers come out run to run on every device: tokens are sorted by sequence, stably, and added in their
    order in float64; there are no atomics.

    Args:
        token_logprob: ``[N]`` float32, bfloat16, float16 or float64.
        sequence_ids: ``[N]`` integers, sorted or not; an id outside [0, num_sequences) puts a token in no sequence.
        cu_seqlens: ``[S + 1]`` integers, sequence s being tokens ``cu_seqlens[s]`` to ``cu_seqlens[s + 1] - 1``;
            boundaries are clamped to [0, N]. Exactly one of ``sequence_ids`` and ``cu_seqlens`` is given.
        num_sequences: S; required with ``sequence_ids``.
        average: divide by the number of tokens.

    Returns:
        ``[S]`` float32 (float64 from float64), differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, or both or neither layout given.
    """
    checks.check_float_dtype("token_logprob", token_logprob)
    checks.check_rank("token_logprob", token_logprob, 1, meaning="[N]")
    if (sequence_ids is None) == (cu_seqlens is None):
        raise ValueError("give exactly one of sequence_ids and cu_seqlens")
    if sequence_ids is not None:
        checks.check_integer_dtype("sequence_ids", sequence_ids)
        checks.check_shape("sequence_ids", sequence_ids, token_logprob.shape, meaning="[N]")
        checks.check_integer("num_sequences", num_sequences, minimum=0)
    if cu_seqlens is not None:
        checks.check_integer_dtype("cu_seqlens", cu_seqlens)
        checks.check_rank("cu_seqlens", cu_seqlens, 1, meaning="[S + 1]")
        if cu_seqlens.shape[0] == 0 or num_sequences not in (None, cu_seqlens.shape[0] - 1):
            wanted = "at least 1" if num_sequences is None else f"num_sequences + 1 = {num_sequences + 1}"
            raise ValueError(f"cu_seqlens must have {wanted} entries, not {cu_seqlens.shape[0]}")
        num_sequences = cu_seqlens.shape[0] - 1
    checks.check_same_device(token_logprob=token_logprob, sequence_ids=sequence_ids, cu_seqlens=cu_seqlens)
    assert num_sequences is not None
    return _sequence_sum(token_logprob, sequence_ids, cu_seqlens, num_sequences, average)


@torch.library.custom_op("reprdpo::sequence_sum", mutates_args=())
def _sequence_sum(
    token_logprob: Tensor, sequence_ids: Tensor | None, cu_seqlens: Tensor | None, num_sequences: int, average: bool
) -> Tensor:
    layout = reference.segments(token_logprob.shape[0], num_sequences, sequence_ids, cu_seqlens)
    return reference.sequence_sum(token_logprob, layout, average=average)


@_sequence_sum.register_fake
def _(
    token_logprob: Tensor, sequence_ids: Tensor | None, cu_seqlens: Tensor | None, num_sequences: int, average: bool
) -> Tensor:
    return token_logprob.new_empty(num_sequences, dtype=reference.compute_dtype(token_logprob))


@torch.library.custom_op("reprdpo::sequence_sum_backward", mutates_args=())
def _sequence_sum_backward(
    grad: Tensor, sequence_ids: Tensor | None, cu_seqlens: Tensor | None, num_tokens: int, average: bool
) -> Tensor:
    layout = reference.segments(num_tokens, grad.shape[0], sequence_ids, cu_seqlens)
    return reference.sequence_sum_backward(grad, layout, num_tokens, average=average)


@_sequence_sum_backward.register_fake
def _(grad: Tensor, sequence_ids: Tensor | None, cu_seqlens: Tensor | None, num_tokens: int, average: bool) -> Tensor:
    return grad.new_empty(num_tokens)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    token_logprob, sequence_ids, cu_seqlens, _, ctx.average = inputs
    ctx.save_for_backward(sequence_ids, cu_seqlens)
    ctx.num_tokens, ctx.dtype = token_logprob.shape[0], token_logprob.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_N = _sequence_sum_backward(grad, *ctx.saved_tensors, ctx.num_tokens, ctx.average)
    return grad_N.to(ctx.dtype), None, None, None, None


_sequence_sum.register_autograd(_backward, setup_context=_save)
checks.refuse_second_derivative("sequence_sum", _sequence_sum_backward)
