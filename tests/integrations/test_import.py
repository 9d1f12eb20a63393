"""Who knows TRL: the integration alone, which says in one line that it is missing."""

import subprocess
import sys

CODE = """
import sys
sys.modules["trl"] = None
from reprdpo import experiments, cli, training, integrations
import reprdpo.integrations.trl
"""


def test_without_trl_all_the_rest_imports_and_one_line_says_how_to_get_it() -> None:
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ModuleNotFoundError: reprdpo.integrations.trl needs TRL")
    assert "pip install 'reprdpo[trl]'" in last
