"""One HTML page that needs no other file: a run's tables and plots, and the record over commits."""

import html
from pathlib import Path

from benchmarks.report import plots, record
from benchmarks.report.results import Result, stamp
from benchmarks.report.tables import Table, cost_claims, group_tables, kernel_claims, parts_tables

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .2rem .7rem; text-align: left }
tr { border-bottom: 1px solid #ddd }
svg { max-width: 100%; height: auto }
"""


def page(result: Result | None, results_folder: Path) -> str:
    """The page of a run (if any) and of the record in ``results_folder``."""
    parts = _run(result) if result else []
    for device, results in record.read(results_folder).items():
        lines = record.series(results)
        parts += [f"<h2>Over commits: {html.escape(device)}</h2>", record.table(device, lines).html()]
        parts += [plots.over_commits(line) for line in lines if sum(s is not None for s in line.seconds) > 1]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>reprdpo benchmarks</title>\n'
        f"<style>{STYLE}</style>\n<h1>reprdpo benchmarks</h1>\n{body}\n</html>\n"
    )


def _run(result: Result) -> list[str]:
    parts = [f"<h2>This run</h2>\n<p>{html.escape(stamp(result))}</p>"]
    parts += [table.html() for table in _claims(result)]
    parts += [f"<h3>{html.escape(title)}</h3>{svg}" for title, svg in plots.along_dimensions(result["rows"]).items()]
    for title, svg in (
        ("Roofline", plots.roofline(result["rows"])),
        ("Share of the floor", plots.floor_shares(result["rows"])),
    ):
        parts += [f"<h3>{title}</h3>{svg}"] if svg else []
    return parts + [table.html() for table in (*group_tables(result), *parts_tables(result))]


def _claims(result: Result) -> list[Table]:
    return [table for table in (kernel_claims(result), *cost_claims(result)) if table.rows]
