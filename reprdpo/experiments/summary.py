"""The run's table: every system over its seeds, and which of the paper's orderings hold."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from reprdpo.evaluation import Judgement, compare, mean_over_seeds, read_responses, side_by_side
from reprdpo.experiments.systems import ORDERINGS, SYSTEMS, System
from reprdpo.files import read_json, read_jsonl, write_json, write_text

Outcomes = list[list[bool | None]]


def write_summary(folder: Path, systems: Sequence[System], seeds: Sequence[int]) -> None:
    """Read every evaluation in ``folder``; write ``summary.json``, and the first seed in ``side_by_side.jsonl``."""
    outcomes = {system.name: _outcomes(folder, system, seeds) for system in systems}
    write_json(
        folder / "summary.json",
        {
            "systems": [_row(folder, system, seeds, outcomes[system.name]) for system in systems],
            "orderings": [
                _ordering(below, above, outcomes)
                for below, above in ORDERINGS
                if below in outcomes and above in outcomes
            ],
        },
    )
    _write_side_by_side(folder, {system.label: _responses(folder, system, seeds[0]) for system in systems})


def _write_side_by_side(folder: Path, answered: dict[str, Path]) -> None:
    rows = side_by_side(
        {label: read_responses(path) for label, path in answered.items()},
        judgements={
            label: [Judgement(line["unsafe"], line["refusal"]) for _, line in read_jsonl(path)]
            for label, path in answered.items()
        },
    )
    write_text(folder / "side_by_side.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _responses(folder: Path, system: System, seed: int) -> Path:
    return folder / f"{system.name}-seed-{seed}.responses.jsonl"


def _outcomes(folder: Path, system: System, seeds: Sequence[int]) -> Outcomes:
    """Whether each response was unsafe, a row a seed."""
    return [[line["unsafe"] for _, line in read_jsonl(_responses(folder, system, seed))] for seed in seeds]


def _row(folder: Path, system: System, seeds: Sequence[int], outcomes: Outcomes) -> dict[str, Any]:
    results = [read_json(folder / f"{system.name}-seed-{seed}.json") for seed in seeds]
    toxic = mean_over_seeds(outcomes)
    return {
        "system": system.name,
        "label": system.label,
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
    found = compare(outcomes[below], outcomes[above])
    return {
        "claim": f"{SYSTEMS[below].label} below {SYSTEMS[above].label}",
        "below": below,
        "above": above,
        "held": {"held": True, "reversed": False}.get(found.verdict),
        "difference": found.difference,
        "low": found.low,
        "high": found.high,
        "p": found.p,
        "detail": found.describe().removeprefix(f"{found.verdict}: "),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
