"""What sampling engines are and share: how responses are drawn, prompts' tokens, the rule that picks a token.

Shape suffixes: B sequences (= prompts x responses), V vocabulary.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reprdpo.data import PromptTooLongError, TokenizeConfig, tokenize_prompt
from reprdpo.data import Text as Prompt
from reprdpo.errors import UserError
from reprdpo.models import model_fingerprint

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

    @property
    def prompts_per_batch(self) -> int:
        return max(1, self.batch_size // self.num_responses)


class Engine(Protocol):
    """Anything that draws responses to prompts.

    One whose attribute ``independent`` is true gets a whole prompt set in one call, to keep it busy from end to end;
    others get it by batches, each the same in a resumed run.
    """

    def fingerprint(self) -> str:
        """What names the model behind the engine; equal for equal models."""
        ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        config: SamplingConfig,
        *,
        prompt_ids: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, list[Response]]]:
        """Yield ``(position in prompts, responses)`` in order.

        Args:
            prompts: plain texts or chats.
            config: how to draw.
            prompt_ids: the numbers that, with ``config.seed``, name each prompt's random streams (default: its
                position), so that a part of a prompt set is answered as the whole would be.
        """
        ...


class LocalEngine(ABC):
    """An :class:`Engine` on a model in this process: its name, its prompts' tokens and its responses' texts."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._end_ids = end_token_ids(model, tokenizer)
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
        prompt_ids: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, list[Response]]]:
        """See :meth:`Engine.generate`.

        Raises:
            UserError: a prompt without tokens or too long for the model, logits that are not finite, or a model that
                the engine cannot run.
        """
        ids = range(len(prompts)) if prompt_ids is None else prompt_ids
        positions = max_positions(self.model)
        encoded = [
            encode_prompt(self.tokenizer, prompt, number, config, positions)
            for number, prompt in zip(ids, prompts, strict=True)
        ]
        yield from self._responses(encoded, ids, config)

    @abstractmethod
    def _responses(
        self, encoded: list[list[int]], prompt_ids: Sequence[int], config: SamplingConfig
    ) -> Iterator[tuple[int, list[Response]]]:
        """What :meth:`generate` yields, of the prompts' tokens."""

    def _decode(self, prompt: list[int], responses: list[list[int]]) -> list[Response]:
        """Texts that continue the prompt: decoded behind it, since many tokenizers drop a text's leading space."""
        before = self.tokenizer.decode(prompt, skip_special_tokens=True)
        decoded = []
        for tokens in responses:
            ended = tokens[-1] in self._end_ids
            body = tokens[:-1] if ended else tokens
            whole = self.tokenizer.decode(prompt + body, skip_special_tokens=True)
            continues = whole.startswith(before)
            text = whole[len(before) :] if continues else self.tokenizer.decode(body, skip_special_tokens=True)
            # A text cut amid a character's bytes ends in replacement marks, which the model never said.
            decoded.append(Response(text if ended else text.rstrip("\ufffd"), truncated=not ended))
        return decoded


def max_positions(model: PreTrainedModel) -> int | None:
    """Positions the model has; None where it names no number."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or None


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, number: int, config: SamplingConfig, positions: int | None
) -> list[int]:
    """A prompt's tokens, cut as the configuration says to leave ``max_new_tokens`` of ``positions`` (None: no limit).

    Raises:
        UserError: a prompt without tokens, or too long; it is called ``number``.
    """
    positions = positions or _NO_LIMIT
    limit = min(positions - max(2, config.max_new_tokens), config.max_prompt_length or positions)
    if limit < 1:
        raise UserError(
            f"sampling: max_new_tokens is {config.max_new_tokens}, the model has {positions} positions; lower it"
        )
    mode: Any = config.truncation_mode
    try:
        tokens = tokenize_prompt(tokenizer, prompt, TokenizeConfig(positions, limit, mode))
    except PromptTooLongError:
        raise UserError(
            f"prompt {number}: has more than the {limit} tokens that fit beside "
            f'max_new_tokens={config.max_new_tokens}; shorten it, or set truncation_mode to "keep_end"'
        ) from None
    if not tokens:
        raise UserError(f"prompt {number}: has no tokens; remove it or give it a text")
    return tokens


def check_finite(logits: Tensor) -> None:
    """Raise a UserError where a row of logits [.., V] has no distribution; a masked token's -inf is fine."""
    if not bool(logits.logsumexp(-1).isfinite().all()):
        raise UserError("the model's logits are not finite; train it again at a lower learning rate")


def uniforms(seed: int, prompt_id: int, copy: int, steps: int) -> np.ndarray:
    """Float64 [steps] in [0, 1): the random stream of one response."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, prompt_id, copy)))).random(steps)


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
        probability_BV = probability_BV.masked_fill(outside_BV.scatter(1, order_BV, outside_BV), 0)
    cdf_BV = probability_BV.cumsum(-1, dtype=torch.float64)
    target_B1 = uniform_B[:, None] * cdf_BV[:, -1:]
    return torch.searchsorted(cdf_BV, target_B1, right=True).squeeze(1).clamp_(max=cdf_BV.shape[-1] - 1)


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end a response: the generation configuration's and the tokenizer's."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    found = [configured] if isinstance(configured, int) else list(configured or [])
    if tokenizer.eos_token_id is not None:
        found.append(tokenizer.eos_token_id)
    if not found:
        raise UserError("sampling: neither tokenizer nor model names an end-of-sequence token; set eos_token")
    return frozenset(found)
