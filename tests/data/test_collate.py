"""Collators against a loop over positions, on either side, with EOS as padding."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reprdpo.data import (
    PreferenceCollator,
    ResponseCollator,
    TokenizeConfig,
    length_grouped_batches,
    load_preferences,
    tokenize_preferences,
)
from reprdpo.models import load_causal_lm, load_tokenizer

EOS = 2

# Lengths 2 (the shortest there is), equal, and one far longer than the rest; EOS inside a prompt.
ROWS: list[dict[str, Any]] = [
    {"pair_id": 7, "chosen_input_ids": [1, EOS], "chosen_response_start": 1, "rejected_input_ids": [1, 5, 6, EOS]},
    {"pair_id": 3, "chosen_input_ids": [1, EOS, 8, EOS], "chosen_response_start": 3, "rejected_input_ids": [9, EOS]},
    {"pair_id": 9, "chosen_input_ids": [*range(3, 14)], "chosen_response_start": 4, "rejected_input_ids": [4, 4, 4]},
]
for _row in ROWS:
    _row["rejected_response_start"] = 1


def collate_by_loop(sequences: list[tuple[list[int], int]], side: str, multiple: int) -> dict[str, torch.Tensor]:
    padded = max(len(ids) for ids, _ in sequences)
    while padded % multiple:
        padded += 1
    input_ids, mask, labels, last = [], [], [], []
    for ids, start in sequences:
        before = padded - len(ids) if side == "left" else 0
        after = padded - len(ids) - before
        targets = [*[token if place >= start else -100 for place, token in enumerate(ids)][1:], -100]
        input_ids.append([EOS] * before + ids + [EOS] * after)
        mask.append([0] * before + [1] * len(ids) + [0] * after)
        labels.append([-100] * before + targets + [-100] * after)
        last.append(before + len(ids) - 1)
    flat = [token for row in labels for token in row]
    columns = {"input_ids": input_ids, "attention_mask": mask, "labels": labels, "last_token_index": last}
    columns["scored_index"] = [index for index, token in enumerate(flat) if token != -100]
    return {name: torch.tensor(value) for name, value in columns.items()}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("multiple", [None, 1, 4, 11, 64])
@pytest.mark.parametrize("convert", [list, np.array, torch.tensor])
def test_pairs_against_a_loop(side: Any, multiple: int | None, convert: Any) -> None:
    rows = [{k: convert(v) if k.endswith("ids") else v for k, v in row.items()} for row in ROWS]
    batch = PreferenceCollator(EOS, padding_side=side, pad_to_multiple_of=multiple)(rows)
    sequences = [
        (row[f"{name}_input_ids"], row[f"{name}_response_start"]) for name in ("chosen", "rejected") for row in ROWS
    ]
    wanted = collate_by_loop(sequences, side, multiple or 1) | {"pair_id": torch.tensor([7, 3, 9])}
    assert batch.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(batch[name], value), name
        assert batch[name].dtype == torch.int64
        assert batch[name].is_contiguous(), "pinned memory is copied in one piece"


def test_responses_have_the_same_keys() -> None:
    rows = [{"input_ids": [1, 4, 5, EOS], "response_start": 2, "row_id": 11}]
    batch = ResponseCollator(EOS)(rows)
    assert batch["labels"].tolist() == [[-100, 5, EOS, -100]]
    assert batch["row_id"].tolist() == [11]
    pair_keys = PreferenceCollator(EOS)(ROWS).keys()
    assert batch.keys() - {"row_id"} == pair_keys - {"pair_id"}
    assert "row_id" not in ResponseCollator(EOS)([{"input_ids": [1, 4], "response_start": 1}])


def test_reference_logps_pass_through_unrounded() -> None:
    rows = [row | {"ref_chosen_logps": -1003.7, "ref_rejected_logps": -1.25} for row in ROWS]
    batch = PreferenceCollator(EOS)(rows)
    assert batch["ref_chosen_logps"].dtype == torch.float32
    assert torch.equal(batch["ref_chosen_logps"], torch.full((3,), -1003.7))
    assert torch.equal(batch["ref_rejected_logps"], torch.full((3,), -1.25))


@pytest.mark.parametrize("start", [0, 3, 4])
def test_a_response_needs_a_context_and_a_token(start: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        ResponseCollator(EOS)([{"input_ids": [1, 2, 3], "response_start": start}])


def test_refusals() -> None:
    with pytest.raises(ValueError, match="no rows"):
        PreferenceCollator(EOS)([])
    with pytest.raises(TypeError, match="pad_token_id is None"):
        PreferenceCollator(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="padding_side"):
        ResponseCollator(EOS, padding_side="middle")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pad_to_multiple_of"):
        ResponseCollator(EOS, pad_to_multiple_of=0)


def test_length_grouped_batches_cover_every_row_once() -> None:
    lengths = [3, 9, 3, 1, 9, 4, 7]
    batches = length_grouped_batches(lengths, 3)
    assert batches == [[1, 4, 6], [5, 0, 2], [3]]
    assert length_grouped_batches([], 2) == []
    with pytest.raises(ValueError, match="batch_size is 0"):
        length_grouped_batches(lengths, 0)


@pytest.mark.parametrize("side", ["right", "left"])
def test_log_probs_of_a_real_batch_equal_those_of_each_sequence_alone(real_dir: Path, side: Any) -> None:
    model = load_causal_lm(real_dir / "models" / "stories260K").double()
    tokenizer = load_tokenizer(real_dir / "models" / "stories260K")
    pairs = load_preferences(real_dir / "pairs" / "hh_harmless.jsonl", limit=12)
    rows = list(tokenize_preferences(pairs, tokenizer, TokenizeConfig(max_length=256, truncation_mode="drop")))[:3]
    batch = PreferenceCollator(tokenizer.eos_token_id, padding_side=side, pad_to_multiple_of=8)(rows)
    with torch.no_grad():
        logp_STV = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
        scored = batch["labels"] != -100
        token_logp_ST = logp_STV.gather(2, batch["labels"].clamp(min=0)[..., None])[..., 0] * scored
        alone = []
        for name in ("chosen", "rejected"):
            for row in rows:
                ids, start = torch.tensor(row[f"{name}_input_ids"]), row[f"{name}_response_start"]
                logp_TV = model(ids[None]).logits[0].log_softmax(-1)
                alone.append(sum(logp_TV[t - 1, ids[t]] for t in range(start, len(ids))))
    # Padding on the left moves the positions, and rotary angles are float32 whatever the model's dtype.
    rtol = 1e-9 if side == "right" else 1e-6
    torch.testing.assert_close(token_logp_ST.sum(1), torch.stack(alone), rtol=rtol, atol=0)
    last = batch["input_ids"].gather(1, batch["last_token_index"][:, None])
    assert (last == tokenizer.eos_token_id).all()
