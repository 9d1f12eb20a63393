"""The whole pipeline on the smallest sandbox: every system, resumed, refused where it must be."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reprdpo.errors import UserError
from reprdpo.experiments import RunConfig, run
from reprdpo.experiments.run_folder import RunFolder
from reprdpo.files import read_json, read_jsonl
from reprdpo.models import load_causal_lm, model_fingerprint
from reprdpo.report import render, summary_table
from reprdpo.reward import HybridReward

Interrupted = Callable[[str], AbstractContextManager[None]]
TRAINED = ("dpo", "dpo_ranked", "cdpo_fixed", "reprdpo", "online")


def metrics(folder: Path, system: str) -> list[dict[str, float]]:
    return [line for _, line in read_jsonl(folder / "systems" / system / "seed-0" / "metrics.jsonl")]


def test_every_stage_is_done(tiny_run: Path) -> None:
    state = read_json(tiny_run / "run.json")
    assert {stage["status"] for stage in state["stages"].values()} == {"done"}
    assert {"sft", "fit", "sample", "reward model", "summary"} <= state["stages"].keys()


def test_every_system_is_trained_judged_and_in_the_table(tiny_run: Path, tiny_config: RunConfig) -> None:
    summary = read_json(tiny_run / "evaluation" / "summary.json")
    assert [row["system"] for row in summary["systems"]] == list(tiny_config.systems)
    assert all(0 <= row["toxic_low"] <= row["toxic_mean"] <= row["toxic_high"] <= 1 for row in summary["systems"])
    assert len(summary["orderings"]) == 7
    fingerprints = {
        model_fingerprint(load_causal_lm(tiny_run / "systems" / system / "seed-0" / "model")) for system in TRAINED
    }
    assert len(fingerprints) == len(TRAINED)
    assert "cDPO* (ours)" in summary_table(tiny_run)


def test_answers_stand_side_by_side(tiny_run: Path, tiny_config: RunConfig) -> None:
    rows = [row for _, row in read_jsonl(tiny_run / "evaluation" / "side_by_side.jsonl")]
    assert len(rows) == read_json(tiny_run / "evaluation" / "base-seed-0.json")["toxic"]["n"]
    assert {len(row["responses"]) for row in rows} == {len(tiny_config.systems)}
    assert all({"text", "unsafe", "refusal"} <= answer.keys() for row in rows for answer in row["responses"].values())


@pytest.mark.parametrize("system", [system for system in TRAINED if system != "online"])
def test_policy_equals_reference_at_step_0(tiny_run: Path, system: str) -> None:
    first = metrics(tiny_run, system)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=0.1 * 1e-4)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_the_method_logs_reward_and_confidence_at_every_step(tiny_run: Path) -> None:
    lines = metrics(tiny_run, "reprdpo")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    for line in lines[:2]:
        assert {"rewards/accuracies", "hybrid/accuracies", "hybrid/nll", "confidence/mean", "confidence/std"} <= set(
            line
        )
    assert "hybrid/accuracies" not in metrics(tiny_run, "dpo")[0]


def test_the_reward_moved_with_the_method_and_only_there(tiny_run: Path) -> None:
    fitted = HybridReward.from_pretrained(tiny_run / "reward")
    moved = HybridReward.from_pretrained(tiny_run / "systems" / "reprdpo" / "seed-0" / "model" / "reward")
    assert not moved.probe_weight.equal(fitted.probe_weight)
    assert not (tiny_run / "systems" / "dpo" / "seed-0" / "model" / "reward").exists()


def test_the_report_draws(tiny_run: Path) -> None:
    page = render(tiny_run)
    assert "cDPO* (ours)" in page.read_text()


def test_the_same_command_again_does_nothing(tiny_run: Path, tiny_config: RunConfig) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*") if path.is_file() and path.name != ".lock"}
    said: list[str] = []
    run(tiny_config, say=said.append)
    after = {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*") if path.is_file() and path.name != ".lock"}
    assert before == after
    assert all(line.endswith("done before") for line in said)


def test_a_run_goes_on_with_smaller_batches_of_generation(tiny_run: Path, tiny_config: RunConfig) -> None:
    smaller = replace(tiny_config, evaluate=replace(tiny_config.evaluate, batch_size=1))
    assert run(smaller, say=lambda line: None).path == tiny_run


def test_a_run_stopped_in_the_middle_ends_as_an_unbroken_one(
    tiny_run: Path, tiny_config: RunConfig, tmp_path: Path, interrupted: Interrupted
) -> None:
    config = replace(tiny_config, output_dir=str(tmp_path / "run"))
    with interrupted("reprdpo"):
        run(config, say=lambda line: None)
    assert read_json(tmp_path / "run" / "run.json")["stages"]["train reprdpo seed 0"]["status"] == "stopped"
    run(config, say=lambda line: None)
    one, other = (
        [row["toxic_mean"] for row in read_json(folder / "evaluation" / "summary.json")["systems"]]
        for folder in (tiny_run, tmp_path / "run")
    )
    assert one == other
    for system in TRAINED:
        assert [line["loss"] for line in metrics(tiny_run, system) if "loss" in line] == [
            line["loss"] for line in metrics(tmp_path / "run", system) if "loss" in line
        ]


@pytest.mark.slow
def test_a_run_killed_goes_on_with_the_same_command(tiny_run: Path, cache_dir: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "reprdpo.cli", "demo", "--scale", "tiny", "--output_dir", str(tmp_path / "run")]
    threads = str(torch.get_num_threads())  # tiny_run's own: the order of a sum depends on them
    environment = {**os.environ, "REPRDPO_CACHE": str(cache_dir), "OMP_NUM_THREADS": threads}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "run" / "systems" / "dpo_ranked").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (tmp_path / "run" / "evaluation" / "summary.json").exists()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    one, other = (read_json(folder / "evaluation" / "summary.json") for folder in (tiny_run, tmp_path / "run"))
    assert one == other


def test_a_folder_of_another_run_is_refused(tiny_run: Path, tiny_config: RunConfig) -> None:
    with pytest.raises(UserError, match=r"holds another run \(train.beta is 0.1 there, 0.2 here\)"):
        run(replace(tiny_config, train={**tiny_config.train, "beta": 0.2}), say=lambda line: None)


def test_a_run_does_not_go_on_with_a_file_that_changed(tmp_path: Path, real_dir: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text((real_dir / "pairs" / "refusal_direction.jsonl").read_text())
    config = RunConfig(output_dir=str(tmp_path / "run"), model="m", preferences=str(pairs))
    RunFolder(config).stage("one", lambda: None, say=lambda line: None)
    pairs.write_text(pairs.read_text() * 2)
    with pytest.raises(UserError, match="holds another run"):
        RunFolder(config)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, tiny_config: RunConfig) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="not a run's folder and not empty"):
        run(replace(tiny_config, output_dir=str(tmp_path)), say=lambda line: None)


def test_bad_input_is_said_before_any_stage(tmp_path: Path, tiny_config: RunConfig) -> None:
    said: list[str] = []
    config = replace(tiny_config, output_dir=str(tmp_path / "run"), train={"beta": -1.0})
    with pytest.raises(UserError, match="beta"):
        run(config, say=said.append)
    assert not said
    assert not (tmp_path / "run").exists()


def test_a_folder_that_two_runs_begin_is_the_firsts(tmp_path: Path, tiny_config: RunConfig) -> None:
    one, other = (RunFolder(replace(tiny_config, output_dir=str(tmp_path / "run"))) for _ in range(2))
    one.stage("one", lambda: None, say=lambda line: None)
    with pytest.raises(UserError, match="another process is working in this folder"):
        other.stage("one", lambda: None, say=lambda line: None)
    one.close()
    with pytest.raises(UserError, match="another process began a run in this folder"):
        other.stage("one", lambda: None, say=lambda line: None)


@pytest.mark.parametrize("name", ["preferences", "prompts"])
def test_data_that_the_sandbox_would_not_read_are_refused(tmp_path: Path, tiny_config: RunConfig, name: str) -> None:
    config = replace(tiny_config, output_dir=str(tmp_path / "run"), **{name: "mine.jsonl"})
    with pytest.raises(UserError, match=f"{name}: the sandbox is aligned on its own"):
        run(config, say=lambda line: None)


def test_a_server_that_is_not_there_is_said_before_any_stage(tmp_path: Path, tiny_config: RunConfig) -> None:
    said: list[str] = []
    sample = replace(tiny_config.sample, engine="openai", base_url="http://127.0.0.1:1/v1")
    config = replace(tiny_config, output_dir=str(tmp_path / "run"), systems=("base", "reprdpo"), sample=sample)
    with pytest.raises(UserError, match="cannot be reached"):
        run(config, say=said.append)
    assert not said


def test_a_run_goes_on_with_a_server_elsewhere(tmp_path: Path, tiny_config: RunConfig) -> None:
    sample = replace(tiny_config.sample, engine="openai", base_url="http://127.0.0.1:1/v1")
    config = replace(tiny_config, output_dir=str(tmp_path / "run"), sample=sample)
    RunFolder(config).stage("one", lambda: None, say=lambda line: None)
    elsewhere = replace(sample, base_url="http://127.0.0.1:2/v1", concurrency=3, request_retries=0)
    assert RunFolder(replace(config, sample=elsewhere)).done("one")
    with pytest.raises(UserError, match=r"holds another run \(sample.served_model"):
        RunFolder(replace(config, sample=replace(sample, served_model="other")))


def test_a_real_model_and_real_pairs(real_dir: Path, tmp_path: Path) -> None:
    config = RunConfig(
        output_dir=str(tmp_path / "run"),
        model=str(real_dir / "models" / "stories260K"),
        preferences=str(real_dir / "pairs" / "refusal_direction.jsonl"),
        limit=60,
        systems=("base", "rs", "reprdpo"),
        data=replace(RunConfig(output_dir="x").data, max_length=96, truncation_mode="keep_end"),
        sample=replace(
            RunConfig(output_dir="x").sample, engine="continuous", num_responses=2, max_new_tokens=12, limit=8
        ),
        train={"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "beta": 0.1},
        evaluate=replace(
            RunConfig(output_dir="x").evaluate,
            prompts=str(real_dir / "prompts" / "harmful.jsonl"),
            borderline_prompts=str(real_dir / "prompts" / "harmless.jsonl"),
            limit=8,
            max_new_tokens=12,
        ),
    )
    folder = run(config, say=lambda line: None).path
    assert metrics(folder, "reprdpo")[0]["loss"] == pytest.approx(math.log(2), abs=0.1 * 1e-4)
    assert json.loads((folder / "evaluation" / "rs-seed-0.json").read_text())["toxic"]["n"] == 8
