"""Preference losses of the log-probs of whole responses: a pure function of pairs.

Shape suffixes: P pairs.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reprdpo.ops import backend, checks, reference
from reprdpo.ops.head_tiles import triton_kernels
from reprdpo.ops.reference import PAIR_LOSSES, PairBatch, PairTerms

backend.declare("preference_loss", cuda=("triton",))


class PreferenceLoss(NamedTuple):
    """Loss of each pair, and detached implicit rewards, each [P]."""

    loss: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor


def preference_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None = None,
    ref_rejected_logp: Tensor | None = None,
    *,
    beta: float,
    confidence: float | Tensor = 1.0,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    chosen_length: Tensor | None = None,
    rejected_length: Tensor | None = None,
    simpo_gamma: float = 0.5,
) -> PreferenceLoss:
    """Loss and rewards of each pair from summed log-probs.

    A loss l(a, b) is stated on the scores of the chosen and the rejected response. A score is the log-ratio
    ``logp - ref_logp``, or ``logp`` where a type is reference-free, divided by the response's length where it averages
    (0/0 is 0). Confidence gamma, the probability that the label is right, mixes in the flipped form:
    ``loss = gamma l(a, b) + (1 - gamma) l(b, a)``, but for robust and gdpo.

    ========  ==================================  ==============  =========  ==================================
    type      l(a, b)                             score           reference  paper
    ========  ==================================  ==============  =========  ==================================
    sigmoid   -log sigma(beta (a - b))            summed          yes        DPO 2305.18290; with gamma cDPO
    ipo       (a - b - 1 / (2 beta))^2            averaged        yes        IPO 2310.12036
    hinge     max(0, 1 - beta (a - b))            summed          yes        SLiC 2305.10425, RSO 2309.06657
    robust    sigmoid's, debiased (below)         summed          yes        robust DPO 2403.00409
    simpo     -log sigma(beta (a - b) - gamma_s)  averaged        no         SimPO 2405.14734
    orpo      -a - beta log sigma(o(a) - o(b))    averaged        no         ORPO 2403.07691
    gdpo      -log sigma(beta (2 gamma - 1)(a-b)) summed          yes        soft labels 2409.06691
    apo_zero  sigma(-beta a) + sigma(beta b)      summed          yes        APO 2408.06266
    apo_down  sigma(beta a) + sigma(-beta (a-b))  summed          yes        APO 2408.06266
    sft       -a                                  averaged        no         negative log-likelihood a token
    ========  ==================================  ==============  =========  ==================================

    o(a) = a - log(1 - e^a); gamma_s is ``simpo_gamma``. robust is ``[gamma l(a, b) - (1 - gamma) l(b, a)] /
    (2 gamma - 1)`` and takes only a number in (0.5, 1]. For gdpo confidence is the soft label of the geometric average.
    For sigmoid ``dloss/d(a - b) = beta (sigma(beta (a - b)) - gamma)``. A label smoothing of eps is confidence 1 - eps.

    Args:
        chosen_logp, rejected_logp: ``[P]`` floating, sums over the response's tokens.
        ref_chosen_logp, ref_rejected_logp: ``[P]`` constants; given exactly when a type needs the reference.
        beta: greater than 0.
        confidence: a number in [0, 1] or a constant ``[P]``, where a value outside [0, 1] gives NaN in its pair.
        loss_type: a name, or several, whose losses are added with ``loss_weights`` (default 1 each).
        chosen_length, rejected_length: ``[P]`` numbers of scored tokens; required where a type averages.
        simpo_gamma: SimPO's target margin, at least 0.

    Returns:
        :class:`PreferenceLoss`, float32 (float64 from float64). The rewards are beta times the first type's scores.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, a reference or length missing, a
            reference given to types that use none, a constant that requires a gradient, a number out of range.
    """
    loss_types, weights = check_loss(loss_type, loss_weights, beta, confidence, simpo_gamma)
    checks.check_float_dtype("chosen_logp", chosen_logp)
    checks.check_rank("chosen_logp", chosen_logp, 1, meaning="[P]")
    pairs = chosen_logp.shape[0]
    checks.check_float_dtype("rejected_logp", rejected_logp)
    checks.check_shape("rejected_logp", rejected_logp, (pairs,), meaning="[P]")
    check_references(loss_types, ref_chosen_logp, ref_rejected_logp, chosen_logp, pairs)
    lengths = {"chosen_length": chosen_length, "rejected_length": rejected_length}
    for name, length in lengths.items():
        if length is not None:
            checks.check_tensor(name, length)
            checks.check_shape(name, length, (pairs,), meaning="[P]")
        elif averaging := [kind for kind in loss_types if PAIR_LOSSES[kind].averages]:
            raise ValueError(f"{name} is missing: loss_type {averaging[0]!r} averages over tokens and needs it")
    checks.check_same_device(chosen_logp=chosen_logp, rejected_logp=rejected_logp, **lengths)
    loss, chosen_reward, rejected_reward = _preference_loss(
        chosen_logp,
        rejected_logp,
        ref_chosen_logp,
        ref_rejected_logp,
        confidence_per_pair(confidence, chosen_logp, pairs),
        chosen_length,
        rejected_length,
        float(beta),
        loss_types,
        weights,
        float(simpo_gamma),
    )
    return PreferenceLoss(loss, chosen_reward, rejected_reward)


def check_loss(
    loss_type: str | Sequence[str],
    loss_weights: Sequence[float] | None,
    beta: float,
    confidence: float | Tensor,
    simpo_gamma: float,
) -> tuple[list[str], list[float]]:
    """Refuse what no loss takes; the loss types and their weights as lists."""
    loss_types = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    if not loss_types:
        raise ValueError("loss_type must name at least one loss, not be an empty list")
    for name in loss_types:
        checks.check_choice("loss_type", name, tuple(PAIR_LOSSES))
    weights = [1.0] * len(loss_types) if loss_weights is None else list(loss_weights)
    if len(weights) != len(loss_types):
        raise ValueError(f"loss_weights must have one weight a loss type ({len(loss_types)}), not {len(weights)}")
    for weight in weights:
        checks.check_finite_scalar("loss_weights", weight)
    checks.check_finite_scalar("beta", beta, positive=True)
    checks.check_finite_scalar("simpo_gamma", simpo_gamma, minimum=0.0)
    if not isinstance(confidence, Tensor):
        checks.check_finite_scalar("confidence", confidence, minimum=0.0, maximum=1.0)
    if "robust" in loss_types and (isinstance(confidence, Tensor) or confidence <= 0.5):
        came = "a tensor" if isinstance(confidence, Tensor) else confidence
        raise ValueError(f"confidence must be a number in (0.5, 1] for loss_type 'robust', not {came}")
    return loss_types, [float(weight) for weight in weights]


def check_references(
    loss_types: list[str], ref_chosen_logp: Tensor | None, ref_rejected_logp: Tensor | None, like: Tensor, pairs: int
) -> None:
    """Refuse reference log-probs that are missing, that no type uses, not [P], or asking a gradient."""
    needing = [name for name in loss_types if PAIR_LOSSES[name].needs_reference]
    for name, value in (("ref_chosen_logp", ref_chosen_logp), ("ref_rejected_logp", ref_rejected_logp)):
        if value is None:
            if needing:
                raise ValueError(f"{name} is missing: loss_type {needing[0]!r} needs reference log-probs")
            continue
        if not needing:
            raise ValueError(f"{name} is given, but loss_type {loss_types[0]!r} is reference-free; leave it out")
        _check_constant(name, value, like, pairs)


def confidence_per_pair(confidence: float | Tensor, like: Tensor, pairs: int) -> Tensor:
    """Confidence as a constant [P] on the device of ``like``; refuses another shape or a gradient."""
    if isinstance(confidence, Tensor):
        _check_constant("confidence", confidence, like, pairs)
        return confidence
    return like.new_full((pairs,), float(confidence), dtype=reference.compute_dtype(like))


def _check_constant(name: str, value: Tensor, like: Tensor, pairs: int) -> None:
    checks.check_float_dtype(name, value)
    checks.check_shape(name, value, (pairs,), meaning="[P]")
    checks.check_no_grad(name, value)
    if value.device != like.device:
        raise ValueError(f"{name} must lie on {like.device}, not {value.device}")


@torch.library.custom_op(
    "reprdpo::preference_loss",
    mutates_args=(),
    schema=(
        "(Tensor chosen_logp, Tensor rejected_logp, Tensor? ref_chosen_logp, Tensor? ref_rejected_logp, "
        "Tensor confidence, Tensor? chosen_length, Tensor? rejected_length, float beta, str[] loss_types, "
        "float[] loss_weights, float simpo_gamma) -> (Tensor, Tensor, Tensor)"
    ),
)
def _preference_loss(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    terms = _terms(arguments)
    return terms[:3]


@_preference_loss.register_fake
def _(chosen_logp: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    like = torch.empty_like(chosen_logp, dtype=reference.compute_dtype(chosen_logp))
    return like, torch.empty_like(like), torch.empty_like(like)


@torch.library.custom_op(
    "reprdpo::preference_loss_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad_loss, Tensor chosen_logp, Tensor rejected_logp, Tensor? ref_chosen_logp, "
        "Tensor? ref_rejected_logp, Tensor confidence, Tensor? chosen_length, Tensor? rejected_length, float beta, "
        "str[] loss_types, float[] loss_weights, float simpo_gamma) -> (Tensor, Tensor)"
    ),
)
def _preference_loss_backward(grad_loss: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    terms = _terms(arguments)
    return grad_loss * terms.chosen_slope, grad_loss * terms.rejected_slope


@_preference_loss_backward.register_fake
def _(grad_loss: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(grad_loss), torch.empty_like(grad_loss)


def _terms(arguments: tuple[Any, ...]) -> PairTerms:
    *tensors, beta, loss_types, loss_weights, simpo_gamma = arguments
    scalars = {"beta": beta, "loss_types": loss_types, "loss_weights": loss_weights, "simpo_gamma": simpo_gamma}
    if backend.select("preference_loss", tensors[0]) == "triton":
        return PairTerms(*triton_kernels("preference_loss").preference_loss_forward(*tensors, **scalars))
    return reference.preference_terms(PairBatch(*tensors), **scalars)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.constants = inputs[7:]
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Any, ...]:
    chosen_logp, rejected_logp, *_rest = ctx.saved_tensors
    grad_chosen, grad_rejected = _preference_loss_backward(grad_loss, *ctx.saved_tensors, *ctx.constants)
    return grad_chosen.to(chosen_logp.dtype), grad_rejected.to(rejected_logp.dtype), *[None] * 9


_preference_loss.register_autograd(_backward, setup_context=_save)
checks.refuse_second_derivative("preference_loss", _preference_loss_backward)
