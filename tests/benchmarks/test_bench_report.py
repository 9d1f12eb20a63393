"""Result files become tables; files of different devices are never compared."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import main


def result(cpu: str = "EPYC", seconds: float = 0.002) -> dict[str, Any]:
    info = {
        "p20_s": seconds / 2,
        "p50_s": seconds,
        "p80_s": seconds * 2,
        "peak_bytes": 3e6,
        "flop": 4e9,
        "bytes": 5e6,
        "floor_share": 0.5,
        "error": 1e-7,
    }
    return {
        "machine_info": {"cpu": cpu, "cuda": [], "threads": 2, "capability": "AVX2", "versions": {"torch": "2.13.0"}},
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": "2026-01-02T03:04:05",
        "benchmarks": [{"name": "test_op[native]", "group": "op", "extra_info": info}],
    }


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(name: str, content: Any) -> str:
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return str(tmp_path / name)

    return write


def test_a_table_with_its_stamp(write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([write("a.json", result())]) == 0
    shown = capsys.readouterr().out
    assert "EPYC (AVX2), 2 threads; torch 2.13.0; 0123456789; 2026-01-02" in shown
    assert "| op[native] | 1 / 2 / 4 | 3 | 4 | 5 | 0.50 | 1.0e-07 |" in shown


def test_two_commits(write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([write("new.json", result(seconds=0.001)), write("old.json", result(seconds=0.003))]) == 0
    assert "| test_op[native] | 3 | 1 | 3.00 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("new", "old", "message"),
    [
        (result(), result(cpu="Xeon"), "differ in cpu ('Xeon' and 'EPYC')"),
        (result(), result() | {"benchmarks": []}, "holds no benchmark"),
        (result(), "{", "is not a result of these benchmarks"),
        (result(), {"benchmarks": [{"name": "x"}]}, "is not a result of these benchmarks"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    write: Any, capsys: pytest.CaptureFixture[str], new: Any, old: Any, message: str
) -> None:
    assert main([write("new.json", new), write("old.json", old)]) == 2
    assert message in capsys.readouterr().err
