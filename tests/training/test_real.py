"""On a real model and real preference pairs: step 0, learning, and a reward model, end to end from text."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from reprdpo.data import load_preferences, tokenize_preferences
from reprdpo.errors import UserError
from reprdpo.files import read_jsonl
from reprdpo.models import load_causal_lm, load_tokenizer
from reprdpo.reward import HybridReward, RewardFitConfig, extract_pair_states
from reprdpo.training import BradleyTerryRewardModel, ReprDPOTrainer

Make = Callable[..., Any]


@pytest.fixture
def folder(real_dir: Path) -> Path:
    return real_dir / "models" / "stories260K"


def test_from_text_to_a_better_margin(folder: Path, real_dir: Path, make_config: Make) -> None:
    """Step 0 costs log 2 for every beta and gamma; repeating one batch raises its margin."""
    model, tokenizer = load_causal_lm(folder, dtype=torch.float32), load_tokenizer(folder)
    preferences = load_preferences(real_dir / "pairs" / "hh_harmless.jsonl", limit=150)
    shape = {"max_length": 200, "truncation_mode": "drop", "per_device_train_batch_size": 8}
    config = make_config(max_steps=6, learning_rate=1e-4, reference_cache_dir=None, **shape)
    tokenized = tokenize_preferences(preferences, tokenizer, config.tokenize_config(), where="the test").select(
        range(8)
    )
    states = extract_pair_states(model, tokenized, pad_token_id=0, progress=False)
    for beta, gamma in ((1.5, 1.0), (1.5, 0.7), (0.1, 0.0)):
        fixed = make_config(confidence_source="fixed", beta=beta, fixed_confidence=gamma)
        evaluated = ReprDPOTrainer(model, fixed, eval_dataset=tokenized).evaluate()
        assert evaluated["eval_loss"] == pytest.approx(math.log(2), abs=beta * 1e-4)

    reward, _ = HybridReward.fit(*states, RewardFitConfig(folds=2), base=model)
    trainer = ReprDPOTrainer(model, config, train_dataset=tokenized, processing_class=tokenizer, reward=reward)
    trainer.train()
    lines = [line for _, line in read_jsonl(Path(config.output_dir) / "metrics.jsonl")]
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[0]["hybrid/accuracies"] == 1
    assert lines[-1]["rewards/margins"] > 0.01
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert len(list(Path(config.output_dir, "reference").rglob("logps.safetensors"))) == 1


def test_raw_text_is_tokenised_by_the_trainer(folder: Path, make_config: Make) -> None:
    rows = [
        {"prompt": "Once upon", "chosen": " a time there was.", "rejected": f" a {word}."} for word in ("cat", "dog")
    ]
    config = make_config(confidence_source="fixed", max_steps=1)
    ReprDPOTrainer(
        load_causal_lm(folder), config, train_dataset=Dataset.from_list(rows), processing_class=load_tokenizer(folder)
    ).train()
    ((_, line),) = read_jsonl(Path(config.output_dir) / "metrics.jsonl")
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_a_reward_of_other_weights_is_refused(folder: Path, make_reward: Make, make_config: Make) -> None:
    with pytest.raises(UserError, match="the reward was fitted on"):
        ReprDPOTrainer(load_causal_lm(folder), make_config(), reward=make_reward())


def test_scoring_text(folder: Path, make_config: Make) -> None:
    model, tokenizer = BradleyTerryRewardModel.from_causal_lm(folder), load_tokenizer(folder)
    torch.nn.init.ones_(model.head.weight)
    config = make_config(confidence_source="fixed").tokenize_config()
    responses = [" there was a dog.", " a cat sat."]
    both = model.score_responses(tokenizer, ["Once upon a time"] * 2, responses, config)
    alone = [model.score_responses(tokenizer, ["Once upon a time"], [text], config)[0] for text in responses]
    assert both == pytest.approx(alone)
    assert len(set(both)) == 2
