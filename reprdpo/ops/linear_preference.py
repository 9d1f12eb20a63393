"""Preference loss straight from hidden states and lm_head, in one op.

Shape suffixes: N tokens, D hidden size, V vocabulary, P pairs, S = 2P sequences, all chosen and then all rejected.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from reprdpo.ops import backend, checks, reference
from reprdpo.ops.linear_logprob import (
    as_autocast_would,
    backward_tiles,
    check_head_arguments,
    check_integer,
    check_scored_index,
    empty_gradients,
    empty_outputs,
    find_scored,
    forward_tiles,
)
from reprdpo.ops.preference_loss import check_loss, check_references, confidence_per_pair
from reprdpo.ops.reference import Head, PairBatch, PairTerms, Segments

backend.declare("linear_preference_loss")


class SequenceStats(NamedTuple):
    """Means over a sequence's scored tokens, each [S], 0 where it has none: entropy in nats, top-1 hits, mean logit."""

    entropy: Tensor
    top1_accuracy: Tensor
    mean_logit: Tensor


class LinearPreferenceLoss(NamedTuple):
    """The loss, differentiable, and float32 detached log-probs (summed), rewards, each [P], and stats."""

    loss: Tensor
    chosen_logp: Tensor
    rejected_logp: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor
    stats: SequenceStats | None


def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ref_chosen_logp: Tensor | None = None,
    ref_rejected_logp: Tensor | None = None,
    beta: float,
    confidence: float | Tensor = 1.0,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    simpo_gamma: float = 0.5,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
    scored_index: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    shift: bool = False,
    reduction: Literal["mean", "sum", "none"] = "mean",
    return_stats: bool = False,
    max_tile_bytes: int | None = None,
) -> LinearPreferenceLoss:
    """:func:`linear_logprob`, summed by sequence, into :func:`preference_loss`; see there for the formulas.

    Gradients flow to hidden, weight and bias. Response lengths, where a loss averages, are counted here. An empty
    response has log-prob 0 and no gradient.

    Args:
        hidden: ``[S, T, D]`` padded, or ``[N, D]`` packed with ``sequence_ids`` and ``num_sequences``; S = 2P, all
            chosen and then all rejected.
        weight: ``[V, D]``; bias: ``[V]`` or None.
        labels: ``[S, T]`` or ``[N]`` integers, aligned with ``hidden``, unless ``shift``.
        ref_chosen_logp, ref_rejected_logp, confidence, loss_type, loss_weights, simpo_gamma: as ``preference_loss``.
        sequence_ids: ``[N]`` the sequence of each packed token; an id outside [0, num_sequences) is in none.
        scored_index: flat positions in ``hidden`` of all labels that, after any shift, are not ignored; saves a
            synchronisation.
        shift: the label at a position is the token there, not the next: it is scored from the position before it,
            within its sequence, whose tokens must lie side by side where packed. The first label is not scored.
        reduction: over pairs; the mean of no pairs is 0.
        return_stats: also return :class:`SequenceStats`, from the same pass.
        logit_scale, softcap, temperature, ignore_index, max_tile_bytes: as ``linear_logprob``.

    Returns:
        :class:`LinearPreferenceLoss`; ``loss`` is a scalar, or ``[P]`` for "none".

    Raises:
        TypeError, ValueError: what ``linear_logprob`` and ``preference_loss`` refuse, an odd number of sequences,
            packed hidden states without their sequences, or padded ones with them.
    """
    check_head_arguments(hidden, weight, labels, bias, logit_scale, softcap, temperature, ignore_index, max_tile_bytes)
    checks.check_choice("reduction", reduction, ("mean", "sum", "none"))
    loss_types, weights = check_loss(loss_type, loss_weights, beta, confidence, simpo_gamma)
    sequence_ids_N, num_sequences = _sequences(hidden, labels, sequence_ids, num_sequences)
    pairs = num_sequences // 2
    check_references(loss_types, ref_chosen_logp, ref_rejected_logp, hidden, pairs)
    confidence_P = confidence_per_pair(confidence, hidden, pairs)
    check_scored_index(scored_index, labels)
    hidden, weight = as_autocast_would(hidden, weight)
    labels_N = labels.reshape(-1).long()
    if shift:
        labels_N = _next_labels(labels_N, sequence_ids_N, ignore_index)
    if scored_index is None:
        scored_index = find_scored(labels_N, ignore_index)
    loss, logp_S, reward_S, stats_3S, *_ = _linear_preference_loss(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        labels_N,
        sequence_ids_N,
        scored_index,
        ref_chosen_logp,
        ref_rejected_logp,
        confidence_P,
        num_sequences,
        float(beta),
        loss_types,
        weights,
        float(simpo_gamma),
        reduction,
        float(logit_scale),
        None if softcap is None else float(softcap),
        float(temperature),
        ignore_index,
        return_stats,
        max_tile_bytes,
    )
    stats = SequenceStats(*stats_3S.unbind()) if return_stats else None
    return LinearPreferenceLoss(loss, logp_S[:pairs], logp_S[pairs:], reward_S[:pairs], reward_S[pairs:], stats)


def _sequences(
    hidden: Tensor, labels: Tensor, sequence_ids: Tensor | None, num_sequences: int | None
) -> tuple[Tensor, int]:
    """The sequence of each token, [N], and S."""
    checks.check_rank("hidden", hidden, 2, 3, meaning="[S, T, D] or [N, D]")
    checks.check_shape("labels", labels, hidden.shape[:-1], meaning="hidden's without D")
    if hidden.dim() == 3:
        if sequence_ids is not None or num_sequences is not None:
            raise ValueError("sequence_ids and num_sequences go with packed hidden [N, D], not with padded [S, T, D]")
        num_sequences, length = hidden.shape[:2]
        sequence_ids = torch.arange(num_sequences, device=hidden.device).repeat_interleave(length)
    elif sequence_ids is None or num_sequences is None:
        raise ValueError("packed hidden [N, D] needs sequence_ids and num_sequences")
    checks.check_integer_dtype("sequence_ids", sequence_ids)
    checks.check_shape("sequence_ids", sequence_ids, hidden.reshape(-1, hidden.shape[-1]).shape[:1], meaning="[N]")
    checks.check_same_device(hidden=hidden, sequence_ids=sequence_ids)
    check_integer("num_sequences", num_sequences, minimum=0)
    if num_sequences % 2:
        raise ValueError(f"the number of sequences must be even, chosen and then rejected, not {num_sequences}")
    return sequence_ids.long(), num_sequences


def _next_labels(labels_N: Tensor, sequence_ids_N: Tensor, ignore_index: int) -> Tensor:
    """The label of the next token of the same sequence, ignored where there is none."""
    shifted_N = torch.full_like(labels_N, ignore_index)
    same = sequence_ids_N[1:] == sequence_ids_N[:-1]
    shifted_N[:-1] = torch.where(same, labels_N[1:], ignore_index)
    return shifted_N


def _segments(labels: Tensor, sequence_ids: Tensor, num_sequences: int, ignore_index: int) -> Segments:
    """Scored tokens by sequence."""
    scored_ids_N = torch.where(labels == ignore_index, -1, sequence_ids)
    return reference.segments(labels.shape[0], num_sequences, scored_ids_N, None)


def _terms(logp_S: Tensor, lengths_S: Tensor, constants: tuple[Any, ...]) -> PairTerms:
    ref_chosen_logp, ref_rejected_logp, confidence, beta, loss_types, loss_weights, simpo_gamma = constants
    pairs = logp_S.shape[0] // 2
    batch = PairBatch(
        logp_S[:pairs],
        logp_S[pairs:],
        ref_chosen_logp,
        ref_rejected_logp,
        confidence,
        lengths_S[:pairs],
        lengths_S[pairs:],
    )
    return reference.preference_terms(
        batch, beta=beta, loss_types=loss_types, loss_weights=loss_weights, simpo_gamma=simpo_gamma
    )


_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor sequence_ids, Tensor? scored_index, "
    "Tensor? ref_chosen_logp, Tensor? ref_rejected_logp, Tensor confidence, int num_sequences, float beta, "
    "str[] loss_types, float[] loss_weights, float simpo_gamma, str reduction, float logit_scale, float? softcap, "
    "float temperature, int ignore_index"
)


@torch.library.custom_op(
    "reprdpo::linear_preference_loss",
    mutates_args=(),
    schema=f"({_INPUTS}, bool return_stats, int? max_tile_bytes) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    sequence_ids: Tensor,
    scored_index: Tensor | None,
    ref_chosen_logp: Tensor | None,
    ref_rejected_logp: Tensor | None,
    confidence: Tensor,
    num_sequences: int,
    beta: float,
    loss_types: list[str],
    loss_weights: list[float],
    simpo_gamma: float,
    reduction: str,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    return_stats: bool,
    max_tile_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, log-probs [S], rewards [S], stats [3, S] (or empty), row stats [3, N] of ``linear_logprob``."""
    backend.select("linear_preference_loss", hidden)
    tokens = forward_tiles(
        hidden,
        Head(weight, bias, logit_scale, softcap, temperature),
        labels,
        scored_index,
        ignore_index=ignore_index,
        entropy=return_stats,
        stats=return_stats,
        max_tile_bytes=max_tile_bytes,
    )
    layout = _segments(labels, sequence_ids, num_sequences, ignore_index)
    logp_S = reference.sequence_sum(tokens.logp, layout)
    constants = (ref_chosen_logp, ref_rejected_logp, confidence, beta, loss_types, loss_weights, simpo_gamma)
    terms = _terms(logp_S, layout.offsets.diff(), constants)
    loss = terms.loss if reduction == "none" else terms.loss.sum()
    if reduction == "mean":
        loss = loss / max(1, terms.loss.shape[0])
    per_token = (tokens.entropy, tokens.top1, tokens.mean_logit) if return_stats else ()
    means = [reference.sequence_sum(values_N, layout, average=True) for values_N in per_token]
    stats_3S = torch.stack(means) if means else logp_S.new_empty(0)
    return loss, logp_S, torch.cat([terms.chosen_reward, terms.rejected_reward]), stats_3S, tokens.row_stats


@_linear_preference_loss.register_fake
def _(hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_sequences, reduction, return_stats = rest[8], rest[13], rest[18]
    row_stats_3N = empty_outputs(hidden, entropy=False, stats=False).row_stats
    return (
        row_stats_3N.new_empty((num_sequences // 2,) if reduction == "none" else ()),
        row_stats_3N.new_empty(num_sequences),
        row_stats_3N.new_empty(num_sequences),
        row_stats_3N.new_empty((3, num_sequences) if return_stats else 0),
        row_stats_3N,
    )


@torch.library.custom_op(
    "reprdpo::linear_preference_loss_backward",
    mutates_args=(),
    schema=(
        f"(Tensor grad_loss, Tensor logp, Tensor row_stats, {_INPUTS}, int? max_tile_bytes, "
        "bool hidden_grad, bool weight_grad, bool bias_grad) -> (Tensor, Tensor, Tensor)"
    ),
)
def _linear_preference_loss_backward(
    grad_loss: Tensor,
    logp: Tensor,
    row_stats: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    sequence_ids: Tensor,
    scored_index: Tensor | None,
    ref_chosen_logp: Tensor | None,
    ref_rejected_logp: Tensor | None,
    confidence: Tensor,
    num_sequences: int,
    beta: float,
    loss_types: list[str],
    loss_weights: list[float],
    simpo_gamma: float,
    reduction: str,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    max_tile_bytes: int | None,
    hidden_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    backend.select("linear_preference_loss", hidden)
    layout = _segments(labels, sequence_ids, num_sequences, ignore_index)
    constants = (ref_chosen_logp, ref_rejected_logp, confidence, beta, loss_types, loss_weights, simpo_gamma)
    terms = _terms(logp, layout.offsets.diff(), constants)
    if reduction == "mean":
        grad_loss = grad_loss / max(1, num_sequences // 2)
    grad_S = torch.cat([grad_loss * terms.chosen_slope, grad_loss * terms.rejected_slope])
    return backward_tiles(
        reference.sequence_sum_backward(grad_S, layout, labels.shape[0]),
        None,
        hidden,
        Head(weight, bias, logit_scale, softcap, temperature),
        labels,
        scored_index,
        hidden.new_empty(0),
        row_stats,
        ignore_index=ignore_index,
        max_tile_bytes=max_tile_bytes,
        hidden_grad=hidden_grad,
        weight_grad=weight_grad,
        bias_grad=bias_grad,
    )


@_linear_preference_loss_backward.register_fake
def _(
    grad_loss: Tensor,
    logp: Tensor,
    row_stats: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(hidden, weight, bias, *rest[-3:])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, logp, reward, stats, row_stats = output
    ctx.save_for_backward(logp, row_stats, *inputs[:9])
    ctx.constants = (*inputs[9:-2], inputs[-1])
    ctx.mark_non_differentiable(logp, reward, stats, row_stats)


def _backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad[:3]
    grads = _linear_preference_loss_backward(grad_loss, *ctx.saved_tensors, *ctx.constants, *needs)
    return (*(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), *[None] * 18)


_linear_preference_loss.register_autograd(_backward, setup_context=_save)
