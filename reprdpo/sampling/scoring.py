"""Rewards of responses, read from a model's pooled hidden states."""

from collections.abc import Sequence

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reprdpo.data import ResponseCollator, TokenizeConfig, length_grouped_batches, to_device, tokenize_nonempty
from reprdpo.errors import UserError
from reprdpo.models import evaluating
from reprdpo.reward import HybridReward, pool_states
from reprdpo.sampling.engine import Prompt


@torch.inference_mode()
def score_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reward: HybridReward,
    prompts: Sequence[Prompt],
    responses: Sequence[Prompt],
    tokenize: TokenizeConfig | None = None,
    *,
    batch_size: int = 64,
    progress: bool = False,
) -> list[float]:
    """The reward of each response to its prompt, in order; NaN for an empty one.

    With the first three arguments bound (``functools.partial``) this is the ``score`` of
    :func:`~reprdpo.sampling.best_of_n.sample_responses`.

    Args:
        model: the causal LM the reward was fitted on, or a descendant of it.
        tokenizer: its tokenizer.
        reward: the probes and gate; moved nowhere, so it should be on the model's device.
        prompts: one a response, repeated where a prompt has several.
        responses: texts, or messages; a text that answers a chat becomes the assistant's message.
        tokenize: the tokenisation the reward was fitted with.
        batch_size: sequences a forward, taken by length.
        progress: show a progress bar.

    Raises:
        UserError: unequal lengths, or a prompt too long for ``tokenize``.
    """
    if len(prompts) != len(responses):
        raise UserError(f"score: {len(prompts)} prompts and {len(responses)} responses; give one prompt a response")
    scored, rows = tokenize_nonempty(tokenizer, prompts, responses, tokenize or TokenizeConfig())
    rewards = [float("nan")] * len(responses)
    collate = ResponseCollator(0)  # any token serves as padding: it is masked
    batches = length_grouped_batches([len(row["input_ids"]) for row in rows], batch_size)
    with evaluating(model):
        for batch in tqdm(batches, unit=" batches", desc="score", disable=not progress, delay=2):
            inputs = to_device(collate([rows[row] for row in batch]), model.device)
            pooled_BLD = pool_states(model, inputs["input_ids"], inputs["attention_mask"], pool=reward.metadata.pool)
            for row, value in zip(batch, reward(pooled_BLD).reward.tolist(), strict=True):
                rewards[scored[row]] = value
    return rewards
