"""The README's tables and figures, made from the newest committed results of each device."""

from pathlib import Path

from benchmarks.report import plots, record
from benchmarks.report.results import Result, Row
from benchmarks.report.tables import cost_claims, kernel_claims

BEGIN, END = "<!-- benchmarks: made by python -m benchmarks.report --readme -->", "<!-- benchmarks: end -->"
FIGURES = "docs/benchmarks"


def updated(text: str, results_folder: Path) -> tuple[str, dict[str, str]]:
    """``text`` with what stands between the two markers made anew, and the SVG files it shows, by path from it.

    Raises:
        ValueError: the markers are not there, once each and in order, or a result is of uncommitted changes.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before + after:
        raise ValueError(f"needs the lines {BEGIN!r} and {END!r}, once each, in this order")
    parts: list[str] = []
    figures: dict[str, str] = {}
    for device, results in record.read(results_folder).items():
        newest = _newest(results)
        if any(result["commit_info"].get("dirty") for result in newest):
            raise ValueError(f"{device}: a result is of uncommitted changes; measure a commit")
        for name, (caption, figure) in _figures([row for result in newest for row in result["rows"]]).items():
            figures[path := f"{FIGURES}/{device}{name}.svg"] = figure
            parts.append(f"![{caption}, on {device}]({path})")
        for result in newest:
            parts += [table.markdown() for table in (kernel_claims(result), *cost_claims(result)) if table.rows]
    claims = "\n\n".join(parts) or "No results are committed yet."
    return f"{before}{BEGIN}\n{claims}\n{END}{after}", figures


def _figures(rows: list[Row]) -> dict[str, tuple[str, str]]:
    """What a figure's file is called behind its device, to its caption and its SVG."""
    beside = plots.beside_peers(rows)
    found = {"": ("Time and memory of the loss and of a training step beside every peer", beside)} if beside else {}
    for dimension, figure in plots.memory_along(rows).items():
        found[f"-memory-{dimension}"] = (f"Time and memory of the loss in bfloat16 along {dimension}", figure)
    return found


def _newest(results: list[Result]) -> list[Result]:
    """The results of each commit, newest first, each without the benchmark files that a newer one ran."""
    seen: set[str] = set()
    kept = []
    for result in reversed(results):
        kept.append(result | {"rows": [row for row in result["rows"] if row["file"] not in seen]})
        seen |= {row["file"] for row in result["rows"]}
    return kept
