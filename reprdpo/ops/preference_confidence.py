"""gamma: how sure the representation reward is of a pair's label."""

from typing import Any, Literal

import torch
from torch import Tensor

from reprdpo.ops import checks, reference

# P pairs.


def preference_confidence(
    chosen_reward: Tensor,
    rejected_reward: Tensor,
    *,
    alpha: float = 7.5,
    squash: bool = False,
    floor: float | None = None,
    reduce: Literal["batch"] | None = None,
) -> Tensor:
    """The confidence of each pair, ``gamma = sigma(alpha (R_c - R_r))`` (arXiv 2503.10093, Eq. 8).

    gamma is a constant of the loss: it is computed from the values of the rewards and carries no gradient,
    whether they ask for one or not.

    Args:
        chosen_reward, rejected_reward: [P], floating point.
        alpha: the slope, at least 0.
        squash: take ``sigma(R)`` for each reward first, so that gamma stays within ``sigma(+-alpha)``.
        floor: in [0, 1]; no pair's gamma is taken below it.
        reduce: "batch" gives every pair the mean gamma of the batch, after the floor.

    Returns:
        [P] float32 (float64 for float64 rewards), detached; NaN where a reward is.

    Raises:
        TypeError: a reward is not a floating point tensor, or a number is not one.
        ValueError: shapes or devices differ, or alpha, floor or reduce lies outside its range.
    """
    checks.check_float_dtype("chosen_reward", chosen_reward)
    checks.check_float_dtype("rejected_reward", rejected_reward)
    checks.check_rank("chosen_reward", chosen_reward, 1, meaning="[P]")
    checks.check_shape("rejected_reward", rejected_reward, chosen_reward.shape, meaning="[P]")
    checks.check_same_device(chosen_reward=chosen_reward, rejected_reward=rejected_reward)
    check_confidence_options(alpha, floor, reduce)
    return torch.ops.reprdpo.preference_confidence(
        chosen_reward.detach(), rejected_reward.detach(), alpha, squash, floor, reduce
    )


def check_confidence_options(alpha: float, floor: float | None, reduce: str | None) -> None:
    """Raise where alpha, floor or reduce is not what :func:`preference_confidence` takes."""
    checks.check_finite_scalar("alpha", alpha, minimum=0)
    if floor is not None:
        checks.check_finite_scalar("floor", floor, minimum=0, maximum=1)
    checks.check_choice("reduce", reduce, (None, "batch"))


@torch.library.custom_op("reprdpo::preference_confidence", mutates_args=())
def _preference_confidence(
    chosen_reward: Tensor,
    rejected_reward: Tensor,
    alpha: float,
    squash: bool,
    floor: float | None,
    reduce: str | None,
) -> Tensor:
    return reference.preference_confidence(chosen_reward, rejected_reward, alpha, squash, floor, reduce)


@_preference_confidence.register_fake
def _(
    chosen_reward: Tensor,
    rejected_reward: Tensor,
    alpha: float,
    squash: bool,
    floor: float | None,
    reduce: str | None,
) -> Tensor:
    dtype = reference.compute_dtype(chosen_reward, rejected_reward)
    return chosen_reward.new_empty(chosen_reward.shape, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.mark_non_differentiable(output)


def _backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
    return None, None, None, None, None, None


_preference_confidence.register_autograd(_backward, setup_context=_setup_context)
