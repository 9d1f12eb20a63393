"""One optimizer step of ReprDPOTrainer beside TRL's DPOTrainer: same model, pairs, reference log-probs and precision.

Both trainers' own loops are timed from the end of one step to the end of the next, and their losses compared.
"""

import gc
import typing
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.device import device_name, free_bytes
from benchmarks.harness import DEVICE
from benchmarks.training_peers import Pairs, Run, Steps, loss_error, ours, train, trl
from reprdpo import models
from reprdpo.errors import UserError
from reprdpo.training import ReprDPOConfig

# Steps of a run; the first also sets up the optimizer and is not timed.
STEPS = 3 if DEVICE == "cpu" else 8
# Tokens a sequence: a batch of four pairs of hh-rlhf harmless-base drawn at random (4 characters a token), four alike.
LENGTHS = {"hh": (504, 300, 229, 180), "full": (512, 512, 512, 512)}
# Length mix, share of a sequence that is prompt, precision.
GROUPS = [("hh", 0.5, "bfloat16"), ("hh", 0.25, "bfloat16"), ("hh", 0.75, "bfloat16"), ("full", 0.5, "bfloat16")]
if DEVICE == "cpu":
    GROUPS += [("full", 0.5, "float32"), ("hh", 0.5, "float32")]
# What `make bench` runs and the README shows: one group with the reward, and that of the least and the most padding.
HEADLINE = {"reward": GROUPS[:1], "plain": [GROUPS[0], GROUPS[4 if DEVICE == "cpu" else 3]]}
# Hidden size, intermediate size, layers, heads; the largest that fits is taken.
LLAMAS = {
    "cpu": {"52M": (512, 1376, 6, 8)},
    "cuda": {"7B": (4096, 11008, 32, 32), "1B": (2048, 5504, 20, 16)},
}[DEVICE]
# Of the loss over a run's steps: both trainers round, in another order.
MAX_LOSS_ERROR = {"float32": 1e-4, "bfloat16": 2e-2}


def llama(name: str) -> LlamaConfig:
    hidden, intermediate, layers, heads = LLAMAS[name]
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )


def sizes(config: LlamaConfig) -> tuple[int, int]:
    """The parameters of decoder and head that multiply a token."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return models.matmul_parameters(models.decoder(model)), model.lm_head.weight.numel()


def needs_bytes(config: LlamaConfig, pairs: Pairs, dtype: torch.dtype) -> int:
    """Weights, gradients and Adam's two moments, and what a layer keeps of each token for its backward, roughly."""
    decoder, head = sizes(config)
    kept = config.num_hidden_layers * (18 * config.hidden_size + 5 * config.intermediate_size)
    return dtype.itemsize * (4 * (decoder + 2 * head) + kept * 2 * len(pairs) * max(pairs.lengths))


def systems() -> dict[str, dict[str, Any] | None]:
    """Row to our trainer's options, or None for TRL's: the first, as ours are checked with its losses."""
    packing = typing.get_type_hints(ReprDPOConfig).get("packing")
    layouts = {name: {"packing": name} for name in typing.get_args(packing) if name != "auto"} or {"padded": {}}
    rows: dict[str, dict[str, Any] | None] = {"TRL": None}
    for name, options in layouts.items():
        rows[f"reprdpo, {name}"] = options
        rows[f"reprdpo, {name}, reward"] = options | {"reward": True}
    return rows


SYSTEMS = systems()


def rows() -> Iterator[Any]:
    """Every row that is asked for; `make bench` runs those of the headline groups."""
    for mix, share, precision in GROUPS:
        for system in SYSTEMS:
            reward = "reward" in system
            if share == 0.5 or not reward:
                headline = (mix, share, precision) in HEADLINE["reward" if reward else "plain"]
                marks = () if headline else (pytest.mark.secondary,)
                yield pytest.param(mix, share, precision, system, marks=marks)


@pytest.fixture(scope="module")
def losses_of() -> dict[str, list[float]]:
    """Group to the losses of its first row."""
    return {}


@pytest.mark.parametrize(("mix", "share", "precision", "system"), list(rows()))
def test_training_step(
    benchmark: BenchmarkFixture, losses_of: dict[str, list[float]], mix: str, share: float, precision: str, system: str
) -> None:
    pairs, options = Pairs(LENGTHS[mix], share), SYSTEMS[system]
    weights = torch.float32 if DEVICE == "cpu" else torch.bfloat16
    name = next((each for each in LLAMAS if needs_bytes(llama(each), pairs, weights) < free_bytes(DEVICE)), None)
    if name is None:
        pytest.skip(f"none of {', '.join(LLAMAS)} fits {free_bytes(DEVICE) / 1e9:.3g} GB")
    config = llama(name)
    run = Run(pairs, STEPS, bf16=precision == "bfloat16", learning_rate=1e-6)
    benchmark.group = f"a step of {len(pairs)} pairs, {name}, {mix}, prompts {share:.0%}, {precision}"
    peer = options is None
    try:
        steps = train(trl if peer else ours, run, config, DEVICE, weights, **(options or {}))
    except UserError as refusal:  # a layout that cannot be served here
        pytest.skip(str(refusal))
    finally:
        gc.collect()
    reference = losses_of.setdefault(benchmark.group, steps.losses)
    error = loss_error(steps.losses, reference)
    if not error <= MAX_LOSS_ERROR[precision]:
        pytest.fail(f"another training: losses {steps.losses}, {reference} expected; not timed")
    benchmark.pedantic(lambda: None)
    benchmark.extra_info.update(
        columns(steps, pairs, config)
        | {
            "implementation": system,
            "peer": peer,
            "shape": {"T": max(pairs.lengths), "D": config.hidden_size, "V": config.vocab_size, "P": len(pairs)},
            "dtype": precision,
            "device": device_name(DEVICE),
            "threads": torch.get_num_threads(),
            "headline": "kernel" if (mix, share, precision) in HEADLINE["plain"] else None,
            "kind": "exact",
            "error": None if reference is steps.losses else error,
        }
    )


def columns(steps: Steps, pairs: Pairs, config: LlamaConfig) -> dict[str, Any]:
    """Times, memory, and FLOP by what the batch holds; tokens a second are those of the pairs, without padding."""
    decoder, head = sizes(config)
    low, median, high = np.quantile(steps.seconds, (0.2, 0.5, 0.8)).tolist()
    return {
        "p20_s": low,
        "p50_s": median,
        "p80_s": high,
        "parts": steps.median_parts(),
        "tokens_per_s": pairs.tokens / median,
        "losses": steps.losses,
        "peak_bytes": steps.peak_bytes,
        "flop": 6 * (decoder * steps.batch_tokens + head * pairs.scored),
        "bytes": 0,
    }
