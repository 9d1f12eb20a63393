"""Sampling batch by batch with transformers' models, a prompt read once for all its responses.

Shape suffixes: B sequences (= prompts x responses), T tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from reprdpo import costs
from reprdpo.data import pad_sequences
from reprdpo.errors import UserError
from reprdpo.models import evaluating, forward_flop
from reprdpo.sampling.engine import LocalEngine, Response, SamplingConfig, check_finite, pick_tokens, uniforms


class TransformersEngine(LocalEngine):
    """An :class:`~reprdpo.sampling.engine.Engine` on a transformers causal LM.

    Every response has a random stream of its own, named by (seed, prompt id, response number), and one uniform of it
    picks each token by inverse CDF. So a response depends on nothing sampled before or beside it (but for the rounding
    of differently shaped matmuls): a longer ``max_new_tokens`` extends it, a larger ``num_responses`` adds to it.
    A prompt is read once for all its responses, and finished sequences leave the batch.
    """

    def _responses(
        self, encoded: list[list[int]], prompt_ids: Sequence[int], config: SamplingConfig
    ) -> Iterator[tuple[int, list[Response]]]:
        """Batches hold prompts of like length, the longest first."""
        order = sorted(range(len(encoded)), key=lambda row: -len(encoded[row]))
        size, many = config.prompts_per_batch, config.num_responses
        finished: dict[int, list[Response]] = {}
        following = 0
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            numbers = [prompt_ids[row] for row in rows]
            tokens = self._sample([encoded[row] for row in rows], numbers, config)
            for place, row in enumerate(rows):
                finished[row] = self._decode(encoded[row], tokens[place * many : (place + 1) * many])
            while following in finished:
                yield following, finished.pop(following)
                following += 1

    @torch.inference_mode()
    def _sample(self, prompts: list[list[int]], prompt_ids: list[int], config: SamplingConfig) -> list[list[int]]:
        """Token lists, the responses of a prompt side by side, each with its end token if it met one."""
        copies = 1 if config.temperature == 0 else config.num_responses
        with evaluating(self.model):
            sampled_BT = self._decode_loop(prompts, prompt_ids, config, copies)
        rows = [_until_end(row, self._end_ids) for row in sampled_BT.tolist()]
        return [row for row in rows for _ in range(config.num_responses // copies)]

    def _decode_loop(
        self, prompts: list[list[int]], prompt_ids: list[int], config: SamplingConfig, copies: int
    ) -> Tensor:
        device = self.model.device
        steps = config.max_new_tokens
        padded = pad_sequences(prompts, self.tokenizer.pad_token_id or 0, side="left")
        input_ids, mask = (part.to(device) for part in padded)
        prompt_length = input_ids.shape[1]
        position_ids = (mask.cumsum(-1) - 1).clamp_(min=0)
        cache = growing_cache(self.model, prompt_length + steps)
        logits = self._forward(input_ids, mask, position_ids, cache)
        check_finite(logits)

        cache.batch_repeat_interleave(copies)
        logits_BV = logits.repeat_interleave(copies, 0)
        position_B1 = position_ids[:, -1:].repeat_interleave(copies, 0)
        mask_BT = torch.nn.functional.pad(mask.repeat_interleave(copies, 0), (0, steps), value=1)
        uniform_BT = _uniforms(config.seed, prompt_ids, copies, steps).to(device)
        end_ids = torch.tensor(sorted(self._end_ids), device=device)
        sampled_BT = torch.full_like(uniform_BT, int(end_ids[0]), dtype=torch.long)
        row_B = torch.arange(len(sampled_BT), device=device)
        alive_B = torch.ones_like(row_B, dtype=torch.bool)
        for step in range(steps):
            token_B = pick_tokens(logits_BV, uniform_BT[row_B, step], config)
            sampled_BT[row_B[alive_B], step] = token_B[alive_B]
            alive_B &= torch.isin(token_B, end_ids, invert=True)
            remaining = int(alive_B.sum())
            if remaining == 0 or step + 1 == steps:
                break
            if remaining <= 0.75 * len(row_B):  # a copy of the cache for cheaper steps from here on
                kept = alive_B.nonzero().squeeze(1)
                cache.batch_select_indices(kept)
                row_B, token_B, position_B1, mask_BT = row_B[kept], token_B[kept], position_B1[kept], mask_BT[kept]
                alive_B = alive_B[kept]
            position_B1 = position_B1 + 1
            seen = prompt_length + step + 1
            logits_BV = self._forward(token_B[:, None], mask_BT[:, :seen], position_B1, cache)
        return sampled_BT

    def _forward(self, input_ids: Tensor, mask: Tensor, position_ids: Tensor, cache: DynamicCache) -> Tensor:
        output = self.model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        costs.count(forward_flop(self.model, input_ids.numel(), scored=len(input_ids)))
        return output.logits[:, -1].float()


class _GrowingLayer(DynamicLayer):
    """A cache layer written in place into room set aside once; concatenating per token costs more than the matmuls."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
        # The first update (the prompt's) is kept as it came: it is repeated for the responses, which drops the buffers.
        if start == 0:
            self.keys, self.values = key_states, value_states
            return self.keys, self.values
        if self._buffers is None or self.keys.data_ptr() != self._buffers[0].data_ptr():
            self._buffers = (self._roomy(self.keys), self._roomy(self.values))
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values

    def _roomy(self, states: Tensor) -> Tensor:
        batch, heads, length, width = states.shape
        roomy = states.new_empty(batch, heads, self._capacity, width)
        roomy[:, :, :length] = states
        return roomy


def growing_cache(model: PreTrainedModel, capacity: int) -> DynamicCache:
    """A cache with room for ``capacity`` tokens, where the model's layers allow it (full attention)."""
    cache = DynamicCache(config=model.config)
    cache.layers = [_GrowingLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    odd = next((layer for layer in cache.layers if not hasattr(layer, "batch_repeat_interleave")), None)
    if odd is not None:
        raise UserError(
            f"engine transformers: cannot share a prompt among responses in a {type(odd).__name__} "
            f"({model.config.model_type}); serve the model and use the engine openai"
        )
    return cache


def _uniforms(seed: int, prompt_ids: Sequence[int], copies: int, steps: int) -> Tensor:
    """Float64 [prompts * copies, steps], a stream a row."""
    streams = [uniforms(seed, number, copy, steps) for number in prompt_ids for copy in range(copies)]
    return torch.from_numpy(np.stack(streams))


def _until_end(tokens: list[int], end_ids: frozenset[int]) -> list[int]:
    for place, token in enumerate(tokens):
        if token in end_ids:
            return tokens[: place + 1]
    return tokens
