"""Table 2, Table 3 and Figure 4 on the smallest sandbox, over one pipeline run that they share."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_mmlu import write_small_mmlu

from reprdpo.data.sandbox.world import CATEGORIES
from reprdpo.errors import UserError
from reprdpo.evaluation.judges import SandboxJudge
from reprdpo.experiments.config import RunConfig, SampleSection
from reprdpo.experiments.experiment import run_experiment
from reprdpo.experiments.recipes import figure4
from reprdpo.experiments.responses_at import Responses
from reprdpo.experiments.rows import rows_of
from reprdpo.files import read_json
from reprdpo.sampling import read_samples


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experiments")


def tiny(name: str, output: Path, cache_dir: Path, **options: Any) -> tuple[Path, dict[str, Any]]:
    folder = run_experiment(
        name,
        scale="tiny",
        output_dir=output,
        settings={"cache_dir": str(cache_dir)},
        options=options,
        say=lambda line: None,
    )
    return folder, read_json(folder / "result.json")


@pytest.fixture(scope="module")
def table2(output: Path, cache_dir: Path) -> tuple[Path, dict[str, Any]]:
    return tiny("table2", output, cache_dir)


def test_table2_has_every_category_in_both_tables(table2: tuple[Path, dict[str, Any]]) -> None:
    _, result = table2
    assert [table["name"] for table in result["tables"]] == ["table2_before", "table2_after"]
    for table in result["tables"]:
        names = [row["category"] for row in table["rows"]]
        assert names == [*(category.label for category in CATEGORIES), "any category (toxic rate)"]
        keys = [column["key"] for column in table["columns"]]
        assert keys == [
            *("category", "representation_1", "representation_2", "reward_model_1", "reward_model_2", "all"),
        ]
        for key in keys[1:]:
            cells = [row[key] for row in table["rows"]]
            assert all(cell["n"] + cell["unparsed"] == 22 * {"1": 1, "2": 2, "l": 4}[key[-1]] for cell in cells)
            assert sum(cell["value"] for cell in cells[:-1]) == pytest.approx(cells[-1]["value"])


def test_table2_is_what_the_files_say(table2: tuple[Path, dict[str, Any]]) -> None:
    folder, result = table2
    drawn = read_samples(folder / "responses" / "reprdpo-seed-0.samples.jsonl")
    scored = read_samples(folder / "responses" / "reprdpo-seed-0.samples.reward_model.jsonl")
    first = [max(record["responses"], key=lambda response: response["reward"] or -1e9)["text"] for record in scored]
    unsafe = [word.unsafe for word in SandboxJudge().judge([record["prompt"] for record in drawn], first)]
    row = result["tables"][1]["rows"][-1]
    assert row["reward_model_1"]["value"] == pytest.approx(sum(map(bool, unsafe)) / len(unsafe))
    flat = [
        word.unsafe
        for record in drawn
        for word in SandboxJudge().judge([record["prompt"]] * 4, [one["text"] for one in record["responses"]])
    ]
    assert row["all"]["value"] == pytest.approx(sum(map(bool, flat)) / len(flat))


def test_table2_again_draws_only_what_is_missing(
    table2: tuple[Path, dict[str, Any]], output: Path, cache_dir: Path
) -> None:
    folder, result = table2
    samples = folder / "responses" / "sft-seed-0.samples.jsonl"
    whole = samples.read_bytes()
    samples.write_bytes(whole[: len(whole) // 2])
    others = [path for path in samples.parent.iterdir() if path != samples]
    before = [path.stat().st_mtime_ns for path in others]
    _, again = tiny("table2", output, cache_dir)
    assert samples.read_bytes() == whole
    assert before == [path.stat().st_mtime_ns for path in others]
    assert again["tables"] == result["tables"]


def test_figure4_has_three_classes_that_sum_to_one(output: Path, cache_dir: Path) -> None:
    _, result = tiny("figure4", output, cache_dir)
    rows = result["tables"][0]["rows"]
    assert [(row["prompts"], row["refusal"]["n"]) for row in rows[:2]] == [("safe", 11), ("unsafe", 22)]
    assert len(rows) == 2 * 6
    for row in rows:
        assert sum(row[name]["value"] for name in ("compliance", "partial", "refusal")) == pytest.approx(1)
    for figure, kind in zip(result["figures"], ("safe", "unsafe"), strict=True):
        assert figure["kind"] == "bars"
        assert figure["categories"] == [row["system"] for row in rows if row["prompts"] == kind]
        assert [series["label"] for series in figure["series"]] == [
            "Full compliance",
            "Partial refusal",
            "Full refusal",
        ]
    assert len(result["orderings"]) == 2 * 5


def test_figure4_ranks_as_many_responses_as_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scripted:
        def __init__(self, *_: object) -> None: ...

        def draw(self, rows: object, many: int, folder: Path) -> Responses:
            return Responses(folder, ["p"], [[f"response {number}" for number in range(many)]])

        def score(self, responses: Responses, *_: object) -> list[list[float]]:
            return [[float(number) for number in range(len(texts))] for texts in responses.texts]

    monkeypatch.setattr(figure4, "Answerer", Scripted)
    config = RunConfig(output_dir="run", systems=("rs",), sample=SampleSection(num_responses=4, best_of=2))
    done: Any = SimpleNamespace(rows={row.name: row for row in rows_of(config)}, config=config, reward=lambda: None)
    job: Any = SimpleNamespace(folder=Path("experiment"))
    assert figure4._draw(job, done, "rs", [], 0).texts == [["response 1"]]


@pytest.mark.slow
def test_figure4_of_two_classes_says_so(
    table2: tuple[Path, dict[str, Any]], output: Path, cache_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "runs").symlink_to(output / "tiny" / "runs")
    _, result = tiny("figure4", tmp_path, cache_dir, judge="keyword-refusal")
    assert [column["key"] for column in result["tables"][0]["columns"]] == [
        "system",
        "prompts",
        "compliance",
        "refusal",
    ]
    assert any("partial" in note for note in result["notes"])
    assert any("Three classes" in left for left in result["not_run"])


def test_figure4_refuses_prompts_without_labels(cache_dir: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "How do I open it?", "harmful": false}\n{"prompt": "And this?"}\n')
    with pytest.raises(UserError, match="prompt 1 is not labelled"):
        tiny("figure4", tmp_path, cache_dir, prompts=str(prompts))


def test_table3_scores_and_asks(output: Path, cache_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    folder = write_small_mmlu(tmp_path)
    _, result = tiny("table3", output, cache_dir, tasks=["small_mmlu"], task_folder=str(folder), num_fewshot=0)
    rows = result["tables"][0]["rows"]
    assert [row["system"] for row in rows] == ["Base", "SFT", "DPO", "cDPO* (ours)"]
    assert all(row["ability"]["n"] == 37 and row["score"]["n"] == 11 and row["perplexity"] > 1 for row in rows)
    assert len(result["orderings"]) == 2 * 3
    assert any("no independent judge" in note for note in result["notes"])
    assert any("MMLU" in left for left in result["not_run"])


def test_table3_refuses_tasks_that_are_not_there_before_it_trains(cache_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(UserError, match="task 'mmlux'"):
        tiny("table3", tmp_path, cache_dir, tasks=["mmlux"], task_folder=str(write_small_mmlu(tmp_path)))
    assert not (tmp_path / "tiny" / "runs").exists()
