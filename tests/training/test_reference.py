"""Reference log-probs equal log_softmax in float64, are cached by content, and go on after a kill."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from reprdpo.data import PackingCollator, PreferenceCollator
from reprdpo.models import base_fingerprint
from reprdpo.training import reference, reference_logps


def oracle(model: Any, ids: list[int], start: int) -> float:
    logits = model.double()(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logits[position - 1, ids[position]].item() for position in range(start, len(ids)))


@torch.no_grad()
@pytest.mark.parametrize("layout", [None, "padded", "prefix"])
def test_equal_to_log_softmax(make_model: Callable[..., Any], pairs: Dataset, layout: Any) -> None:
    collator = layout and PackingCollator(PreferenceCollator(2), (layout,), max_row_tokens=40)
    got = reference_logps(make_model(), pairs, pad_token_id=2, batch_size=7, collator=collator, progress=False)
    model = make_model()
    for row in got:
        for side in ("chosen", "rejected"):
            expected = oracle(model, row[f"{side}_input_ids"], row[f"{side}_response_start"])
            assert row[f"ref_{side}_logps"] == pytest.approx(expected, abs=2e-5)


def forbid(*args: Any) -> None:
    raise AssertionError("the model ran again")


def test_found_again_by_content(
    make_model: Callable[..., Any], pairs: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def model() -> Any:
        return make_model().bfloat16().float()  # values that both dtypes hold, which name the model

    settings = {"pad_token_id": 0, "cache_dir": tmp_path, "progress": False}
    first = reference_logps(model(), pairs, **settings)
    monkeypatch.setattr(reference, "batch_logps", forbid)
    again = reference_logps(model(), pairs, **settings, batch_size=2)
    assert again["ref_chosen_logps"] == first["ref_chosen_logps"]
    other_model = model()
    with torch.no_grad():
        other_model.lm_head.weight[0, 0] += 1
    moved = pairs.map(lambda row: {"rejected_response_start": row["rejected_response_start"] + 1})
    one, other, *rest = pairs  # the same tokens on end, the border of two rows elsewhere
    first_id, *others = other["chosen_input_ids"]
    one, other = one | {"chosen_input_ids": [*one["chosen_input_ids"], first_id]}, other | {"chosen_input_ids": others}
    for changed, data, dtype in (
        (other_model, pairs, None),
        (model().bfloat16(), pairs, None),
        (model(), moved, None),
        (model(), Dataset.from_list([one, other, *rest]), None),
        (model(), pairs, torch.bfloat16),
    ):
        with pytest.raises(AssertionError, match="ran again"):
            reference_logps(changed, data, **settings, autocast_dtype=dtype)
    with pytest.raises(AssertionError, match="ran again"):
        reference_logps(model(), pairs, **settings, collator=PackingCollator(PreferenceCollator(0), ("prefix",)))
    told = reference_logps(model(), pairs, **settings, fingerprint=base_fingerprint(model()))
    assert told["ref_rejected_logps"] == first["ref_rejected_logps"]


def test_what_is_found_again_stays_in_its_file(make_model: Callable[..., Any], pairs: Dataset, tmp_path: Path) -> None:
    """The columns are the cached file's pages: neither it nor a copy of it is read into memory."""
    if not (maps := Path("/proc/self/maps")).exists():
        pytest.skip("only Linux tells what is mapped")
    settings = {"pad_token_id": 0, "cache_dir": tmp_path, "progress": False}
    reference_logps(make_model(), pairs, **settings)
    found = reference_logps(make_model(), pairs, **settings)
    (mapped,) = (line for line in maps.read_text().splitlines() if line.endswith("/logps.safetensors"))
    start, end = (int(address, 16) for address in mapped.split()[0].split("-"))
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        (chunk,) = found.data.column(name).chunks
        assert start < chunk.buffers()[1].address < end


@pytest.mark.parametrize("batch_size", [2, 6])
def test_a_kill_loses_one_chunk(
    make_model: Callable[..., Any], pairs: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    """Gone on with in batches of another size, the chunks, which hold other rows then, are made anew."""
    monkeypatch.setattr(reference, "_CHUNK_TOKENS", 30)
    settings = {"pad_token_id": 0, "batch_size": 2, "progress": False}
    whole = reference_logps(make_model(), pairs, **settings)
    real, calls = reference.batch_logps, []

    def counted(*args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(reference, "batch_logps", counted)
    with pytest.raises(KeyboardInterrupt):
        reference_logps(make_model(), pairs, **settings, cache_dir=tmp_path)
    resumed = reference_logps(make_model(), pairs, **settings | {"batch_size": batch_size}, cache_dir=tmp_path)
    assert len(calls) < 10 + 14 - 5
    assert list(resumed["ref_rejected_logps"]) == pytest.approx(list(whole["ref_rejected_logps"]), abs=1e-5)
    assert not list(tmp_path.rglob("chunk-*"))


@pytest.mark.parametrize("training", [False, True])
def test_no_dropout_and_the_model_comes_back_in_its_mode(
    make_model: Callable[..., Any], pairs: Dataset, training: bool
) -> None:
    model = make_model(attention_dropout=0.5).train(training)
    got = reference_logps(model, pairs, pad_token_id=0, progress=False)
    assert model.training == training
    plain = reference_logps(make_model(), pairs, pad_token_id=0, progress=False)
    assert got["ref_chosen_logps"] == plain["ref_chosen_logps"]


def test_no_rows(make_model: Callable[..., Any], pairs: Dataset) -> None:
    got = reference_logps(make_model(), pairs.select([]), pad_token_id=0, progress=False)
    assert got.column_names[-2:] == ["ref_chosen_logps", "ref_rejected_logps"]
