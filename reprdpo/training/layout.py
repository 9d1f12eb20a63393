"""How a policy's batches are laid out: which layouts it can be served, its inputs, and the way back to sequences.

Shape suffixes: S sequences, B rows, T row length, N scored tokens, M tokens of the longest sequence, D hidden size; a
packed batch is one of :class:`~reprdpo.data.PackingCollator` whose layout is not "padded".
"""

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from reprdpo import models
from reprdpo.data import Layout, PackingCollator, PreferenceCollator, pair_tokens, to_device
from reprdpo.errors import UserError, first_line
from reprdpo.heads import run_at_head

logger = logging.getLogger(__name__)

Packing = Literal["auto", "prefix", "varlen", "padded"]
_FLEX_BLOCK = 128
# Mixture-of-experts configurations name their feed-forward layers in the same list.
_ANY_ROW = {"full_attention", "sliding_attention", "sparse", "dense", "moe"}
# Beyond the last of them Doge's tokens compete for being seen, ties decided by their place in the row.
_WINDOWS = ("sliding_window", "attention_window_size", "window_size", "keep_window_size")


def packing_collator(
    model: nn.Module, padded: PreferenceCollator, *, packing: Packing = "auto", max_row_tokens: int = 4096
) -> PackingCollator:
    """The collator of ``model``'s batches under ``packing``; with "auto", says once why they are always padded.

    Rows are shared-prefix ones under sdpa, eager and FlexAttention, and whole sequences under flash attention; "auto"
    leaves the choice between them and padding to each batch's lengths. Rows are no longer than a sliding window.

    Args:
        model: the policy, where it will be trained.
        padded: makes the padded batches.

    Raises:
        UserError: ``packing`` asks for a layout that this model cannot be served.
    """
    collator = PackingCollator(padded, ("padded",), max_row_tokens, _score_cost(model))
    if packing == "padded":
        return collator
    implementation = _attention(model)
    layout: Layout = "varlen" if packing == "varlen" or (packing == "auto" and "flash" in implementation) else "prefix"
    packed = replace(collator, layouts=(layout,), max_row_tokens=min(max_row_tokens, _window(model) or max_row_tokens))
    if implementation == "flex_attention":  # block-sparse: a row's length costs nothing by itself
        packed = replace(packed, score_cost=0.0, pad_to_multiple_of=_FLEX_BLOCK)
    reason = _why_not(model, layout) or _difference(model, packed)
    if reason is None:
        return packed if packing != "auto" else replace(packed, layouts=("padded", layout))
    reason = f"{type(models.unwrap(model)).__name__} cannot be served the {layout} layout: {reason}"
    if packing != "auto":
        raise UserError(f"packing: {reason}; choose auto or padded")
    logger.warning("packing: batches are padded, because %s", reason)
    return collator


def check_pair_lengths(collator: PackingCollator, pairs: Dataset, what: str) -> None:
    """Say how many pairs are too long for a packed row, whose batches will be padded.

    Raises:
        UserError: there are some, and batches may not be padded.
    """
    if "prefix" not in collator.layouts:
        return
    limit, tokens_P = collator.max_row_tokens, pair_tokens(pairs)
    if not (longer := int((tokens_P > limit).sum())):
        return
    found = f"{what}: {longer} of {len(tokens_P)} pairs take more than the {limit} tokens of a packed row"
    if "padded" not in collator.layouts:
        raise UserError(f"packing: {found} (up to {tokens_P.max()}); choose auto, or raise max_row_tokens")
    logger.warning("packing: %s; their batches are padded", found)


def set_attention(model: nn.Module, implementation: str) -> None:
    """Have the model attend by ``implementation``, under transformers' name for it.

    Raises:
        UserError: it is not installed, or the model has none of that name.
    """
    before = _attention(model)
    try:
        models.unwrap(model).set_attn_implementation(implementation)
    except (ImportError, ValueError, RuntimeError) as error:
        raise UserError(f"attn_implementation: {implementation} cannot be used: {first_line(error)}") from error
    if implementation != before == _attention(model):
        raise UserError(f"attn_implementation: {type(models.unwrap(model)).__name__} has {before} attention alone")


def is_packed(batch: Mapping[str, Any]) -> bool:
    """Whether the batch is laid out by segments rather than padded."""
    return "token_index" in batch


def model_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What the policy's forward takes of the batch."""
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "use_cache": False}
    if not is_packed(batch):
        return inputs | {"attention_mask": batch["attention_mask"]}
    inputs["position_ids"] = batch["position_ids"]
    if "segment_ids" in batch:
        return inputs | {"attention_mask": _segment_mask(model, batch["segment_ids"], batch["prefix_ids"])}
    lengths, longest = batch["cu_seq_lens"], batch["max_length"]
    inputs |= {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths}
    return inputs | {"max_length_q": longest, "max_length_k": longest}


def loss_inputs(hidden_BTD: Tensor, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`reprdpo.ops.linear_preference_loss` takes of the batch and of the states under the head.

    Of a packed batch these are the N scored rows alone, one state twice where both responses start from it.
    """
    if not is_packed(batch):
        return {"hidden": hidden_BTD, "labels": batch["labels"], "scored_index": batch["scored_index"]}
    return {
        "hidden": hidden_BTD.flatten(0, 1).index_select(0, batch["scored_index"]),
        "labels": batch["labels"],
        "scored_index": torch.arange(len(batch["labels"]), device=hidden_BTD.device),
        "sequence_ids": batch["sequence_ids"],
        "num_sequences": len(batch["last_token_index"]),
    }


def indexed_states(states: Sequence[Tensor], batch: Mapping[str, Any]) -> list[Tensor]:
    """Each layer's states as ``last_token_index`` points into them: [S, T, D] as they are, or flat [B * T, D]."""
    return [state.flatten(0, 1) for state in states] if is_packed(batch) else list(states)


def mean_over_tokens(states: Sequence[Tensor], batch: Mapping[str, Any]) -> Tensor:
    """[S, L, D]: each of the :func:`indexed_states`' mean over a sequence's tokens, summed in float32."""
    if is_packed(batch):
        real_SM1 = batch["token_index"][:, :, None] >= 0
        at_SM = batch["token_index"].clamp(min=0)
        states = [state[at_SM] for state in states]
    else:
        real_SM1 = batch["attention_mask"].bool()[:, :, None]
    sums = [torch.where(real_SM1, state, 0).sum(1, dtype=torch.float32) for state in states]
    return torch.stack([(sum_SD / real_SM1.sum(1)).to(states[0].dtype) for sum_SD in sums], dim=1)


def segment_mask_function(segment_ids_BT: Tensor, prefix_ids_BT: Tensor) -> Callable[..., Tensor]:
    """FlexAttention's ``mask_mod``: a token sees those before it of its own segment and of the one it continues."""

    def visible(batch: Any, head: Any, query: Any, key: Any) -> Any:
        segment = segment_ids_BT[batch, key]
        own, continued = segment_ids_BT[batch, query], prefix_ids_BT[batch, query]
        return (query >= key) & ((segment == own) | (segment == continued))

    return visible


def _segment_mask(model: nn.Module, segment_ids_BT: Tensor, prefix_ids_BT: Tensor) -> Tensor | BlockMask:
    """[B, 1, T, T] as the model's attention takes it: booleans for sdpa, numbers to add for eager, blocks for flex."""
    visible = segment_mask_function(segment_ids_BT, prefix_ids_BT)
    (num_rows, length), device = segment_ids_BT.shape, segment_ids_BT.device
    implementation = _attention(model)
    if implementation == "flex_attention":
        return create_block_mask(visible, num_rows, None, length, length, device=str(device))
    rows, positions = torch.arange(num_rows, device=device), torch.arange(length, device=device)
    mask_B1TT = visible(rows[:, None, None, None], None, positions[None, None, :, None], positions[None, None, None, :])
    if implementation == "sdpa":
        return mask_B1TT
    dtype = models.unwrap(model).dtype
    return torch.zeros(mask_B1TT.shape, dtype=dtype, device=device).masked_fill_(~mask_B1TT, torch.finfo(dtype).min)


def _attention(model: nn.Module) -> str:
    return str(models.unwrap(model).config.get_text_config()._attn_implementation)


def _why_not(model: nn.Module, layout: Layout) -> str | None:
    """Why the model cannot be served a packed layout, as far as its configuration tells."""
    causal_lm, implementation = models.unwrap(model), _attention(model)
    config = causal_lm.config.get_text_config()
    takes = inspect.signature(causal_lm.forward).parameters
    if layout == "varlen" and "flash" not in implementation:
        return f"its attention is {implementation}; set attn_implementation to flash_attention_2 (pip: reprdpo[flash])"
    if layout == "prefix" and implementation not in ("sdpa", "eager", "flex_attention"):
        return f"its attention is {implementation}, which takes no such mask; sdpa, eager and flex_attention do"
    if implementation == "flex_attention" and causal_lm.device.type == "cpu":
        return "flex_attention has no backward on a CPU; set attn_implementation to sdpa"
    if "position_ids" not in takes or getattr(config, "alibi", False):
        return "its positions are those in the row (its forward takes no position_ids, or it has ALiBi)"
    if layout == "varlen" and not any(kind.kind is kind.VAR_KEYWORD for kind in takes.values()):
        return "its forward takes no cu_seq_lens"
    if other := sorted(set(getattr(config, "layer_types", None) or ()) - _ANY_ROW):
        return f"its layers of kind {', '.join(other)} depend on what lies before them in the row"
    return None


def _window(model: nn.Module) -> int | None:
    """How far back a layer looks; within it, a row's mask is the only limit."""
    config = models.unwrap(model).config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    return min((size for name in _WINDOWS if isinstance(size := getattr(config, name, None), int)), default=None)


def _score_cost(model: nn.Module) -> float:
    """Multiply-adds of an attention score of all layers, q k and p v, as a share of a token's in matrix products."""
    config = models.unwrap(model).config.get_text_config()
    return 2 * config.num_hidden_layers * config.hidden_size / models.matmul_parameters(models.decoder(model))


@torch.no_grad()
def _difference(model: nn.Module, collator: PackingCollator) -> str | None:
    """What is wrong with the states of two small pairs packed into rows, which must be those of padded ones."""
    vocabulary = models.output_head(model).weight.shape[0]
    ids = [number % vocabulary for number in range(3, 32)]
    rows = [
        {
            "pair_id": pair,
            "chosen_input_ids": [*prompt, *ids[8 : 11 + pair]],
            "rejected_input_ids": [*prompt, *ids[20 : 25 - pair]],
            "chosen_response_start": len(prompt),
            "rejected_response_start": len(prompt),
        }
        for pair, prompt in enumerate([ids[:4], ids[3:6]])
    ]
    padded, packed = collator.padded(rows), replace(collator, max_row_tokens=_FLEX_BLOCK)(rows)
    try:
        with models.evaluating(model):
            alone_STD, in_row_BTD = (_states(model, batch) for batch in (padded, packed))
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        return f"its forward refuses it ({first_line(error)})"
    real_ST = padded["attention_mask"].bool()
    alone_XD = alone_STD.cpu()[real_ST].float()
    in_row_XD = in_row_BTD.cpu().flatten(0, 1)[packed["token_index"][packed["token_index"] >= 0]].float()
    error_X = (alone_XD - in_row_XD).norm(dim=-1) / alone_XD.norm(dim=-1)
    if error_X.max() <= torch.finfo(alone_STD.dtype).eps ** 0.5:
        return None
    return f"a token's states depend on what else is in its row (off by {error_X.max():.2g})"


def _states(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    inputs = model_inputs(model, to_device(batch, models.unwrap(model).device))
    states: Tensor = run_at_head(model, lambda hidden, _: hidden, **inputs)
    return states
