"""The representation reward: linear probes on every layer's last token, mixed by a gate."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reprdpo.ops import checks, reference
from reprdpo.ops.backend import declare, select
from reprdpo.ops.pooling import as_index, as_layers, layer_count
from reprdpo.ops.preference_confidence import check_confidence_options

# B sequences, T padded length, N packed tokens, L layers, D hidden size.


class ProbeReward(NamedTuple):
    """The reward [B], each layer's score [B, L] and its share of the reward, the gate [B, L]."""

    reward: Tensor
    layer_scores: Tensor
    layer_gate: Tensor


class ProbeConfidence(NamedTuple):
    """Each pair's confidence [P], which carries no gradient, beside the fields of :class:`ProbeReward`."""

    confidence: Tensor
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
    parameters = (probe_weight, probe_bias, gate_weight, gate_bias)
    return ProbeReward(*_run(hidden_states, index, parameters, gate, _NO_CONFIDENCE)[:3])


def probe_confidence(
    hidden_states: Sequence[Tensor] | Tensor,
    index: Tensor | None,
    probe_weight: Tensor,
    probe_bias: Tensor,
    gate_weight: Tensor | None,
    gate_bias: Tensor,
    *,
    gate: Literal["softmax", "static", "vote"] = "softmax",
    alpha: float = 7.5,
    squash: bool = False,
    floor: float | None = None,
    reduce: Literal["batch"] | None = None,
) -> ProbeConfidence:
    """Hidden states to the confidence of each pair: :func:`probe_reward` and :func:`preference_confidence` in one.

    ``gamma_p = sigma(alpha (R_p - R_{P+p}))`` (arXiv 2503.10093, Eq. 8) with R as in :func:`probe_reward`; one launch
    on a GPU. gamma is a constant of the loss and carries no gradient, the other results do.

    Args:
        hidden_states, index, probe_weight, probe_bias, gate_weight, gate_bias, gate: as :func:`probe_reward` takes
            them; the B = 2P sequences are all chosen, then all rejected.
        alpha: the slope, at least 0.
        squash: take ``sigma(R)`` for each reward first, so that gamma stays within ``sigma(+-alpha)``.
        floor: in [0, 1]; no pair's gamma is taken below it.
        reduce: "batch" gives every pair the mean gamma of the batch, after the floor.

    Returns:
        confidence [P], detached, and reward [B], layer_scores [B, L], layer_gate [B, L], all float32 (float64 where an
        input is float64). Where ``index`` is out of range the reward and its pair's gamma are NaN.

    Raises:
        TypeError: an argument is not a tensor of the dtype it must have, or a number is not one.
        ValueError: a rank, shape, device or ``gate`` does not fit, the number of sequences is odd, alpha, floor or
            reduce lies outside its range, or the backend asked for cannot serve.
    """
    options = _confidence_options(alpha, squash, floor, reduce)
    parameters = (probe_weight, probe_bias, gate_weight, gate_bias)
    reward, scores, layer_gate, confidence = _run(hidden_states, index, parameters, gate, options)
    return ProbeConfidence(confidence, reward, scores, layer_gate)


class ProbeRows(NamedTuple):
    """Detached fields of :class:`ProbeConfidence` and what :func:`probe_gradients` needs beside them."""

    confidence: Tensor
    reward: Tensor
    layer_scores: Tensor
    layer_gate: Tensor
    rows: Tensor  # [B, L, D], the pooled hidden states


def probe_rows(
    hidden_states: Sequence[Tensor] | Tensor,
    index: Tensor | None,
    parameters: "Parameters",
    *,
    gate: str = "softmax",
    alpha: float = 7.5,
    squash: bool = False,
    floor: float | None = None,
    reduce: Literal["batch"] | None = None,
) -> ProbeRows:
    """As :func:`probe_confidence`, outside autograd: the rows are kept for a backward taken by hand."""
    options = _confidence_options(alpha, squash, floor, reduce)
    with torch.no_grad():
        if not torch.compiler.is_compiling() and _is_plain(hidden_states, index, parameters, gate):
            layers = [hidden_states] if isinstance(hidden_states, Tensor) else hidden_states
            backend = _check_once(layers, hidden_states, index, parameters, gate, options)
            index = index if index is None else index.long()
            try:
                results = _forward(backend, layers, index, parameters, gate, index is not None, options)
            except RuntimeError:
                _check(hidden_states, index, parameters, gate, options)  # as in _run_eagerly
                raise
        else:
            layers, index = _check(hidden_states, index, parameters, gate, options)
            results = torch.ops.reprdpo.probe_reward(layers, index, *parameters, gate, index is not None, *options)
    reward, scores, layer_gate, pooled, confidence = results
    return ProbeRows(confidence, reward, scores, layer_gate, pooled if index is not None else layers[0])


def probe_gradients(
    upstream_B: Tensor, scored: ProbeRows, parameters: "Parameters", *, gate: str = "softmax"
) -> list[Tensor]:
    """The gradients of w, b, v (where there is one) and c for an upstream gradient of the reward."""
    probe_weight, _, gate_weight, _ = parameters
    rows = scored.rows
    needs = [False, True, True, gate_weight is not None, True]
    given = (rows, None, probe_weight, gate_weight, scored.layer_scores, scored.layer_gate, gate, rows.shape, 1)
    with torch.no_grad():
        if type(rows) is Tensor and not torch._C._len_torch_dispatch_stack():
            _, *grads = _gradients((upstream_B, None, None), *given, rows.dtype, needs)
        else:
            _, *grads = torch.ops.reprdpo.probe_reward_backward(upstream_B, None, None, *given, rows.dtype, needs)
    return [grad for grad, need in zip(grads, needs[1:], strict=True) if need]


# probe_weight, probe_bias, gate_weight, gate_bias.
Parameters = tuple[Tensor, Tensor, Tensor | None, Tensor]
# alpha (None: no confidence is asked), squash, floor, reduce_batch.
ConfidenceOptions = tuple[float | None, bool, float | None, bool]
_NO_CONFIDENCE: ConfidenceOptions = (None, False, None, False)
Results = tuple[Tensor, Tensor, Tensor, Tensor]
# Of reward, layer_scores and layer_gate.
Upstream = tuple[Tensor | None, Tensor | None, Tensor | None]


def _confidence_options(alpha: float, squash: bool, floor: float | None, reduce: str | None) -> ConfidenceOptions:
    check_confidence_options(alpha, floor, reduce)
    return alpha, bool(squash), floor, reduce == "batch"


def _run(
    hidden_states: Sequence[Tensor] | Tensor,
    index: Tensor | None,
    parameters: Parameters,
    gate: str,
    options: ConfidenceOptions,
) -> Results:
    """reward, layer_scores, layer_gate and confidence, through the registered op or, in plain eager code, around it."""
    if not torch.compiler.is_compiling() and _is_plain(hidden_states, index, parameters, gate):
        return _run_eagerly(hidden_states, index, parameters, gate, options)
    layers, index = _check(hidden_states, index, parameters, gate, options)
    asks = torch.is_grad_enabled() and _row_weight_asks(parameters, gate)
    reward, scores, layer_gate, _, confidence = torch.ops.reprdpo.probe_reward(
        layers, index, *parameters, gate, index is not None and asks, *options
    )
    return reward, scores, layer_gate, confidence


def _row_weight_asks(parameters: Parameters, gate: str) -> bool:
    """Whether a weight that multiplies the pooled rows, which are written out for it alone, asks for a gradient."""
    probe_weight, _, gate_weight, _ = parameters
    return probe_weight.requires_grad or (gate == "softmax" and gate_weight is not None and gate_weight.requires_grad)


def _check(
    hidden_states: Sequence[Tensor] | Tensor,
    index: Tensor | None,
    parameters: Parameters,
    gate: str,
    options: ConfidenceOptions,
) -> tuple[list[Tensor], Tensor | None]:
    """The layers as a list and the index as int64."""
    layers = _check_pooled(hidden_states) if index is None else as_layers(hidden_states)
    if index is not None:
        index = as_index(index, layers)
    L = layers[0].shape[1] if index is None else layer_count(layers)
    _check_parameters(layers[0], L, *parameters, gate)
    B = layers[0].shape[0] if index is None else index.shape[0]
    if options[0] is not None and B % 2:
        raise ValueError(f"hidden_states must hold all chosen, then as many rejected sequences, not {B} of them")
    return layers, index


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


declare("probe_reward", cpu=("native",), cuda=("native", "triton"))


def _backend(layers: Sequence[Tensor], parameters: Parameters) -> str:
    return select("probe_reward", parameters[0], dtype=reference.compute_dtype(layers[0], parameters[0]))


def _forward(
    backend: str,
    layers: Sequence[Tensor],
    index: Tensor | None,
    parameters: Parameters,
    gate: str,
    save_pooled: bool,
    options: ConfidenceOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """reward, layer_scores, layer_gate, pooled (or empty) and confidence (or empty) from the backend that serves."""
    if backend == "native":
        dense = index if index is None else index.contiguous()
        floats = [_float_rows(parameter) for parameter in parameters]
        return torch.ops.reprdpo_native.probe_reward.default(layers, dense, *floats, gate, save_pooled, *options)
    if backend == "triton":
        from reprdpo_kernels.probe_reward import probe_reward_forward

        return probe_reward_forward(layers, index, *parameters, gate, save_pooled, *options)
    pooled = layers[0] if index is None else reference.pool_last_token(layers, index)
    results = reference.probe_reward(pooled, *parameters, gate)
    alpha, squash, floor, reduce_batch = options
    confidence = results[0].new_empty(0)
    if alpha is not None:
        chosen, rejected = results[0].chunk(2) if results[0].numel() else (results[0], results[0])
        reduce = "batch" if reduce_batch else None
        confidence = reference.preference_confidence(chosen, rejected, alpha, squash, floor, reduce)
    return (*results, pooled if save_pooled else pooled.new_empty(0), confidence)


def _float_rows(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.float().contiguous()


def _gradients(
    upstream: Upstream,
    pooled: Tensor | None,
    index: Tensor | None,
    probe_weight: Tensor,
    gate_weight: Tensor | None,
    scores: Tensor,
    layer_gate: Tensor,
    gate: str,
    hidden_shape: Sequence[int],
    hidden_count: int,
    hidden_dtype: torch.dtype,
    needs: Sequence[bool],
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """Those of the hidden states, probe_weight, probe_bias, gate_weight and gate_bias; empty where not in ``needs``."""
    backend = select("probe_reward", probe_weight, dtype=scores.dtype)
    if backend == "native":
        dense = index if index is None else index.contiguous()
        try:
            hidden, *grads = torch.ops.reprdpo_native.probe_reward_backward.default(
                *upstream, pooled, dense, _float_rows(probe_weight), _float_rows(gate_weight), scores, layer_gate, gate,
                hidden_shape, hidden_count, hidden_dtype, needs,
            )  # fmt: skip
        except RuntimeError:
            # The library's ABI hands on no type of error: what memory there is not, torch itself says.
            _ = [probe_weight.new_empty(hidden_shape, dtype=hidden_dtype) for _ in range(hidden_count * needs[0])]
            raise
        return (hidden, *(grad.to(probe_weight.dtype) for grad in grads))
    backward: Any = reference.probe_reward_backward
    if backend == "triton":
        from reprdpo_kernels.probe_reward import probe_reward_backward as backward
    found = backward(
        *upstream, pooled, index, probe_weight, gate_weight, scores, layer_gate, gate, hidden_shape, hidden_count,
        hidden_dtype, needs,
    )  # fmt: skip
    filled = [probe_weight.new_empty(0) if grad is None else grad for grad in found[1:]]
    return (found[0] or [], *filled)  # type: ignore[return-value]


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
    alpha: float | None,
    squash: bool,
    floor: float | None,
    reduce_batch: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    parameters = (probe_weight, probe_bias, gate_weight, gate_bias)
    options = (alpha, squash, floor, reduce_batch)
    backend = _backend(hidden_states, parameters)
    return _forward(backend, hidden_states, index, parameters, gate, save_pooled, options)


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
    alpha: float | None,
    squash: bool,
    floor: float | None,
    reduce_batch: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B = hidden_states[0].shape[0] if index is None else index.shape[0]
    L, D = probe_weight.shape
    dtype = reference.compute_dtype(hidden_states[0], probe_weight)
    layer_scores = probe_weight.new_empty(B, L, dtype=dtype)
    pooled = hidden_states[0].new_empty((B, L, D) if save_pooled else (0,))
    confidence = probe_weight.new_empty(0 if alpha is None else B // 2, dtype=dtype)
    return probe_weight.new_empty(B, dtype=dtype), layer_scores, torch.empty_like(layer_scores), pooled, confidence


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
    *arguments: Any,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    return _gradients((grad_reward, grad_scores, grad_gate), *arguments)


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
    hidden_states, index, probe_weight, _, gate_weight, _, gate, save_pooled = inputs[:8]
    _, layer_scores, layer_gate, pooled, confidence = output
    ctx.mark_non_differentiable(pooled, confidence)
    ctx.set_materialize_grads(False)
    rows = hidden_states[0] if index is None else pooled if save_pooled else None
    ctx.save_for_backward(rows, index, probe_weight, gate_weight, layer_scores, layer_gate)
    ctx.gate, ctx.hidden_shape = gate, hidden_states[0].shape
    ctx.hidden_count, ctx.hidden_dtype = len(hidden_states), hidden_states[0].dtype


def _backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
    asks_hidden, _, *asks_parameters = ctx.needs_input_grad[:6]
    needs = [any(asks_hidden), *asks_parameters]
    hidden, *parameters = torch.ops.reprdpo.probe_reward_backward(
        *upstream[:3], *ctx.saved_tensors, ctx.gate, ctx.hidden_shape, ctx.hidden_count, ctx.hidden_dtype, needs
    )
    asked = [grad if need else None for grad, need in zip(parameters, needs[1:], strict=True)]
    return (hidden or [None] * ctx.hidden_count, None, *asked, *[None] * 6)


_probe_reward.register_autograd(_backward, setup_context=_setup_context)


# In plain eager code the Python registration costs more than the kernel: the same functions are called without it.
# Whatever must see the op itself (compilers, modes, transforms, tensor subclasses) gets the registered one.

_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))
# What the checks read of arguments that passed them; emptied when it grows.
_accepted: set[tuple[Any, ...]] = set()
_MAX_ACCEPTED = 4096


def _is_plain(
    hidden_states: Sequence[Tensor] | Tensor, index: Tensor | None, parameters: Parameters, gate: str
) -> bool:
    """Plain tensors (what is no tensor at all is left to the checks), and nothing that must see the op itself."""
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
    ):
        return False
    if isinstance(hidden_states, (list, tuple)) and hidden_states and index is not None:
        kinds = set(map(type, hidden_states))
    else:
        kinds = {type(hidden_states)}
    kinds.update([type(tensor) for tensor in (index, *parameters) if tensor is not None])
    return kinds <= _PLAIN_TYPES and isinstance(gate, str)


def _run_eagerly(
    hidden_states: Sequence[Tensor] | Tensor,
    index: Tensor | None,
    parameters: Parameters,
    gate: str,
    options: ConfidenceOptions,
) -> Results:
    arguments = (hidden_states, index, parameters, gate, options)
    layers = [hidden_states] if isinstance(hidden_states, Tensor) else hidden_states
    backend = _check_once(layers, *arguments)
    if index is not None and index.dtype != torch.int64:
        index = index.long()
    asks = hidden_asks = False
    if torch.is_grad_enabled():
        hidden_asks = any(layer.requires_grad for layer in layers)
        asks = hidden_asks or any(parameter is not None and parameter.requires_grad for parameter in parameters)
    try:
        if hidden_asks:
            return _ProbeReward.apply(None, index, *parameters, gate, options, backend, *layers)
        if asks:
            return _ProbeReward.apply(layers, index, *parameters, gate, options, backend)
        reward, scores, layer_gate, _, confidence = _forward(backend, layers, index, parameters, gate, False, options)
        return reward, scores, layer_gate, confidence
    except RuntimeError:
        _check(*arguments)  # what the native op refuses, in the user's words
        raise


def _check_once(
    layers: Sequence[Tensor],
    hidden_states: Sequence[Tensor] | Tensor,
    index: Tensor | None,
    parameters: Parameters,
    gate: str,
    options: ConfidenceOptions,
) -> str:
    """The backend that serves, after the checks, which look but once at arguments that are alike to them."""
    first, n = layers[0], len(layers)
    key = (
        n if hidden_states is layers else None, first.shape, first.dtype, first.device, gate, options[0] is None,
        *[None if tensor is None else (tensor.shape, tensor.dtype, tensor.device) for tensor in (index, *parameters)],
    )  # fmt: skip
    if key in _accepted:
        backend = _backend(layers, parameters)
        # Whether the layers are alike the native op looks itself, faster; but one GPU is to it as good as another.
        if backend == "native" and (first.is_cpu or [layer.device for layer in layers].count(first.device) == n):
            return backend
        seen = (first.shape, first.dtype, first.device)
        if all((layer.shape, layer.dtype, layer.device) == seen for layer in layers):
            return backend
    _check(hidden_states, index, parameters, gate, options)
    if len(_accepted) >= _MAX_ACCEPTED:
        _accepted.clear()
    _accepted.add(key)
    return _backend(layers, parameters)


class _ProbeReward(torch.autograd.Function):
    """The gradients of probe_reward; layers of which none asks for one come as a list, which costs apply nothing."""

    @staticmethod
    def forward(
        ctx: Any,
        layers: Sequence[Tensor] | None,
        index: Tensor | None,
        probe_weight: Tensor,
        probe_bias: Tensor,
        gate_weight: Tensor | None,
        gate_bias: Tensor,
        gate: str,
        options: ConfidenceOptions,
        backend: str,
        *asking_layers: Tensor,
    ) -> Results:
        layers = asking_layers if layers is None else layers
        parameters = (probe_weight, probe_bias, gate_weight, gate_bias)
        save_pooled = index is not None and _row_weight_asks(parameters, gate)
        reward, scores, layer_gate, pooled, confidence = _forward(
            backend, layers, index, parameters, gate, save_pooled, options
        )
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(confidence)
        rows = layers[0] if index is None else pooled if save_pooled else None
        ctx.save_for_backward(rows, index, probe_weight, gate_weight, scores, layer_gate)
        ctx.rest = (gate, layers[0].shape, len(layers), layers[0].dtype)
        ctx.asks_hidden = len(asking_layers) > 0
        return reward, scores, layer_gate, confidence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        rows, index, probe_weight, gate_weight, scores, layer_gate = ctx.saved_tensors
        needs = [ctx.asks_hidden, *ctx.needs_input_grad[2:6]]
        arguments = (rows, index, probe_weight, gate_weight, scores, layer_gate, *ctx.rest, needs)
        if type(scores) is Tensor and not torch._C._len_torch_dispatch_stack():
            hidden, *grads = _gradients((upstream[0], upstream[1], upstream[2]), *arguments)
        else:
            hidden, *grads = torch.ops.reprdpo.probe_reward_backward(*upstream[:3], *arguments)
        asked = [grad if need else None for grad, need in zip(grads, needs[1:], strict=True)]
        return (None, None, *asked, None, None, None, *hidden)
