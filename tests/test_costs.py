"""Counting and timing of stages and their parts; the formulas of the compute claim."""

import mmap
import time
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from reprdpo import costs, models


def small_llama(**settings: Any) -> Any:
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        **settings,
    )
    return AutoModelForCausalLM.from_config(config)


def test_a_stage_holds_what_was_counted_inside_it_and_its_parts():
    costs.count(1e9)
    with costs.stage() as outer:
        costs.count(5)
        with costs.part("reference"):
            costs.count(7)
            with costs.stage() as inner:
                costs.count(11, "reward")
            time.sleep(0.02)
        costs.count_seconds(3.0, "reward")
    costs.count(1e9)
    assert (outer.flop, outer.parts["reference"].flop, outer.parts["reward"].flop) == (23, 7, 11)
    assert (inner.flop, list(inner.parts)) == (11, ["reward"])
    assert outer.parts["reward"].seconds == 3.0
    assert 0.02 <= outer.parts["reference"].seconds <= outer.seconds


def test_a_stage_that_fails_still_tells_its_cost():
    stage = costs.stage()
    cost = stage.__enter__()
    costs.count(2)
    assert not stage.__exit__(KeyError, KeyError(), None)
    costs.count(3)
    assert cost.flop == 2
    assert cost.seconds > 0


def test_peak_memory_is_that_of_the_stage():
    # Mapped, not allocated: an allocator may hand out memory that is resident already, or keep it.
    with costs.stage() as large, mmap.mmap(-1, 2**28) as memory:
        memory[:: mmap.PAGESIZE] = bytes(2**28 // mmap.PAGESIZE)
    with costs.stage() as small:
        pass
    if large.peak_bytes is None or small.peak_bytes is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert large.peak_bytes - small.peak_bytes > 2**27


def test_a_stage_started_again_adds_to_what_it_cost_before():
    first = costs.StageCost(seconds=1.0, flop=10, peak_bytes=100, parts={"a": costs.Cost(0.5, 5)})
    second = costs.StageCost(
        seconds=2.0, flop=20, peak_bytes=50, parts={"a": costs.Cost(1.0, 7), "b": costs.Cost(1, 1)}
    )
    both = second.to_json(first.to_json({}))
    assert (both["seconds"], both["flop"], both["peak_bytes"]) == (3.0, 30, 100)
    assert both["parts"] == {"a": {"seconds": 1.5, "flop": 12}, "b": {"seconds": 1, "flop": 1}}
    assert costs.StageCost(peak_bytes=None).to_json({})["peak_bytes"] is None


def test_a_stopwatch_reads_what_ran_since_the_last_reading():
    watch = costs.Stopwatch(torch.device("cpu"))
    with watch:
        time.sleep(0.02)
    assert watch.read() >= 0.02
    assert watch.read() == 0


@pytest.mark.parametrize("tied", [False, True])
def test_forward_flop_is_what_the_profiler_sees(tied: bool):
    model = small_llama(tie_word_embeddings=tied)
    ids = torch.arange(10)[None]
    with torch.profiler.profile(with_flops=True) as profile, torch.no_grad():
        model(input_ids=ids)
    linear = sum(event.flops for event in profile.events() if event.name in ("aten::mm", "aten::addmm"))
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    assert models.forward_flop(model, tokens=10, scored=10) == linear + 2 * norms * 10
    assert models.forward_flop(model, tokens=10) == linear + 2 * norms * 10 - 2 * 40 * 16 * 10


def test_the_formulas_of_the_compute_claim():
    # METHOD: at 7B the marginal ratio is 4e6 at T=64, 3e7 at 512, 3e8 at 4096 (Adam, once a batch, left out).
    for tokens, ratio in ((64, 4e6), (512, 3e7), (4096, 3e8)):
        ours = costs.reward_flop(32, 4096, sequences=2, gradients=True)
        assert costs.online_flop(6_700_000_000, tokens) / ours == pytest.approx(ratio, rel=0.4)
    assert costs.reward_flop(3, 5, sequences=7) == 4 * 3 * 5 * 7
    assert costs.reward_flop(3, 5, sequences=7, gradients=True) == 2 * 4 * 3 * 5 * 7
    assert costs.reward_step_flop(3, 5) == 12 * 2 * 3 * 6
    assert costs.online_flop(10, 3) == 2 * 10 * 10 * 3
    assert costs.online_flop(10, 3, responses=8) == (8 * 4 + 12) * 10 * 3
