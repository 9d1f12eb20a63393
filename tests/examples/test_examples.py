"""Every example runs from its command line on a tiny model and learns what it is for."""

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, LlamaForCausalLM
from transformers.models.gemma2 import Gemma2ForCausalLM

from reprdpo.data.sandbox.tokenizer import build_tokenizer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PAIRS = [
    {"prompt": f"say {word} to me", "chosen": f" {word} {word} yes", "rejected": f" no{' not' * count} {word}"}
    for count, word in enumerate(("one", "two", "three", "four"))
]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return str(path)


@pytest.fixture(params=["llama", "gemma2"])
def model_dir(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A model with a plain head, and one with a softcap on tied embeddings."""
    tokenizer = build_tokenizer(text for pair in PAIRS for text in pair.values())
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if request.param == "llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    else:
        model = Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=16, final_logit_softcapping=3.0))
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize("model_dir", ["llama"], indirect=True)
def test_plain_loop(model_dir: str, pairs: str) -> None:
    losses = load("plain_loop").main(
        [model_dir, pairs, "--batch-size", "3", "--epochs", "4", "--beta", "0.5", "--lr", "3e-3"]
    )
    assert len(losses) == 4 * math.ceil(len(PAIRS) / 3)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5), "the policy starts as its own reference"
    assert losses[-2] < 0.3


def test_trl_trainer_agrees_with_trls_own_loss(model_dir: str, pairs: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    example = load("trl_dpo")
    trainer = example.main([model_dir, pairs, str(tmp_path / "out"), "--max-steps", "2"])
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert {"rewards/margins", "logps/chosen"} <= logged[0].keys()
    assert logged[1]["logps/chosen"] != logged[0]["logps/chosen"]
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    model = trainer.model.train()
    found, wanted = {}, {}
    for grads, cls in ((found, example.FusedDPOTrainer), (wanted, trl.DPOTrainer)):
        model.zero_grad()
        loss = cls.compute_loss(trainer, model, dict(inputs))
        (loss * 3).backward()
        grads.update({name: parameter.grad.clone() for name, parameter in model.named_parameters()}, loss=loss.detach())
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=1e-5, msg=lambda text, at=name: at + text)


def test_grpo(model_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    example = load("grpo")
    history = example.main([model_dir, "say one to me", "say two to me", "--rounds", "2", "--max-new-tokens", "6"])
    assert len(history) == 2
    assert all(0 <= reward <= 1 for reward in history)
    assert "mean reward" in capsys.readouterr().out


@pytest.mark.parametrize("model_dir", ["gemma2"], indirect=True)
def test_grpo_learns_and_its_gradient_is_that_of_eager_logits(model_dir: str) -> None:
    example = load("grpo")
    tokenizer = example.AutoTokenizer.from_pretrained(model_dir)
    model = example.AutoModelForCausalLM.from_pretrained(model_dir).eval()
    batch = example.sample(model, tokenizer, "say three to me", 5, 6)
    scored_GT, advantages_G = batch["labels"] != -100, torch.linspace(-1, 1, 5)
    old_GT = example.token_logps(model, batch).detach() + 0.3 * torch.randn(scored_GT.shape)
    logits_GTV = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    eager_GT = logits_GTV.log_softmax(-1).gather(-1, batch["labels"].clamp(min=0)[..., None]).squeeze(-1)
    eager_GT = torch.where(scored_GT, eager_GT, 0)
    gradients = []
    for logps_GT in (example.token_logps(model, batch), eager_GT):
        model.zero_grad()
        example.grpo_loss(logps_GT, old_GT, advantages_G, scored_GT).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)
    history = example.train(
        model,
        tokenizer,
        ["say one to me"],
        reward=lambda text: text.count(" yes"),
        rounds=12,
        lr=1e-2,
        max_new_tokens=5,
    )
    assert sum(history[-3:]) > sum(history[:3]) + 1
