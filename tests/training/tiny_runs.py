"""A tiny random Llama, random preference pairs in its vocabulary, a reward fitted on its states, and settings."""

from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from reprdpo.data import PreferenceCollator
from reprdpo.reward import HiddenStateTap, HybridReward, RewardFitConfig
from reprdpo.training import ReprDPOConfig

VOCABULARY, HIDDEN, LAYERS = 48, 16, 3


def make_model(attention_dropout: float = 0.0) -> LlamaForCausalLM:
    """The same weights at every call."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        attention_dropout=attention_dropout,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(7)
    return LlamaForCausalLM(config).eval()


def make_pairs() -> Dataset:
    """Fourteen tokenised pairs of unequal lengths, responses of one token among them."""
    generator = torch.Generator().manual_seed(3)

    def ids(count: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()

    rows = []
    for number in range(14):
        prompt = ids(1 + number % 4)
        rows.append(
            {
                "chosen_input_ids": [*prompt, *ids(number % 5), 2],
                "chosen_response_start": len(prompt),
                "rejected_input_ids": [*prompt, *ids(1 + number % 3), 2],
                "rejected_response_start": len(prompt),
                "pair_id": number,
                "category": "a column the collator has no use for",
            }
        )
    return Dataset.from_list(rows)


def make_reward(pool: str = "last") -> HybridReward:
    model = make_model()
    batch = PreferenceCollator(0)(list(make_pairs()))
    with torch.no_grad(), HiddenStateTap(model) as tap:
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    rows = torch.arange(len(batch["input_ids"]))
    states = torch.stack([layer[rows, batch["last_token_index"]] for layer in tap.states], dim=1)
    chosen, rejected = states.chunk(2)
    reward, _ = HybridReward.fit(chosen, rejected, RewardFitConfig(alpha=1.0, folds=2, pool=pool), base=model)
    return reward


def make_config(output_dir: str, cls: type = ReprDPOConfig, **settings: Any) -> Any:
    quiet = {"disable_tqdm": True, "use_cpu": True, "logging_steps": 1, "save_strategy": "no"}
    sizes = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    return cls(**{"output_dir": output_dir, **quiet, **sizes, **settings})
