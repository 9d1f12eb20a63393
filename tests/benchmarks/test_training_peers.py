"""The training step benchmark compares the same training: this trainer's losses are TRL's, over a hundred steps."""

import math

import pytest
from transformers import LlamaConfig

pytest.importorskip("trl")
pytest.importorskip("pytest_benchmark")

from benchmarks.training_peers import PARTS, Pairs, Run, loss_error, ours, train, trl

TINY = LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
)
PAIRS = Pairs((24, 17, 30, 9), share=0.5)


def test_a_hundred_steps_are_those_of_trl() -> None:
    # A rate at which the loss falls and the margin's growth does not yet magnify rounding.
    run = Run(PAIRS, steps=100, learning_rate=1e-5)
    theirs = train(trl, run, TINY, "cpu")
    plain = train(ours, run, TINY, "cpu")
    rewarded = train(ours, run, TINY, "cpu", reward=True)
    assert len(theirs.losses) == 100
    assert math.isclose(theirs.losses[0], math.log(2), abs_tol=1e-5)
    assert theirs.losses[-1] < theirs.losses[0] - 0.01
    assert loss_error(plain.losses, theirs.losses) < 1e-5
    assert loss_error(rewarded.losses, theirs.losses) < 1e-5
    for steps in (theirs, plain, rewarded):
        assert len(steps.parts) == 100
        assert set(steps.parts[-1]) >= set(PARTS) - {"reward"}
        assert steps.peak_bytes > 0
    assert rewarded.median_parts()["reward"] > 0


def test_loss_error_sees_what_is_off() -> None:
    assert loss_error([1.0, 2.2], [1.0, 2.0]) == pytest.approx(0.1)
    assert math.isnan(loss_error([math.nan, 1.0], [1.0, 1.0]))


def test_pairs_have_the_share_and_the_lengths_they_say() -> None:
    rows = PAIRS.dataset(97)
    assert [len(ids) for ids in rows["rejected_input_ids"]] == [24, 17, 30, 9]
    assert rows["chosen_response_start"] == [12, 8, 15, 4]
    assert PAIRS.tokens == 160
    assert PAIRS.scored == 2 * (12 + 9 + 15 + 5)
    for row in rows:
        start = row["chosen_response_start"]
        assert row["chosen_input_ids"][:start] == row["rejected_input_ids"][:start]
        assert row["chosen_input_ids"][start:] != row["rejected_input_ids"][start:]
