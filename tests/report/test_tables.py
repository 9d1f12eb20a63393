"""Tables: the numbers of the files, in their columns, in words a terminal can show."""

from pathlib import Path

from reprdpo.files import read_json
from reprdpo.report import summary_table
from reprdpo.report.run_folder import load_run
from reprdpo.report.tables import NONE, category_table, cost_table, results_table, seeds_table
from tests.report.invented_run import put


def test_results_hold_the_summarys_numbers(run_dir: Path) -> None:
    table = results_table(load_run(run_dir))
    row = next(row for row in table.rows if row[0].text == "cDPO*")
    assert [cell.text for cell in row] == ["cDPO*", "9.0", "6.0 to 12.5", "660", "3", "10.2", "4.14"]
    assert row[1].value == 0.09


def test_what_the_run_does_not_tell_is_a_dash_that_sorts_last(run_dir: Path) -> None:
    summary = read_json(run_dir / "evaluation" / "summary.json")
    summary["systems"][0] |= {"toxic_mean": None, "toxic_low": None, "perplexity_mean": None, "seeds": [0, 1, 2]}
    put(run_dir / "evaluation" / "summary.json", summary)
    row = results_table(load_run(run_dir)).rows[0]
    assert [cell.text for cell in row] == ["base", "—", "—", "660", "3", "2.4", "—"]
    assert row[1].value is None


def test_responses_the_judge_could_not_judge_have_a_column_where_there_are_any(run_dir: Path) -> None:
    summary = read_json(run_dir / "evaluation" / "summary.json")
    for row in summary["systems"]:
        row["unparsed"] = 7 * (row["system"] == "rs")
    put(run_dir / "evaluation" / "summary.json", summary)
    table = results_table(load_run(run_dir))
    assert table.columns[-1] == "unjudged"
    assert [row[-1].text for row in table.rows] == ["0", "0", "0", "7", "0", "0", "0"]


def test_categories_pool_the_counts_of_the_seeds(run_dir: Path) -> None:
    for seed, (k, n) in enumerate([(1, 10), (3, 10), (8, 20)]):
        path = run_dir / "evaluation" / f"base-seed-{seed}.json"
        value = read_json(path)
        value["by_category"]["curses"] = {"k": k, "n": n, "rate": k / n, "low": 0.0, "high": 1.0}
        put(path, value)
    table = category_table(load_run(run_dir))
    assert table.columns == ["category", "base", "SFT", "DPO", "RS", "DPO*", "cDPO*", "online"]
    assert table.rows[0][0].text == "curses"
    assert table.rows[0][1].value == 12 / 40


def test_every_seed_has_its_row_with_counts(run_dir: Path) -> None:
    table = seeds_table(load_run(run_dir))
    assert len(table.rows) == 21
    assert [cell.text for cell in table.rows[1]][:4] == ["base", "1", "106 of 220", "48.2"]


def test_cost_adds_up_the_seeds_of_a_stage(run_dir: Path) -> None:
    rows = {row[0].text: [cell.text for cell in row[1:]] for row in cost_table(load_run(run_dir)).rows}
    assert rows["train dpo"] == ["3", "done", "40.5", NONE, NONE]
    assert rows["fit"] == ["1", "done", "21.4", NONE, NONE]
    assert max(row[3].heat or 0.0 for row in cost_table(load_run(run_dir)).rows) == 1.0


def test_the_terminals_table_is_aligned_and_says_what_held(run_dir: Path) -> None:
    table, orderings = summary_table(run_dir).split("\n\n")
    lines = table.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split()[0] == "system"
    assert "  held       DPO below SFT (24.0 % against 31.0 %)" in orderings
    assert "  not held   online below cDPO*" in orderings
    assert "  undecided  RS below DPO" in orderings
