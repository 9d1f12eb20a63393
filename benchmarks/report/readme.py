"""The README's tables, made from the newest committed results of each device."""

from pathlib import Path

from benchmarks.report import record
from benchmarks.report.results import Result
from benchmarks.report.tables import cost_claims, kernel_claims

BEGIN, END = "<!-- benchmarks: made by python -m benchmarks.report --readme -->", "<!-- benchmarks: end -->"


def updated(text: str, results_folder: Path) -> str:
    """``text`` with what stands between the two markers made anew.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before + after:
        raise ValueError(f"needs the lines {BEGIN!r} and {END!r}, once each, in this order")
    return f"{before}{BEGIN}\n{claims(results_folder)}\n{END}{after}"


def claims(results_folder: Path) -> str:
    """The claims of each device, a table a commit: what the newest run of each benchmark file says.

    Raises:
        ValueError: a result is of a tree with uncommitted changes.
    """
    tables = []
    for device, results in record.read(results_folder).items():
        for result in _newest(results):
            if result["commit_info"].get("dirty"):
                raise ValueError(f"{device}: a result is of uncommitted changes; measure a commit")
            tables += [table.markdown() for table in (kernel_claims(result), *cost_claims(result)) if table.rows]
    return "\n\n".join(tables) or "No results are committed yet."


def _newest(results: list[Result]) -> list[Result]:
    """Newest first, each without the benchmark files that a newer one ran."""
    seen: set[str] = set()
    kept = []
    for result in reversed(results):
        kept.append(result | {"rows": [row for row in result["rows"] if row["file"] not in seen]})
        seen |= {row["file"] for row in result["rows"]}
    return kept
