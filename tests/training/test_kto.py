"""KTO in the trainer: its loss against the formula, its baseline across a resume."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from training.tiny_runs import make_config, make_model, make_pairs

from reprdpo.files import read_jsonl
from reprdpo.training import ReprDPOTrainer
from reprdpo.training.checkpoint import load_state
from reprdpo.training.trainer import STATE_FILE


def make_trainer(folder: Path, **settings: object) -> ReprDPOTrainer:
    fixed = {"loss_type": "kto", "confidence_source": "fixed", "fixed_confidence": 0.8, "beta": 0.5}
    config = make_config(str(folder), packing="padded", **(fixed | settings))
    return ReprDPOTrainer(make_model(), config, train_dataset=make_pairs())


def logps(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    labels = batch["labels"]
    token = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (token * (labels != -100)).sum(1)


@pytest.mark.parametrize(("z", "nearer"), [(0.0, 0.0), (0.7, 0.0), (0.7, 5.0)])
def test_the_loss_is_the_formula_and_the_next_baseline_the_mean_log_ratio(
    tmp_path: Path, z: float, nearer: float
) -> None:
    """The last reference is likelier than the policy: the baseline stays at 0."""
    trainer = make_trainer(tmp_path)
    (batch,) = next(iter(trainer.get_train_dataloader()))
    model, kto = trainer.model, trainer._kto
    assert kto is not None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    kto.z = torch.tensor(z)
    batch |= {name: batch[name] + nearer for name in ("ref_chosen_logps", "ref_rejected_logps")}
    reference = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
    ratio = logps(model, batch).detach() - reference
    a, b = ratio.chunk(2)
    beta, gamma = 0.5, 0.8

    def value(up: Tensor, down: Tensor) -> Tensor:
        return torch.sigmoid(-beta * (up - z)) + torch.sigmoid(beta * (down - z))

    expected = (gamma * value(a, b) + (1 - gamma) * value(b, a)).mean()
    model.train()
    loss = trainer.compute_loss(model, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert kto.z.item() == pytest.approx(max(0.0, ratio.mean().item()), rel=1e-4, abs=1e-6)
    means = trainer._windows[True].drain(lambda value: value)
    assert means["rewards/chosen"] == pytest.approx(beta * a.mean().item(), rel=1e-4, abs=1e-6)


def test_the_baseline_survives_a_resume(tmp_path: Path) -> None:
    settings = {"fixed_confidence": 1.0, "beta": 0.1, "max_steps": 7, "save_strategy": "steps", "save_steps": 5}

    def losses() -> list[float]:
        lines = [line for _, line in read_jsonl(tmp_path / "metrics.jsonl")]
        return [line["loss"] for line in lines if "loss" in line]

    make_trainer(tmp_path, **settings).train()
    straight, checkpoint = losses(), tmp_path / "checkpoint-5"
    assert load_state(checkpoint / STATE_FILE)["kto"] > 0.1
    make_trainer(tmp_path, **settings).train(resume_from_checkpoint=str(checkpoint))
    assert losses() == straight
