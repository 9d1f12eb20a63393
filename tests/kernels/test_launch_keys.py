"""What the interpreter cannot show: which launches would compile a kernel of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def steps():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    script = Path(__file__).with_name("launch_keys.py")
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = [json.loads(line) for line in run.stdout.splitlines()]
    return {step.pop("what"): step for step in found}


def test_no_batch_size_length_or_number_compiles_a_kernel_anew(steps):
    assert steps["sizes and numbers"]["first"] > 5
    assert not steps["sizes and numbers"]["new"]


@pytest.mark.parametrize("what", ["both gradients", "head frozen", "tiles", "gradient_mass_eps", "reward"])
def test_a_captured_step_needs_no_kernel_that_its_warm_up_did_not(steps, what):
    """One cannot be loaded during a capture."""
    assert steps[what]["first"] > 1
    assert not steps[what]["new"]
