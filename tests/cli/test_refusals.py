"""What is wrong with a command's inputs is one line, said before anything is made."""

import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from reprdpo.cli import main
from reprdpo.models import load_causal_lm, load_tokenizer

Refused = Callable[[str], str]

PAIRS = [{"prompt": f"Once {n}", "chosen": f" a dog {n}.", "rejected": " none."} for n in range(40)]


@pytest.fixture
def refused(
    tmp_path: Path, real_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refused:
    """Run a command that must be refused, in a folder with ``pairs.jsonl``, and find the folder as it was.

    ``MODEL`` in it is a real model. Returns the one line of complaint.
    """
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))

    def run(words: str) -> str:
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        argv = words.replace("MODEL", str(real_dir / "models" / "stories260K")).split()
        assert main(argv) == 2
        *_, last = capsys.readouterr().err.strip().splitlines()
        assert last.startswith(f"reprdpo {argv[0]}: "), last
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before, "something was made"
        return last

    return run


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ("--packing varlen", "cannot be served the varlen layout"),
        ("--max_tokens_per_device 4", "max_tokens_per_device: 4 does not hold row"),
        ("--max_row_tokens 4 --packing prefix", "take more than the 4 tokens of a packed row"),
        ("--fsdp full_shard", "fsdp: shards over processes"),
        ("--attn_implementation none_such", "attn_implementation: none_such cannot be used"),
        ("--beta -1", "beta: got -1.0, expected a positive number"),
        ("--learning_rate nan", "learning_rate: got nan, expected a number of at least 0"),
        ("--max_grad_norm nan", "max_grad_norm: got nan, expected a number of at least 0"),
        ("--save_steps 0", "save_steps: got 0.0, expected a number above 0"),
        ("--resume_from_checkpoint x", "--resume_from_checkpoint: leave it out; training goes on from"),
        ("--per_device_train_batch_size 0", "per_device_train_batch_size: got 0, expected an integer of at least 1"),
        ("--gradient_accumulation_steps 0", "gradient_accumulation_steps: got 0, expected an integer of at least 1"),
        ("--eval_strategy steps", "but you didn't pass an `eval_dataset`"),
        ("--report_to nope", "nope is not supported"),
        ("--load_best_model_at_end true --eval_strategy epoch", "Save strategy: SaveStrategy.STEPS"),  # in one line
        ("--dataloader_num_workers -1", "dataloader_num_workers: got -1, expected an integer of at least 0"),
    ],
)
def test_training(refused: Refused, more: str, complaint: str) -> None:
    assert complaint in refused(f"train --model MODEL --method dpo --preferences pairs.jsonl --output_dir a/b {more}")


@pytest.mark.parametrize(
    "command",
    [
        "train --method dpo --preferences pairs.jsonl --output_dir pairs.jsonl/a",
        "train --method dpo --preferences pairs.jsonl --output_dir pairs.jsonl",
        "fit --preferences pairs.jsonl --output pairs.jsonl",
        "sample --prompts pairs.jsonl --reward none --output pairs.jsonl/a",
        "evaluate --prompts pairs.jsonl --output pairs.jsonl/a",
        "score pairs.jsonl --reward none --output pairs.jsonl/a",
    ],
)
def test_a_file_where_a_folder_is_to_be_is_said_before_a_model_is_looked_for(refused: Refused, command: str) -> None:
    assert "another file or folder is in its way" in refused(f"{command} --model none")


def test_weights_that_are_not_finite(refused: Refused, real_dir: Path) -> None:
    model = load_causal_lm(real_dir / "models" / "stories260K")
    torch.nn.init.constant_(model.model.norm.weight, torch.nan)
    model.save_pretrained("broken")
    load_tokenizer(real_dir / "models" / "stories260K").save_pretrained("broken")
    told = refused("train --model broken --method dpo --preferences pairs.jsonl --output_dir a")
    assert "its logits are not finite; its weights may hold NaN or infinity" in told


def test_a_run(refused: Refused) -> None:
    settings = {"model": "MODEL", "preferences": "none.jsonl", "output_dir": "runs/mine"}
    Path("run.json").write_text(json.dumps(settings))
    assert "none.jsonl: no such file" in refused("run run.json")
    Path("folder").mkdir()
    assert "folder: cannot be read (Is a directory); give a YAML file" in refused("run folder")


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ("--judge none_such", "judge 'none_such'"),
        ("--model MODEL --preferences none.jsonl", "none.jsonl: no such file"),
        ("--set train.beta=-1", "beta: got -1.0"),
    ],
)
def test_an_experiment(refused: Refused, more: str, complaint: str) -> None:
    assert complaint in refused(f"experiment table1 --scale tiny --output_dir runs {more}")


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("sample --reward reward --output samples --max_new_tokens 600", "the model has 512 positions"),
        ("sample --reward reward --output samples --max_prompt_length 2", "prompt 10: has more than the 2 tokens"),
        ("evaluate --output judged/a --max_new_tokens 600", "the model has 512 positions"),
    ],
)
def test_sampling(
    refused: Refused, real_dir: Path, command: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(real_dir / "models" / "stories260K")
    assert main(["fit", "--model", model, "--preferences", "pairs.jsonl", "--output", "reward", "--folds", "2"]) == 0
    assert complaint in refused(f"{command} --model MODEL --prompts pairs.jsonl")


@pytest.mark.parametrize(
    ("error", "complaint"),
    [
        (ModuleNotFoundError("No module", name="datasets"), "needs datasets; pip install 'reprdpo[train]'"),
        (PackageNotFoundError("The 'a>=1' distribution was not found.\nTry"), "The 'a>=1' distribution was not found."),
        (ImportError("You need to install `b`\nby pip"), "You need to install `b`"),
        (ImportError("cannot import name", name="reprdpo.x"), None),
        (ModuleNotFoundError("No module", name="reprdpo.x"), None),
    ],
)
def test_a_package_that_is_not_installed(
    error: ImportError, complaint: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(argv: list[str]) -> None:
        raise error

    monkeypatch.setattr("reprdpo.cli.doctor.main", fail)
    if complaint is None:
        with pytest.raises(ImportError):
            main(["doctor"])
        return
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == f"reprdpo doctor: {complaint}\n"
