"""Result files: written whole, read with their form checked, never mixed across devices, settings or commits."""

import json
import math
import os
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Result = dict[str, Any]

SETTINGS = ("cpu", "capability", "threads", "cuda")
NUMBERS = ("p20_s", "p50_s", "p80_s", "peak_bytes", "flop", "bytes", "floor_s", "floor_share", "error")
STATUSES = ("measured", "counted", "skipped", "red")


def write(result: Result, path: Path) -> None:
    """Replace ``path`` at once, so that an interrupted run leaves the last whole state."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(_finite(result), indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def load(path: Path) -> Result:
    """A result file.

    Raises:
        ValueError: it cannot be read, is of another form, or holds no row.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        for row in result["rows"]:
            _check(row)
        [result["machine_info"][key] for key in (*SETTINGS, "versions")]
        result["commit_info"]["id"], result["datetime"], result["complete"]
    except (OSError, UnicodeDecodeError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: is not a result of these benchmarks ({type(error).__name__}: {error})") from None
    if not result["rows"]:
        raise ValueError(f"{path}: holds no row; nothing was run")
    return result


def merge(paths: list[Path]) -> Result:
    """The parts of one run as one result.

    Raises:
        ValueError: they are of different devices, settings, versions or commits, or two hold the same row.
    """
    first, *others = [load(path) for path in paths]
    for other, path in zip(others, paths[1:], strict=True):
        check_same_device(first, other, f"{paths[0]} and {path}")
        for key in ("versions", "python"):
            if first["machine_info"].get(key) != other["machine_info"].get(key):
                raise ValueError(f"{paths[0]} and {path} differ in {key}; parts of one run have the same")
        if first["commit_info"] != other["commit_info"]:
            raise ValueError(f"{paths[0]} is of {commit(first)}, {path} of {commit(other)}; compare them, not mix")
    rows = [row for result in (first, *others) for row in result["rows"]]
    seen: set[tuple[str, ...]] = set()
    for row in rows:
        if key_of(row) in seen:
            raise ValueError(f"two of the files hold the row {row['name']} of {row['group']}")
        seen.add(key_of(row))
    return first | {"rows": rows, "complete": all(result["complete"] for result in (first, *others))}


def check_same_device(one: Result, other: Result, names: str) -> None:
    """ValueError where two results are not of one device and setting."""
    for key in SETTINGS:
        a, b = one["machine_info"][key], other["machine_info"][key]
        if a != b:
            raise ValueError(f"{names} differ in {key} ({a!r} and {b!r}); compare results of one device")


def key_of(row: Row) -> tuple[str, ...]:
    """What makes two rows the same question."""
    return row["file"], row["group"], row["name"], row["mode"]


def groups(result: Result) -> dict[str, list[Row]]:
    """The rows by group, measured ones first and fastest first."""
    found: dict[str, list[Row]] = {}
    for row in result["rows"]:
        found.setdefault(row["group"], []).append(row)
    return {name: sorted(rows, key=lambda row: row.get("p50_s", math.inf)) for name, rows in found.items()}


def device(result: Result) -> str:
    """The device in words."""
    machine = result["machine_info"]
    return ", ".join(machine["cuda"]) or f"{machine['cpu']} ({machine['capability']}), {machine['threads']} threads"


def commit(result: Result) -> str:
    """The commit, shortened; a tree with uncommitted changes says so."""
    info = result["commit_info"]
    return (info["id"] or "unknown commit")[:10] + (" with uncommitted changes" if info.get("dirty") else "")


def stamp(result: Result) -> str:
    """One line: device, versions, commit, date, and whether the run came to its end."""
    versions = result["machine_info"]["versions"]
    parts = [device(result)]
    parts += [f"{name} {versions[name]}" for name in ("torch", "triton") if versions.get(name)]
    parts += [f"driver {driver}"] if (driver := result["machine_info"].get("driver")) else []
    parts += [commit(result), result["datetime"][:10]]
    return "; ".join(parts + ([] if result["complete"] else ["interrupted: only the rows finished by then"]))


def _check(row: Row) -> None:
    for key in ("name", "file", "group", "mode", "status"):
        if not isinstance(row[key], str):
            raise TypeError(f"{key} of a row is {row[key]!r}, not a text")
    if row["status"] not in STATUSES:
        raise TypeError(f"status of {row['name']} is {row['status']!r}, none of {', '.join(STATUSES)}")
    if row["status"] == "measured":
        for key in NUMBERS:
            if not isinstance(row[key], (int, float)):
                raise TypeError(f"{key} of {row['name']} is {row[key]!r}, not a number")


def _finite(value: Any) -> Any:
    """JSON has no NaN: null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, (list, tuple)) else value
