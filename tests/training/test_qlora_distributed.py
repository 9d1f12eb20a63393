"""QLoRA on two processes over gloo: the losses, adapters and reward of one process with all the pairs."""

from pathlib import Path
from typing import Any

import distributed
import pytest
import tiny_runs
import torch
from test_trainer import logged, untied

from reprdpo.models import Quantization, load_causal_lm
from reprdpo.training import ReprDPOTrainer

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.slow

HELD = {
    "4bit": Quantization(load_in_4bit=True),
    "nested": Quantization(load_in_4bit=True, bnb_4bit_quant_type="fp4", use_bnb_nested_quant=True),
    "8bit": Quantization(load_in_8bit=True),
}
LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "up_proj", "lm_head"]}


def train(folder: str, batch: int) -> dict[str, dict[str, Any]]:
    """What was trained, by how the base is held."""
    ends = {}
    for name, held in HELD.items():
        reward = tiny_runs.make_reward()
        settings = {"optim": "sgd", "per_device_train_batch_size": batch, "allow_reward_descendant": True}
        config = tiny_runs.make_config(f"{folder}/{name}", **LORA, **settings)
        torch.manual_seed(1)
        model = load_causal_lm(Path(folder).parent / "base", quantization=held)
        pairs = tiny_runs.make_pairs()
        trainer = ReprDPOTrainer(model, config, pairs, pairs.select(range(5)), reward=reward)
        trainer.train()
        adapters = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        parameters = {name: p.detach().clone() for name, p in reward.named_parameters()}
        evaluated = {"evaluated": torch.tensor(trainer.evaluate()["eval_loss"])}
        ends[name] = adapters | parameters | evaluated
    return ends


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    tiny_runs.make_model().save_pretrained(tmp_path / "base")
    ranks = distributed.run(train, str(tmp_path / "two"), 4)
    alone = train(str(tmp_path / "one"), 8)
    for held, wanted in alone.items():
        # Eight bits also quantise what is multiplied, by its largest value in the batch.
        tolerance = 0.03 if held == "8bit" else 2e-5
        assert ranks[0][held].keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.equal(ranks[0][held][name], ranks[1][held][name]), (held, name)
            torch.testing.assert_close(ranks[0][held][name], value, rtol=0, atol=tolerance)
        lines = [untied(logged(tmp_path / run / held)) for run in ("two", "one")]
        for line, other in zip(*lines, strict=True):
            assert line == pytest.approx({**other, "epoch": line["epoch"]}, abs=10 * tolerance)
