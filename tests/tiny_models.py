"""Tiny random causal LMs, one for every way in which architectures use their head."""

from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 3,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = SIZES | {"intermediate_size": 24, "num_key_value_heads": 1}
# Softcaps this low bend the logits of a random model.
CAUSAL_LMS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "qwen2_tied": ("Qwen2Config", GROUPED | {"tie_word_embeddings": True}),
    "gpt2": ("GPT2Config", SIZES),
    "gpt_neox": ("GPTNeoXConfig", SIZES | {"intermediate_size": 24}),
    "phi_with_bias": ("PhiConfig", SIZES | {"intermediate_size": 24}),
    "opt_without_model_attribute": ("OPTConfig", SIZES | {"ffn_dim": 24, "word_embed_proj_dim": 16}),
    "mpt_unused_scale": (
        "MptConfig",
        {"vocab_size": VOCABULARY, "d_model": 16, "n_layers": 3, "n_heads": 2, "logit_scale": "inv_sqrt_d_model"},
    ),
    "gemma2": ("Gemma2Config", GROUPED | {"head_dim": 8, "final_logit_softcapping": 0.05}),
    "gemma3_without_softcap": ("Gemma3TextConfig", GROUPED | {"head_dim": 8}),
    "recurrent_gemma_own_name": (
        "RecurrentGemmaConfig",
        GROUPED | {"logits_soft_cap": 0.05, "lru_width": 16, "attention_window_size": 8},
    ),
    "llama4_without_get_decoder": (
        "Llama4TextConfig",
        GROUPED | {"head_dim": 8, "intermediate_size_mlp": 24, "num_local_experts": 2},
    ),
    "cohere": ("CohereConfig", GROUPED | {"logit_scale": 0.25}),
    "cohere2": ("Cohere2Config", GROUPED | {"logit_scale": 0.25}),
    "granite": ("GraniteConfig", GROUPED | {"logits_scaling": 8.0}),
    "hyperclovax_multiplies": ("HyperCLOVAXConfig", GROUPED | {"logits_scaling": 0.25}),
    "minicpm3_scales_hidden": (
        "MiniCPM3Config",
        GROUPED
        | {
            "num_key_value_heads": 2,
            "dim_model_base": 4,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 4,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
        },
    ),
    "falcon_h1_multiplier": (
        "FalconH1Config",
        GROUPED | {"lm_head_multiplier": 0.5, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
    ),
    "mamba": ("MambaConfig", {"vocab_size": VOCABULARY, "num_hidden_layers": 3, "hidden_size": 16, "state_size": 4}),
}


def tiny_causal_lm(name: str) -> PreTrainedModel:
    """The model of that name in evaluation mode, with a bias that is not zero where there is one."""
    class_name, settings = CAUSAL_LMS[name]
    torch.manual_seed(0)
    config = getattr(transformers, class_name)(**settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    if (bias := getattr(model.get_output_embeddings(), "bias", None)) is not None:
        nn.init.normal_(bias)
    return model
