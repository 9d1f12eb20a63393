"""kill -9 at any moment, start the same command again: the same curve, bit for bit."""

import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from safetensors.torch import load_file
from test_trainer import logged
from transformers import TrainerCallback

from reprdpo.training import ReprDPOTrainer, last_checkpoint

STEPS = 40


class KilledAt(TrainerCallback):
    """kill -9 by the process itself, amid the step ``number``: after one of its micro-batches, or at its end."""

    def __init__(self, number: int) -> None:
        self._number = number

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._number % 2 and state.global_step + 1 == self._number:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._number:
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: str, steps: str, killed_at: str = "0") -> None:
    """One command that starts or goes on; dropout and two shuffles of the data draw on the random state.

    In few steps LoRA, packed rows and workers that load the data are there as well.
    """
    settings: dict[str, Any] = {}
    if int(steps) < STEPS:
        settings = {"packing": "prefix", "dataloader_num_workers": 2}
        settings |= {"use_peft": True, "lora_r": 4, "lora_dropout": 0.2, "lora_target_modules": ["q_proj", "lm_head"]}
    config = tiny_runs.make_config(
        folder,
        max_steps=int(steps),
        save_strategy="steps",
        save_steps=3,
        save_total_limit=2,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        max_tokens_per_device=24,
        logging_steps=2,
        disable_dropout=False,
        **settings,
    )
    torch.manual_seed(5)  # the adapters are drawn
    trainer = ReprDPOTrainer(
        tiny_runs.make_model(attention_dropout=0.3),
        config,
        train_dataset=tiny_runs.make_pairs(),
        reward=tiny_runs.make_reward(),
        callbacks=[KilledAt(int(killed_at))],
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    trainer.save_model(f"{folder}/model")


def start(folder: Path, steps: int = STEPS, killed_at: int = 0) -> subprocess.Popen[bytes]:
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder), str(steps), str(killed_at)]
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
    same(tmp_path, "model.safetensors", told)


@pytest.mark.slow
def test_killed_at_every_step_with_adapters_packing_and_workers(tmp_path: Path) -> None:
    """Each start is killed one step further: before the first checkpoint, between two and right at one."""
    if importlib.util.find_spec("peft") is None:
        pytest.skip("needs peft")
    steps = 8
    straight = start(tmp_path / "straight", steps)
    for number in range(1, steps + 1):
        killed = start(tmp_path / "killed", steps, killed_at=number)
        _, errors = killed.communicate(timeout=120)
        assert killed.returncode == -signal.SIGKILL, errors.decode()
    finish(start(tmp_path / "killed", steps))
    finish(straight)
    assert len(logged(tmp_path / "straight")) == steps // 2 + 1
    same(tmp_path, "adapter_model.safetensors")


def same(folder: Path, weights: str, told: str = "") -> None:
    """The log, the weights and the reward of the straight run and of the killed one."""
    assert logged(folder / "killed") == logged(folder / "straight"), told
    for name in (weights, "reward/reward.safetensors"):
        ends = [load_file(folder / run / "model" / name) for run in ("straight", "killed")]
        assert all(ends[0][key].equal(ends[1][key]) for key in ends[0]), f"{told}: {name}"


if __name__ == "__main__":
    main(*sys.argv[1:])
else:
    pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kill -9 on this system")
