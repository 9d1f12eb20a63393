"""The committed results as a record: for each device its commits in order, never mixed across devices or settings."""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.report.results import Result, check_same_device, commit, groups, load, merge
from benchmarks.report.tables import Table


@dataclass(frozen=True)
class Series:
    """One headline figure over commits: the time of our fastest row; None where a commit has none or is red."""

    group: str
    commits: list[str]
    seconds: list[float | None]
    floor_share: list[float | None]


def read(folder: Path) -> dict[str, list[Result]]:
    """The results of ``folder/<device>/``, one a commit, oldest first; parts of one commit's run are put together.

    Raises:
        ValueError: a file is no result, one folder mixes devices or settings, or one commit was measured twice.
    """
    found: dict[str, list[Result]] = {}
    for device in sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []:
        paths: dict[str, list[Path]] = {}
        for path in sorted(device.rglob("*.json")):
            paths.setdefault(commit(load(path)), []).append(path)
        results = sorted((merge(parts) for parts in paths.values()), key=lambda result: result["datetime"])
        for result in results[1:]:
            check_same_device(results[0], result, f"files of {device}")
        if results:
            found[device.name] = results
    return found


def series(results: list[Result]) -> list[Series]:
    """Every headline group's figure at each commit."""
    by_commit = [groups(result) for result in results]
    names = dict.fromkeys(
        name for found in by_commit for name, rows in found.items() if any(row.get("headline") for row in rows)
    )
    lines = []
    for name in names:
        best = []
        for found in by_commit:
            ours = [row for row in found.get(name, []) if not row.get("peer")]
            red = any(row["status"] == "red" for row in ours)
            measured = [row for row in ours if row["status"] == "measured"]
            best.append(measured[0] if measured and not red else None)
        seconds = [row["p50_s"] if row else None for row in best]
        share = [row["floor_share"] if row else None for row in best]
        lines.append(Series(name, [commit(result) for result in results], seconds, share))
    return lines


def table(device: str, lines: list[Series]) -> Table:
    """Milliseconds and share of the floor, a column a commit."""
    commits = lines[0].commits if lines else []
    rows = []
    for line in lines:
        pairs = zip(line.seconds, line.floor_share, strict=True)
        rows.append(
            [line.group, *("" if time is None else f"{1e3 * time:.3g} ms, {share:.2f}" for time, share in pairs)]
        )
    return Table(f"{device}: ours, and its share of the floor, by commit", ["", *commits], rows)
