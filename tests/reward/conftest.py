"""Fixtures of the reward's tests: tiny random models, sequences of unequal lengths."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reward_cases import CONFIGS, VOCABULARY
from transformers import AutoModelForCausalLM


@pytest.fixture
def make_model() -> Callable[..., Any]:
    """The same random weights at every call, in evaluation mode."""

    def make(family: str = "llama") -> Any:
        torch.manual_seed(11)
        return AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()

    return make


@pytest.fixture
def sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in (5, 1, 7, 3, 2, 7, 4)]
