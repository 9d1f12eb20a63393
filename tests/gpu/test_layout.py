"""Shared prompts under FlexAttention's block masks, and whole sequences under flash attention, forward and backward."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from reprdpo import ops

pytest.importorskip("datasets", reason="datasets is not installed")  # what a bare PyTorch image lacks
from reprdpo.data import PreferenceCollator
from reprdpo.heads import run_at_head
from reprdpo.training.layout import loss_inputs, model_inputs, packing_collator

PADDED = PreferenceCollator(0)
PAIRS = [
    {
        "pair_id": length,
        "chosen_input_ids": list(range(3, 3 + length + 7)),
        "chosen_response_start": length,
        "rejected_input_ids": [*range(3, 3 + length), *range(80, 91)],
        "rejected_response_start": length,
    }
    for length in (1, 20, 70)
]


def step(attention: str, dtype: torch.dtype, packing: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=100, **sizes, initializer_range=0.2)
    model = LlamaForCausalLM(config).to("cuda", dtype).train()
    model.set_attn_implementation(attention)
    batch = packing_collator(model, PADDED, packing=packing)(PAIRS)
    batch = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in batch.items()}
    zeros = torch.zeros(len(PAIRS), device="cuda")

    def loss(hidden: Tensor, head: Any) -> Tensor:
        inputs = {**loss_inputs(hidden, batch), **head._asdict()}
        return ops.linear_preference_loss(**inputs, ref_chosen_logp=zeros, ref_rejected_logp=zeros, beta=0.1).loss

    result = run_at_head(model, loss, **model_inputs(model, batch))
    result.backward()
    return {"loss": result.detach().float()} | {n: p.grad.float() for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("attention", "packing", "dtype", "tolerance"),
    [
        ("sdpa", "prefix", torch.float32, 1e-3),
        ("flex_attention", "prefix", torch.float32, 1e-3),
        ("flash_attention_2", "varlen", torch.bfloat16, 5e-2),
    ],
)
def test_packed_is_padded(attention: str, packing: str, dtype: torch.dtype, tolerance: float) -> None:
    if "flash" in attention and find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    expected, got = step("sdpa", dtype, "padded"), step(attention, dtype, packing)
    for name, value in expected.items():
        assert (got[name] - value).norm() <= tolerance * value.norm(), name
