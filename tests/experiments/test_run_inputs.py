"""A run's inputs: published files as they stand, and prompts put to the model as the preferences are."""

import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from reprdpo.errors import UserError
from reprdpo.experiments.config import RunConfig, build
from reprdpo.experiments.run_folder import SETTINGS_FILE, RunFolder, checked_settings
from reprdpo.experiments.sources import read_inputs
from reprdpo.files import write_json


@pytest.fixture
def pku(tmp_path: Path) -> Path:
    path = tmp_path / "data" / "pku.jsonl"
    path.parent.mkdir()
    rows = [
        {
            "prompt": f"Question {n}?",
            "response_0": "Harm.",
            "response_1": "No.",
            "is_response_0_safe": False,
            "is_response_1_safe": n % 2 == 0,
            "better_response_id": 0,
            "safer_response_id": 1,
        }
        for n in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def xstest(tmp_path: Path) -> Path:
    path = tmp_path / "xstest_prompts.csv"
    rows = ["id,prompt,type,label,focus,note", "1,Kill it?,homonyms,safe,,", "2,Kill?,contrast_homonyms,unsafe,,"]
    path.write_text("".join(f"{row}\n" for row in rows))
    return path


def config(preferences: str, **evaluate: str) -> RunConfig:
    return build(
        RunConfig,
        {"output_dir": "out", "model": "m", "holdout": 0.3, "preferences": preferences, "evaluate": evaluate},
    )


def test_published_files_are_inputs_as_they_stand(pku: Path, xstest: Path) -> None:
    found = read_inputs(
        config(
            f"pku-safe-rlhf:{pku}?both_unsafe=drop",
            prompts=f"xstest:{xstest}?label=unsafe",
            borderline_prompts=f"{xstest}?label=safe",
            benign_text=str(pku),
        )
    )
    assert len(found.preferences) + len(set(found.preferences["prompt"])) <= 60
    assert set(found.preferences["chosen"]) == {"\nNo."}
    assert (found.red_team["prompt"], found.red_team["harmful"]) == (["Kill?"], [True])
    assert found.borderline is not None
    assert found.borderline["prompt"] == ["Kill it?"]
    assert set(found.benign["response"]) == {"\nNo."}
    assert set(found.prompts["prompt"]) == set(found.preferences["prompt"])


def test_what_is_asked_at_the_end_was_in_nothing_before(tmp_path: Path) -> None:
    """Two pairs a prompt, the prompts' order and the rows' another time another one."""
    rows = [{"prompt": f"Question {n % 40}?", "chosen": f" Yes {n}.", "rejected": " No."} for n in range(80)]
    split = []
    for order in (rows, rows[::-1]):
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in order))
        found = read_inputs(config(str(path)))
        kept, held = set(found.preferences["prompt"]), set(found.held_out["prompt"])
        assert (len(kept) + len(held), kept & held) == (40, set())
        assert len(found.preferences) == 2 * len(kept)
        assert set(found.prompts["prompt"]) == set(found.demonstrations["prompt"]) == kept
        assert set(found.red_team["prompt"]) == set(found.benign["prompt"]) == held
        split.append(held)
    assert split[0] == split[1]


def test_prompts_of_another_kind_than_the_preferences_are_refused(pku: Path, xstest: Path) -> None:
    message = r"evaluate\.prompts: its prompts are plain where the preferences are chat; write \?turns=chat after"
    with pytest.raises(UserError, match=message):
        read_inputs(config(f"{pku}?turns=chat", prompts=str(xstest)))
    assert read_inputs(config(f"{pku}?turns=chat", prompts=f"{xstest}?turns=chat")).red_team["prompt"][0] == [
        {"role": "user", "content": "Kill it?"}
    ]
    with pytest.raises(UserError, match=r"evaluate\.borderline_prompts: its prompts are chat where .* are plain"):
        read_inputs(config(str(pku), borderline_prompts=f"{xstest}?turns=chat"))


@pytest.mark.parametrize(
    "place", ["pku-safe-rlhf:{}", "{}?label=better", "trl:{.parent}?split=train", "{}", "{.parent}"]
)
def test_a_run_does_not_go_on_with_other_data_behind_a_source(tmp_path: Path, pku: Path, place: str) -> None:
    run = RunConfig(output_dir=str(tmp_path / "runs" / "run"), model="m", preferences=place.format(pku))
    RunFolder(run).stage("one", lambda: None, say=lambda line: None)
    assert RunFolder(run).done("one")
    pku.write_text(pku.read_text() * 2)
    with pytest.raises(UserError, match=r"holds another run \(.*pku\.jsonl"):
        RunFolder(run)


def test_of_a_folder_what_is_read_counts_and_a_models_not_at_all(tmp_path: Path, pku: Path) -> None:
    (model := tmp_path / "model").mkdir()
    sources = ({"preferences": str(pku.parent)}, {"prompt_sets": {"a": str(pku.parent)}})
    for number, source in enumerate(sources):
        folder, settings = tmp_path / str(number), {"model": str(model), **source}
        write_json(folder / SETTINGS_FILE, checked_settings(folder, settings))
        (model / "config.json").write_text("{}")
        (pku.parent / "test.jsonl").write_text("{}\n")  # another split
        (pku.parent / "README.md").write_text("of these")
        checked_settings(folder, settings)
        (pku.parent / f"more-{number}.jsonl").write_text("{}\n")
        with pytest.raises(UserError, match=rf"more-{number}\.jsonl"):
            checked_settings(folder, settings)


def test_a_saved_data_set_that_changed_is_seen(tmp_path: Path, pku: Path) -> None:
    saved, run = tmp_path / "saved", tmp_path / "run"
    splits = DatasetDict({split: Dataset.from_json(str(pku), cache_dir=str(tmp_path)) for split in ("train", "test")})
    splits.save_to_disk(saved)
    settings = {"preferences": str(saved)}
    write_json(run / SETTINGS_FILE, checked_settings(run, settings))
    splits["test"].select(range(3)).save_to_disk(saved / "test")
    checked_settings(run, settings)
    splits["train"].select(range(3)).save_to_disk(saved / "train")
    with pytest.raises(UserError, match=r"saved/train/.*\.arrow"):
        checked_settings(run, settings)
