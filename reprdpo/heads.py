"""The lm_head of any transformers causal LM: what it computes, and ops run in its place, inside its own forward.

An op over hidden states and weight needs the whole weight. FSDP2 and ZeRO-3 gather it only while the module that holds
it runs, and ready it for the backward only where the model's output depends on that module. So the op runs there.

Shape suffixes: B sequences, T padded length, D hidden size, V vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from reprdpo import ops
from reprdpo.errors import UserError
from reprdpo.models import evaluating, output_head, unwrap

Result = TypeVar("Result", bound=Tensor | tuple[Any, ...])


class HeadSpec(NamedTuple):
    """How a head turns what it is given into logits: ``softcap * tanh(logit_scale * (h W^T + b) / softcap)``.

    The names are those of the ops' arguments: ``ops.linear_logprob(hidden, labels=labels, **head._asdict())``.
    """

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits [..., V] themselves, in float32."""
        scaled = nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias).float() * self.logit_scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)


def run_at_head(model: nn.Module, use: Callable[[Tensor, HeadSpec], Result], **inputs: Any) -> Result:
    """Run ``model(**inputs)`` with ``use(hidden, head)`` in place of lm_head's forward; return what ``use`` returned.

    ``hidden`` [B, T, D] is what the model hands its head: the final states of every position, scaled first where the
    architecture does so. The decoder has run by then, so what taps on it have caught is there to be used. With LoRA on
    the head, weight and hidden states are those of ``[W | B] [h; s A h]``, which is exact: adding s B A to a bf16 W
    would round most of it away.

    Args:
        model: a causal LM of transformers: plain, or under peft, DistributedDataParallel, FSDP2 or DeepSpeed.
        use: returns a tensor, or a (named) tuple of tensors and whatever else; gradients flow through all of them.
        inputs: as ``model`` takes them; without ``logits_to_keep``, so that every position reaches the head.

    Raises:
        UserError: a head that is not one linear map of its input, or a forward that does not call it once.
    """
    causal_lm, head = unwrap(model), output_head(model)
    constants = _constants(causal_lm.config.get_text_config())
    results: list[Result] = []

    def forward(hidden_BTD: Tensor, *_: Any, **__: Any) -> Tensor:
        def finish(hidden_BTD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
            rows = slice(constants.vocabulary)
            spec = HeadSpec(
                weight_VD[rows], None if bias_V is None else bias_V[rows], constants.logit_scale, constants.softcap
            )
            results.append(use(hidden_BTD, spec))
            return _Carrier.apply(hidden_BTD, *_differentiable(results[-1]))

        return _with_weight(head, hidden_BTD, finish)

    with _in_place_of_forward(head, forward):
        output = model(**inputs)
    if len(results) != 1:
        raise UserError(f"{type(causal_lm).__name__}: its forward calls its lm_head {len(results)} times, not once")
    return _anchor(results[0], output[0] if isinstance(output, tuple) else output.logits)


def token_logps(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Log-probs [B, T] float32 of a collator's batch under ``model``, 0 where not scored.

    ``labels`` [B, T] are aligned with ``input_ids``: the token to predict from each position.
    """

    def use(hidden_BTD: Tensor, head: HeadSpec) -> Tensor:
        logps = ops.linear_logprob(
            hidden_BTD, labels=batch["labels"], scored_index=batch["scored_index"], **head._asdict()
        )
        assert isinstance(logps, Tensor)
        return logps

    return run_at_head(
        model, use, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    )


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Compare the model's logits of a few tokens with those of the :class:`HeadSpec` that ops would be given.

    Raises:
        UserError: they are not finite, or differ, so that what an op makes of the head would be wrong.
    """
    causal_lm, head = unwrap(model), output_head(model)
    ids_BT = torch.arange(min(8, head.weight.shape[0]), device=head.weight.device)[None]
    with evaluating(causal_lm):
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits.float()
        mine_BTV = run_at_head(model, lambda hidden, spec: spec.logits(hidden), input_ids=ids_BT, use_cache=False)
    if not logits_BTV.isfinite().all():
        raise UserError(f"{type(causal_lm).__name__}: its logits are not finite; its weights may hold NaN or infinity")
    error = (logits_BTV - mine_BTV).abs().max() if logits_BTV.shape == mine_BTV.shape else torch.tensor(torch.inf)
    if not error <= 8 * torch.finfo(head.weight.dtype).eps * logits_BTV.abs().max().clamp(min=1.0):
        raise UserError(
            f"{type(causal_lm).__name__}: its logits are not softcap(scale * (W h + b)) of its last hidden state "
            f"(off by {error:.2g}); this architecture's head is not supported"
        )


class _Constants(NamedTuple):
    logit_scale: float
    softcap: float | None
    vocabulary: int | None


def _constants(config: Any) -> _Constants:
    """What the architecture does to the head's output; what it does to the head's input has happened by then."""
    softcaps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    softcap = next((float(cap) for name in softcaps if (cap := getattr(config, name, None)) is not None), None)
    # MPT keeps an unused `logit_scale`.
    scale = 1.0 if config.model_type == "mpt" else getattr(config, "logit_scale", None) or 1.0
    for multiplier in ("lm_head_multiplier", "output_multiplier"):
        scale *= getattr(config, multiplier, None) or 1.0
    scaling = getattr(config, "logits_scaling", None) or 1.0
    if config.model_type.startswith("hyperclovax"):  # multiplies by the name Granite divides by
        scale *= scaling
    elif config.model_type != "minicpm3":  # divides the head's input
        scale /= scaling
    return _Constants(float(scale), softcap, getattr(config, "unpadded_vocab_size", None))


def _with_weight(head: nn.Module, hidden: Tensor, finish: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Tensor:
    """``finish(hidden, weight, bias)`` of the linear map that ``head`` is, each weight inside its own module."""
    module: Any = head
    if hasattr(module, "modules_to_save"):  # peft's copy of a module that is trained whole
        original = module.disable_adapters or not module.active_adapters
        module = module.original_module if original else module.modules_to_save[module.active_adapters[0]]
        return _inside(module, lambda states: _with_weight(module, states, finish), hidden)
    if hasattr(module, "lora_A"):
        return _with_lora(module, hidden, finish)
    weight = getattr(module, "weight", None)
    if not isinstance(module, (nn.Linear, nn.Embedding)) or weight is None or not weight.is_floating_point():
        raise UserError(
            f"lm_head is a {type(module).__name__}; ops over the head need a plain linear layer, alone, under LoRA, or "
            "in modules_to_save; leave the head out of quantisation and of other adapters"
        )
    return finish(hidden, weight, getattr(module, "bias", None))


def _with_lora(layer: Any, hidden: Tensor, finish: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Tensor:
    """``W h + sum of s B A h`` as one linear map of ``[h; s A h]``, so that A and B get gradients from the op's own."""
    plain = layer.disable_adapters or layer.merged
    adapters = [] if plain else [name for name in layer.active_adapters if name in layer.lora_A]
    if any(name in getattr(layer, "lora_variant", {}) for name in adapters):
        raise UserError("lm_head: of LoRA's variants only the plain one is supported here; turn off DoRA and the like")

    def gather(states: list[Tensor], weights: list[Tensor], bias: Tensor | None, rest: list[str]) -> Tensor:
        if not rest:
            return finish(_concatenated(states), _concatenated(weights), bias)
        name, *rest = rest
        scale, down, up = layer.scaling[name], layer.lora_A[name], layer.lora_B[name]

        def at_up(low: Tensor) -> Tensor:
            both = bias if up.bias is None else scale * up.bias + (0 if bias is None else bias)
            return gather([*states, scale * low], [*weights, up.weight], both, rest)

        return _inside(up, at_up, down(layer.lora_dropout[name](hidden).to(down.weight.dtype)))

    def at_base(states: Tensor) -> Tensor:
        return _with_weight(layer.base_layer, states, lambda h, weight, bias: gather([h], [weight], bias, adapters))

    return _inside(layer.base_layer, at_base, hidden)


def _concatenated(parts: list[Tensor]) -> Tensor:
    """Along the last dimension in the dtype of the first; the first itself where it is alone."""
    return parts[0] if len(parts) == 1 else torch.cat([part.to(parts[0].dtype) for part in parts], -1)


@contextlib.contextmanager
def _in_place_of_forward(module: nn.Module, function: Callable[..., Tensor]) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.forward = function
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _inside(module: nn.Module, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``module(*inputs)`` with ``function`` as its forward: between its hooks, where its weight is whole."""
    with _in_place_of_forward(module, function):
        output: Tensor = module(*inputs)
    return output


# Hooks that gather a weight again for the backward sit on the outputs of modules, which may be cast to half precision
# on their way. So a zero takes that way, from the results out through every module; its gradient, zero too, comes back
# through every hook before the op's own backward can start. The results themselves and their gradients go straight.


def _differentiable(result: Any) -> list[Tensor]:
    values = (result,) if isinstance(result, Tensor) else result
    return [value for value in values if isinstance(value, Tensor) and value.requires_grad]


def _anchor(result: Result, logits: Tensor) -> Result:
    """``result``, its gradient held up until that of the model's output has gone back to the head."""
    differentiable = _differentiable(result)
    if not differentiable or not logits.requires_grad:
        return result
    anchored = iter(_Anchored.apply(logits, *differentiable))
    if isinstance(result, Tensor):
        return next(anchored)
    values = [next(anchored) if isinstance(value, Tensor) and value.requires_grad else value for value in result]
    return type(result)._make(values) if hasattr(result, "_make") else type(result)(values)


class _Carrier(torch.autograd.Function):
    """A zero [1, 1, 1] in place of logits that depends on the results, and gives them no gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *results: Tensor) -> Tensor:
        ctx.num_inputs = 1 + len(results)
        return hidden.new_zeros(1, 1, 1)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, ...]:
        return (None,) * ctx.num_inputs


class _Anchored(torch.autograd.Function):
    """The results, unchanged, which now depend on the model's output too."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *results: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.like = (logits.shape, logits.dtype, logits.device)
        return tuple(result.clone() for result in results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        shape, dtype, device = ctx.like
        return torch.zeros(shape, dtype=dtype, device=device), *grads
