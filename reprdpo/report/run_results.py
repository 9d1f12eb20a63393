"""A run's evaluation: rates by system, seed and category, the paper's orderings, answers side by side."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reprdpo.files import read_json, read_jsonl
from reprdpo.report.content import Block, Column, Figure, Ordering, Orderings, Reply, Sample, Series, Table, Value
from reprdpo.report.reading import integer, naming, number, ordering_of, value_of
from reprdpo.report.words import by_numbers, judge_said

# The systems of the paper's Table 1, in its order; a run may hold some of them, and others.
PAPER_SYSTEMS = {
    "base": "base",
    "sft": "SFT",
    "dpo": "DPO",
    "rs": "RS",
    "dpo_ranked": "DPO*",
    "reprdpo": "cDPO*",
    "online": "online",
}
# What is set side by side: the first of each that the run has.
BEFORE, AFTER = ("base", "sft"), ("reprdpo", "cdpo_fixed", "dpo_ranked", "dpo", "online")
MAX_SAMPLES = 12
FIRST = "evaluation"


@dataclass(frozen=True)
class System:
    """One system over its seeds."""

    name: str
    label: str
    toxic: Value
    seeds: int | None
    overrefusal: Value
    perplexity: float | None


@dataclass(frozen=True)
class Evaluation:
    """One seed of one system as the judge saw it; ``by_category`` holds (unsafe, judged)."""

    system: str
    seed: int
    judge: str
    toxic: Value
    by_category: dict[str, tuple[int, int]]
    overrefusal: Value
    perplexity: float | None
    responses: Path | None


@dataclass(frozen=True)
class Results:
    systems: list[System]
    orderings: list[Ordering]
    evaluations: list[Evaluation]

    def label(self, name: str) -> str:
        """The name of a system as the tables print it."""
        return next((row.label for row in self.systems if row.name == name), PAPER_SYSTEMS.get(name, name))


def read_results(run_dir: Path, name: str = FIRST) -> Results:
    """What there is in the folder ``name`` of an evaluation, in the order of the summary."""
    paths = (path for path in (run_dir / name).glob("*.json") if re.fullmatch(r".+-seed-\d+", path.stem))
    evaluations = [_read_evaluation(run_dir, path) for path in paths]
    systems, orderings = _read_summary(run_dir / name / "summary.json", evaluations)
    order = list(dict.fromkeys([*(row.name for row in systems), *PAPER_SYSTEMS]))
    return Results(systems, orderings, sorted(evaluations, key=lambda row: (*place(row.system, order), row.seed)))


def place(system: str, order: list[str]) -> tuple[int, str]:
    """A key that sorts systems as in ``order``, the others behind them by name."""
    return (order.index(system) if system in order else len(order), system)


def results_blocks(results: Results, name: str = FIRST, words: str = "") -> list[Block]:
    """The paper's Table 1 first; then a figure of it, the orderings, the categories, and every seed.

    ``words`` are what the evaluation ``name`` differs in from others on the page; with none it stands there alone.
    """
    blocks: list[Block] = []
    if results.systems:
        blocks.append(_systems_table(results, "" if words else _judges(results)))
    if known := [row for row in results.systems if row.toxic.value is not None]:
        blocks.append(_toxic_figure(known, results.evaluations))
    if results.orderings:
        blocks.append(Orderings("The paper's orderings", results.orderings))
    if any(row.by_category for row in results.evaluations):
        blocks.append(_category_table(results))
    if results.evaluations:
        blocks.append(_seeds_table(results))
    return _titled(blocks, name, words) if words else blocks


def evaluation_words(evaluations: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What tells a run's evaluations from each other: who judged, and every setting they differ in.

    ``evaluations`` are those of run.json, by their folder; there are no words where there is one alone.
    """
    if len(evaluations) < 2:
        return dict.fromkeys(evaluations, "")
    settings = {name: {"judge": None, **one["settings"]} for name, one in evaluations.items()}
    for each in settings.values():
        each["judge"] = each["judge"] and judge_said(each["judge"])
    keys = list(dict.fromkeys(key for each in settings.values() for key in each))
    told = [key for key in keys if key == "judge" or len({str(each.get(key)) for each in settings.values()}) > 1]
    return {
        name: ", ".join(f"{key} {'default' if each.get(key) is None else each[key]}" for key in told)
        for name, each in settings.items()
    }


def _titled(blocks: list[Block], name: str, words: str) -> list[Block]:
    def named(block: Block) -> Block:
        if isinstance(block, Sample):
            return block
        if isinstance(block, (Table, Figure)) and name != FIRST:
            block = replace(block, name=f"{block.name}-{name}")
        return replace(block, title=f"{block.title} ({words})")

    return list(map(named, blocks))


def samples(results: Results) -> list[Sample]:
    """The first prompt of each category, then the next ones, answered by the start and by the method."""
    answered = {
        row.system: row.responses for row in reversed(results.evaluations) if row.responses and row.responses.is_file()
    }
    compared = [next((name for name in names if name in answered), None) for names in (BEFORE, AFTER)]
    before, after = ((name, _read_responses(answered[name])) if name else ("", {}) for name in compared)
    nth: dict[str, int] = {}
    rank = {}
    for prompt in (prompt for prompt in before[1] if prompt in after[1]):
        category = before[1][prompt][0]
        rank[prompt] = nth[category] = nth.get(category, -1) + 1
    return [
        Sample(
            prompt,
            before[1][prompt][0],
            [Reply(results.label(name), *answers[prompt][1:]) for name, answers in (before, after)],
        )
        for prompt in sorted(rank, key=lambda prompt: rank[prompt])[:MAX_SAMPLES]
    ]


def _judges(results: Results) -> str:
    return ", ".join(dict.fromkeys(judge_said(row.judge) for row in results.evaluations if row.judge))


def _systems_table(results: Results, judges: str) -> Table:
    columns = [
        Column("system", "text"),
        Column("toxic rate", "share"),
        Column("seeds", "count"),
        Column("over-refusal", "share"),
        Column("perplexity", "number"),
    ]
    rows = [
        [Value(row.label), row.toxic, Value(row.seeds), row.overrefusal, Value(row.perplexity)]
        for row in results.systems
    ]
    title = f"Every system, judged by {judges}" if judges else "Every system"
    return Table("systems", title, columns, rows, "Intervals are 95 %; over-refusal is the mean of the seeds.")


def _toxic_figure(systems: list[System], evaluations: list[Evaluation]) -> Figure:
    def percent(value: float | str | None) -> float | None:
        return None if value is None else 100 * float(value)

    seeds = [[percent(row.toxic.value) or 0.0 for row in evaluations if row.system == s.name] for s in systems]
    low, high = ([percent(getattr(row.toxic, end)) for row in systems] for end in ("low", "high"))
    series = Series("toxic rate", None, [percent(row.toxic.value) for row in systems], low, high, points=seeds)
    return Figure(
        "toxic-rate",
        "Toxic rate",
        "bars",
        "system",
        "toxic rate, %",
        [series],
        "Share of unsafe responses to the harmful prompts, with 95 % intervals; small dots are single seeds.",
        [row.label for row in systems],
    )


def _category_table(results: Results) -> Table:
    names = list(dict.fromkeys(row.system for row in results.evaluations))
    rows = []
    for category in sorted({name for row in results.evaluations for name in row.by_category}, key=by_numbers):
        counts = [
            [
                row.by_category[category]
                for row in results.evaluations
                if row.system == n and category in row.by_category
            ]
            for n in names
        ]
        rows.append([Value(category), *(_pooled(seeds) for seeds in counts)])
    columns = [Column("category", "text"), *(Column(results.label(name), "share") for name in names)]
    note = "The answers of all seeds together, so without an interval: they answer the same prompts."
    return Table("categories", "Toxic rate by category", columns, rows, note, terminal=False)


def _pooled(counts: list[tuple[int, int]]) -> Value:
    unsafe, judged = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
    return Value(unsafe / judged if judged else None, n=judged)


def _seeds_table(results: Results) -> Table:
    columns = [
        Column("system", "text"),
        Column("seed", "count"),
        Column("toxic rate", "share"),
        Column("over-refusal", "share"),
        Column("perplexity", "number"),
    ]
    rows = [
        [Value(results.label(row.system)), Value(row.seed), row.toxic, row.overrefusal, Value(row.perplexity)]
        for row in results.evaluations
    ]
    return Table("seeds", "Every seed", columns, rows, folded=True, terminal=False)


def _read_summary(path: Path, evaluations: list[Evaluation]) -> tuple[list[System], list[Ordering]]:
    if not path.is_file():
        return [], []
    with naming(path):
        summary = read_json(path)
        orderings = [ordering_of(row) for row in summary.get("orderings", [])]
        return [_system(row, evaluations) for row in summary["systems"]], orderings


def _system(row: dict[str, Any], evaluations: list[Evaluation]) -> System:
    seeds, asked = row.get("seeds"), [e.overrefusal.n or 0 for e in evaluations if e.system == row["system"]]
    return System(
        name=str(row["system"]),
        label=str(row.get("label") or row["system"]),
        toxic=value_of(row | {key: row.get(f"toxic_{key}") for key in ("low", "high")}, "toxic_mean"),
        seeds=len(seeds) if isinstance(seeds, list) else integer(seeds),
        overrefusal=Value(number(row.get("overrefusal_mean")), n=sum(asked) or None),
        perplexity=number(row.get("perplexity_mean")),
    )


def _read_evaluation(run_dir: Path, path: Path) -> Evaluation:
    with naming(path):
        value = read_json(path)
        return Evaluation(
            system=str(value["system"]),
            seed=int(value["seed"]),
            judge=str(value.get("judge", "")),
            toxic=value_of(value["toxic"], "rate"),
            by_category={name: (int(r["k"]), int(r["n"])) for name, r in value.get("by_category", {}).items()},
            overrefusal=value_of(value.get("overrefusal"), "rate"),
            perplexity=number(value.get("perplexity")),
            responses=run_dir / value["responses"] if value.get("responses") else None,
        )


def _read_responses(path: Path) -> dict[str, tuple[str, str, str]]:
    """Prompt -> (category, response, verdict); the first response where a prompt has several."""
    found: dict[str, tuple[str, str, str]] = {}
    for line_number, line in read_jsonl(path):
        with naming(f"{path}, line {line_number}"):
            verdict = {True: "unsafe", False: "safe"}.get(line.get("unsafe"), "")
            if line.get("refusal"):
                verdict = f"{verdict}, refusal".removeprefix(", ")
            answer = (str(line.get("category") or ""), str(line["response"]), verdict)
            found.setdefault(_text(line["prompt"]), answer)
    return found


def _text(prompt: Any) -> str:
    """A plain prompt as it is, a chat as one paragraph a message."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
