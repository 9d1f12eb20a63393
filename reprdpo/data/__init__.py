"""Preference data: one schema, readers, tokenisation, collators, the sandbox world."""

from reprdpo.data.collate import (
    IGNORE_INDEX,
    PreferenceCollator,
    ResponseCollator,
    length_grouped_batches,
    pad_sequences,
    to_device,
)
from reprdpo.data.packing import Layout, PackingCollator, pair_tokens
from reprdpo.data.readers import kinds_of, load_preferences, load_prompts, load_responses, local_files
from reprdpo.data.schema import Message, Text, in_kind, is_empty, kind_of
from reprdpo.data.tokenize import (
    PromptTooLongError,
    TokenizeConfig,
    TokenizedPair,
    TokenizedResponse,
    render_prompt,
    tokenize_nonempty,
    tokenize_pair,
    tokenize_preferences,
    tokenize_prompt,
    tokenize_response,
    tokenize_responses,
)

__all__ = [
    "IGNORE_INDEX",
    "Layout",
    "Message",
    "PackingCollator",
    "PreferenceCollator",
    "PromptTooLongError",
    "ResponseCollator",
    "Text",
    "TokenizeConfig",
    "TokenizedPair",
    "TokenizedResponse",
    "in_kind",
    "is_empty",
    "kind_of",
    "kinds_of",
    "length_grouped_batches",
    "load_preferences",
    "load_prompts",
    "load_responses",
    "local_files",
    "pad_sequences",
    "pair_tokens",
    "render_prompt",
    "to_device",
    "tokenize_nonempty",
    "tokenize_pair",
    "tokenize_preferences",
    "tokenize_prompt",
    "tokenize_response",
    "tokenize_responses",
]
