"""A run's file: every row in it as soon as it is finished, whatever becomes of the run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.conftest import rows_of
from benchmarks.report.results import load

ROOT = Path(__file__).resolve().parent.parent.parent
BENCH = """
import os, pytest, torch
from benchmarks import harness
from benchmarks.harness import Work, count, import_peer, measure

harness.SECONDS = 0.01

def row(benchmark, run, **options):
    benchmark.group = "doubling"
    measure(benchmark, run, lambda seed: [torch.ones(8)], oracle=lambda x: 2 * x.double(), max_error=1e-6,
            work=Work(bytes=64), dtype=torch.float32, **options)

def test_right(benchmark):
    row(benchmark, lambda x: x + x)

def test_wrong(benchmark):
    row(benchmark, lambda x: x)

def test_missing(benchmark):
    row(benchmark, import_peer("no_such_peer").double)

def test_large(benchmark):
    row(benchmark, lambda x: x + x, needs_bytes=10**18)

def test_counted(benchmark):
    benchmark.group = "at 70B"
    count(benchmark, Work(bytes=10, gemms=((1, 2, 3),)), reason="no machine here holds 70B", implementation="ours")

def test_end(benchmark):
    END

def test_never_reached(benchmark):
    row(benchmark, lambda x: x + x)
"""


def run(folder: Path, end: str) -> dict[str, Any]:
    (folder / "bench_it.py").write_text(BENCH.replace("END", end))
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "REPRDPO_COMMIT": "abc123+"}
    command = [sys.executable, "-m", "pytest", "bench_it.py", "-p", "benchmarks.conftest", "-p", "no:cacheprovider"]
    command += ["--benchmark-json", "out.json", "--rootdir", "."]
    subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=120, check=False)
    assert [path.name for path in folder.glob(".out*")] == []
    return load(folder / "out.json")


def test_a_whole_run(tmp_path: Path) -> None:
    result = run(tmp_path, "pass")
    rows = {row["name"]: row for row in result["rows"]}
    assert result["complete"]
    assert result["commit_info"] == {"id": "abc123", "dirty": True}
    assert list(rows)[-1] == "test_never_reached"
    assert {name: (row["status"], row["group"]) for name, row in rows.items()} == {
        "test_right": ("measured", "doubling"),
        "test_wrong": ("red", "doubling"),
        "test_missing": ("skipped", "test_missing"),
        "test_large": ("skipped", "doubling"),
        "test_counted": ("counted", "at 70B"),
        "test_end": ("skipped", "test_end"),
        "test_never_reached": ("measured", "doubling"),
    }
    assert "wrong result: error 0.5" in rows["test_wrong"]["reason"]
    assert rows["test_missing"]["reason"].startswith("no_such_peer is not usable here")
    assert rows["test_end"]["reason"] == "measured nothing"
    assert rows["test_counted"]["flop"] == 12
    assert "p50_s" not in rows["test_counted"]


@pytest.mark.parametrize("end", ["os._exit(1)", "raise KeyboardInterrupt"], ids=["killed", "interrupted"])
def test_what_was_finished_is_kept(tmp_path: Path, end: str) -> None:
    result = run(tmp_path, end)
    assert not result["complete"]
    assert [row["name"] for row in result["rows"]][:2] == ["test_right", "test_wrong"]
    assert "test_never_reached" not in json.dumps(result)


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        ({"p50_s": 1e-6}, [("eager", "measured", 5e-6), ("graph", "measured", 1e-6)]),
        ({"reason": "cannot be captured"}, [("eager", "measured", 5e-6), ("graph", "skipped", 5e-6)]),
    ],
)
def test_a_graph_is_a_row_of_its_own(graph: dict[str, Any], expected: list[tuple[str, str, float]]) -> None:
    item: Any = SimpleNamespace(name="test_op[native]", path=Path("bench_op.py"), originalname="test_op")
    benchmark = SimpleNamespace(group="op", extra_info={"p50_s": 5e-6, "graph": graph})
    rows = rows_of(item, benchmark, SimpleNamespace(outcome="passed"))  # type: ignore[arg-type]
    assert [(row["mode"], row["status"], row["p50_s"]) for row in rows] == expected
