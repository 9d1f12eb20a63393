"""A tiny Llama and its tokenizer on disk, as scripts of TRL name them, preferences for it, a reward fitted on it."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from reprdpo.data import TokenizeConfig, tokenize_preferences
from reprdpo.data.sandbox.tokenizer import build_tokenizer
from reprdpo.models import load_causal_lm, load_tokenizer
from reprdpo.reward import HybridReward, RewardFitConfig, extract_pair_states

gc.freeze()  # every Trainer.train() collects garbage: without the imported modules' objects that takes no time
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
PAIRS = [
    {"prompt": f"say {word} to me", "chosen": f" {word}{' yes' * (1 + k % 3)}", "rejected": f" no{' not' * k} {word}"}
    for k, word in enumerate(WORDS)
]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)
Make = Callable[..., Any]


def as_chat(pair: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    """TRL's conversational format of a pair."""
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {name: [{"role": roles[name], "content": text.strip()}] for name, text in pair.items()}


@pytest.fixture(autouse=True)
def _no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    tokenizer = build_tokenizer([*(t for pair in PAIRS for t in pair.values()), "user assistant \n", *WORDS, "no say"])
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("model")
    for saved in (LlamaForCausalLM(config), tokenizer):
        saved.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tokenizer(model_dir: str) -> PreTrainedTokenizerBase:
    return load_tokenizer(model_dir)


@pytest.fixture
def pairs() -> Dataset:
    return Dataset.from_list(PAIRS)


@pytest.fixture
def chats() -> Dataset:
    return Dataset.from_list([as_chat(pair) for pair in PAIRS])


@pytest.fixture
def make_reward(model_dir: str, tokenizer: PreTrainedTokenizerBase, pairs: Dataset) -> Make:
    """A reward fitted on the model's states, the same at every call."""
    model = load_causal_lm(model_dir)
    rows = tokenize_preferences(pairs, tokenizer, TokenizeConfig())

    def make(pool: str = "last") -> HybridReward:
        chosen, rejected = extract_pair_states(model, rows, pad_token_id=0, pool=pool, progress=False)
        reward, _ = HybridReward.fit(chosen, rejected, RewardFitConfig(alpha=1.0, folds=2, pool=pool), base=model)
        return reward

    return make


@pytest.fixture
def make_config(tmp_path: Path) -> Make:
    """Settings of a short deterministic run; ``cls`` is TRL's config or ours."""

    def make(cls: type, name: str = "run", **settings: Any) -> Any:
        quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
        sizes = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "bf16": False}
        return cls(**{"output_dir": str(tmp_path / name), **quiet, **sizes, **settings})

    return make
