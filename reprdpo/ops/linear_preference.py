"""Preference loss straight from hidden states and lm_head, in one op.

Shape suffixes: N tokens, D hidden size, V vocabulary, P pairs, S = 2P sequences, all chosen and then all rejected.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from reprdpo.ops import backend, checks, reference
from reprdpo.ops.backend import Backend
from reprdpo.ops.head_schedule import (
    HeadForward,
    Plan,
    empty_forward,
    find_scored,
    head_backward,
    head_forward,
    plan_head,
    planned_rows,
)
from reprdpo.ops.head_tiles import Needs, select_head, triton_kernels
from reprdpo.ops.linear_logprob import (
    as_autocast_would,
    check_head_arguments,
    check_scored_index,
    empty_gradients,
    gradient_needs,
    token_rows,
)
from reprdpo.ops.pair_schedule import kept_dtype, pair_forward
from reprdpo.ops.preference_loss import check_loss, check_references, confidence_per_pair
from reprdpo.ops.reference import Head, PairBatch
from reprdpo.ops.sparse_product import check_mass_eps

backend.declare("linear_preference_loss", cpu=("native",), cuda=("triton",))


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
    gradient_mass_eps: float | None = None,
) -> LinearPreferenceLoss:
    """:func:`linear_logprob`, summed by sequence, into :func:`preference_loss`; see there for the formulas.

    As many matmuls as there, but three beyond the budget too, where ``reduction`` is "mean" or "sum": tiles are whole
    pairs, whose gradients are finished in the forward while G is alive (finding each pair's rows synchronises once);
    only a pair that is larger than the budget by itself costs four. What is finished waits for its upstream gradient as
    float32 for float16 inputs, else in the inputs' dtype; a second backward through the same loss makes it again.

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
        logit_scale, softcap, temperature, ignore_index, max_tile_bytes, gradient_mass_eps: as ``linear_logprob``.

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
    needs = gradient_needs(hidden, weight, bias)
    check_mass_eps(gradient_mass_eps, needs)
    labels_N = labels.reshape(-1).long()
    if shift:
        labels_N = _next_labels(labels_N, sequence_ids_N, ignore_index)
    if scored_index is None:
        scored_index = find_scored(labels_N, ignore_index)
    loss, logp_S, reward_S, _, stats_3S, *_ = _linear_preference_loss(
        token_rows(hidden, labels.numel()),
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
        *needs,
        None if gradient_mass_eps is None else float(gradient_mass_eps),
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
        sequence_ids = torch.arange(num_sequences, device=hidden.device).unsqueeze(1).expand(-1, length).reshape(-1)
    elif sequence_ids is None or num_sequences is None:
        raise ValueError("packed hidden [N, D] needs sequence_ids and num_sequences")
    checks.check_integer_dtype("sequence_ids", sequence_ids)
    checks.check_shape("sequence_ids", sequence_ids, (labels.numel(),), meaning="[N]")
    checks.check_same_device(hidden=hidden, sequence_ids=sequence_ids)
    checks.check_integer("num_sequences", num_sequences, minimum=0)
    if num_sequences % 2:
        raise ValueError(f"the number of sequences must be even, chosen and then rejected, not {num_sequences}")
    return sequence_ids.long(), num_sequences


def _next_labels(labels_N: Tensor, sequence_ids_N: Tensor, ignore_index: int) -> Tensor:
    """The label of the next token of the same sequence, ignored where there is none."""
    shifted_N = torch.full_like(labels_N, ignore_index)
    same = sequence_ids_N[1:] == sequence_ids_N[:-1]
    shifted_N[:-1] = torch.where(same, labels_N[1:], ignore_index)
    return shifted_N


class SequenceTerms(NamedTuple):
    """By pair the loss [P]; by sequence [S] log-prob, reward, the loss's derivative by the log-prob; means [3, S]."""

    loss: Tensor
    logp: Tensor
    reward: Tensor
    slope: Tensor
    means: Tensor


class LossOptions(NamedTuple):
    """What a preference loss is besides a function of log-probs."""

    ref_chosen_logp: Tensor | None
    ref_rejected_logp: Tensor | None
    confidence: Tensor
    beta: float
    loss_types: list[str]
    loss_weights: list[float]
    simpo_gamma: float

    def of(self, pairs: slice) -> "LossOptions":
        """The same for some of the pairs."""
        chosen, rejected = self.ref_chosen_logp, self.ref_rejected_logp
        return self._replace(
            ref_chosen_logp=None if chosen is None else chosen[pairs],
            ref_rejected_logp=None if rejected is None else rejected[pairs],
            confidence=self.confidence[pairs],
        )


def _sequence_terms(
    kind: Backend,
    logp_N: Tensor,
    sequence_ids_N: Tensor,
    labels_N: Tensor,
    options: LossOptions,
    ignore_index: int,
    token_stats: tuple[Tensor, ...] = (),
) -> SequenceTerms:
    """The scalar stage, from token log-probs to the loss of each pair and its slopes."""
    scalars: dict[str, Any] = dict(zip(LossOptions._fields[3:], options[3:], strict=True))
    if kind == "triton":
        terms = triton_kernels("preference_loss").sequence_preference_loss_forward(
            *(logp_N, sequence_ids_N, labels_N, *options[:3]),
            **scalars,
            ignore_index=ignore_index,
            token_stats_3N=torch.stack(token_stats) if token_stats else None,
        )
        return SequenceTerms(terms.loss, terms.logp, terms.reward, terms.slope, terms.means)
    pairs = options.confidence.shape[0]
    scored_ids_N = torch.where(labels_N == ignore_index, -1, sequence_ids_N)
    layout = reference.segments(labels_N.shape[0], 2 * pairs, scored_ids_N, None)
    logp_S, length_S = reference.sequence_sum(logp_N, layout), layout.offsets.diff()
    terms = reference.preference_terms(
        PairBatch(logp_S[:pairs], logp_S[pairs:], *options[:3], length_S[:pairs], length_S[pairs:]), **scalars
    )
    means = [reference.sequence_sum(values_N, layout, average=True) for values_N in token_stats]
    return SequenceTerms(
        terms.loss,
        logp_S,
        torch.cat([terms.chosen_reward, terms.rejected_reward]),
        torch.cat([terms.chosen_slope, terms.rejected_slope]),
        torch.stack(means) if means else logp_S.new_empty(0),
    )


def _token_gradients(grad_S: Tensor, sequence_ids_N: Tensor) -> Tensor:
    """Each token's sequence's gradient, 0 for tokens of none; that of an ignored token is not looked at."""
    count = grad_S.shape[0]
    inside_N = (sequence_ids_N >= 0) & (sequence_ids_N < count)
    if count == 0:
        return grad_S.new_zeros(sequence_ids_N.shape[0])
    return grad_S[sequence_ids_N.clamp(0, count - 1)].masked_fill_(~inside_N, 0)


def _plan(
    kind: Backend,
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    scored_index: Tensor | None,
    needs: Needs,
    *,
    reduction: str,
    stats: bool,
    max_tile_bytes: int | None,
) -> Plan:
    """The head's plan, but tiles of whole pairs where it would make logits twice and upstream is one number."""
    num_rows = planned_rows(labels, scored_index)
    plan = plan_head(kind, hidden, head, num_rows, needs, entropy=stats, max_tile_bytes=max_tile_bytes)
    if plan.keep == "nothing" and any(needs) and reduction != "none":
        return plan._replace(keep="pairs", rows=plan.residual_rows)
    return plan


_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor sequence_ids, Tensor? scored_index, "
    "Tensor? ref_chosen_logp, Tensor? ref_rejected_logp, Tensor confidence, int num_sequences, float beta, "
    "str[] loss_types, float[] loss_weights, float simpo_gamma, str reduction, float logit_scale, float? softcap, "
    "float temperature, int ignore_index"
)
_NEEDS = "bool hidden_grad, bool weight_grad, bool bias_grad"


@torch.library.custom_op(
    "reprdpo::linear_preference_loss",
    mutates_args=(),
    schema=f"({_INPUTS}, bool return_stats, int? max_tile_bytes, {_NEEDS}, "
    f"float? gradient_mass_eps=None) -> ({', '.join(['Tensor'] * 11)})",
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
    hidden_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
    gradient_mass_eps: float | None = None,
) -> tuple[Tensor, ...]:
    """Loss; log-probs, rewards and slopes [S]; stats [3, S] or empty; what :class:`HeadForward` keeps for the backward;
    and where the plan is "pairs", the gradients for an upstream gradient of 1."""
    kind = select_head("linear_preference_loss", hidden, weight)
    head, needs = Head(weight, bias, logit_scale, softcap, temperature), Needs(hidden_grad, weight_grad, bias_grad)
    options = LossOptions(ref_chosen_logp, ref_rejected_logp, confidence, beta, loss_types, loss_weights, simpo_gamma)
    plan = _plan(
        *(kind, hidden, head, labels, scored_index, needs),
        reduction=reduction,
        stats=return_stats,
        max_tile_bytes=max_tile_bytes,
    )
    gradients = hidden.new_empty(0), hidden.new_empty(0), hidden.new_empty(0)
    if plan.keep == "pairs":

        def slopes(logp_n: Tensor, sequence_ids_n: Tensor, labels_n: Tensor, pairs: slice) -> Tensor:
            terms = _sequence_terms(kind, logp_n, sequence_ids_n, labels_n, options.of(pairs), ignore_index)
            grad_s = _over_pairs(terms.slope, reduction, num_sequences)
            return _token_gradients(grad_s, sequence_ids_n)

        tokens, gradients = pair_forward(
            *(kind, hidden, head, labels, scored_index, sequence_ids, num_sequences, slopes, plan, needs),
            ignore_index=ignore_index,
            stats=return_stats,
        )
    else:
        tokens = head_forward(
            *(kind, hidden, head, labels, scored_index, needs),
            ignore_index=ignore_index,
            entropy=return_stats,
            stats=return_stats,
            max_tile_bytes=max_tile_bytes,
            gradient_mass_eps=gradient_mass_eps,
        )
    token_stats = (tokens.entropy, tokens.top1, tokens.mean_logit) if return_stats else ()
    terms = _sequence_terms(kind, tokens.logp, sequence_ids, labels, options, ignore_index, token_stats)
    loss = terms.loss if reduction == "none" else _over_pairs(terms.loss.sum(), reduction, num_sequences)
    return loss, *terms[1:], *_kept(tokens), *gradients


def _over_pairs(value: Tensor, reduction: str, num_sequences: int) -> Tensor:
    """The mean's division by the number of pairs; the mean of no pairs is 0."""
    return value / max(1, num_sequences // 2) if reduction == "mean" else value


def _kept(tokens: HeadForward) -> tuple[Tensor, Tensor, Tensor]:
    return tokens.row_stats, tokens.residual, tokens.hidden_rows


@_linear_preference_loss.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, _: Tensor, scored_index: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    num_sequences, reduction, logit_scale, softcap, temperature = rest[3], *rest[8:12]
    return_stats, max_tile_bytes, *flags = rest[13:18]
    kind = select_head("linear_preference_loss", hidden, weight)
    head, needs = Head(weight, bias, logit_scale, softcap, temperature), Needs(*flags)
    plan = _plan(
        *(kind, hidden, head, labels, scored_index, needs),
        reduction=reduction,
        stats=return_stats,
        max_tile_bytes=max_tile_bytes,
    )
    num_rows = planned_rows(labels, scored_index)
    tokens = empty_forward(kind, hidden, weight.shape[0], num_rows, plan, needs, entropy=False, stats=False)
    like = tokens.logp
    gradients = hidden.new_empty(0), hidden.new_empty(0), hidden.new_empty(0)
    if plan.keep == "pairs":
        gradients = empty_gradients(hidden, weight, bias, *needs, dtype=kept_dtype(hidden.dtype))
    return (
        like.new_empty((num_sequences // 2,) if reduction == "none" else ()),
        like.new_empty(num_sequences),
        like.new_empty(num_sequences),
        like.new_empty(num_sequences),
        like.new_empty((3, num_sequences) if return_stats else 0),
        *_kept(tokens),
        *gradients,
    )


@torch.library.custom_op("reprdpo::linear_preference_loss_backward", mutates_args=())
def _linear_preference_loss_backward(
    grad_loss: Tensor,
    slope: Tensor,
    row_stats: Tensor,
    residual: Tensor,
    hidden_rows: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    sequence_ids: Tensor,
    scored_index: Tensor | None,
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
    kind, pairs = select_head("linear_preference_loss", hidden, weight), slope.shape[0] // 2
    grad_S = (_over_pairs(grad_loss, reduction, 2 * pairs) * slope.view(2, pairs)).reshape(-1)
    by_sequence = kind == "triton"
    return head_backward(
        kind,
        grad_S if by_sequence else _token_gradients(grad_S, sequence_ids),
        None,
        hidden,
        Head(weight, bias, logit_scale, softcap, temperature),
        labels,
        scored_index,
        hidden.new_empty(0),
        row_stats,
        residual,
        hidden_rows,
        Needs(hidden_grad, weight_grad, bias_grad),
        ignore_index=ignore_index,
        max_tile_bytes=max_tile_bytes,
        sequence_ids_N=sequence_ids if by_sequence else None,
    )


@_linear_preference_loss_backward.register_fake
def _(
    grad_loss: Tensor,
    slope: Tensor,
    row_stats: Tensor,
    residual: Tensor,
    hidden_rows: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(hidden, weight, bias, *rest[-3:])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, logp, reward, slope, stats, row_stats, residual, hidden_rows, *gradients = output
    ctx.save_for_backward(slope, row_stats, residual, hidden_rows, *inputs[:6])
    ctx.constants = (*inputs[14:19], inputs[20])
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[:3]]
    # Not saved tensors: the first backward takes them, scales them where they lie and hands them on, with no copy.
    ctx.finished = {position: grad for position, grad in enumerate(gradients) if grad.numel()}
    ctx.mark_non_differentiable(logp, reward, slope, stats, row_stats, residual, hidden_rows, *gradients)
    ctx.set_materialize_grads(False)  # else zeros as large as the residual come with the loss's gradient


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if grad_loss is None:
        return (None,) * 25
    needs = ctx.needs_input_grad[:3]
    # Under create_graph what was finished would be a constant: made again, it refuses a second derivative.
    finished = {} if torch.is_grad_enabled() else ctx.finished
    grads = [finished.pop(position, None) if needed else None for position, needed in enumerate(needs)]
    missing = [needed and grad is None for needed, grad in zip(needs, grads, strict=True)]
    for position, grad in enumerate(grads):
        if grad is not None:
            like = None if ctx.dtypes[position] == grad.dtype else ctx.dtypes[position]
            grads[position] = _scaled(grad, grad_loss, like)
    if any(missing):
        again = _linear_preference_loss_backward(grad_loss, *ctx.saved_tensors, *ctx.constants, *missing)
        grads = [new if absent else old for old, new, absent in zip(grads, again, missing, strict=True)]
    return (*grads, *[None] * 22)


def _scaled(grad: Tensor, upstream: Tensor, dtype: torch.dtype | None) -> Tensor:
    """``grad * upstream``, multiplied in the upstream's dtype: in place, unless in another dtype or traced.

    On the CPU an upstream gradient of 1 costs nothing; on CUDA looking at it would synchronise.
    """
    factor = upstream.reshape([1] * grad.dim())  # with a dimension, so that it takes part in type promotion
    if dtype is not None or type(upstream) is not Tensor:
        return (grad * factor).to(dtype or grad.dtype)
    if upstream.is_cpu and upstream.item() == 1.0:
        return grad
    if upstream.is_cuda or factor.dtype == grad.dtype:
        return torch.mul(grad, factor, out=grad)
    for rows in grad.split(max(1, 2**20 // max(1, grad[0].numel()))):  # the CPU would upcast it whole
        rows.copy_(rows * factor)
    return grad


_linear_preference_loss.register_autograd(_backward, setup_context=_save)
checks.refuse_second_derivative("linear_preference_loss", _linear_preference_loss_backward)
