"""Reading: what is there is read, what is not is named with its cure, what is broken is a one-line error."""

import shutil
from pathlib import Path

import pytest

from reprdpo.errors import UserError
from reprdpo.files import read_json
from reprdpo.report.run_folder import load_run
from tests.report.invented_run import HOSTILE, put, put_lines


def test_reads_every_part(run_dir: Path) -> None:
    run = load_run(run_dir)
    assert run.absent() == []
    assert [row.label for row in run.summary] == ["base", "SFT", "DPO", "RS", "DPO*", "cDPO*", "online"]
    assert [training.system for training in run.trainings] == ["sft", "dpo", "dpo_ranked", "reprdpo", "online"]
    assert all(len(training.metrics["loss"]) == 3 for training in run.trainings)
    assert [(row.system, row.seed) for row in run.evaluations][:4] == [
        ("base", 0),
        ("base", 1),
        ("base", 2),
        ("sft", 0),
    ]
    assert run.fit is not None
    assert len(run.fit.layers) == 6
    assert len(run.fit.calibrations[0].bins) == 9  # the empty bin is left out


def test_samples_show_each_category_before_a_second_of_any(run_dir: Path) -> None:
    run = load_run(run_dir)
    assert run.compared == ("base", "reprdpo")
    assert len({sample.category for sample in run.samples[:6]}) == 6
    assert run.samples[0].before.text == f"{HOSTILE} said base"
    assert run.samples[1].before.verdict == "unsafe"
    assert run.samples[1].after.verdict == "safe, refusal"


def test_chat_prompts_become_text(run_dir: Path) -> None:
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello?"}]
    for system in ("base", "reprdpo"):
        line = {"prompt": chat, "response": "Good day.", "unsafe": None, "refusal": None}
        put_lines(run_dir / "evaluation" / f"{system}-seed-0.responses.jsonl", [line])
    (sample,) = load_run(run_dir).samples
    assert sample.prompt == "system: Be kind.\nuser: Hello?"
    assert sample.before.verdict == ""


def test_a_step_logged_twice_keeps_the_later_value_and_a_torn_line_is_passed_over(run_dir: Path) -> None:
    log = run_dir / "systems" / "dpo" / "seed-0" / "metrics.jsonl"
    put_lines(log, [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 2, "loss": 3.0, "epoch": None}])
    with log.open("a") as file:
        file.write('{"step": 3, "lo')
    dpo = next(training for training in load_run(run_dir).trainings if training.system == "dpo")
    assert dpo.metrics["loss"][0] == {1: 1.0, 2: 3.0}
    assert "epoch" not in dpo.metrics


def test_training_log_in_the_systems_own_folder(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "systems" / "sft")
    put_lines(run_dir / "systems" / "sft" / "metrics.jsonl", [{"step": 1, "loss": 2.5}])
    assert load_run(run_dir).trainings[0].metrics == {"loss": [{1: 2.5}]}


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("fit", ["Probe accuracy and calibration: absent"]),
        ("systems", ["Training curves: absent"]),
        ("systems/reprdpo/seed-*/confidence_histogram.json", ["Confidence histogram: absent"]),
        ("evaluation", ["Table of toxic rates: absent", "Samples before and after: absent"]),
    ],
)
def test_absent_parts_are_named(run_dir: Path, part: str, words: list[str]) -> None:
    for path in run_dir.glob(part):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    *absent, cure = load_run(run_dir).absent()
    assert [sentence.split(",")[0] for sentence in absent] == words
    assert cure.startswith("To go on where it stopped" if part == "evaluation" else "All its stages are done")


def test_absent_systems_are_named_and_an_unfinished_run_with_its_command(run_dir: Path) -> None:
    state, summary = read_json(run_dir / "run.json"), read_json(run_dir / "evaluation" / "summary.json")
    state["stages"]["fit"]["status"] = "stopped"
    summary["systems"] = [row for row in summary["systems"] if row["system"] != "online"]
    put(run_dir / "run.json", state)
    put(run_dir / "evaluation" / "summary.json", summary)
    assert load_run(run_dir).absent() == [
        "Systems of the paper's table that are not in this run: online.",
        "Not finished: fit.",
        "To go on where it stopped: reprdpo run invented.yaml",
    ]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("run.json", "{", r"run\.json: is not JSON"),
        ("run.json", "[]", r"run\.json: holds something other than expected"),
        ("run.json", '{"stages": {"fit": {}}}', r"run\.json: field 'status' is missing"),
        ("fit/report.json", "{}", r"report\.json: field 'layer_accuracy' is missing"),
        ("fit/report.json", '{"layer_accuracy": ["high"]}', r"report\.json: holds something other"),
        ("evaluation/summary.json", '{"systems": [{}]}', r"summary\.json: field 'system' is missing"),
        ("evaluation/dpo-seed-0.json", '{"system": "dpo", "seed": 0}', r"dpo-seed-0\.json: field 'toxic' is missing"),
        ("evaluation/base-seed-0.responses.jsonl", "{}\n", r"responses\.jsonl, line 1: field 'prompt' is missing"),
        ("systems/dpo/seed-0/metrics.jsonl", '{"step": 1}\nnot JSON\n', r"metrics\.jsonl, line 2: is not JSON"),
        ("systems/dpo/seed-0/metrics.jsonl", "[1]\n", r"metrics\.jsonl, line 1: holds something other"),
        (
            "systems/reprdpo/seed-0/confidence_histogram.json",
            '{"edges": [0, 1], "initial": [1, 2], "final": [1]}',
            r"confidence_histogram\.json: holds something other than expected \(edges",
        ),
    ],
)
def test_broken_files_are_user_errors_of_one_line(run_dir: Path, file: str, content: str, message: str) -> None:
    (run_dir / file).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        load_run(run_dir)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run folder \(no run.json in it\)"):
        load_run(tmp_path)
