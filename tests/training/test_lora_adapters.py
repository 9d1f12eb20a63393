"""LoRA by settings, on whole and on quantised models: what trains, what is saved, what is refused."""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from test_trainer import logged
from torch import nn

from reprdpo import models
from reprdpo.errors import UserError
from reprdpo.models import Quantization, base_fingerprint, load_causal_lm
from reprdpo.training import OnlineDPOConfig, ReprDPOTrainer, ReprSFTConfig, ReprSFTTrainer, adapters, reference_logps

peft = pytest.importorskip("peft")
bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")

LORA: dict[str, Any] = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "lm_head"]}
HELD = {
    "4bit": Quantization(load_in_4bit=True),
    "nested": Quantization(load_in_4bit=True, bnb_4bit_quant_type="fp4", use_bnb_nested_quant=True),
    "8bit": Quantization(load_in_8bit=True),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    tiny_runs.make_model().save_pretrained(folder)
    return folder


def trainer_of(model: Any, folder: Path, reward: Any = None, **settings: Any) -> ReprDPOTrainer:
    config = tiny_runs.make_config(str(folder), **settings)
    reward = reward or tiny_runs.make_reward()
    return ReprDPOTrainer(model, config, train_dataset=tiny_runs.make_pairs(), reward=reward)


def test_settings_make_the_adapters_that_peft_would(tmp_path: Path) -> None:
    torch.manual_seed(1)
    trainer_of(tiny_runs.make_model(), tmp_path / "settings", **LORA).train()
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "lm_head"]
    )
    torch.manual_seed(1)
    trainer_of(peft.get_peft_model(tiny_runs.make_model(), lora), tmp_path / "by hand").train()
    wanted = [line["loss"] for line in logged(tmp_path / "by hand")]
    assert [line["loss"] for line in logged(tmp_path / "settings")] == wanted
    assert len(set(wanted)) > 1


def test_what_is_saved_loads_as_what_was_trained(saved: Path, tmp_path: Path) -> None:
    trainer = trainer_of(load_causal_lm(saved), tmp_path, **LORA)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    assert not list((tmp_path / "model").glob("model*.safetensors"))
    found = load_causal_lm(tmp_path / "model")
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        logits = found(ids).logits
        assert torch.equal(logits, trainer.model.eval()(ids).logits)
        assert not torch.allclose(logits, load_causal_lm(saved)(ids).logits, atol=1e-3)
    assert base_fingerprint(found) == base_fingerprint(load_causal_lm(saved))


def test_a_resumed_run_is_the_same_bit_for_bit(saved: Path, tmp_path: Path) -> None:
    settings = LORA | {"save_strategy": "steps", "save_steps": 2}
    torch.manual_seed(1)
    trainer_of(load_causal_lm(saved), tmp_path, **settings).train()
    wanted = [line["loss"] for line in logged(tmp_path)]
    torch.manual_seed(2)
    again = trainer_of(load_causal_lm(saved), tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [line["loss"] for line in logged(tmp_path)] == wanted
    with pytest.raises(UserError, match="was trained with lora_r 4, not 8"):
        trainer_of(load_causal_lm(saved), tmp_path, **settings | {"lora_r": 8}).train(resume_from_checkpoint=True)


def test_the_reference_is_the_base_under_adapters_that_have_moved() -> None:
    """As in the later rounds of online DPO."""
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_runs.make_model(), lora).eval()
    plain, pairs = tiny_runs.make_model(), tiny_runs.make_pairs()
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        moved = model(ids).logits
    assert not torch.allclose(moved, plain(ids).logits, atol=0.1)
    found, wanted = (reference_logps(each, pairs, pad_token_id=0, progress=False) for each in (model, plain))
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        assert found[name][:] == pytest.approx(wanted[name][:], abs=1e-5)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, moved)


def test_supervised_fine_tuning_takes_adapters_too(tmp_path: Path) -> None:
    rows = [
        {"input_ids": row["chosen_input_ids"], "response_start": row["chosen_response_start"]}
        for row in tiny_runs.make_pairs()
    ]
    config = tiny_runs.make_config(str(tmp_path), ReprSFTConfig, **LORA)
    trainer = ReprSFTTrainer(tiny_runs.make_model(), config, tiny_runs.Dataset.from_list(rows))
    trainer.train()
    assert {name.split(".")[-3] for name, p in trainer.model.named_parameters() if p.requires_grad} == {
        "lora_A",
        "lora_B",
    }


def test_what_cannot_be_trained_is_refused_by_name(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="lora_r: says nothing without LoRA"):
        tiny_runs.make_config(str(tmp_path), lora_r=8)
    with pytest.raises(UserError, match=r"lora_dropout: 0\.1, but disable_dropout"):
        tiny_runs.make_config(str(tmp_path), use_peft=True, lora_dropout=0.1)
    with pytest.raises(UserError, match="lora_r: got 0"):
        tiny_runs.make_config(str(tmp_path), OnlineDPOConfig, use_peft=True, lora_r=0)
    with pytest.raises(UserError, match=r"lora_target_modules: .*w_proj"):
        trainer_of(tiny_runs.make_model(), tmp_path, use_peft=True, lora_target_modules=["w_proj"])
    with pytest.raises(UserError, match="use_peft: the model has adapters already"):
        trainer_of(peft.get_peft_model(tiny_runs.make_model(), peft.LoraConfig()), tmp_path, use_peft=True)
    with pytest.raises(UserError, match="all parameters are frozen"):
        trainer_of(tiny_runs.make_model().requires_grad_(False), tmp_path)
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"use_peft: needs peft.*pip install 'reprdpo\[peft\]'"):
        trainer_of(tiny_runs.make_model(), tmp_path, use_peft=True)


def test_quantisation_is_refused_where_it_cannot_be(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="load_in_4bit: cannot be together with load_in_8bit"):
        Quantization(load_in_4bit=True, load_in_8bit=True)
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"load_in_8bit: needs bitsandbytes.*pip install 'reprdpo\[peft\]'"):
        load_causal_lm(saved, quantization=Quantization(load_in_8bit=True))


def whole(model: Any) -> Any:
    """A plain model with the numbers that the quantised one's weights stand for."""
    plain = tiny_runs.make_model()
    identity: Callable[[int], torch.Tensor] = torch.eye
    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
            with torch.no_grad():
                plain.get_submodule(name).weight.copy_(module(identity(module.in_features)).T)
    return plain


@bitsandbytes
@pytest.mark.parametrize("held", HELD)
def test_a_quantised_policy_steps_as_the_plain_one_it_stands_for(held: str, saved: Path, tmp_path: Path) -> None:
    """Loss, gamma, the reward's own update and the adapters' gradients, the head's among them."""
    quantised = load_causal_lm(saved, quantization=HELD[held])
    plain = whole(quantised)
    changed = (
        plain.model.layers[0].mlp.up_proj.weight - tiny_runs.make_model().model.layers[0].mlp.up_proj.weight
    ).abs()
    assert changed.max() > 1e-4
    ends = {}
    for name, model in (("plain", plain), ("quantised", quantised)):
        torch.manual_seed(1)
        reward = tiny_runs.make_reward()
        settings = LORA | {"allow_reward_descendant": True, "lora_target_modules": ["q_proj", "up_proj", "lm_head"]}
        trainer = trainer_of(model, tmp_path / name, reward, optim="sgd", max_steps=3, **settings)
        trainer.train()
        parameters = [p.detach() for p in trainer.model.parameters() if p.requires_grad] + list(reward.parameters())
        ends[name] = (logged(tmp_path / name), parameters)
    # Eight bits quantise what is multiplied as well.
    tolerance = 0.03 if held == "8bit" else 2e-5
    assert ends["quantised"][0][0]["loss"] == pytest.approx(math.log(2), abs=tolerance)
    for line, other in zip(ends["quantised"][0], ends["plain"][0], strict=True):
        for metric in ("loss", "hybrid/margins", "rewards/margins", "logps/chosen"):
            assert line[metric] == pytest.approx(other[metric], rel=tolerance, abs=tolerance), metric
    for got, wanted in zip(ends["quantised"][1], ends["plain"][1], strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)


@bitsandbytes
def test_quantised_bases_are_told_apart(saved: Path) -> None:
    model = load_causal_lm(saved, quantization=HELD["4bit"])
    first = base_fingerprint(model)
    with torch.no_grad():
        model(torch.arange(3, 9)[None])  # bitsandbytes would repack its weights here
    assert base_fingerprint(model) == first
    assert base_fingerprint(load_causal_lm(saved, quantization=HELD["4bit"])) == first
    assert base_fingerprint(peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))) == first
    assert len({first, base_fingerprint(load_causal_lm(saved)), *(fingerprint(saved, held) for held in HELD)}) == 4
    scales = model.get_base_model() if hasattr(model, "get_base_model") else model
    scales.model.layers[0].mlp.up_proj.weight.quant_state.absmax[0] *= 2
    assert base_fingerprint(model) != first


def fingerprint(saved: Path, held: str) -> str:
    return base_fingerprint(load_causal_lm(saved, quantization=HELD[held]))


@bitsandbytes
def test_a_quantised_model_counts_all_its_weights(saved: Path) -> None:
    found = models.matmul_parameters(load_causal_lm(saved, quantization=HELD["4bit"]))
    assert found == models.matmul_parameters(load_causal_lm(saved))


@bitsandbytes
def test_a_quantised_model_is_trained_through_adapters_on_a_reward_of_its_own(saved: Path, tmp_path: Path) -> None:
    model: nn.Module = load_causal_lm(saved, quantization=HELD["4bit"])
    with pytest.raises(UserError, match="use_peft: a quantised model"):
        trainer_of(model, tmp_path, allow_reward_descendant=True)
    with pytest.raises(UserError, match="quantised from that base"):
        trainer_of(model, tmp_path, **LORA)
    logps = reference_logps(model, tiny_runs.make_pairs(), pad_token_id=0, progress=False)["ref_chosen_logps"][:]
    whole_logps = reference_logps(whole(model), tiny_runs.make_pairs(), pad_token_id=0, progress=False)
    assert logps == pytest.approx(whole_logps["ref_chosen_logps"][:], abs=1e-4)
