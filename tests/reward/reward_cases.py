"""Cases the reward's tests share: five model families, padded batches, a random reward and its formula."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from reprdpo.reward import HybridReward

VOCABULARY, HIDDEN, LAYERS = 40, 16, 3
_COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
_SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    **_COMMON,
}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "gpt2": lambda: GPT2Config(n_embd=HIDDEN, n_layer=LAYERS, n_head=2, n_positions=32, **_COMMON),
    "gemma2": lambda: Gemma2Config(**_SIZES, num_key_value_heads=1, head_dim=8, sliding_window=16),
    "qwen3": lambda: Qwen3Config(**_SIZES, num_key_value_heads=1, head_dim=8),
    "gpt_neox": lambda: GPTNeoXConfig(**_SIZES),
}
FAMILIES = sorted(CONFIGS)
GATES = ["softmax", "static", "vote"]


def pad(sequences: list[list[int]], side: str = "right") -> tuple[Tensor, Tensor]:
    T = max(map(len, sequences))
    before = [T - len(ids) if side == "left" else 0 for ids in sequences]
    ids = [[0] * b + s + [0] * (T - len(s) - b) for s, b in zip(sequences, before, strict=True)]
    mask = [[0] * b + [1] * len(s) + [0] * (T - len(s) - b) for s, b in zip(sequences, before, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


def make_reward(gate: str = "softmax", L: int = 3, D: int = 16) -> HybridReward:
    generator = torch.Generator().manual_seed(4)
    weight = {"softmax": (L, D), "vote": (L, L)}.get(gate)
    return HybridReward(
        torch.randn(L, D, generator=generator),
        torch.randn(L, generator=generator),
        None if weight is None else torch.randn(weight, generator=generator),
        torch.randn(L, generator=generator),
        gate=gate,  # type: ignore[arg-type]
        alpha=1.5,
    )


def by_formula(reward: HybridReward, pooled: torch.Tensor) -> torch.Tensor:
    w, b, c, h = (x.double() for x in (reward.probe_weight, reward.probe_bias, reward.gate_bias, pooled))
    s = (h * w).sum(-1) + b
    if reward.gate == "static":
        return (c.softmax(0) * s).sum(-1)
    assert reward.gate_weight is not None
    v = reward.gate_weight.double()
    gate = ((h * v).sum(-1) + c).softmax(-1) if reward.gate == "softmax" else torch.sigmoid(s @ v.T + c)
    return (gate * s).sum(-1)
