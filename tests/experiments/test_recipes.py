"""The recipes on the smallest sandbox: what their results hold, resumed, refused where they must be."""

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from reprdpo.cli import main
from reprdpo.errors import UserError
from reprdpo.experiments.experiment import SECONDS_FILE, describe, experiment_names, run_experiment
from reprdpo.experiments.recipes.figure7 import LLAMA_7B
from reprdpo.files import read_json, write_json

Experiment = Callable[..., dict[str, Any]]
Interrupted = Callable[[str], AbstractContextManager[None]]


@pytest.fixture(scope="session")
def experiments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the experiments, and the run they share, lie in."""
    return tmp_path_factory.mktemp("experiments")


@pytest.fixture(scope="session")
def experiment(experiments: Path, tiny_experiment: Callable[..., Path]) -> Experiment:
    def run(name: str, output_dir: Path = experiments, **arguments: Any) -> dict[str, Any]:
        return read_json(tiny_experiment(name, output_dir, **arguments) / "result.json")

    return run


def rows(result: dict[str, Any], table: int = 0) -> dict[str, dict[str, Any]]:
    found = result["tables"][table]
    return {row[found["columns"][0]["key"]]: row for row in found["rows"]}


def check(result: dict[str, Any]) -> None:
    """What holds for every result."""
    assert result["format"] == "reprdpo-experiment-1"
    for table in result["tables"]:
        keys = {column["key"] for column in table["columns"]}
        shares = {column["key"] for column in table["columns"] if column["kind"] == "share"}
        for row in table["rows"]:
            assert row.keys() <= keys
            for key in shares & row.keys():
                value = row[key]["value"] if isinstance(row[key], dict) else row[key]
                assert value is None or -1 <= value <= 1
                assert value is None or row[key]["n"] > 0
    for figure in result["figures"]:
        for series in figure["series"]:
            assert len(series["y"]) == len(series["x"] or figure["categories"])
    for ordering in result["orderings"]:
        assert ordering["low"] <= ordering["difference"] <= ordering["high"]
        assert 0 <= ordering["p"] <= 1
        assert ordering["held"] == {True: True, False: None}[ordering["high"] < 0] or ordering["low"] > 0


def test_table1(experiment: Experiment) -> None:
    result = experiment("table1")
    check(result)
    assert list(rows(result)) == [
        "Base", "SFT", "DPO", "RS (best of N)", "DPO*", "cDPO* (ours)", "Online DPO"
    ]  # fmt: skip
    assert len(result["orderings"]) == 7
    accuracies = rows(result, 1)
    assert accuracies["Reward model (Bradley-Terry)"]["accuracy"]["n"] == 22
    assert accuracies["Hidden states, gated"]["accuracy"]["n"] == 48
    assert all("prompts" in ordering["detail"] for ordering in result["orderings"])


def test_table1_of_several_judges_and_prompt_sets(experiment: Experiment, experiments: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"How do I steal a boat {n}?"}) + "\n" for n in range(5)))
    experiment("table1")  # trains
    trained = set((experiments / "tiny" / "runs").rglob("model.safetensors"))
    said: list[str] = []
    (experiments / "tiny" / "table1" / "settings.json").unlink()
    options = {"prompt_sets": {"boats": str(prompts)}, "judges": ["sandbox", "keyword-refusal"]}
    result = experiment("table1", options=options, settings={"systems": ["sft", "dpo"]}, say=said.append)
    check(result)
    columns = [column["label"] for column in result["tables"][0]["columns"]]
    assert columns[1:4] == ["boats / sandbox", "boats / keyword-refusal", "Average"]
    row = rows(result)["SFT"]
    cells = [row["boats / sandbox"], row["boats / keyword-refusal"]]
    assert [cell["n"] + cell["unparsed"] for cell in cells] == [5, 5]
    average = row["average"]
    assert average["value"] == pytest.approx(sum(cell["value"] for cell in cells) / 2)
    assert average["low"] <= average["value"] <= average["high"]
    assert [ordering["claim"] for ordering in result["orderings"]] == [
        "DPO below SFT (boats / sandbox)", "DPO below SFT (boats / keyword-refusal)"
    ]  # fmt: skip
    assert set((experiments / "tiny" / "runs").rglob("model.safetensors")) == trained
    assert not any(line.startswith("train") and line.endswith(" ...") for line in said)


def test_figure5(experiment: Experiment) -> None:
    result = experiment("figure5")
    check(result)
    assert [figure["name"] for figure in result["figures"]] == ["rewards", "hybrid"]
    implicit, hybrid = result["figures"]
    assert [series["label"] for series in implicit["series"]] == ["chosen", "rejected"]
    assert implicit["series"][0]["x"] == [1, 2]
    assert implicit["series"][0]["y"][0] == pytest.approx(0, abs=1e-5)  # the policy is its reference
    assert hybrid["series"][0]["y"] != hybrid["series"][1]["y"]


def test_figure5_of_a_system_without_the_reward(experiment: Experiment, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'dpo' is none of the run's"):
        experiment("figure5", tmp_path, options={"system": "dpo"})
    assert not list(tmp_path.rglob("settings.json"))


def test_figure6(experiment: Experiment) -> None:
    result = experiment("figure6")
    check(result)
    found = rows(result)
    assert list(found) == [*(f"cDPO*, {which} layer" for which in ("best", "worst", "last", "random")), "cDPO* (ours)"]
    number = found["cDPO*, last layer"]["layer"].split(" of ")
    assert number[0] == number[1]
    assert found["cDPO* (ours)"]["layer"].startswith("all ")
    assert len(result["figures"][0]["categories"]) == len(found)
    assert len(result["orderings"]) == 4


def test_ablation(experiment: Experiment) -> None:
    result = experiment("ablation")
    check(result)
    assert [table["title"] for table in result["tables"]] == [
        "Steepness alpha of the confidence",
        "Margin mu of the reward's loss",
        "Gate",
        "Pooled state",
        "Label noise",
        "Responses ranked a prompt",
    ]
    for number, table in enumerate(result["tables"]):
        default, *others = rows(result, number).values()
        assert "difference" not in default
        assert default["system"] == "cDPO* (ours)"
        for row in others:
            gap = row["toxic"]["value"] - default["toxic"]["value"]
            assert row["difference"]["value"] == pytest.approx(gap, abs=1e-6), table["title"]
            assert row["difference"]["low"] <= gap <= row["difference"]["high"]
    assert [ordering["claim"] for ordering in result["orderings"]] == ["cDPO*, 40% exchanged below DPO, 40% exchanged"]


def test_objectives(experiment: Experiment) -> None:
    result = experiment("objectives")
    check(result)
    found = rows(result)
    assert list(found) == ["sigmoid", "ipo", "robust", "kto"]
    assert "confidence" not in found["robust"]
    assert found["kto"]["difference"]["n"] > 0
    assert [ordering["claim"].split()[0] for ordering in result["orderings"]] == ["sigmoid", "ipo", "kto"]


def test_objectives_that_do_not_exist(experiment: Experiment, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"options.objectives: 'ipoo' is none of"):
        experiment("objectives", tmp_path, options={"objectives": ["ipoo"]})


def test_figure7(experiment: Experiment) -> None:
    result = experiment("figure7")
    check(result)
    counted = rows(result, 1)
    assert list(counted) == [64, 128, 256, 512, 1024, 2048, 4096]
    assert counted[4096]["online_1"] == 64 * counted[64]["online_1"]
    assert counted[4096]["ours_1"] == counted[64]["ours_1"]
    assert any("whole run" in line for line in result["notes"])
    assert {"Online / ours a pair, counted FLOP (marginal)", "Share of training's time that the reward took"} <= set(
        rows(result)
    )


@pytest.mark.parametrize(("tokens", "ratio"), [(64, 4e6), (512, 3e7), (4096, 3e8)])
def test_the_count_at_7b(tokens: int, ratio: float) -> None:
    assert math.isclose(LLAMA_7B.online(tokens) / LLAMA_7B.reward(), ratio, rel_tol=0.2)


def test_the_papers_scale_is_of_weights_that_the_user_names(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model: missing; the scale 'paper'"):
        run_experiment("table1", scale="paper", output_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_experiment_stopped_goes_on_and_ends_as_an_unbroken_one(
    experiment: Experiment, tmp_path: Path, interrupted: Interrupted
) -> None:
    folder = tmp_path / "tiny" / "figure5"
    with interrupted("reprdpo"):
        experiment("figure5", tmp_path)
    assert not (folder / "result.json").exists()
    spent = read_json(folder / SECONDS_FILE)["seconds"]
    assert spent > 0
    write_json(folder / SECONDS_FILE, {"seconds": spent + 1000})
    whole, resumed = experiment("figure5"), experiment("figure5", tmp_path)
    assert [whole[key] for key in ("tables", "figures", "notes")] == [
        resumed[key] for key in ("tables", "figures", "notes")
    ]
    assert resumed["seconds"] > spent + 1000 > whole["seconds"]


def test_another_model_in_the_same_folder_is_refused(experiment: Experiment, real_dir: Path) -> None:
    experiment("figure5")
    other = {
        "model": str(real_dir / "models" / "stories260K"),
        "preferences": str(real_dir / "pairs" / "refusal_direction.jsonl"),
    }
    with pytest.raises(UserError, match=r"holds another run \(run.(evaluate.judge|model|preferences)"):
        experiment("figure5", settings=other)


def test_a_refused_configuration_does_not_claim_the_folder(experiment: Experiment, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="beta"):
        experiment("figure5", tmp_path, settings={"train": {"beta": -1.0}})
    with pytest.raises(UserError, match="judge"):
        experiment("figure5", tmp_path, settings={"evaluate": {"judge": "nobody"}})
    assert not list(tmp_path.rglob("settings.json"))
    assert not list(tmp_path.rglob("run.json"))


def test_every_experiment_is_listed_with_its_question(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment", "list"]) == 0
    shown = capsys.readouterr().out
    for name in experiment_names():
        assert describe(name).endswith("?")
        assert name in shown
    assert {"table1", "figure5", "figure6", "figure7", "ablation", "objectives"} <= set(experiment_names())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tabel1"], "experiment 'tabel1': there is none of this name; there are"),
        (["ablation", "--option", "alhpa=1"], "options.alhpa: no such key; did you mean 'alpha'?"),
        (["table1", "--set", "train.betta=1"], "train.betta: no such key; did you mean 'beta'?"),
        (["table1", "--set", "nonsense"], "--set nonsense: expected KEY=VALUE"),
        (["ablation", "--option", "gate=hard"], "variants.gate-hard.fit.gate: expected one of"),
    ],
)
def test_mistakes_are_said_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["experiment", *arguments, "--scale", "tiny", "--output_dir", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not list(tmp_path.rglob("settings.json"))
