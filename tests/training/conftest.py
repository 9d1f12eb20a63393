"""The tiny runs as fixtures."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from datasets import Dataset
from transformers import LlamaForCausalLM

from reprdpo.reward import HybridReward
from reprdpo.training import ReprDPOConfig

gc.freeze()  # every Trainer.train() collects garbage: without the imported modules' objects that takes no time


@pytest.fixture
def make_model() -> Callable[..., LlamaForCausalLM]:
    return tiny_runs.make_model


@pytest.fixture
def pairs() -> Dataset:
    return tiny_runs.make_pairs()


@pytest.fixture
def make_reward() -> Callable[..., HybridReward]:
    return tiny_runs.make_reward


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., ReprDPOConfig]:
    def make(cls: type = ReprDPOConfig, **settings: Any) -> Any:
        return tiny_runs.make_config(**{"output_dir": str(tmp_path / "run"), "cls": cls, **settings})

    return make
