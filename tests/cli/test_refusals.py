"""What is wrong with a command's inputs is one line, said before anything is made."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from reprdpo.cli import main

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
    ],
)
def test_training(refused: Refused, more: str, complaint: str) -> None:
    assert complaint in refused(f"train --model MODEL --method dpo --preferences pairs.jsonl --output_dir a/b {more}")


def test_a_run(refused: Refused) -> None:
    settings = {"model": "MODEL", "preferences": "none.jsonl", "output_dir": "runs/mine"}
    Path("run.json").write_text(json.dumps(settings))
    assert "none.jsonl: no such file" in refused("run run.json")


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
