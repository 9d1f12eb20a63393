"""Keeps every row of a run in its result file as it goes, and stamps the file with what it was measured on."""

import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Generator, Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch

import reprdpo
from benchmarks.device import device_name
from benchmarks.report.results import write

PACKAGES = ("torch", "triton", "transformers", "numpy", "scikit-learn", "trl", "liger-kernel", "cut-cross-entropy")
_RESULT = pytest.StashKey[dict[str, Any]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RESULT] = {
        "machine_info": machine_info(),
        "commit_info": commit_info(),
        "datetime": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["pytest", *map(_without_folder, map(str, config.invocation_params.args))]),
        "complete": False,
        "rows": [],
    }


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    benchmark = getattr(item, "funcargs", {}).get("benchmark")
    if (report.when == "call" or report.outcome != "passed") and "benchmark" in getattr(item, "fixturenames", ()):
        item.config.stash[_RESULT]["rows"] += rows_of(item, benchmark, report)
        _save(item.config)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if report.outcome != "passed":  # a file that does not import is a row too
        row = {"name": collector.name, "file": collector.path.name, "group": collector.path.name, "mode": "eager"}
        status = "red" if report.failed else "skipped"
        collector.config.stash[_RESULT]["rows"].append(row | {"status": status, "reason": _reason(report)})
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> Iterator[None]:
    result = session.config.stash[_RESULT]
    result["complete"] = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    yield
    _save(session.config)  # over the file that pytest-benchmark has just written in a form of its own


def rows_of(item: pytest.Item, benchmark: Any, report: pytest.TestReport) -> list[dict[str, Any]]:
    """The rows of one test: measured (one a mode), counted, skipped or red, the last two with the reason."""
    row = {
        "name": item.name,
        "file": item.path.name,
        "group": getattr(benchmark, "group", None) or getattr(item, "originalname", item.name),
        "mode": "eager",
        "status": "measured",
        **getattr(benchmark, "extra_info", {}),
    }
    graph = row.pop("graph", None)
    if report.outcome != "passed":
        return [row | {"status": "skipped" if report.skipped else "red", "reason": _reason(report)}]
    if "counted" in row:
        return [row | {"status": "counted", "reason": row["counted"]}]
    if "p50_s" not in row:
        return [row | {"status": "skipped", "reason": "measured nothing"}]
    if graph is None:
        return [row]
    status = "skipped" if "reason" in graph else "measured"
    return [row, row | graph | {"mode": "graph", "status": status}]


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why a test was skipped, or the line that says what went wrong."""
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        return reason.removeprefix("Skipped: ")
    lines = report.longreprtext.strip().splitlines() or ["no reason given"]
    return next((line[1:] for line in lines if line.startswith("E ")), lines[-1]).strip()


def machine_info() -> dict[str, Any]:
    """Device, driver and versions; never the host's name."""
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": device_name("cpu"),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cuda": [gpu.name for gpu in gpus],
        "cuda_memory": [gpu.total_memory for gpu in gpus],
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpus else None,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES}
        | {"reprdpo": reprdpo.__version__, "cuda": torch.version.cuda},
    }


def commit_info() -> dict[str, Any]:
    """The commit that is measured: the checkout's, or REPRDPO_COMMIT where the tree came without its history."""
    if given := os.environ.get("REPRDPO_COMMIT"):
        return {"id": given.removesuffix("+"), "dirty": given.endswith("+")}
    commit = _output("git", "rev-parse", "HEAD")
    changes = _output("git", "status", "--porcelain", "--", ":(top)", ":(top,exclude)benchmarks/results")
    return {"id": commit, "dirty": bool(changes)}


def _save(config: pytest.Config) -> None:
    if path := config.getoption("benchmark_json", None):
        write(config.stash[_RESULT], Path(path))


def _without_folder(argument: str) -> str:
    return Path(argument).name if os.path.isabs(argument) else argument


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
