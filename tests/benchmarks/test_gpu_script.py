"""benchmarks/gpu.sh without a GPU: what it would do, and what it refuses."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
SOURCE = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "tests")))}


def run(*arguments: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **variables}
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_a_dry_run_lists_every_part_with_its_command_and_minutes(tmp_path: Path) -> None:
    shown = run("--dry-run", cwd=tmp_path)
    assert (shown.returncode, shown.stderr) == (0, "")
    parts = {
        name: int(minutes) for name, minutes in re.findall(r"^(\w+) +about (\d+) min$", shown.stdout, re.MULTILINE)
    }
    assert {
        "build",
        "tests",
        "memcheck",
        "racecheck",
        "initcheck",
        "ceilings",
        "profile",
        "tune",
        "probe",
        "logprob",
        "overhead",
        "step",
    } <= parts.keys()
    assert all(minutes < 9 for minutes in parts.values())
    assert f"together  about {sum(parts.values())} min" in shown.stdout
    assert "--benchmark-json build/gpu/probe.json" in shown.stdout
    # Every benchmark of the tree has its part.
    assert set(re.findall(r"benchmarks/(bench_\w+\.py)", shown.stdout)) == {
        path.name for path in (ROOT / "benchmarks").glob("bench_*.py")
    }
    assert not list(tmp_path.iterdir())


def test_chosen_parts_and_their_folder(tmp_path: Path) -> None:
    shown = run("probe", "--out", "results", "--dry-run", cwd=tmp_path).stdout
    assert f"--benchmark-json {tmp_path}/results/probe.json" in shown
    assert "tests/gpu" not in shown


# A Python with a GPU on a bare image: no datasets, a test that fails, rows where they are asked.
BARE_PYTHON = """#!/usr/bin/env bash
case "$*" in
  *"import datasets"*) exit 1 ;;
  *"-m pytest tests/gpu"*) exit 3 ;;
  *"-m pytest"*) echo '{"rows": [1]}' > "${@: -1}" ;;
  *benchmarks.report*) echo "report of $3" ;;
esac
"""


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path


def test_a_part_that_fails_or_lacks_a_package_leaves_the_others(tmp_path: Path) -> None:
    python = str(executable(tmp_path / "python", BARE_PYTHON))
    checked = (
        "#!/bin/sh\necho checked with $2\n[ $2 = initcheck ] && echo '45 skipped in 2.10s' || echo '45 passed in 2.10s'"
    )
    executable(tmp_path / "cuda" / "bin" / "compute-sanitizer", checked)
    parts = ("tests", "racecheck", "initcheck", "svm", "ceilings", "--headline", "--out", "out")
    done = run(*parts, cwd=tmp_path, PYTHON=python, CUDA_HOME=str(tmp_path / "cuda"))
    assert done.returncode == 1
    assert re.search(r"== tests: \d+ s, status 3\n", done.stdout)
    assert re.search(r"checked with racecheck\n45 passed.*\n== racecheck: \d+ s, status 0\n", done.stdout)
    assert "== svm\nskipped: no datasets; give it in --wheels\n" in done.stdout
    assert f"report of {tmp_path}/out/ceilings.json" in done.stdout
    assert (tmp_path / "out" / "log.txt").read_text(encoding="utf-8") == done.stdout
    summary = (tmp_path / "out" / "summary.txt").read_text(encoding="utf-8")
    assert done.stdout.endswith(summary)
    assert re.findall(r"^(\w+) +(\w+)", summary, re.MULTILINE) == [
        ("tests", "red"),
        ("tests", "red"),
        ("racecheck", "green"),
        ("initcheck", "skipped"),
        ("svm", "skipped"),
        ("ceilings", "green"),
    ]


# Of two commands of the tests the first hangs; then a benchmark, of whose rows one is red.
HANGING_PYTHON = """#!/usr/bin/env bash
case "$*" in
  *"-m pytest tests/gpu"*) sleep 60 ;;
  *"-m pytest"*)
    echo '{"rows": [{"status": "measured"}, {"status": "red", "name": "a", "reason": "off"}]}' > "${@: -1}" ;;
  -c*collections*) exec python3 "$@" ;;
esac
"""


def test_a_part_that_hangs_is_stopped_and_the_summary_of_two_calls_is_one(tmp_path: Path) -> None:
    python = str(executable(tmp_path / "python", HANGING_PYTHON))
    first = run("tests", "probe", "--out", "out", "--limit", "2", cwd=tmp_path, PYTHON=python)
    assert first.returncode == 1
    run("ceilings", "probe", "--out", "out", cwd=tmp_path, PYTHON=python)
    summary = (tmp_path / "out" / "summary.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split()[:2] for line in summary if line[0] != " "] == [
        ["tests", "stopped"],
        ["tests", "not"],
        ["ceilings", "green"],
        ["probe", "green"],
    ]
    assert summary[-2].endswith("status 0: 1 rows measured, 1 rows red")
    assert summary[-1].split() == ["a", "|", "off"]


LOST_CONTEXT = """
import torch
healthy = True
def synchronize():
    if not healthy: raise RuntimeError("an illegal memory access was encountered")
torch.cuda.is_available = torch.cuda.is_initialized = lambda: True
torch.cuda.synchronize = synchronize
def test_first(): pass
def test_second():
    global healthy
    healthy = False
    raise AssertionError("a wrong address")
def test_third(): assert healthy
"""


@pytest.mark.slow
def test_a_lost_cuda_context_costs_one_test(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    shutil.copy(ROOT / "tests" / "gpu" / "conftest.py", tmp_path)
    (tmp_path / "test_lost.py").write_text(LOST_CONTEXT, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "1", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=SOURCE, capture_output=True, text=True, check=False)
    assert "1 failed, 2 passed" in done.stdout
    assert "a wrong address" in done.stderr
    assert "test_second lost the CUDA context: an illegal memory access" in done.stderr


def test_headline_leaves_the_secondary_rows_out() -> None:
    assert run("--dry-run", "--headline", "probe").stdout.count("-m 'not secondary'") == 1
    assert "secondary" not in run("--dry-run", "probe").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bogus"], "no part bogus; there are: all build tests"),
        (["--out"], "--out needs a value"),
        (["--fast"], "unknown option --fast"),
        ([], "usage: benchmarks/gpu.sh"),
        (["probe", "--wheels", "none"], "none is no folder"),
        (["probe", "--minutes", "soon"], "--minutes must be a whole number, not soon"),
        (["probe"], "finds no CUDA device"),
    ],
)
def test_what_is_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    refused = run(*arguments, cwd=tmp_path)
    assert refused.returncode == 2
    assert message in refused.stderr
    assert not list(tmp_path.iterdir())
