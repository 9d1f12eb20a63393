"""The last token of every sequence: where it lies, and its states of all layers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reprdpo.ops import checks, reference

# B sequences, T padded length, N packed tokens, L layers, D hidden size.


def last_token_index(attention_mask: Tensor) -> Tensor:
    """The position of the last token that is not padding, under left or right padding.

    Args:
        attention_mask: [B, T], integer or bool; 0 is padding.

    Returns:
        int64 [B]: ``max{t : mask[b, t] != 0}``, -1 where the whole row is padding.

    Raises:
        TypeError: the mask is not an integer or bool tensor.
        ValueError: the mask is not of rank 2.
    """
    checks.check_integer_dtype("attention_mask", attention_mask, allow_bool=True)
    checks.check_rank("attention_mask", attention_mask, 2, meaning="[B, T]")
    return torch.ops.reprdpo.last_token_index(attention_mask)


def pool_last_token(hidden_states: Sequence[Tensor] | Tensor, index: Tensor) -> Tensor:
    """The states of one token a sequence, of all layers: ``pooled[b, l] = hidden_states[l][b, index[b]]``.

    Args:
        hidden_states: L tensors [B, T, D]; or L packed tensors [N, D], ``index`` then being flat; or one stacked
            tensor [L, B, T, D]. Any floating dtype.
        index: integer [B], as from :func:`last_token_index`.

    Returns:
        [B, L, D] in the dtype of ``hidden_states``, differentiable in them; NaN where ``index`` is out of range
        (-1, a row of padding alone), and such a row gives no gradient.

    Raises:
        TypeError: an argument is not a tensor (or a sequence of them) of the dtype it must have.
        ValueError: a rank, shape or device does not fit.
    """
    layers = as_layers(hidden_states)
    return torch.ops.reprdpo.pool_last_token(layers, as_index(index, layers))


def as_layers(hidden_states: Sequence[Tensor] | Tensor) -> list[Tensor]:
    """The list an op takes: L tensors [B, T, D] or [N, D], all alike, or one [L, B, T, D].

    Raises:
        TypeError, ValueError: ``hidden_states`` is none of these.
    """
    if isinstance(hidden_states, Tensor):
        checks.check_float_dtype("hidden_states", hidden_states)
        checks.check_rank(
            "hidden_states", hidden_states, 4, meaning="[L, B, T, D], or a sequence of L tensors [B, T, D]"
        )
        return [hidden_states]
    if not isinstance(hidden_states, (list, tuple)):
        raise TypeError(f"hidden_states must be a tensor or a sequence of them, not {type(hidden_states).__name__}")
    if not hidden_states:
        raise ValueError("hidden_states must hold at least one layer, not none")
    first, *rest = hidden_states
    checks.check_float_dtype("hidden_states[0]", first)
    checks.check_rank("hidden_states[0]", first, 2, 3, meaning="[B, T, D] or packed [N, D]")
    for number, layer in enumerate(rest, start=1):
        if not _alike(first, layer):
            _refuse_layer(first, f"hidden_states[{number}]", layer)
    return [first, *rest]


def as_index(index: Tensor, layers: list[Tensor]) -> Tensor:
    """``index`` as int64 [B], checked against the ``layers`` it points into.

    Raises:
        TypeError, ValueError: it is not an integer tensor [B] on the device of the layers.
    """
    checks.check_integer_dtype("index", index)
    checks.check_same_device(hidden_states=layers[0], index=index)
    if layers[0].dim() == 2:
        checks.check_rank("index", index, 1, meaning="[B], flat into the packed [N, D] hidden_states")
    else:
        checks.check_shape("index", index, layers[0].shape[-3:-2], meaning="[B]")
    return index.long()


def _alike(first: Tensor, layer: Any) -> bool:
    return (
        isinstance(layer, Tensor)
        and layer.shape == first.shape
        and layer.dtype == first.dtype
        and layer.device == first.device
    )


def _refuse_layer(first: Tensor, name: str, layer: Any) -> None:
    checks.check_tensor(name, layer)
    checks.check_shape(name, layer, first.shape)
    checks.check_same_dtype(**{"hidden_states[0]": first, name: layer})
    checks.check_same_device(**{"hidden_states[0]": first, name: layer})


@torch.library.custom_op("reprdpo::last_token_index", mutates_args=())
def _last_token_index(attention_mask: Tensor) -> Tensor:
    return reference.last_token_index(attention_mask)


@_last_token_index.register_fake
def _(attention_mask: Tensor) -> Tensor:
    return attention_mask.new_empty(attention_mask.shape[0], dtype=torch.int64)


@torch.library.custom_op("reprdpo::pool_last_token", mutates_args=())
def _pool_last_token(hidden_states: Sequence[Tensor], index: Tensor) -> Tensor:
    return reference.pool_last_token(hidden_states, index)


@_pool_last_token.register_fake
def _(hidden_states: Sequence[Tensor], index: Tensor) -> Tensor:
    return hidden_states[0].new_empty(index.shape[0], layer_count(hidden_states), hidden_states[0].shape[-1])


@torch.library.custom_op("reprdpo::pool_last_token_backward", mutates_args=())
def _pool_last_token_backward(
    grad: Tensor, index: Tensor, hidden_shape: Sequence[int], hidden_count: int
) -> list[Tensor]:
    return reference.pool_last_token_backward(grad, index, hidden_shape, hidden_count)


@_pool_last_token_backward.register_fake
def _(grad: Tensor, index: Tensor, hidden_shape: Sequence[int], hidden_count: int) -> list[Tensor]:
    return [grad.new_empty(hidden_shape) for _ in range(hidden_count)]


def layer_count(hidden_states: Sequence[Tensor]) -> int:
    """L of the list an op takes."""
    return hidden_states[0].shape[0] if hidden_states[0].dim() == 4 else len(hidden_states)


def _setup_context(ctx: Any, inputs: tuple[Sequence[Tensor], Tensor], output: Tensor) -> None:
    hidden_states, index = inputs
    ctx.save_for_backward(index)
    ctx.hidden_shape, ctx.hidden_count = hidden_states[0].shape, len(hidden_states)


def _backward(ctx: Any, grad: Tensor) -> tuple[list[Tensor], None]:
    (index,) = ctx.saved_tensors
    return torch.ops.reprdpo.pool_last_token_backward(grad, index, ctx.hidden_shape, ctx.hidden_count), None


_pool_last_token.register_autograd(_backward, setup_context=_setup_context)
