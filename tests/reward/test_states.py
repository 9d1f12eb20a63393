"""States of a data set: order, padding side, pooling, modes, refusals."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from reward_cases import FAMILIES

from reprdpo.errors import UserError
from reprdpo.reward import extract_pair_states, extract_states


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pool", ["last", "mean"])
def test_rows_are_as_if_alone(
    family: str, side: str, pool: str, make_model: Callable[..., Any], sequences: list[list[int]]
) -> None:
    """Batched, sorted and padded on either side, each row gets the states it has unpadded, in its own place."""
    model = make_model(family)
    options = {"pool": pool, "padding_side": side, "progress": False, "pad_token_id": 0}
    states = extract_states(model, [{"input_ids": ids} for ids in sequences], batch_size=3, **options)
    for ids, row in zip(sequences, states, strict=True):
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[1:]
        expected = [layer[0, -1] if pool == "last" else layer[0].mean(0) for layer in alone]
        torch.testing.assert_close(row, torch.stack(expected), rtol=1e-3, atol=1e-4)


def test_pairs_from_a_dataset(make_model: Callable[..., Any], sequences: list[list[int]]) -> None:
    model = make_model("gpt2").train()  # which has dropout
    rows = Dataset.from_dict({"chosen_input_ids": sequences, "rejected_input_ids": sequences[::-1]})
    chosen, rejected = extract_pair_states(model, rows, pad_token_id=0, batch_size=4, progress=False)
    assert chosen.shape == (7, 3, 16)
    assert chosen.dtype == torch.float32
    torch.testing.assert_close(chosen, rejected.flip(0))
    assert model.training
    assert not chosen.requires_grad


def test_bfloat16_model_gives_float32_states(make_model: Callable[..., Any], sequences: list[list[int]]) -> None:
    model = make_model().to(torch.bfloat16)
    states = extract_states(model, [{"input_ids": ids} for ids in sequences], pad_token_id=0, progress=False)
    assert states.dtype == torch.float32
    assert torch.equal(states, states.bfloat16().float())


def test_refusals(make_model: Callable[..., Any]) -> None:
    model = make_model()
    options: dict[str, Any] = {"pad_token_id": 0, "progress": False}
    with pytest.raises(UserError, match="no rows"):
        extract_states(model, [], **options)
    with pytest.raises(UserError, match="no column input_ids; tokenise them first"):
        extract_states(model, [{"text": "a"}], **options)
    with pytest.raises(UserError, match="no column chosen_input_ids"):
        extract_pair_states(model, Dataset.from_dict({"prompt": ["a"]}), **options)
    with pytest.raises(UserError, match="row 1: input_ids is empty"):
        extract_states(model, [{"input_ids": [3]}, {"input_ids": []}], **options)


def test_response_only_is_the_mean_over_the_response(make_model, sequences) -> None:
    model = make_model()
    starts = [2, 0, 3, 1, 1, 6, 2]
    rows = [{"input_ids": ids, "response_start": start} for ids, start in zip(sequences, starts, strict=True)]
    for side in ("right", "left"):
        options = {"pad_token_id": 0, "batch_size": 3, "padding_side": side, "progress": False}
        found = extract_states(model, rows, pool="mean", response_only=True, **options)
        for row, ids, start in zip(found, sequences, starts, strict=True):
            states = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[1:]
            expected = torch.stack([layer[0, start:].mean(0) for layer in states])
            torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)
