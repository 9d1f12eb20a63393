"""The representation reward: linear probes on every layer's last token, mixed by a gate."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from reprdpo.ops import checks, reference
from reprdpo.ops.backend import declare, select
from reprdpo.ops.pooling import as_index, as_layers, layer_count

# B sequences, T padded length, N packed tokens, L layers, D hidden size.


class ProbeReward(NamedTuple):
    """The reward [B], each layer's score [B, L] and its share of the reward, the gate [B, L]."""

    reward: Tensor
    layer_scores: Tensor
    layer_gate: Tensor


def probe_reward(
    hidden_states: Sequence[Tensor] | Tensor,
    index: Tensor | None,
    probe_weight: Tensor,
    probe_bias: Tensor,
    gate_weight: Tensor | None,
    gate_bias: Tensor,
    *,
    gate: Literal["softmax", "static", "vote"] = "softmax",
) -> ProbeReward:
    """A linear probe on each layer's last token, mixed by a gate: ``R = sum_l g_l s_l`` with ``s_l = w_l . h_l + b_l``.

    "softmax": ``g = softmax_l(v_l . h_l + c_l)`` (arXiv 2503.10093, section 3.2); "static": ``g = softmax(c)``;
    "vote": ``g = sigma(V s + c)``, independent sigmoids over the scores.

    Args:
        hidden_states: L tensors [B, T, D]; or L packed tensors [N, D], ``index`` then being flat; or one stacked
            tensor [L, B, T, D]; or the pooled rows [B, L, D] with ``index=None``. Any floating dtype.
        index: integer [B], the token to read of each sequence, as from ``last_token_index``; None for pooled rows.
        probe_weight: w [L, D].
        probe_bias: b [L].
        gate_weight: v [L, D] for "softmax", V [L, L] for "vote", None for "static".
        gate_bias: c [L].
        gate: how the layers are mixed. The four parameters share one dtype.

    Returns:
        reward [B], layer_scores [B, L] and layer_gate [B, L] in float32, whatever autocast says (float64 where an
        input is float64), each differentiable in the hidden states and the parameters. Where ``index`` is out of
        range (-1: a row of padding alone) the reward and the scores are NaN, and the row gives no gradient.

    Raises:
        TypeError: an argument is not a tensor of the dtype it must have.
        ValueError: a rank, shape, device or ``gate`` does not fit, or the backend asked for cannot serve.
    """
    layers = _check_pooled(hidden_states) if index is None else as_layers(hidden_states)
    if index is not None:
        index = as_index(index, layers)
    L = layers[0].shape[1] if index is None else layer_count(layers)
    _check_parameters(layers[0], L, probe_weight, probe_bias, gate_weight, gate_bias, gate)
    # Pooled rows handed in are saved as they are; others are written out only for a weight that multiplies them.
    weights = (probe_weight, gate_weight if gate == "softmax" else None)
    asks_weights = any(weight is not None and weight.requires_grad for weight in weights)
    save_pooled = index is not None and asks_weights and torch.is_grad_enabled()
    reward, scores, layer_gate, _ = torch.ops.reprdpo.probe_reward(
        layers, index, probe_weight, probe_bias, gate_weight, gate_bias, gate, save_pooled
    )
    return ProbeReward(reward, scores, layer_gate)


def _check_pooled(hidden_states: Any) -> list[Tensor]:
    if not isinstance(hidden_states, Tensor):
        raise ValueError("index may be None only where hidden_states is one pooled tensor [B, L, D], not a sequence")
    checks.check_float_dtype("hidden_states", hidden_states)
    checks.check_rank("hidden_states", hidden_states, 3, meaning="pooled [B, L, D] where index is None")
    return [hidden_states]


def _check_parameters(
    hidden: Tensor,
    L: int,
    probe_weight: Tensor,
    probe_bias: Tensor,
    gate_weight: Tensor | None,
    gate_bias: Tensor,
    gate: str,
) -> None:
    checks.check_choice("gate", gate, ("softmax", "static", "vote"))
    if (gate_weight is None) != (gate == "static"):
        came = "None" if gate_weight is None else f"a {type(gate_weight).__name__}"
        raise ValueError(f'gate_weight must be None for gate="static" and only for it, not {came} for gate={gate!r}')
    D = hidden.shape[-1]
    checks.check_float_dtype("probe_weight", probe_weight)
    if probe_weight.dim() == 2 and probe_weight.shape[0] == L - 1:
        raise ValueError(
            f"hidden_states holds {L} layers, probe_weight {L - 1}: leave the embedding output out "
            "(transformers' hidden_states[1:])"
        )
    expected: dict[str, tuple[Any, tuple[int, ...], str]] = {
        "probe_weight": (probe_weight, (L, D), "[L, D]"),
        "probe_bias": (probe_bias, (L,), "[L]"),
        "gate_weight": (gate_weight, (L, L) if gate == "vote" else (L, D), "[L, L]" if gate == "vote" else "[L, D]"),
        "gate_bias": (gate_bias, (L,), "[L]"),
    }
    for name, (tensor, shape, meaning) in expected.items():
        if name == "gate_weight" and tensor is None:
            continue
        checks.check_float_dtype(name, tensor)
        checks.check_shape(name, tensor, shape, meaning=meaning)
    parameters = {name: tensor for name, (tensor, _, _) in expected.items()}
    checks.check_same_dtype(**parameters)
    checks.check_same_device(hidden_states=hidden, **parameters)


declare("probe_reward", cpu=("native",))


@torch.library.custom_op("reprdpo::probe_reward", mutates_args=())
def _probe_reward(
    hidden_states: Sequence[Tensor],
    index: Tensor | None,
    probe_weight: Tensor,
    probe_bias: Tensor,
    gate_weight: Tensor | None,
    gate_bias: Tensor,
    gate: str,
    save_pooled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = reference.compute_dtype(hidden_states[0], probe_weight)
    if select("probe_reward", probe_weight, dtype=dtype) == "native":
        parameters = (_float_rows(x) for x in (probe_weight, probe_bias, gate_weight, gate_bias))
        return torch.ops.reprdpo_native.probe_reward(
            hidden_states, index, *parameters, gate, save_pooled, None, False, None, False
        )[:4]
    pooled = hidden_states[0] if index is None else reference.pool_last_token(hidden_states, index)
    results = reference.probe_reward(pooled, probe_weight, probe_bias, gate_weight, gate_bias, gate)
    return (*results, pooled if save_pooled else pooled.new_empty(0))


def _float_rows(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.float().contiguous()


@_probe_reward.register_fake
def _(
    hidden_states: Sequence[Tensor],
    index: Tensor | None,
    probe_weight: Tensor,
    probe_bias: Tensor,
    gate_weight: Tensor | None,
    gate_bias: Tensor,
    gate: str,
    save_pooled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B = hidden_states[0].shape[0] if index is None else index.shape[0]
    L, D = probe_weight.shape
    dtype = reference.compute_dtype(hidden_states[0], probe_weight)
    layer_scores = probe_weight.new_empty(B, L, dtype=dtype)
    pooled = hidden_states[0].new_empty((B, L, D) if save_pooled else (0,))
    return probe_weight.new_empty(B, dtype=dtype), layer_scores, torch.empty_like(layer_scores), pooled


# A schema cannot return an optional tensor: a gradient that nobody asked for comes back empty.
@torch.library.custom_op(
    "reprdpo::probe_reward_backward",
    mutates_args=(),
    schema="(Tensor? grad_reward, Tensor? grad_scores, Tensor? grad_gate, Tensor? pooled, Tensor? index, "
    "Tensor probe_weight, Tensor? gate_weight, Tensor layer_scores, Tensor layer_gate, str gate, "
    "SymInt[] hidden_shape, int hidden_count, ScalarType hidden_dtype, bool[] needs) "
    "-> (Tensor[], Tensor, Tensor, Tensor, Tensor)",
)
def _probe_reward_backward(
    grad_reward: Tensor | None,
    grad_scores: Tensor | None,
    grad_gate: Tensor | None,
    pooled: Tensor | None,
    index: Tensor | None,
    probe_weight: Tensor,
    gate_weight: Tensor | None,
    layer_scores: Tensor,
    layer_gate: Tensor,
    gate: str,
    hidden_shape: Sequence[int],
    hidden_count: int,
    hidden_dtype: torch.dtype,
    needs: Sequence[bool],
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    hidden, *parameters = reference.probe_reward_backward(
        grad_reward,
        grad_scores,
        grad_gate,
        pooled,
        index,
        probe_weight,
        gate_weight,
        layer_scores,
        layer_gate,
        gate,
        hidden_shape,
        hidden_count,
        hidden_dtype,
        needs,
    )
    filled = [probe_weight.new_empty(0) if grad is None else grad for grad in parameters]
    return (hidden or [], *filled)  # type: ignore[return-value]


@_probe_reward_backward.register_fake
def _(
    grad_reward: Tensor | None,
    grad_scores: Tensor | None,
    grad_gate: Tensor | None,
    pooled: Tensor | None,
    index: Tensor | None,
    probe_weight: Tensor,
    gate_weight: Tensor | None,
    layer_scores: Tensor,
    layer_gate: Tensor,
    gate: str,
    hidden_shape: Sequence[int],
    hidden_count: int,
    hidden_dtype: torch.dtype,
    needs: Sequence[bool],
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    L = probe_weight.shape[0]
    gate_shape = (0,) if gate_weight is None else gate_weight.shape
    shapes = (probe_weight.shape, (L,), gate_shape, (L,))
    parameters = [
        probe_weight.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs[1:], strict=True)
    ]
    count = hidden_count if needs[0] else 0
    hidden = [probe_weight.new_empty(hidden_shape, dtype=hidden_dtype) for _ in range(count)]
    return (hidden, *parameters)  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden_states, index, probe_weight, _, gate_weight, _, gate, save_pooled = inputs
    _, layer_scores, layer_gate, pooled = output
    ctx.mark_non_differentiable(pooled)
    ctx.set_materialize_grads(False)
    rows = hidden_states[0] if index is None else pooled if save_pooled else None
    ctx.save_for_backward(rows, index, probe_weight, gate_weight, layer_scores, layer_gate)
    ctx.gate, ctx.hidden_shape = gate, hidden_states[0].shape
    ctx.hidden_count, ctx.hidden_dtype = len(hidden_states), hidden_states[0].dtype


def _backward(
    ctx: Any, grad_reward: Tensor | None, grad_scores: Tensor | None, grad_gate: Tensor | None, _: None
) -> tuple[Any, ...]:
    rows, index, probe_weight, gate_weight, layer_scores, layer_gate = ctx.saved_tensors
    asks_hidden, _, *asks_parameters, _, _ = ctx.needs_input_grad
    needs = [any(asks_hidden), *asks_parameters]
    hidden, *parameters = torch.ops.reprdpo.probe_reward_backward(
        grad_reward,
        grad_scores,
        grad_gate,
        rows,
        index,
        probe_weight,
        gate_weight,
        layer_scores,
        layer_gate,
        ctx.gate,
        ctx.hidden_shape,
        ctx.hidden_count,
        ctx.hidden_dtype,
        needs,
    )
    asked = [grad if need else None for grad, need in zip(parameters, needs[1:], strict=True)]
    return (hidden or [None] * ctx.hidden_count, None, *asked, None, None)


_probe_reward.register_autograd(_backward, setup_context=_setup_context)
