"""Sampling engines: batched generation from a causal LM that gives the same texts resumed or not.

Shape suffixes: B sequences (= prompts x responses), T tokens, V vocabulary.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache, DynamicLayer

from reprdpo import costs
from reprdpo.data import PromptTooLongError, TokenizeConfig, tokenize_prompt
from reprdpo.data import Text as Prompt
from reprdpo.errors import UserError
from reprdpo.models import forward_flop, model_fingerprint

TRUNCATION_MODES = ("error", "keep_end", "keep_start")

_NO_LIMIT = 1 << 30


class Response(NamedTuple):
    """One sampled text; ``truncated`` where it stopped at ``max_new_tokens`` instead of at an end token."""

    text: str
    truncated: bool


@dataclass(frozen=True)
class SamplingConfig:
    """How responses are drawn.

    Attributes:
        num_responses: responses a prompt.
        max_new_tokens: longest response, in tokens.
        temperature: divides the logits; 0 takes the likeliest token (all responses of a prompt are then one text).
        top_p: smallest set of tokens holding this much probability; 1 is off.
        top_k: number of likeliest tokens kept, ties with the last one too; 0 is off.
        batch_size: sequences (prompts x responses) a forward; a prompt's responses are never split.
        seed: start of every random stream.
        max_prompt_length: longest prompt in tokens; None is what the model's positions leave for it.
        truncation_mode: what a longer prompt meets: "error", "keep_end" or "keep_start".
    """

    num_responses: int = 8
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    batch_size: int = 64
    seed: int = 0
    max_prompt_length: int | None = None
    truncation_mode: str = "error"

    def __post_init__(self) -> None:
        for name, least in (("num_responses", 1), ("max_new_tokens", 1), ("batch_size", 1), ("top_k", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise UserError(f"sampling: {name} is {getattr(self, name)}; give {least} or more")
        if self.max_prompt_length is not None and self.max_prompt_length < 1:
            raise UserError(f"sampling: max_prompt_length is {self.max_prompt_length}; give 1 or more, or none")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"sampling: temperature is {self.temperature}; give 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise UserError(f"sampling: top_p is {self.top_p}; give a number in (0, 1]")
        if self.truncation_mode not in TRUNCATION_MODES:
            choices = ", ".join(TRUNCATION_MODES)
            raise UserError(f"sampling: truncation_mode is {self.truncation_mode!r}; give one of {choices}")

    def prompts_per_batch(self, num_responses: int) -> int:
        return max(1, self.batch_size // num_responses)


class Engine(Protocol):
    """Anything that draws responses to prompts."""

    def fingerprint(self) -> str:
        """What names the model behind the engine; equal for equal models."""
        ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        config: SamplingConfig,
        *,
        num_responses: int | None = None,
        prompt_ids: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, list[Response]]]:
        """Yield ``(position in prompts, responses)`` in order.

        Args:
            prompts: plain texts or chats.
            config: how to draw.
            num_responses: instead of the configuration's.
            prompt_ids: the numbers that, with ``config.seed``, name each prompt's random streams (default: its
                position), so that a part of a prompt set is answered as the whole would be.
        """
        ...


class TransformersEngine:
    """An :class:`Engine` on a transformers causal LM.

    Every response has a random stream of its own, named by (seed, prompt id, response number), and one uniform of it
    picks each token by inverse CDF. So a response depends on nothing sampled before or beside it (but for the rounding
    of differently shaped matmuls): a longer ``max_new_tokens`` extends it, a larger ``num_responses`` adds to it.
    A prompt is read once for all its responses, and finished sequences leave the batch.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._end_ids = _end_token_ids(model, tokenizer)
        self._fingerprint: str | None = None

    def fingerprint(self) -> str:
        """The model's weights and the tokenizer's vocabulary, hashed once: a model that moved needs another engine."""
        if self._fingerprint is None:
            vocabulary = json.dumps(sorted(self.tokenizer.get_vocab().items())).encode()
            self._fingerprint = f"{model_fingerprint(self.model)}-{hashlib.sha256(vocabulary).hexdigest()[:8]}"
        return self._fingerprint

    def generate(
        self,
        prompts: Sequence[Prompt],
        config: SamplingConfig,
        *,
        num_responses: int | None = None,
        prompt_ids: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, list[Response]]]:
        """See :meth:`Engine.generate`; batches hold prompts of like length, the longest first.

        Raises:
            UserError: a prompt without tokens or too long for the model, or logits that are not finite.
        """
        count = num_responses or config.num_responses
        ids = range(len(prompts)) if prompt_ids is None else prompt_ids
        encoded = [self._encode(prompt, number, config) for number, prompt in zip(ids, prompts, strict=True)]
        order = sorted(range(len(encoded)), key=lambda row: -len(encoded[row]))
        size = config.prompts_per_batch(count)
        finished: dict[int, list[Response]] = {}
        following = 0
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            tokens = self._sample([encoded[row] for row in rows], [ids[row] for row in rows], config, count)
            for place, row in enumerate(rows):
                mine = tokens[place * count : (place + 1) * count]
                finished[row] = self._decode(encoded[row], mine)
            while following in finished:
                yield following, finished.pop(following)
                following += 1

    def _encode(self, prompt: Prompt, number: int, config: SamplingConfig) -> list[int]:
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or _NO_LIMIT
        limit = min(positions - max(2, config.max_new_tokens), config.max_prompt_length or positions)
        if limit < 1:
            raise UserError(
                f"sampling: max_new_tokens is {config.max_new_tokens}, the model has {positions} positions; lower it"
            )
        mode: Any = config.truncation_mode
        try:
            tokens = tokenize_prompt(self.tokenizer, prompt, TokenizeConfig(positions, limit, mode))
        except PromptTooLongError:
            raise UserError(
                f"prompt {number}: has more than the {limit} tokens that fit beside "
                f'max_new_tokens={config.max_new_tokens}; shorten it, or set truncation_mode to "keep_end"'
            ) from None
        if not tokens:
            raise UserError(f"prompt {number}: has no tokens; remove it or give it a text")
        return tokens

    def _decode(self, prompt: list[int], responses: list[list[int]]) -> list[Response]:
        """Texts that continue the prompt: decoded behind it, since many tokenizers drop a text's leading space."""
        before = self.tokenizer.decode(prompt, skip_special_tokens=True)
        decoded = []
        for tokens in responses:
            ended = tokens[-1] in self._end_ids
            body = tokens[:-1] if ended else tokens
            text = self.tokenizer.decode(prompt + body, skip_special_tokens=True)
            if text.startswith(before):
                text = text[len(before) :]
            else:
                text = self.tokenizer.decode(body, skip_special_tokens=True)
            # A text cut amid a character's bytes ends in replacement marks, which the model never said.
            decoded.append(Response(text if ended else text.rstrip("\ufffd"), truncated=not ended))
        return decoded

    @torch.inference_mode()
    def _sample(
        self, prompts: list[list[int]], prompt_ids: list[int], config: SamplingConfig, num_responses: int
    ) -> list[list[int]]:
        """Token lists, the responses of a prompt side by side, each with its end token if it met one."""
        copies = 1 if config.temperature == 0 else num_responses
        was_training = self.model.training
        self.model.eval()
        try:
            sampled_BT = self._decode_loop(prompts, prompt_ids, config, copies)
        finally:
            self.model.train(was_training)
        rows = [_until_end(row, self._end_ids) for row in sampled_BT.tolist()]
        return [row for row in rows for _ in range(num_responses // copies)]

    def _decode_loop(
        self, prompts: list[list[int]], prompt_ids: list[int], config: SamplingConfig, copies: int
    ) -> Tensor:
        device = self.model.device
        pad_id, steps = self.tokenizer.pad_token_id or 0, config.max_new_tokens
        input_ids, mask = _left_padded(prompts, pad_id, device)
        prompt_length = input_ids.shape[1]
        position_ids = (mask.cumsum(-1) - 1).clamp_(min=0)
        cache = growing_cache(self.model, prompt_length + steps)
        logits = self._forward(input_ids, mask, position_ids, cache)
        if not bool(logits.logsumexp(-1).isfinite().all()):  # a masked token's -inf is fine
            raise UserError("the model's logits are not finite; train it again at a lower learning rate")

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


def pick_tokens(logits_BV: Tensor, uniform_B: Tensor, config: SamplingConfig) -> Tensor:
    """Token ids [B]: the argmax at temperature 0, else the inverse CDF of the filtered softmax at ``uniform_B``.

    Args:
        logits_BV: float32 [B, V].
        uniform_B: float64 [B] in [0, 1).
        config: temperature, then top-k, then top-p, as transformers orders them.
    """
    if config.temperature == 0:
        return logits_BV.argmax(-1)
    scaled_BV = logits_BV / config.temperature
    if 0 < config.top_k < scaled_BV.shape[-1]:
        kth_B1 = scaled_BV.topk(config.top_k, dim=-1).values[:, -1:]
        scaled_BV = scaled_BV.masked_fill(scaled_BV < kth_B1, float("-inf"))
    probability_BV = scaled_BV.softmax(-1)
    if config.top_p < 1:
        descending_BV, order_BV = probability_BV.sort(dim=-1, descending=True, stable=True)
        outside_BV = descending_BV.cumsum(-1) - descending_BV >= config.top_p
        outside_BV[:, 0] = False
        probability_BV = probability_BV.masked_fill(outside_BV.scatter(1, order_BV, outside_BV), 0)
    cdf_BV = probability_BV.cumsum(-1, dtype=torch.float64)
    target_B1 = uniform_B[:, None] * cdf_BV[:, -1:]
    return torch.searchsorted(cdf_BV, target_B1, right=True).squeeze(1).clamp_(max=cdf_BV.shape[-1] - 1)


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
    return cache


def _uniforms(seed: int, prompt_ids: Sequence[int], copies: int, steps: int) -> Tensor:
    """Float64 [prompts * copies, steps] in [0, 1), a stream for each (seed, prompt id, response number)."""
    streams = [
        np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, number, copy)))).random(steps)
        for number in prompt_ids
        for copy in range(copies)
    ]
    return torch.from_numpy(np.stack(streams))


def _left_padded(rows: list[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    input_ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return input_ids, mask


def _until_end(tokens: list[int], end_ids: frozenset[int]) -> list[int]:
    for place, token in enumerate(tokens):
        if token in end_ids:
            return tokens[: place + 1]
    return tokens


def _end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    configured = getattr(model.generation_config, "eos_token_id", None)
    found = [configured] if isinstance(configured, int) else list(configured or [])
    if tokenizer.eos_token_id is not None:
        found.append(tokenizer.eos_token_id)
    if not found:
        raise UserError("sampling: neither tokenizer nor model names an end-of-sequence token; set eos_token")
    return frozenset(found)
