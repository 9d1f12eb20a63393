"""`python -m benchmarks.report RESULT.json [OTHER.json]`: tables of one result file, or two commits compared."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Print the tables; status 2 for files that cannot be read or compared."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("result", type=Path, help="a file of `pytest benchmarks --benchmark-json FILE`")
    parser.add_argument("other", type=Path, nargs="?", help="a file of another commit, on the same device")
    arguments = parser.parse_args(argv)
    try:
        result = load(arguments.result)
        print(compare(result, load(arguments.other)) if arguments.other else tables(result))
    except ValueError as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2
    return 0


def load(path: Path) -> dict[str, Any]:
    """A result file; ValueError where it is none."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        rows = [row["extra_info"]["p50_s"] for row in result["benchmarks"]]
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: is not a result of these benchmarks ({type(error).__name__}: {error})") from None
    if not rows:
        raise ValueError(f"{path}: holds no benchmark; every one failed or was left out")
    return result


def tables(result: dict[str, Any]) -> str:
    """One Markdown table a group, fastest first, under a line that names device, versions and commit."""
    groups: dict[str, list[Row]] = {}
    for row in result["benchmarks"]:
        groups.setdefault(row["group"], []).append(row)
    header = "| | p20 / p50 / p80, ms | peak extra, MB | GFLOP | moved, MB | of the floor | relative error |"
    lines = [_stamp(result)]
    for group, rows in groups.items():
        lines += ["", f"**{group}**", "", header, "|---|---|---|---|---|---|---|"]
        lines += [_line(row) for row in sorted(rows, key=lambda row: row["extra_info"]["p50_s"])]
    return "\n".join(lines)


def compare(new: dict[str, Any], old: dict[str, Any]) -> str:
    """The speed-up of each benchmark both files hold.

    Raises:
        ValueError: the files are of different devices or settings, or share no benchmark.
    """
    for key in ("cpu", "cuda", "threads"):
        if new["machine_info"].get(key) != old["machine_info"].get(key):
            found = f"{old['machine_info'].get(key)!r} and {new['machine_info'].get(key)!r}"
            raise ValueError(f"the files differ in {key} ({found}); compare results of one device")
    before = {row["name"]: row["extra_info"] for row in old["benchmarks"]}
    shared = [row for row in new["benchmarks"] if row["name"] in before]
    if not shared:
        raise ValueError("the files share no benchmark")
    lines = [f"{_stamp(old)}\n{_stamp(new)}", "", "| | before, ms | after, ms | times as fast |", "|---|---|---|---|"]
    for row in shared:
        was, now = before[row["name"]]["p50_s"], row["extra_info"]["p50_s"]
        lines.append(f"| {row['name']} | {1e3 * was:.3g} | {1e3 * now:.3g} | {was / now:.2f} |")
    return "\n".join(lines)


def _line(row: Row) -> str:
    info = row["extra_info"]
    cells = [
        row["name"].removeprefix("test_"),
        " / ".join(f"{1e3 * info[key]:.3g}" for key in ("p20_s", "p50_s", "p80_s")),
        f"{info['peak_bytes'] / 1e6:.4g}",
        f"{info['flop'] / 1e9:.4g}",
        f"{info['bytes'] / 1e6:.4g}",
        f"{info['floor_share']:.2f}",
        f"{info['error']:.1e}",
    ]
    return f"| {' | '.join(cells)} |"


def _stamp(result: dict[str, Any]) -> str:
    machine, commit = result["machine_info"], result["commit_info"]
    device = ", ".join(machine["cuda"]) or f"{machine['cpu']} ({machine['capability']}), {machine['threads']} threads"
    code = str(commit.get("id"))[:10] + (" with uncommitted changes" if commit.get("dirty") else "")
    return f"{device}; torch {machine['versions']['torch']}; {code}; {result['datetime'][:10]}"


if __name__ == "__main__":
    sys.exit(main())
