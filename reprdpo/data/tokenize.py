"""Tokenisation: token ids with the response marked exactly, one end-of-sequence token, truncation by stated rules.

The response starts at the first token where the ids of prompt and of prompt + response diverge, so a token that merges
across the boundary belongs to the response. Plain texts get the tokenizer's own special tokens, chats those of their
template; a leading BOS stands once, and EOS (``append_eos``) once, last, where the reward is read.

What does not fit is cut by these rules:

1. The prompt may have ``max_prompt_length`` tokens, BOS included; without one, what the longer response leaves of
   ``max_length``, and never less than half of it.
2. A longer prompt is an error, loses its start (``keep_end``; a BOS stays) or its end (``keep_start``), or its row is
   left out (``drop``). Chosen and rejected keep the same prompt, of one token at least.
3. Then the response is cut from the right to ``max_length``; EOS stays last.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jinja2
from datasets import Dataset, Features, Value
from transformers import PreTrainedTokenizerBase

from reprdpo.data.schema import PREFERENCES, RESPONSES, Text, in_kind, is_empty
from reprdpo.errors import UserError
from reprdpo.files import content_hash

logger = logging.getLogger(__name__)

TruncationMode = Literal["error", "keep_end", "keep_start", "drop"]


class PromptTooLongError(UserError):
    """A prompt over its limit, in the modes ``error`` and ``drop``."""


@dataclass(frozen=True)
class TokenizeConfig:
    """Lengths in tokens; the rules are the module's.

    Attributes:
        max_length: longest sequence of prompt and response, in tokens.
        max_prompt_length: longest prompt, BOS included; unset, what the longer response leaves, and half at least.
        truncation_mode: what a longer prompt meets: "error", "keep_end", "keep_start", or "drop" (of its row).
        append_eos: end every response with EOS, where the reward is read.

    Raises:
        UserError: lengths that leave no room for a prompt token, a response token and EOS, or an unknown mode.
    """

    max_length: int = 1024
    max_prompt_length: int | None = None
    truncation_mode: TruncationMode = "error"
    append_eos: bool = True

    def __post_init__(self) -> None:
        if self.max_length < 4:
            raise UserError(f"max_length is {self.max_length}; a prompt, a response and EOS need 4 tokens or more")
        if self.max_prompt_length is not None and not 1 <= self.max_prompt_length <= self.max_length - 2:
            raise UserError(
                f"max_prompt_length is {self.max_prompt_length}; choose 1 to {self.max_length - 2} (max_length - 2)"
            )
        if self.truncation_mode not in get_args(TruncationMode):
            modes = ", ".join(get_args(TruncationMode))
            raise UserError(f"truncation_mode is '{self.truncation_mode}'; choose one of {modes}")


class TokenizedPair(NamedTuple):
    """Ids of prompt + chosen and prompt + rejected; ``prompt_ids`` is the part of the prompt both begin with."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    chosen_start: int
    rejected_start: int


class TokenizedResponse(NamedTuple):
    """Ids of prompt + response; the response is ``input_ids[response_start:]``."""

    input_ids: list[int]
    response_start: int


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Text) -> str:
    """The prompt as the model reads it: a plain text as it stands, a chat by its template up to the response.

    Raises:
        UserError: a chat and a tokenizer without a chat template, or one that refuses the messages.
    """
    return prompt if isinstance(prompt, str) else _apply_template(tokenizer, prompt, add_generation_prompt=True)


def tokenize_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Text, config: TokenizeConfig) -> list[int]:
    """The ids to generate from: the prompt alone, cut by the module's rules.

    Raises:
        PromptTooLongError: in the modes ``error`` and ``drop``.
    """
    (ids,) = _prompt_ids(tokenizer, [prompt])
    ids = _without_last(tokenizer.eos_token_id, ids)
    return _cut_prompt([ids], len(ids), config, tokenizer.bos_token_id, config.max_length)[0]


def tokenize_pair(
    tokenizer: PreTrainedTokenizerBase, prompt: Text, chosen: Text, rejected: Text, config: TokenizeConfig
) -> TokenizedPair:
    """Tokenise one pair by the module's rules.

    Raises:
        PromptTooLongError: a prompt over its limit in the modes ``error`` and ``drop``.
        UserError: a chat that the tokenizer's template cannot render.
    """
    (pair,) = _tokenize_batch(tokenizer, [prompt], [[chosen], [rejected]], config)
    if isinstance(pair, PromptTooLongError):
        raise pair
    (chosen_ids, rejected_ids), (chosen_start, rejected_start) = pair
    shared = min(chosen_start, rejected_start)
    return TokenizedPair(chosen_ids[:shared], chosen_ids, rejected_ids, chosen_start, rejected_start)


def tokenize_response(
    tokenizer: PreTrainedTokenizerBase, prompt: Text, response: Text, config: TokenizeConfig
) -> TokenizedResponse:
    """Tokenise one prompt and response by the module's rules; raises as :func:`tokenize_pair`."""
    (found,) = _tokenize_batch(tokenizer, [prompt], [[response]], config)
    if isinstance(found, PromptTooLongError):
        raise found
    return TokenizedResponse(found[0][0], found[1][0])


def tokenize_nonempty(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text], responses: Sequence[Text], config: TokenizeConfig
) -> tuple[list[int], list[dict[str, Any]]]:
    """The places of the responses that are not empty, and their rows; a text that answers a chat is the assistant's.

    Raises:
        UserError: as :func:`tokenize_response`.
    """
    places = [place for place, response in enumerate(responses) if not is_empty(response)]
    texts = [(prompts[place], in_kind(prompts[place], responses[place])) for place in places]
    return places, [tokenize_response(tokenizer, *text, config)._asdict() for text in texts]


def tokenize_preferences(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, config: TokenizeConfig, *, where: str = "preferences"
) -> Dataset:
    """Tokenise a data set of the preference schema.

    Returns columns chosen_input_ids, chosen_response_start, rejected_input_ids, rejected_response_start, pair_id (the
    row's number in ``dataset`` from 0, whatever is left out), prompt_id (equal for equal prompts: the first such
    pair_id) and the schema's labels. Left out, and logged: too long prompts in the mode ``drop``; pairs whose ids are
    equal once tokenised and cut.

    Raises:
        UserError: a prompt over its limit in the mode ``error`` (names ``where`` and the row, from 1), a chat that
            cannot be rendered, or nothing left.
    """
    return _tokenize_dataset(dataset, tokenizer, config, where, ("chosen", "rejected"))


def tokenize_responses(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, config: TokenizeConfig, *, where: str = "responses"
) -> Dataset:
    """Tokenise a data set with columns prompt and response.

    Returns columns input_ids, response_start, row_id, prompt_id and the schema's labels, as
    :func:`tokenize_preferences` does.
    """
    return _tokenize_dataset(dataset, tokenizer, config, where, ("response",))


Tokenized = tuple[list[list[int]], list[int]]


def _tokenize_dataset(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, config: TokenizeConfig, where: str, texts: tuple[str, ...]
) -> Dataset:
    pair = len(texts) == 2
    labels = [name for name in (PREFERENCES if pair else RESPONSES).labels if name in dataset.column_names]
    prefixes = [f"{name}_" if pair else "" for name in texts]
    row_id = "pair_id" if pair else "row_id"
    integers = [Value("int32")]
    features: dict[str, Any] = {}
    for prefix in prefixes:
        features |= {f"{prefix}input_ids": integers, f"{prefix}response_start": Value("int32")}
    features |= {row_id: Value("int64"), "prompt_id": Value("int64")} | {n: dataset.features[n] for n in labels}
    first_seen: dict[str, int] = {}
    left_out = {"with a prompt over its limit": 0, "whose chosen and rejected are the same tokens": 0}
    long_prompts, same_tokens = left_out

    def tokenize(batch: dict[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {name: [] for name in features}
        try:
            found = _tokenize_batch(tokenizer, batch["prompt"], [batch[name] for name in texts], config)
        except UserError:
            _name_bad_row(tokenizer, batch, rows, texts, config, where)
            raise
        for position, (row, item) in enumerate(zip(rows, found, strict=True)):
            prompt_id = first_seen.setdefault(repr(batch["prompt"][position]), row)
            if isinstance(item, PromptTooLongError):
                if config.truncation_mode == "error":
                    raise PromptTooLongError(f"{where}, row {row + 1}: {item}")
                left_out[long_prompts] += 1
                continue
            if pair and item[0][0] == item[0][1]:
                left_out[same_tokens] += 1
                continue
            for prefix, ids, start in zip(prefixes, *item, strict=True):
                columns[f"{prefix}input_ids"].append(ids)
                columns[f"{prefix}response_start"].append(start)
            columns[row_id].append(row)
            columns["prompt_id"].append(prompt_id)
            for name in labels:
                columns[name].append(batch[name][position])
        return columns

    # A fingerprint of our own: hashing the function would pickle the tokenizer.
    tokenized = dataset.map(
        tokenize,
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=Features(features),
        keep_in_memory=True,
        load_from_cache_file=False,
        new_fingerprint=content_hash(dataset._fingerprint, repr(tokenizer), repr(config)),
        desc=f"Tokenising {where}",
    )
    for reason, count in left_out.items():
        if count:
            logger.warning("%s: left out %d of %d rows %s", where, count, len(dataset), reason)
    if not len(tokenized):
        raise UserError(f"{where}: no row is left of {len(dataset)} after tokenisation; raise max_length")
    return tokenized


def _name_bad_row(
    tokenizer: PreTrainedTokenizerBase,
    batch: dict[str, list[Any]],
    rows: list[int],
    texts: tuple[str, ...],
    config: TokenizeConfig,
    where: str,
) -> None:
    """Tokenise a batch that failed row by row, to name the row that fails."""
    for position, row in enumerate(rows):
        try:
            _tokenize_batch(tokenizer, [batch["prompt"][position]], [[batch[name][position]] for name in texts], config)
        except UserError as error:
            raise UserError(f"{where}, row {row + 1}: {error}") from error


def _tokenize_batch(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    responses: Sequence[Sequence[Text]],
    config: TokenizeConfig,
) -> list[Tokenized | PromptTooLongError]:
    """Ids and response starts of each prompt with its responses, which come as one list per kind of response."""
    prompt_ids = _prompt_ids(tokenizer, prompts)
    whole = [_whole_ids(tokenizer, prompts, column, config) for column in responses]
    found: list[Tokenized | PromptTooLongError] = []
    for prompt, *sequences in zip(prompt_ids, *whole, strict=True):
        starts = [_response_start(prompt, ids, config) for ids in sequences]
        try:
            found.append(_cut(sequences, starts, config, tokenizer))
        except PromptTooLongError as error:
            found.append(error)
    return found


def _response_start(prompt_ids: list[int], ids: list[int], config: TokenizeConfig) -> int:
    shared = _common_prefix(prompt_ids, ids)
    if len(ids) < 2 or (shared == len(ids) and not config.append_eos):
        raise UserError("the response has no token of its own; remove it, or set append_eos")
    # Position 0 has no context to be predicted from, so a response never starts there; EOS always belongs to it.
    return min(max(shared, 1), len(ids) - 1)


def _cut(
    sequences: list[list[int]], starts: list[int], config: TokenizeConfig, tokenizer: PreTrainedTokenizerBase
) -> Tokenized:
    shared, room = min(starts), config.max_length
    longest = max(len(ids) for ids in sequences) - shared
    shorter = _cut_prompt(sequences, shared, config, tokenizer.bos_token_id, room - longest)
    removed = len(sequences[0]) - len(shorter[0])
    eos = tokenizer.eos_token_id
    cut = [ids if len(ids) <= room else [*ids[: room - 1], ids[-1 if ids[-1] == eos else room - 1]] for ids in shorter]
    return cut, [min(start - removed, len(ids) - 1) for start, ids in zip(starts, cut, strict=True)]


def _cut_prompt(
    sequences: list[list[int]], length: int, config: TokenizeConfig, bos: int | None, left: int
) -> list[list[int]]:
    """Cut the first ``length`` ids, the prompt's, of all ``sequences`` to its limit, given what responses ``left``."""
    limit = config.max_prompt_length or max(config.max_length // 2, left)
    if length <= limit:
        return sequences
    if config.truncation_mode in ("error", "drop"):
        raise PromptTooLongError(
            f"the prompt has {length} tokens and may have {limit}; raise max_length or max_prompt_length, "
            "or set truncation_mode to keep_end, keep_start or drop"
        )
    head = limit
    if config.truncation_mode == "keep_end":
        head = 1 if limit > 1 and sequences[0][0] == bos else 0
    return [ids[:head] + ids[length - (limit - head) :] for ids in sequences]


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text]) -> list[list[int]]:
    texts = [render_prompt(tokenizer, prompt) for prompt in prompts]
    return _encode(tokenizer, texts, chat=not isinstance(prompts[0], str))


def _whole_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text], responses: Sequence[Text], config: TokenizeConfig
) -> list[list[int]]:
    eos, eos_token = tokenizer.eos_token_id, tokenizer.eos_token
    texts = []
    for prompt, response in zip(prompts, responses, strict=True):
        if isinstance(prompt, str) and isinstance(response, str):
            texts.append(prompt + response)
            continue
        text = _apply_template(tokenizer, [*prompt, *response], add_generation_prompt=False)
        # Templates that close a turn by EOS often put a newline after it, which would then be last.
        texts.append(text.rstrip() if eos_token and text.rstrip().endswith(eos_token) else text)
    sequences = _encode(tokenizer, texts, chat=not isinstance(prompts[0], str))
    if not config.append_eos:
        return sequences
    if eos is None:
        raise UserError("the tokenizer has no end-of-sequence token to append; set eos_token, or append_eos to false")
    return [[*_without_last(eos, ids), eos] for ids in sequences]


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, chat: bool) -> list[list[int]]:
    encoded = tokenizer(
        texts, add_special_tokens=not chat, padding=False, truncation=False, return_attention_mask=False, verbose=False
    )
    bos = tokenizer.bos_token_id
    # A plain text may itself begin with the BOS that the tokenizer adds.
    return [ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids for ids in encoded["input_ids"]]


def _apply_template(tokenizer: PreTrainedTokenizerBase, messages: list[Any], *, add_generation_prompt: bool) -> str:
    if not tokenizer.chat_template:
        raise UserError(
            f"{tokenizer.name_or_path or 'the tokenizer'}: has no chat template to render messages by; "
            "use a chat model's tokenizer, set its chat_template, or give prompts and responses as plain strings"
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"the chat template refuses roles {[m['role'] for m in messages]} ({error})") from error


def _without_last(eos: int | None, ids: list[int]) -> list[int]:
    length = len(ids)
    while length > 1 and ids[length - 1] == eos:
        length -= 1
    return ids[:length]


def _common_prefix(first: list[int], second: list[int]) -> int:
    length = min(len(first), len(second))
    return next((i for i in range(length) if first[i] != second[i]), length)
