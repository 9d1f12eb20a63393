"""What the README shows runs as it stands."""

import re
from pathlib import Path
from typing import Any

import torch
import yaml

from reprdpo.experiments.config import RunConfig, build
from reprdpo.files import read_json

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_example_of_an_op_runs() -> None:
    (example,) = blocks("python")
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    gradient = names["hidden_states"][-1].grad  # type: ignore[index]
    assert torch.isfinite(gradient).all()
    assert gradient.abs().sum() > 0


def test_the_example_of_a_run_is_valid() -> None:
    (example,) = blocks("yaml")
    config = build(RunConfig, yaml.safe_load(example))
    assert "reprdpo" in config.systems


def result(experiment: str) -> dict[str, Any]:
    found: dict[str, Any] = read_json(ROOT / "docs" / "results" / experiment / "result.json")
    return found


def test_the_sandbox_table_is_table_1_of_the_committed_results() -> None:
    def row(found: dict[str, Any]) -> str:
        toxic, refused = found["toxic"], found["overrefusal"]["value"]
        shares = [f"{100 * share:.1f}" for share in (toxic["value"], toxic["low"], toxic["high"], refused)]
        return "| {} | {} | {} to {} | {} | {:.2f} |".format(found["system"], *shares, found["perplexity"])

    head = "| system | toxic rate, % | 95 % interval | over-refusal, % | perplexity |\n|---|---|---|---|---|\n"
    rows = result("table1")["tables"][0]["rows"]
    assert head + "\n".join(map(row, rows)) + "\n\n" in README
    assert {row["toxic"]["n"] for row in rows} == {220}


def test_the_sandbox_reading_is_that_of_the_committed_results() -> None:
    held = {ordering["claim"]: ordering for ordering in result("table1")["orderings"]}
    best = held["cDPO* (ours) below RS (best of N)"]
    points, low, high = (f"{100 * best[key]:.1f}" for key in ("difference", "low", "high"))
    text = " ".join(README.split())
    assert f"against the paper's ordering (by {points} points, 95 % interval {low} to {high})" in text
    below = {"SFT below Base", "DPO below SFT", "RS (best of N) below SFT"}
    assert all(held[claim]["held"] is (True if claim in below else None) for claim in held.keys() - {best["claim"]})
    (share,) = (row["value"] for row in result("figure7")["tables"][0]["rows"] if row["what"].startswith("Share of"))
    assert f"The reward took {100 * share:.1f} % of training's time." in text
