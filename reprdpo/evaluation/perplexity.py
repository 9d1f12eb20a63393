"""Perplexity of held-out text: what alignment cost in general ability."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from reprdpo.data import ResponseCollator, length_grouped_batches, to_device
from reprdpo.errors import UserError
from reprdpo.heads import token_logps
from reprdpo.models import evaluating


@torch.inference_mode()
def perplexity(model: PreTrainedModel, rows: Sequence[Mapping[str, Any]], *, batch_size: int = 32) -> float:
    """``exp`` of the mean negative log-likelihood over all scored tokens (long texts weigh more than short ones).

    Args:
        model: a causal LM; its training mode is left as it was.
        rows: ``input_ids`` and ``response_start`` (tokenised responses); tokens from ``response_start`` on are scored.
        batch_size: sequences a forward.

    Raises:
        UserError: no rows, or not one token to score.
    """
    if len(rows) == 0:
        raise UserError("perplexity: no texts; give a file with at least one line")
    collate = ResponseCollator(0)  # any token serves as padding: it is masked
    batches = length_grouped_batches([len(row["input_ids"]) for row in rows], batch_size)
    total, count = 0.0, 0
    with evaluating(model):
        for batch in batches:
            inputs = to_device(collate([rows[row] for row in batch]), model.device)
            total -= float(token_logps(model, inputs).sum(dtype=torch.float64))
            count += inputs["scored_index"].numel()
    if count == 0:
        raise UserError("perplexity: not one token to score; each text needs at least one token after its prompt")
    mean = total / count
    return math.exp(mean) if mean < 700 else math.inf
