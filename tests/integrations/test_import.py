"""Who knows TRL: the integration alone, which says in one line that it is missing."""

import subprocess
import sys


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_nothing_else_imports_trl() -> None:
    rooms = "ops, heads, data, reward, training, integrations, experiments, cli"
    result = python(f"import sys\nfrom reprdpo import {rooms}\nassert 'trl' not in sys.modules")
    assert result.returncode == 0, result.stderr


def test_without_trl_one_line_says_how_to_get_it() -> None:
    result = python("import sys\nsys.modules['trl'] = None\nimport reprdpo.integrations.trl")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert "pip install 'reprdpo[trl]'" in last
