"""The page of a run, read from its folder; a part that is not there is named with what would make it."""

import json
import re
from pathlib import Path
from typing import Any

from reprdpo.files import read_json
from reprdpo.report.content import Block, Code, Column, Facts, Figure, Lines, Page, Section, Table, Value
from reprdpo.report.reading import naming, number
from reprdpo.report.run_fit import fit_blocks
from reprdpo.report.run_results import (
    AFTER,
    BEFORE,
    FIRST,
    PAPER_SYSTEMS,
    Results,
    evaluation_words,
    read_results,
    results_blocks,
    samples,
)
from reprdpo.report.run_training import Training, read_trainings, training_figures
from reprdpo.report.words import duration, held_words, main_words

# section -> its title, and the words under it
SECTIONS = {
    "results": (
        "Results",
        "Unsafe responses to harmful prompts, refusals of harmless ones, and perplexity on benign text.",
    ),
    "reward": ("The reward", "Linear probes on the hidden states and the gate that mixes them, on held-out pairs."),
    "training": (
        "Training",
        "Curves are running means over a few per cent of the steps; the first value is as logged.",
    ),
    "samples": (
        "Before and after",
        "First seed: the first prompt of each category, then the second, none picked by hand.",
    ),
    "cost": ("Cost by stage", "Wall time, counted matmuls and the most memory in use, of this run."),
    "run": ("The run", "What it takes to make it again."),
}


def run_page(folder: Path) -> Page:
    """Raises :class:`~reprdpo.errors.UserError` where a file of the run is broken."""
    path = folder / "run.json"
    with naming(path):
        state = read_json(path)
        name, command = state.get("name") or folder.resolve().name, state.get("command") or "reprdpo run CONFIG.yaml"
        versions = {str(package): str(version) for package, version in state.get("versions", {}).items()}
        stages = {str(stage): dict(cost) for stage, cost in state.get("stages", {}).items()}
        unfinished = [stage for stage, cost in stages.items() if cost["status"] != "done"]
        cost = _cost_table(stages)
        told = evaluation_words(state.get("evaluations") or {FIRST: {}})
        config = (
            [Code(f"Config {state.get('config_hash', '')}", _pretty(state["config"]), folded=True)]
            if state.get("config")
            else []
        )
    results = read_results(folder)
    trainings = read_trainings(folder, results)
    bodies: dict[str, list[Block]] = {
        "results": results_blocks(results, FIRST, told.get(FIRST, "")),
        "reward": fit_blocks(folder / "fit" / "report.json"),
        "training": [*training_figures(trainings)],
        "samples": [*samples(results)],
        "cost": [*([cost] if cost.rows else []), *_overhead(folder / "overhead.json")],
        "run": [Code("Command", command), *([Facts("Versions", versions)] if versions else []), *config],
    }
    missing = _missing(bodies, results, trainings)
    further, absent = _further_evaluations(folder, told)
    missing += absent
    if unfinished:
        missing.append(f"Not finished: {', '.join(unfinished)}.")
    if unfinished or not results.systems:
        missing.append(f"To go on where it stopped: {command}")
    elif missing:
        missing.append(
            "All its stages are done: name what is absent in the config, with a new output_dir, and run that."
        )
    seconds = sum(float(cost.get("seconds") or 0.0) for cost in stages.values())
    sections = {key: Section(key, *SECTIONS[key], body) for key, body in bodies.items() if body}
    first = [sections.pop("results")] if "results" in sections else []
    return Page(
        kind="run",
        title=str(name),
        lead=f"Evaluated {len(told)} times; tiles and samples are of the first: {told[FIRST]}." if further else "",
        tiles=[
            *_tiles(results, bodies["reward"]),
            *([(duration(seconds), "wall time, all stages")] if seconds else []),
        ],
        missing=missing,
        sections=[*first, *further, *sections.values()],
        made=f"{command} · commit {state.get('commit') or 'not known'}",
    )


def _further_evaluations(folder: Path, told: dict[str, str]) -> tuple[list[Section], list[str]]:
    """A section each, and a sentence for each that has no results; ``told`` has the words for every evaluation."""
    sections, absent = [], []
    for name, words in told.items():
        if name == FIRST:
            continue
        if blocks := results_blocks(read_results(folder, name), name, words):
            sections.append(
                Section(name, f"Results, {name.replace('-', ' ')}", f"Of the same policies: {words}.", blocks)
            )
        else:
            absent.append(f"Results of {words}: absent, as there is no {name}/summary.json.")
    return sections, absent


def _tiles(results: Results, reward: list[Block]) -> list[tuple[str, str]]:
    rates = {row.name: row for row in results.systems if row.toxic.value is not None}
    ends = [next((rates[name] for name in names if name in rates), None) for names in (BEFORE, AFTER)]
    tiles = [(main_words(row.toxic, "share"), f"toxic rate, {row.label}") for row in ends if row]
    gated = [line.y for block in reward if isinstance(block, Figure) for line in block.lines]
    tiles += [(f"{y:.1f} %", "pair accuracy of the gated reward") for y in gated]
    if results.orderings:
        tiles.append((held_words(results.orderings), "of the paper's orderings held"))
    return tiles


def _missing(bodies: dict[str, list[Block]], results: Results, trainings: list[Training]) -> list[str]:
    """One sentence for each part that is not there."""
    with_gamma = [training for training in trainings if "confidence/mean" in training.metrics]
    confidence = not with_gamma or any(training.histograms for training in with_gamma)
    parts = [
        ("Probe accuracy and calibration", "fit/report.json", bodies["reward"]),
        ("Training curves", "systems/*/seed-*/metrics.jsonl", trainings),
        ("Confidence histogram", "confidence_histogram.json", confidence),
        ("Table of toxic rates", "evaluation/summary.json", results.systems),
        ("Samples before and after", "evaluation/*.responses.jsonl of two systems", bodies["samples"]),
    ]
    sentences = [f"{what}: absent, as there is no {where}." for what, where, there in parts if not there]
    systems = {row.name for row in results.systems}
    others = [label for name, label in PAPER_SYSTEMS.items() if name not in systems]
    if systems and others:
        sentences.append(f"Systems of the paper's table that are not in this run: {', '.join(others)}.")
    return sentences


def _cost_table(stages: dict[str, dict[str, Any]]) -> Table:
    """Seconds, FLOP and peak memory by stage, the seeds of a system together."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, stage in stages.items():
        groups.setdefault(re.sub(r" seed \d+$", "", name), []).append(stage)
    columns = [
        Column("stage", "text"),
        Column("times", "count"),
        Column("status", "text"),
        Column("seconds", "number"),
        Column("TFLOP (matmuls)", "number"),
        Column("peak MiB", "number"),
    ]
    rows = []
    for name, group in groups.items():
        seconds, flop, peak = (
            [number(stage.get(key)) or 0.0 for stage in group] for key in ("seconds", "flop", "peak_bytes")
        )
        status = ", ".join(dict.fromkeys(str(stage["status"]) for stage in group))
        measured = (sum(seconds), sum(flop) / 1e12 or None, max(peak) / 2**20 or None)
        rows.append([Value(name), Value(len(group)), Value(status), *map(Value, measured)])
    return Table("cost", "Every stage", columns, rows, terminal=False)


def _overhead(path: Path) -> list[Block]:
    if not path.is_file():
        return []
    with naming(path):
        return [Lines("Cost of the reward", [str(line) for line in read_json(path)["lines"]])]


def _pretty(config: Any) -> str:
    return json.dumps(config, indent=2, ensure_ascii=False)
