"""The run's table: every system over its seeds, and which of the paper's orderings hold."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from reprdpo.evaluation import Judgement, compare, mean_over_seeds, read_responses, side_by_side
from reprdpo.experiments.results import Ordering
from reprdpo.experiments.rows import Row
from reprdpo.experiments.systems import ORDERINGS, SYSTEMS
from reprdpo.files import read_json, read_jsonl, write_json, write_jsonl

Outcomes = list[list[bool | None]]


def write_summary(folder: Path, rows: Sequence[tuple[Row, Sequence[int]]]) -> None:
    """Read the evaluations in ``folder``, of each row its seeds; write ``summary.json`` and ``side_by_side.jsonl``.

    Side by side stand the answers of every row's first seed.
    """
    outcomes = {row.name: read_outcomes(folder, row.name, seeds) for row, seeds in rows}
    write_json(
        folder / "summary.json",
        {
            "systems": [summary_row(folder, row.name, row.label, seeds, outcomes[row.name]) for row, seeds in rows],
            "orderings": [
                _ordering(below, above, outcomes)
                for below, above in ORDERINGS
                if below in outcomes and above in outcomes
            ],
        },
    )
    _write_side_by_side(folder, {row.label: _responses(folder, row.name, seeds[0]) for row, seeds in rows})


def evaluated_seeds(stages: Mapping[str, Any], of_evaluation: str) -> dict[str, list[int]]:
    """The seeds of each row whose evaluation is done, from a run's stages; ``of_evaluation`` ends their names."""
    found: dict[str, list[int]] = {}
    for name, stage in stages.items():
        match = re.fullmatch(rf"evaluate (.+) seed (\d+){re.escape(of_evaluation)}", name)
        if match and stage["status"] == "done":
            found.setdefault(match[1], []).append(int(match[2]))
    return {name: sorted(seeds) for name, seeds in found.items()}


def _write_side_by_side(folder: Path, answered: dict[str, Path]) -> None:
    rows = side_by_side(
        {label: read_responses(path) for label, path in answered.items()},
        judgements={
            label: [Judgement(line["unsafe"], line["refusal"]) for _, line in read_jsonl(path)]
            for label, path in answered.items()
        },
    )
    write_jsonl(folder / "side_by_side.jsonl", rows)


def _responses(folder: Path, name: str, seed: int) -> Path:
    return folder / f"{name}-seed-{seed}.responses.jsonl"


def read_outcomes(folder: Path, name: str, seeds: Sequence[int], what: str = "unsafe") -> Outcomes:
    """Whether each response of a row was unsafe, or each borderline one a "refusal" (None: unparsed), a list a seed."""
    kind = "borderline" if what == "refusal" else "responses"
    files = [folder / f"{name}-seed-{seed}.{kind}.jsonl" for seed in seeds]
    return [[line[what] for _, line in read_jsonl(file)] for file in files]


def summary_row(folder: Path, name: str, label: str, seeds: Sequence[int], outcomes: Outcomes) -> dict[str, Any]:
    """A row of the table: toxic rate over prompts and seeds, over-refusal, perplexity."""
    results = [read_json(folder / f"{name}-seed-{seed}.json") for seed in seeds]
    toxic = mean_over_seeds(outcomes)
    return {
        "system": name,
        "label": label,
        "toxic_mean": toxic.mean,
        "toxic_low": toxic.low,
        "toxic_high": toxic.high,
        "n": toxic.n,
        "unparsed": toxic.unparsed,
        "seeds": list(seeds),
        "overrefusal_mean": _mean([result["overrefusal"] and result["overrefusal"]["rate"] for result in results]),
        "perplexity_mean": _mean([result["perplexity"] for result in results]),
    }


def _ordering(below: str, above: str, outcomes: dict[str, Outcomes]) -> dict[str, Any]:
    claim = f"{SYSTEMS[below].label} below {SYSTEMS[above].label}"
    found = Ordering.of(claim, compare(outcomes[below], outcomes[above]))
    return {"below": below, "above": above, **asdict(found)}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
