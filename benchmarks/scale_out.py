"""How two processes' throughput compares with one's: ``python -m benchmarks.scale_out`` (CPU, gloo, a thread each).

Beside it stands the machine's own ceiling: two runs that know nothing of each other, at the same time.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from reprdpo.training import ReprDPOConfig, ReprDPOTrainer

STEPS, WARM_UP = 9, 3
# Pairs a process and step, and tokens a sequence: steps of an eighth of a second and of training's length.
BATCHES = ((2, 96), (4, 256))


def train(folder: str, pairs: int, length: int) -> None:
    """A few steps of DPO on a random model of four million parameters in its layers."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=2,
    )
    ids = torch.randint(3, 1024, (64, 2, length)).tolist()
    rows = [
        {
            "chosen_input_ids": chosen,
            "chosen_response_start": length // 2,
            "rejected_input_ids": rejected,
            "rejected_response_start": length // 2,
            "pair_id": number,
            "ref_chosen_logps": -300.0,
            "ref_rejected_logps": -300.0,
        }
        for number, (chosen, rejected) in enumerate(ids)
    ]
    settings = ReprDPOConfig(
        output_dir=folder,
        use_cpu=True,
        confidence_source="fixed",
        max_steps=STEPS,
        logging_steps=1,
        per_device_train_batch_size=pairs,
        save_strategy="no",
        disable_tqdm=True,
    )
    ReprDPOTrainer(LlamaForCausalLM(config), settings, train_dataset=Dataset.from_list(rows)).train()


def pairs_per_second(folder: Path, processes: int, pairs: int) -> float:
    """From the median step after the first few."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return processes * pairs / statistics.median(line["cost/step_seconds"] for line in lines[WARM_UP:])


def compare(pairs: int, length: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, environment = Path(name), {**os.environ, "OMP_NUM_THREADS": "1"}

        def start(run: str, processes: int) -> subprocess.Popen[bytes]:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            command = [sys.executable, *(launcher if processes > 1 else []), "-m", "benchmarks.scale_out"]
            arguments = [str(folder / run), str(pairs), str(length)]
            return subprocess.Popen([*command, *arguments], env=environment, stdout=subprocess.DEVNULL)

        for runs, processes in ((["one"], 1), (["first", "second"], 1), (["two"], 2)):
            for process in [start(run, processes) for run in runs]:
                if process.wait() != 0:
                    raise SystemExit(process.returncode)
        one = pairs_per_second(folder / "one", 1, pairs)
        apart = sum(pairs_per_second(folder / run, 1, pairs) for run in ("first", "second"))
        two = pairs_per_second(folder / "two", 2, pairs)
    print(f"{pairs} pairs of 2 x {length} tokens a process and step")
    print(f"  one process            {one:7.2f} pairs/s")
    print(f"  two independent runs   {apart:7.2f} pairs/s  {apart / one:.2f} x")
    print(f"  two processes          {two:7.2f} pairs/s  {two / one:.2f} x")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        for batch in BATCHES:
            compare(*batch)
    else:
        train(sys.argv[1], *map(int, sys.argv[2:]))
