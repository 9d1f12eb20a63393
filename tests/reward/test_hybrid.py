"""HybridReward: scores, the loss and gamma by their formulas, saving and reloading, the base it belongs to."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reward_cases import GATES, by_formula, make_reward

from reprdpo import __version__
from reprdpo.errors import UserError
from reprdpo.reward import HybridReward, RewardFitConfig


@pytest.mark.parametrize("gate", GATES)
def test_scores_by_the_formula(gate: str) -> None:
    reward = make_reward(gate)
    hidden = [torch.randn(5, 7, 16) for _ in range(3)]
    index = torch.tensor([0, 6, 3, 2, 6])
    pooled = torch.stack([h[torch.arange(5), index] for h in hidden], dim=1)
    for out in (reward(hidden, index), reward(pooled)):
        torch.testing.assert_close(out.reward.double(), by_formula(reward, pooled), rtol=1e-5, atol=1e-5)
        assert out.layer_scores.shape == out.layer_gate.shape == (5, 3)


def test_loss_and_confidence_by_the_formula() -> None:
    reward = make_reward()
    chosen, rejected = torch.tensor([1.0, 0.2]), torch.tensor([0.5, 0.9])
    nll = reward.nll(chosen, rejected, margin=1.0).item()
    assert nll == pytest.approx((math.log1p(math.exp(0.5)) + math.log1p(math.exp(1.7))) / 2)
    gamma = reward.confidence(chosen, rejected)
    torch.testing.assert_close(gamma, torch.sigmoid(1.5 * (chosen - rejected)))
    reward.squash = True
    squashed = torch.sigmoid(1.5 * (chosen.sigmoid() - rejected.sigmoid()))
    torch.testing.assert_close(reward.confidence(chosen, rejected), squashed)
    assert reward.confidence(chosen, rejected, floor=0.48).min() == pytest.approx(0.48)
    assert reward.confidence(chosen, rejected, reduce="batch").unique().numel() == 1
    assert not reward.confidence(chosen.requires_grad_(), rejected).requires_grad


@pytest.mark.parametrize("gate", GATES)
def test_reloaded_reward_scores_bit_for_bit(gate: str, tmp_path: Path) -> None:
    states = torch.randn(2, 20, 3, 16)
    config = RewardFitConfig(gate=gate, pool="mean", squash=True)  # type: ignore[arg-type]
    reward, report = HybridReward.fit(states[0] + 1, states[1], config)
    reward.save_pretrained(tmp_path / "reward")
    loaded = HybridReward.from_pretrained(tmp_path / "reward")
    for ours, theirs in zip(reward(states[0]), loaded(states[0]), strict=True):
        assert torch.equal(ours, theirs)
    assert (loaded.gate, loaded.alpha, loaded.squash) == (gate, report.alpha, True)
    assert loaded.metadata == reward.metadata
    assert sorted(p.name for p in (tmp_path / "reward").iterdir()) == ["reward.json", "reward.safetensors"]


def test_metadata_names_what_the_reward_needs(make_model: Callable[..., Any], tmp_path: Path) -> None:
    states = torch.randn(2, 20, 3, 16)
    reward, report = HybridReward.fit(states[0] + 1, states[1], base=make_model())
    reward.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "reward.json").read_text())["metadata"]
    assert (saved["model_type"], saved["num_layers"], saved["hidden_size"]) == ("llama", 3, 16)
    assert (saved["pool"], saved["version"], saved["base_model"]) == ("last", __version__, "LlamaForCausalLM")
    assert "standardised" in saved["scaling"]
    assert saved["fit"]["gated_accuracy"] == report.gated_accuracy
    assert saved["fit"]["layer_accuracy"] == report.layer_accuracy


def test_base_is_checked(make_model: Callable[..., Any]) -> None:
    base = make_model()
    states = torch.randn(2, 20, 3, 16)
    reward, _ = HybridReward.fit(states[0] + 1, states[1], base=base)
    reward.check_base(base)
    reward.check_base(make_model())
    trained = make_model()
    with torch.no_grad():
        trained.model.norm.weight += 1
    with pytest.raises(UserError, match="other weights"):
        reward.check_base(trained)
    reward.check_base(trained, allow_descendant=True)
    with pytest.raises(UserError, match=r"model_type llama .* has gpt_neox; fit a reward"):
        reward.check_base(make_model("gpt_neox"), allow_descendant=True)
    with pytest.raises(UserError, match="num_layers 2"):
        make_reward(L=2).check_base(base)
    with pytest.raises(UserError, match="hidden_size 8"):
        make_reward(D=8).check_base(base)
    make_reward().check_base(base)
    with pytest.raises(UserError, match="3 layers of size 16; give the outputs"):
        HybridReward.fit(*torch.randn(2, 20, 4, 16), base=base)


def _change(path: Path, **values: Any) -> None:
    config = json.loads(path.read_text())
    for name, value in values.items():
        if value is None:
            del config[name]
        else:
            config[name] = value
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "reward.safetensors").unlink(), "reward.safetensors: no such file"),
        (lambda d: (d / "reward.json").unlink(), "reward.json: no such file"),
        (lambda d: (d / "reward.json").write_text("{"), "reward.json: is not JSON"),
        (lambda d: (d / "reward.json").write_text("[]"), "is not the configuration of a reward"),
        (lambda d: _change(d / "reward.json", format=99), "is not the configuration of a reward"),
        (lambda d: _change(d / "reward.json", gate="vote"), "does not fit together"),
        (lambda d: _change(d / "reward.json", alpha=None), "does not fit together"),
        (lambda d: _change(d / "reward.json", metadata={"num_layers": 3}), "does not fit together"),
        (lambda d: (d / "reward.safetensors").write_bytes(b"torn"), "a torn save"),
        (lambda d: make_reward("static").save_pretrained(d / "b"), None),
    ],
)
def test_damaged_files_refused(damage: Callable[[Path], Any], message: str | None, tmp_path: Path) -> None:
    make_reward().save_pretrained(tmp_path)
    damage(tmp_path)
    if message is None:
        (tmp_path / "b" / "reward.safetensors").replace(tmp_path / "reward.safetensors")
        message = "a torn save"
    with pytest.raises(UserError, match=message):
        HybridReward.from_pretrained(tmp_path)
