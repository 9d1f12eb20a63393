"""The base model: a Llama of about a million parameters, pretrained on the town's texts."""

import math
import random
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase


@dataclass(frozen=True)
class BaseConfig:
    """Shape of the model and its pretraining, one pass over the documents."""

    hidden_size: int = 96
    layers: int = 8
    heads: int = 4
    intermediate_size: int = 256
    context: int = 256
    batch_size: int = 16
    learning_rate: float = 3e-3
    warmup: float = 0.05
    weight_decay: float = 0.05


def pretrain(
    documents: list[list[str]],
    tokenizer: PreTrainedTokenizerBase,
    config: BaseConfig,
    *,
    seed: int,
    progress: bool = True,
) -> LlamaForCausalLM:
    """Train a fresh model on ``documents``, each one a row whose passages all end with EOS.

    Rows of like length share a batch, which needs neither attention masks nor much padding and is half as fast again as
    packing at these lengths. Returns the model in evaluation mode, float32, on the CPU.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(_llama_config(tokenizer, config)).train()
    rows = _tokenize(documents, tokenizer)
    batches = _batches(rows, config.batch_size, random.Random(seed))
    optimizer = torch.optim.AdamW(
        _parameter_groups(model, config), lr=config.learning_rate, betas=(0.9, 0.95), fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, len(batches), config.warmup))
    bar = tqdm(batches, desc="pretraining the base", unit="step", mininterval=0.5, disable=not progress)
    for batch in bar:
        loss = model(**_collate(batch, tokenizer.pad_token_id), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


def _llama_config(tokenizer: PreTrainedTokenizerBase, config: BaseConfig) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        max_position_embeddings=config.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _tokenize(documents: list[list[str]], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    passages = iter(tokenizer(list(chain.from_iterable(documents))).input_ids)
    eos = tokenizer.eos_token_id
    return [[token for _ in document for token in (*next(passages), eos)] for document in documents]


def _batches(rows: list[list[int]], batch_size: int, rng: random.Random) -> list[list[list[int]]]:
    """Shuffled batches of rows of like length, sorted within pools of sixteen batches only, to keep the kinds mixed."""
    rows = rng.sample(rows, len(rows))
    pool = 16 * batch_size
    rows = [row for start in range(0, len(rows), pool) for row in sorted(rows[start : start + pool], key=len)]
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    rng.shuffle(batches)
    return batches


def _collate(rows: list[list[int]], pad: int) -> dict[str, Tensor]:
    # Padding stands right of causal attention, so it needs no mask, only labels that are passed over.
    width = max(map(len, rows))
    input_ids_BT = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    return {"input_ids": input_ids_BT, "labels": input_ids_BT.masked_fill(input_ids_BT == pad, -100)}


def _parameter_groups(model: LlamaForCausalLM, config: BaseConfig) -> list[dict[str, object]]:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    return [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _rate(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over the first share of the steps, then a cosine down to a tenth."""
    start = max(1, round(steps * warmup))
    if step < start:
        return (step + 1) / start
    progress = (step - start) / max(1, steps - start)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
