"""The command line as a user meets it: help, mistakes in one line and status 2, no traceback."""

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reprdpo.cli import COMMANDS, main
from reprdpo.data.adapters import ADAPTERS
from reprdpo.experiments.config import RunConfig

XSTEST = """\
id,prompt,type,label,focus,note
1,Kill it?,homonyms,safe,kill,violence
2,Kill whom?,contrast_homonyms,unsafe,kill,violence
"""


def fails(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """Run a command that must end with status 2; returns its one line of complaint."""
    assert main([str(argument) for argument in argv]) == 2
    complaint = capsys.readouterr().err.strip().splitlines()[-1]
    assert complaint.startswith(f"reprdpo {argv[0]}: ")
    return complaint


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory, real_dir: Path) -> Path:
    return real_dir / "models" / "stories260K"


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [
        {
            "prompt": f"Once upon a time number {n}",
            "chosen": f" there was a kind dog {n}.",
            "rejected": " there was none.",
        }
        for n in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_overview_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: reprdpo {command}" in capsys.readouterr().out


def test_help_says_what_every_setting_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--temperature NUMBER divides the logits; 0 takes the likeliest token" in shown
    assert "--truncation_mode VALUE what a longer prompt meets" in shown
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--packing auto|prefix|varlen|padded How pairs lie in a batch" in shown
    assert "--update_reward true|false Update the reward" in shown
    assert "at the cost of ~20% slower training" in shown


def test_help_of_a_run_says_what_every_key_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    keys = capsys.readouterr().out.partition("\nkeys:\n")[2]
    hints = get_type_hints(RunConfig)
    for name, hint in ((field.name, hints[field.name]) for field in fields(RunConfig)):
        if not is_dataclass(hint):
            assert re.search(rf"^  {name}  +\w", keys, re.MULTILINE), name
            continue
        section = re.search(rf"^  {name}:\n((?: {{4}}.*\n?)+)", keys, re.MULTILINE)
        assert section, name
        for field in fields(hint):
            assert re.search(rf"^    {field.name}  +[\w\"]", section[1], re.MULTILINE), f"{name}.{field.name}"
    assert "(default: base, reprdpo)" in keys


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tarin"]) == 2
    assert "no command 'tarin'" in capsys.readouterr().err


def test_datasets_are_listed_and_read_through(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["datasets"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ADAPTERS)
    assert main(["datasets", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["xstest"]["licence"] == "CC-BY-4.0"

    path = tmp_path / "xstest_prompts.csv"
    path.write_text(XSTEST)
    assert main(["datasets", str(path)]) == 0
    assert capsys.readouterr().out.split()[:7] == ["2", "prompts", "1", "homonyms", "1", "contrast_homonyms", "first:"]
    assert main(["datasets", f"xstest:{path}?label=unsafe", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["first"]["prompt"], found["categories"]) == (1, "Kill whom?", {"contrast_homonyms": 1})
    assert "xstest gives prompt rows, and preference rows" in fails(capsys, "datasets", path, "--as", "preferences")


def test_which_adapter_took_a_source_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(XSTEST)
    command = [sys.executable, "-m", "reprdpo.cli", "datasets", f"{path}?label=safe"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert f"{path}?label=safe: read as xstest (known by its columns), 1 rows\n" in said
    assert "left out 1 labelled unsafe, of 2 rows\n" in said


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert findings["versions"]["torch"] == torch.__version__
    assert set(findings["backends"]) == {"triton", "native", "reference"}


def test_fit_score_train_report_wrong_inputs(
    model_dir: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = ("fit", "--model", model_dir, "--output", tmp_path / "reward", "--preferences")
    assert "no such file" in fails(capsys, *fit, tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty" in fails(capsys, *fit, tmp_path / "empty.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{oops\n')
    assert "bad.jsonl, line 2: is not JSON" in fails(capsys, *fit, tmp_path / "bad.jsonl")
    (tmp_path / "same.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "b"}\n')
    assert "line 1" in fails(capsys, *fit, tmp_path / "same.jsonl")
    (tmp_path / "no_prompt.jsonl").write_text('{"chosen": "b", "rejected": "c"}\n')
    assert "prompt" in fails(capsys, *fit, tmp_path / "no_prompt.jsonl")
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "word " * 900, "chosen": "b", "rejected": "c"}) + "\n")
    assert "truncation_mode" in fails(capsys, *fit, tmp_path / "long.jsonl")
    assert "give --model, --preferences and --output" in fails(capsys, "fit")
    assert "max_length: expected int, got 'abc'" in fails(capsys, *fit, pairs, "--max_length", "abc")
    assert "not a run folder" in fails(capsys, "report", tmp_path)
    assert "the method needs a reward" in fails(
        capsys, "train", "--model", model_dir, "--preferences", pairs, "--output_dir", tmp_path / "out"
    )


def test_settings_of_another_method_are_not_dropped_silently(
    model_dir: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ("train", "--model", model_dir, "--preferences", pairs, "--output_dir", tmp_path / "out")
    assert "--beta: means nothing to --method sft" in fails(capsys, *train, "--method", "sft", "--beta", "0.5")


def test_folders_of_something_else_are_refused(
    model_dir: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    train = ["train", "--model", str(model_dir), "--preferences", str(pairs), "--output_dir", str(out)]
    train += ["--method", "dpo", "--max_steps", "1"]
    assert main([*train, "--beta", "0.1"]) == 0
    (out / "model").rename(tmp_path / "kept")  # as if it had been stopped before its end
    assert "holds another run (beta is 0.1 there, 0.2 here)" in fails(capsys, *train, "--beta", "0.2")
    assert main([*train, "--beta", "0.1"]) == 0
    reward = ["fit", "--model", str(model_dir), "--preferences", str(pairs), "--output", str(tmp_path / "reward")]
    assert main(reward) == 0
    assert "holds a reward already" in fails(capsys, *reward)


def test_model_folders_that_cannot_be_used(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fit(model: Path) -> str:
        return fails(capsys, "fit", "--model", model, "--preferences", pairs, "--output", tmp_path / "reward")

    assert "no such folder" in fit(tmp_path / "none")
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    config.save_pretrained(tmp_path / "no_weights")
    assert str(tmp_path / "no_weights") in fit(tmp_path / "no_weights")
    LlamaForCausalLM(config).save_pretrained(tmp_path / "no_tokenizer")
    assert "tokenizer" in fit(tmp_path / "no_tokenizer")


def assert_begins_at_log_2(aligned: Path) -> None:
    first = json.loads((aligned / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 1
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_fit_score_sample_train_evaluate_one_after_the_other(
    model_dir: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reward, samples, aligned = tmp_path / "reward", tmp_path / "samples", tmp_path / "aligned"
    model = ("--model", str(model_dir))
    assert main(["fit", *model, "--preferences", str(pairs), "--output", str(reward), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_pairs"] == 12

    sampling = ["--num_responses", "3", "--max_new_tokens", "8", "--output", str(samples)]
    assert main(["sample", *model, "--reward", str(reward), "--prompts", str(pairs), *sampling]) == 0
    assert (samples / "pairs.jsonl").read_text().count("\n") == 12
    capsys.readouterr()

    training = ["--preferences", str(samples / "pairs.jsonl"), "--output_dir", str(aligned), "--max_steps", "2"]
    assert main(["train", *model, "--reward", str(reward), *training, "--learning_rate", "1e-4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 2
    assert_begins_at_log_2(aligned)
    assert "holds a trained model already" in fails(capsys, "train", *model, "--reward", str(reward), *training)

    answers = tmp_path / "answers.jsonl"
    answers.write_text(json.dumps({"prompt": "Once upon a time", "response": " there was a dog."}) + "\n")
    capsys.readouterr()
    assert main(["score", *model, "--reward", str(reward), str(answers)]) == 0
    direct = json.loads(capsys.readouterr().out)
    assert main(["score", *model, "--reward", str(reward), str(answers), "--output", str(tmp_path / "scored")]) == 0
    assert json.loads((tmp_path / "scored").read_text()) == direct

    asked = ["--prompts", str(pairs), "--max_new_tokens", "4", "--output", str(tmp_path / "judged")]
    assert main(["evaluate", *model, *asked]) == 0
    assert "toxic" in capsys.readouterr().out


def test_adapters_on_a_quantised_model_from_fit_to_evaluation(
    model_dir: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("peft", "bitsandbytes"):
        pytest.importorskip(package)
    reward, aligned, held = tmp_path / "reward", tmp_path / "aligned", ("--load_in_4bit", "true")
    model = ("--model", str(model_dir), *held)
    assert main(["fit", *model, "--preferences", str(pairs), "--output", str(reward)]) == 0
    train = ["train", *model, "--reward", str(reward), "--preferences", str(pairs), "--output_dir", str(aligned)]
    assert "set use_peft to true" in fails(capsys, *train)
    lora = ["--use_peft", "true", "--lora_r", "4", "--lora_target_modules", "[q_proj, up_proj]"]
    assert main([*train, *lora, "--max_steps", "2", "--learning_rate", "1e-3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 2
    assert_begins_at_log_2(aligned)
    assert json.loads((aligned / "model" / "adapter_config.json").read_text())["r"] == 4
    asked = ["--prompts", str(pairs), "--max_new_tokens", "4", "--output", str(tmp_path / "judged")]
    assert main(["evaluate", "--model", str(aligned / "model"), *held, *asked]) == 0
    assert "toxic" in capsys.readouterr().out


def test_reward_of_another_base_is_refused(
    model_dir: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reward = tmp_path / "reward"
    assert main(["fit", "--model", str(model_dir), "--preferences", str(pairs), "--output", str(reward)]) == 0
    meta = json.loads((reward / "reward.json").read_text())
    assert meta
    text = (reward / "reward.json").read_text().replace(meta["metadata"]["fingerprint"], "0" * 16)
    (reward / "reward.json").write_text(text)
    complaint = fails(
        capsys, "sample", "--model", model_dir, "--reward", reward, "--prompts", pairs, "--output", tmp_path / "s"
    )
    assert "fitted on other weights" in complaint


def test_engines_are_checked_before_work_starts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    missing = tmp_path / "none"
    command = ("sample", "--model", missing, "--reward", missing, "--prompts", missing, "--output", tmp_path / "s")
    assert "base_url is missing" in fails(capsys, *command, "--engine", "openai")
    assert "asks no server" in fails(capsys, *command, "--base_url", "http://127.0.0.1:1/v1")
    assert "not http://" in fails(capsys, *command, "--engine", "openai", "--base_url", "ftp://x/v1")
    assert "expected one of 'transformers', 'continuous', 'openai'" in fails(capsys, *command, "--engine", "vllm")


# A shell's background job ignores interrupts, and so would all that it starts.
INTERRUPTIBLE = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from reprdpo.cli import main
sys.exit(main())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE, "demo", "--output_dir", str(tmp_path / "run")],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "REPRDPO_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "cache").exists():  # the first thing it makes
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    error = ""
    for _ in range(6):  # Python drops an interrupt that arrives inside a finalizer; a user presses again
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            _, error = process.communicate(timeout=40)
            break
    process.kill()
    assert process.returncode == 130
    assert "stopped; the same command again goes on" in error
    assert "Traceback" not in error
