"""A run's page: what is there is read, what is not is named with its cure, what is broken is a one-line error."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from reprdpo.errors import UserError
from reprdpo.evaluation.judges import KeywordRefusalJudge, XSTestStringMatchJudge
from reprdpo.files import read_json, write_json
from reprdpo.report import render, summary_table
from reprdpo.report.content import Figure, Orderings, Page, Sample, Table
from reprdpo.report.run_page import run_page
from reprdpo.report.words import REFUSAL_PROXIES, detail_words, main_words
from tests.report.invented_run import HOSTILE, put, put_lines

FIGURES = [
    "toxic-rate",
    "probe-accuracy",
    "calibration",
    "confidence-held-out",
    "reward-trends-rewards",
    "reward-trends-hybrid",
    "reward-accuracies",
    "loss",
    "loss-sft",
    "confidence",
]


def figure(page: Page, name: str) -> Figure:
    return next(figure for figure in page.figures() if figure.name == name)


def table(page: Page, name: str) -> Table:
    return next(block for block in page.blocks() if isinstance(block, Table) and block.name == name)


def words(table: Table, row: int) -> list[str]:
    kinds = [column.kind for column in table.columns]
    cells = zip(table.rows[row], kinds, strict=True)
    return [f"{main_words(cell, kind)} {detail_words(cell, kind)}".strip() for cell, kind in cells]


def samples(page: Page) -> list[Sample]:
    return [block for block in page.blocks() if isinstance(block, Sample)]


def change(path: Path, **fields: Any) -> None:
    put(path, read_json(path) | fields)


def test_a_finished_run_has_every_figure_and_lacks_nothing(run_dir: Path) -> None:
    page = run_page(run_dir)
    assert [figure.name for figure in page.figures()] == FIGURES
    assert page.missing == []
    assert page.made == "reprdpo run invented.yaml · commit not known"
    tiles = [big for big, _ in page.tiles]
    assert tiles == ["48.0 %", "9.0 %", "92.1 %", "3 of 5", "6 min 11 s"]


def test_the_table_holds_the_summarys_numbers_with_n_and_interval(run_dir: Path) -> None:
    systems = table(run_page(run_dir), "systems")
    assert [row[0].value for row in systems.rows] == ["base", "SFT", "DPO", "RS", "DPO*", "cDPO*", "online"]
    assert words(systems, 5) == ["cDPO*", "9.0 % 6.0 to 12.5, n 660", "3", "10.2 % n 300", "4.137"]


def test_what_the_run_does_not_tell_is_a_dash_and_what_was_not_judged_is_counted(run_dir: Path) -> None:
    path = run_dir / "evaluation" / "summary.json"
    summary = read_json(path)
    missing = {"toxic_mean": None, "toxic_low": None, "perplexity_mean": None, "seeds": [0, 1, 2], "unparsed": 7}
    summary["systems"][0] |= missing
    put(path, summary)
    systems = table(run_page(run_dir), "systems")
    assert words(systems, 0) == ["base", "— n 660, 7 unjudged", "3", "2.4 % n 300", "—"]


def test_categories_pool_the_counts_of_the_seeds(run_dir: Path) -> None:
    for seed, (k, n) in enumerate([(1, 10), (3, 10), (8, 20)]):
        path = run_dir / "evaluation" / f"base-seed-{seed}.json"
        categories = read_json(path)["by_category"]
        change(path, by_category=categories | {"curses": {"k": k, "n": n, "rate": k / n, "low": 0.0, "high": 1.0}})
    found = table(run_page(run_dir), "categories")
    assert [column.label for column in found.columns][:3] == ["category", "base", "SFT"]
    assert words(found, 0)[:2] == ["curses", "30.0 % n 40"]


def test_every_seed_has_its_row_and_a_stages_seeds_are_added_up(run_dir: Path) -> None:
    page = run_page(run_dir)
    assert len(table(page, "seeds").rows) == 21
    assert words(table(page, "seeds"), 1)[:3] == ["base", "1", "48.2 % 43.2 to 53.2, n 220"]
    costs = [words(table(page, "cost"), row) for row in range(len(table(page, "cost").rows))]
    assert ["train dpo", "3", "done", "40.5", "—", "—"] in costs
    assert ["fit", "1", "done", "21.4", "—", "—"] in costs


def test_samples_show_each_category_before_a_second_of_any(run_dir: Path) -> None:
    found = samples(run_page(run_dir))
    assert len(found) == 12
    assert len({sample.category for sample in found[:6]}) == 6
    before, after = found[0].replies
    assert (before.who, before.text) == ("base", f"{HOSTILE} said base")
    assert [reply.verdict for reply in found[1].replies] == ["unsafe", "safe, refusal"]
    assert after.who == "cDPO*"


def test_chat_prompts_become_text(run_dir: Path) -> None:
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello?"}]
    for system in ("base", "reprdpo"):
        line = {"prompt": chat, "response": "Good day.", "unsafe": None, "refusal": None}
        put_lines(run_dir / "evaluation" / f"{system}-seed-0.responses.jsonl", [line])
    (sample,) = samples(run_page(run_dir))
    assert sample.prompt == "system: Be kind.\nuser: Hello?"
    assert sample.replies[0].verdict == ""


def test_curves_start_as_logged_over_the_steps_that_all_seeds_have(run_dir: Path) -> None:
    for seed in range(3):
        steps = range(1, 121 if seed < 2 else 81)
        log = [{"step": s, "loss": math.log(2) if s == 1 else 0.5 + seed, "rewards/chosen": 0.0} for s in steps]
        put_lines(run_dir / "systems" / "dpo" / f"seed-{seed}" / "metrics.jsonl", log)
    dpo = next(series for series in figure(run_page(run_dir), "loss").series if series.label == "DPO")
    assert dpo.x == list(range(1, 81))
    assert dpo.low
    assert dpo.high
    assert (dpo.low[0], dpo.y[0], dpo.high[0]) == pytest.approx([math.log(2)] * 3)
    assert (dpo.low[40], dpo.y[40], dpo.high[40]) == pytest.approx([0.5, 1.5, 2.5])


def test_a_step_logged_twice_keeps_the_later_value_and_a_torn_line_is_passed_over(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "systems")
    log = run_dir / "systems" / "dpo" / "metrics.jsonl"
    put_lines(log, [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 2, "loss": 3.0, "epoch": None}])
    with log.open("a") as file:
        file.write('{"step": 3, "lo')
    (series,) = figure(run_page(run_dir), "loss-sft").series
    assert (series.x, series.y, series.low) == ([1, 2], [1.0, 3.0], None)


def test_a_fixed_confidence_draws_no_histogram(run_dir: Path) -> None:
    alone = [0] * 19 + [256]
    value = {"edges": [i / 20 for i in range(21)], "initial": alone, "final": alone}
    put(run_dir / "systems" / "dpo" / "seed-0" / "confidence_histogram.json", value)
    confidence = figure(run_page(run_dir), "confidence")
    assert {series.group for series in confidence.series} == {"cDPO*"}
    assert sum(y or 0.0 for y in confidence.series[0].y) == pytest.approx(100)


def test_an_empty_bin_of_the_calibration_is_left_out(run_dir: Path) -> None:
    assert [len(series.y) for series in figure(run_page(run_dir), "calibration").series] == [9, 9]


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
    *absent, cure = run_page(run_dir).missing
    assert [sentence.split(",")[0] for sentence in absent] == words
    assert cure.startswith("To go on where it stopped" if part == "evaluation" else "All its stages are done")


def test_absent_systems_are_named_and_an_unfinished_run_with_its_command(run_dir: Path) -> None:
    state, summary = read_json(run_dir / "run.json"), read_json(run_dir / "evaluation" / "summary.json")
    state["stages"]["fit"]["status"] = "stopped"
    put(run_dir / "run.json", state)
    systems = [row for row in summary["systems"] if row["system"] != "online"]
    change(run_dir / "evaluation" / "summary.json", systems=systems)
    assert run_page(run_dir).missing == [
        "Systems of the paper's table that are not in this run: online.",
        "Not finished: fit.",
        "To go on where it stopped: reprdpo run invented.yaml",
    ]


def test_a_run_that_has_only_begun_still_makes_a_page(run_dir: Path) -> None:
    for part in ("fit", "systems", "evaluation"):
        shutil.rmtree(run_dir / part)
    html = render(run_dir).read_text(encoding="utf-8")
    for what in ("Probe accuracy", "Training curves", "Table of toxic rates", "Samples before and after"):
        assert what in html
    assert "<svg" not in html
    assert [path.name for path in (run_dir / "report").iterdir()] == ["index.html"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("run.json", "{", r"run\.json: is not JSON"),
        ("run.json", "[]", r"run\.json: holds something other than expected"),
        ("run.json", '{"stages": {"fit": {}}}', r"run\.json: field 'status' is missing"),
        ("fit/report.json", "{}", r"report\.json: field 'layer_accuracy' is missing"),
        ("fit/report.json", '{"layer_accuracy": [0.5]}', r"report\.json: field 'gated_accuracy' is missing"),
        ("fit/report.json", '{"layer_accuracy": ["high"]}', r"report\.json: holds something other"),
        ("evaluation/summary.json", '{"systems": [{}]}', r"summary\.json: field 'system' is missing"),
        ("evaluation/dpo-seed-0.json", '{"system": "dpo", "seed": 0}', r"dpo-seed-0\.json: field 'toxic' is missing"),
        ("evaluation/base-seed-0.responses.jsonl", "{}\n", r"responses\.jsonl, line 1: field 'response' is missing"),
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
        run_page(run_dir)
    assert "\n" not in str(caught.value)


def test_the_terminals_table_is_aligned_and_says_what_held(run_dir: Path) -> None:
    systems, orderings = summary_table(run_dir).split("\n\n")
    title, *lines = systems.splitlines()
    assert title == "Every system, judged by sandbox"
    assert len({len(line) for line in lines}) == 1
    assert "  held       DPO below SFT (24.0 % against 31.0 %)" in orderings
    assert "  not held   online below cDPO*" in orderings
    assert "  undecided  RS below DPO" in orderings


def test_a_judge_whose_verdict_is_a_proxy_is_said_to_be_one(run_dir: Path) -> None:
    proxies = {judge.name for judge in (KeywordRefusalJudge, XSTestStringMatchJudge)}
    assert proxies == set(REFUSAL_PROXIES)
    for path in (run_dir / "evaluation").glob("*-seed-*.json"):
        write_json(path, read_json(path) | {"judge": "keyword-refusal"})
    title = "Every system, judged by keyword-refusal (a proxy: unsafe is what is not refused)"
    assert summary_table(run_dir).splitlines()[0] == title


def test_orderings_come_with_their_test(run_dir: Path) -> None:
    (orderings,) = (block for block in run_page(run_dir).blocks() if isinstance(block, Orderings))
    assert [row.held for row in orderings.rows] == [True, True, True, False, None]


def evaluate_again(run_dir: Path, **settings: Any) -> None:
    """Another evaluation of the run, whose folder is a copy of the first."""
    path = run_dir / "run.json"
    first = {"settings": {"judge": "sandbox", "limit": 220, "prompts": None}, "inputs": {}}
    found = read_json(path).get("evaluations", {"evaluation": first})
    name = f"evaluation-{len(found) + 1}"
    change(path, evaluations=found | {name: {**first, "settings": first["settings"] | settings}})
    shutil.copytree(run_dir / "evaluation", run_dir / name)
    for path in (run_dir / name).glob("*.json"):
        if "judge" in read_json(path):
            change(path, judge=settings.get("judge", "sandbox"))


def test_every_evaluation_of_a_run_has_its_results(run_dir: Path) -> None:
    evaluate_again(run_dir, judge="llama-guard-2:guard")
    evaluate_again(run_dir, judge="llama-guard-2:guard", prompts="xstest.csv?label=unsafe")
    for row, rate in (("evaluation-2", 0.51), ("evaluation-3", 0.52)):
        path = run_dir / row / "summary.json"
        systems = read_json(path)["systems"]
        change(path, systems=[systems[0] | {"toxic_mean": rate}, *systems[1:]])
    page = run_page(run_dir)
    assert [section.name for section in page.sections[:4]] == ["results", "evaluation-2", "evaluation-3", "reward"]
    found = {name: table(page, f"systems{name}") for name in ("", "-evaluation-2", "-evaluation-3")}
    assert [systems.rows[0][1].value for systems in found.values()] == [0.48, 0.51, 0.52]
    assert [systems.title for systems in found.values()] == [
        "Every system (judge sandbox, prompts default)",
        "Every system (judge llama-guard-2:guard, prompts default)",
        "Every system (judge llama-guard-2:guard, prompts xstest.csv?label=unsafe)",
    ]
    assert page.lead == "Evaluated 3 times; tiles and samples are of the first: judge sandbox, prompts default."
    assert len({figure.name for figure in page.figures()}) == len(page.figures())
    shown = summary_table(run_dir)
    assert all(systems.title in shown for systems in found.values())
    assert 'href="#evaluation-3"' in render(run_dir).read_text()


def test_an_evaluation_that_is_not_there_is_named(run_dir: Path) -> None:
    evaluate_again(run_dir, judge="keyword-refusal")
    shutil.rmtree(run_dir / "evaluation-2")
    page = run_page(run_dir)
    assert [section.name for section in page.sections[:2]] == ["results", "reward"]
    judge = "judge keyword-refusal (a proxy: unsafe is what is not refused)"
    assert page.missing[0] == f"Results of {judge}: absent, as there is no evaluation-2/summary.json."
    assert page.title == "invented for a test"


def test_a_run_evaluated_once_needs_no_words_for_it(run_dir: Path) -> None:
    change(run_dir / "run.json", evaluations={"evaluation": {"settings": {"judge": "sandbox"}, "inputs": {}}})
    page = run_page(run_dir)
    assert page.lead == ""
    assert table(page, "systems").title == "Every system, judged by sandbox"
