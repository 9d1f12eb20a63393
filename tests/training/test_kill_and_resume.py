"""kill -9 at any moment, start the same command again: the same curve, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_runs
from safetensors.torch import load_file
from test_trainer import logged

from reprdpo.training import ReprDPOTrainer, last_checkpoint

STEPS = 40


def main(folder: str) -> None:
    """One command that starts or goes on; dropout and two shuffles of the data draw on the random state."""
    config = tiny_runs.make_config(
        folder,
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=3,
        save_total_limit=2,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        max_tokens_per_device=24,
        logging_steps=2,
        disable_dropout=False,
    )
    trainer = ReprDPOTrainer(
        tiny_runs.make_model(attention_dropout=0.3),
        config,
        train_dataset=tiny_runs.make_pairs(),
        reward=tiny_runs.make_reward(),
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    trainer.save_model(f"{folder}/model")


def start(folder: Path) -> subprocess.Popen[bytes]:
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    straight = start(tmp_path / "straight")
    seed = random.SystemRandom().randrange(1 << 30)
    draw = random.Random(seed)
    # Past the first checkpoint the kill may hit a step, a checkpoint half written or the log.
    lines, delay = draw.randrange(3, 12), draw.random() * 0.2
    killed, metrics = start(tmp_path / "killed"), tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while killed.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= lines:
            break
        time.sleep(0.01)
    time.sleep(delay)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    told = f"seed {seed}: killed after {lines} lines and {delay:.3f} s"
    assert killed.returncode == -signal.SIGKILL, f"{told}, but it had ended before"
    assert not (tmp_path / "killed" / "model").exists(), told
    finish(start(tmp_path / "killed"))
    finish(straight)
    assert len(logged(tmp_path / "straight")) == STEPS // 2 + 1
    assert logged(tmp_path / "killed") == logged(tmp_path / "straight"), told
    for name in ("model.safetensors", "reward/reward.safetensors"):
        ends = [load_file(tmp_path / run / "model" / name) for run in ("straight", "killed")]
        assert all(ends[0][key].equal(ends[1][key]) for key in ends[0]), f"{told}: {name}"


if __name__ == "__main__":
    main(sys.argv[1])
else:
    pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kill -9 on this system")
