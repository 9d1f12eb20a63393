"""Taps on a causal LM's decoder layers: hidden states as they are produced, by forward hooks.

Shapes: B sequences, T padded length, L decoder layers, D hidden size.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from reprdpo import ops
from reprdpo.errors import UserError
from reprdpo.models import decoder, decoder_layers

Pool = Literal["last", "mean"]


class _Tap(ABC):
    """Hooks that hand each layer's output, and for the last layer the decoder's own, to ``_take(layer, states)``.

    The last layer's states are those after the final norm. A forward inside the block replaces what the one before
    left; a layer run again by gradient checkpointing, its forward being over, is passed by.
    """

    def __init__(self, model: nn.Module) -> None:
        self._decoder = decoder(model)
        self._layers = list(decoder_layers(model))
        self._handles: list[RemovableHandle] = []
        self._in_forward = False

    def __enter__(self) -> Self:
        if self._handles:
            raise RuntimeError("this tap is in use; make another one")
        self._handles.append(self._decoder.register_forward_pre_hook(self._start))
        for layer, module in enumerate(self._layers[:-1]):
            self._handles.append(module.register_forward_hook(self._layer_hook(layer)))
        self._handles.append(self._decoder.register_forward_hook(self._finish))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._in_forward = False

    def _start(self, module: nn.Module, inputs: Any) -> None:
        self._in_forward = True
        self._clear()

    def _layer_hook(self, layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._in_forward:
                self._take(layer, output if isinstance(output, Tensor) else output[0])

        return hook

    def _finish(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._in_forward = False
        self._take(len(self._layers) - 1, output[0] if isinstance(output, tuple) else output.last_hidden_state)

    def _unseen(self, seen: int) -> str:
        return (
            f"{seen} of {len(self._layers)} layers seen; run the model inside the tap (code that torch.compile made "
            "before any tap was there does not see one: call torch._dynamo.reset() first)"
        )

    @abstractmethod
    def _clear(self) -> None: ...

    @abstractmethod
    def _take(self, layer: int, states: Tensor) -> None: ...


class HiddenStateTap(_Tap):
    """Keeps the L layers' outputs of a model's forward: the tensors themselves, gradients and all, nothing copied.

    ``with HiddenStateTap(model) as tap: model(input_ids=..., logits_to_keep=1)`` leaves in ``tap.states`` L tensors
    [B, T, D] equal to transformers' ``hidden_states[1:]``, the last one after the final norm. ``logits_to_keep=1``
    keeps the head from making logits that nobody reads. For inference :class:`PooledStateTap` holds one layer at once.

    Raises:
        UserError: a model whose decoder layers cannot be found.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._states: dict[int, Tensor] = {}

    @property
    def states(self) -> list[Tensor]:
        """L tensors [B, T, D] of the last forward.

        Raises:
            RuntimeError: no forward has run to its end under the tap.
        """
        if len(self._states) != len(self._layers):
            raise RuntimeError(self._unseen(len(self._states)))
        return [self._states[layer] for layer in range(len(self._layers))]

    def _clear(self) -> None:
        self._states.clear()

    def _take(self, layer: int, states: Tensor) -> None:
        self._states[layer] = states


class PooledStateTap(_Tap):
    """Pools each layer's output over the sequence as it is produced, so that no [L, B, T, D] is ever held.

    Afterwards ``tap.pooled`` is [B, L, D] in the states' dtype, detached: the states of each row's last
    non-padding token, or their mean over its non-padding tokens (summed in float32). A row of padding alone is NaN.

    Args:
        model: a causal LM of transformers, wrapped or not.
        attention_mask: [B, T] of the forward to come, 0 at padding, on either side.
        pool: "last" or "mean".

    Raises:
        UserError: a model whose decoder layers cannot be found, or another ``pool``.
    """

    def __init__(self, model: nn.Module, attention_mask: Tensor, *, pool: Pool = "last") -> None:
        super().__init__(model)
        if pool not in ("last", "mean"):
            raise UserError(f"pool must be last or mean, not {pool!r}")
        self._pool = pool
        self._mask_BT = attention_mask
        self._index_B = ops.last_token_index(attention_mask)
        self._pooled_BLD: Tensor | None = None
        self._seen = 0

    @property
    def pooled(self) -> Tensor:
        """[B, L, D] of the last forward.

        Raises:
            RuntimeError: no forward has run to its end under the tap.
        """
        if self._pooled_BLD is None or self._seen != len(self._layers):
            raise RuntimeError(self._unseen(self._seen))
        return self._pooled_BLD

    def _clear(self) -> None:
        self._pooled_BLD, self._seen = None, 0

    @torch.no_grad()
    def _take(self, layer: int, states: Tensor) -> None:
        if self._pooled_BLD is None:
            self._pooled_BLD = states.new_empty(states.shape[0], len(self._layers), states.shape[2])
        self._pooled_BLD[:, layer] = self._row(states.detach())
        self._seen += 1

    def _row(self, states_BTD: Tensor) -> Tensor:
        if self._pool == "last":
            return ops.pool_last_token([states_BTD], self._index_B.to(states_BTD.device))[:, 0]
        real_BT1 = self._mask_BT.to(states_BTD.device).bool()[:, :, None]
        total_BD = torch.where(real_BT1, states_BTD, 0).sum(1, dtype=torch.promote_types(states_BTD.dtype, torch.float))
        return (total_BD / real_BT1.sum(1)).to(states_BTD.dtype)
