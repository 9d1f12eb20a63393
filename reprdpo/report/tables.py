"""The tables of a report as rows of cells, and as plain text for a terminal."""

import re
from dataclasses import dataclass
from pathlib import Path

from reprdpo.report.run_folder import Evaluation, Rate, Run, Stage, load_run

NONE = "—"


@dataclass(frozen=True)
class Cell:
    """What is printed, and the number or text it is sorted by; `heat` in 0..1 shades it."""

    text: str
    value: float | str | None = None
    heat: float | None = None


@dataclass(frozen=True)
class Table:
    """Columns are titles; the first column names its row and the others hold numbers."""

    columns: list[str]
    rows: list[list[Cell]]


def results_table(run: Run) -> Table:
    """The paper's Table 1: a system a row, toxic rate with interval, over-refusal and perplexity."""
    columns = ["system", "toxic rate, %", "95 % interval", "prompts", "seeds", "over-refusal, %", "perplexity"]
    rows = [
        [
            Cell(row.label, position),
            percent(row.toxic.rate),
            interval(row.toxic),
            number(row.toxic.n, ".0f"),
            number(row.seeds, ".0f"),
            percent(row.overrefusal),
            number(row.perplexity, ".2f"),
        ]
        for position, row in enumerate(run.summary)
    ]
    if any(row.unjudged for row in run.summary):
        columns.append("unjudged")
        for cells, row in zip(rows, run.summary, strict=True):
            cells.append(number(row.unjudged, ".0f"))
    return Table(columns, rows)


def seeds_table(run: Run) -> Table:
    """Every seed of every system as the judge counted it."""
    columns = ["system", "seed", "unsafe", "toxic rate, %", "95 % interval", "over-refusal, %", "perplexity"]
    rows = [
        [
            Cell(run.label(row.system), position),
            number(row.seed, ".0f"),
            Cell(f"{row.toxic.k} of {row.toxic.n}", row.toxic.k) if row.toxic.n else Cell(NONE),
            percent(row.toxic.rate),
            interval(row.toxic),
            percent(row.overrefusal.rate),
            number(row.perplexity, ".2f"),
        ]
        for position, row in enumerate(run.evaluations)
    ]
    return Table(columns, rows)


def category_table(run: Run) -> Table:
    """Toxic rate by category (rows) and system (columns), the seeds' counts pooled."""
    systems = list(dict.fromkeys(row.system for row in run.evaluations))
    categories = sorted({name for row in run.evaluations for name in row.by_category}, key=_natural)
    rows = []
    for category in categories:
        rates = [_pooled([row for row in run.evaluations if row.system == system], category) for system in systems]
        rows.append([Cell(category, category), *(Cell(percent(r).text, r, heat=r) for r in rates)])
    return Table(["category", *(run.label(system) for system in systems)], rows)


def _natural(name: str) -> list[tuple[int, str]]:
    """A key by which S2 comes before S10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def cost_table(run: Run) -> Table:
    """Seconds, FLOP and peak memory by stage, the seeds of a system together, shaded as a share of the longest."""
    stages: dict[str, list[Stage]] = {}
    for name, stage in run.stages.items():
        stages.setdefault(re.sub(r" seed \d+$", "", name), []).append(stage)
    seconds = {name: sum(stage.seconds or 0.0 for stage in group) for name, group in stages.items()}
    longest = max(seconds.values(), default=0.0) or 1.0
    rows = []
    for position, (name, group) in enumerate(stages.items()):
        spent = seconds[name]
        status = ", ".join(dict.fromkeys(stage.status for stage in group))
        flop = sum(stage.flop or 0.0 for stage in group)
        peak = max(stage.peak_bytes or 0.0 for stage in group)
        rows.append(
            [
                Cell(name, position),
                Cell(str(len(group)), len(group)),
                Cell(status, status),
                Cell(f"{spent:,.1f}", spent, spent / longest),
                number(flop / 1e12 if flop else None, ".3g"),
                number(peak / 2**20 if peak else None, ",.0f"),
            ]
        )
    return Table(["stage", "times", "status", "seconds", "TFLOP (matmuls)", "peak MiB"], rows)


def summary_table(run_dir: str | Path) -> str:
    """The results, the orderings and what is absent, as plain text for a terminal.

    Raises :class:`~reprdpo.errors.UserError` where the folder is not a run's, or a file of it is broken.
    """
    run = load_run(run_dir)
    parts = []
    if run.summary:
        parts.append(plain(results_table(run)))
    if run.orderings:
        lines = [
            f"  {held_in_words(o.held):<10} {o.claim}{f' ({o.detail})' if o.detail else ''}" for o in run.orderings
        ]
        parts.append("\n".join(["The paper's orderings:", *lines]))
    if run.overhead:
        parts.append("\n  ".join(["Cost of the reward:", *run.overhead]))
    if absent := run.absent():
        parts.append("\n".join(absent))
    return "\n\n".join(parts) + "\n"


def plain(table: Table) -> str:
    """A table as aligned text: the first column to the left, the others to the right."""
    lines = [table.columns, *([cell.text for cell in row] for row in table.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = ([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines)
    return "\n".join("  ".join(line) for line in padded)


def held_in_words(held: bool | None) -> str:
    """`held`, `not held` or `undecided`."""
    return "undecided" if held is None else "held" if held else "not held"


def percent(share: float | None) -> Cell:
    """A share in 0..1 as a percentage with one decimal."""
    return Cell(NONE) if share is None else Cell(f"{100 * share:.1f}", share)


def interval(rate: Rate) -> Cell:
    """An interval in percent, sorted by its lower end."""
    if rate.low is None or rate.high is None:
        return Cell(NONE)
    return Cell(f"{100 * rate.low:.1f} to {100 * rate.high:.1f}", rate.low)


def number(value: float | None, form: str) -> Cell:
    """A number in the given format."""
    return Cell(NONE) if value is None else Cell(format(value, form), value)


def _pooled(evaluations: list[Evaluation], category: str) -> float | None:
    rates = [row.by_category[category] for row in evaluations if category in row.by_category]
    n = sum(rate.n or 0 for rate in rates)
    return sum(rate.k or 0 for rate in rates) / n if n else None
