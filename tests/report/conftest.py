"""The folder the report's tests read."""

from pathlib import Path

import pytest

from tests.report.invented_run import write_run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run, invented for the test, to break at will."""
    return write_run(tmp_path / "run")
