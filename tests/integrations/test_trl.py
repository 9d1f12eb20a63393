"""TRL's trainer with the method in it, against TRL's own, the formulas, and this library's trainer."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, load_dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, HfArgumentParser, MixtralConfig, MixtralForCausalLM, ProcessorMixin

trl = pytest.importorskip("trl")

from integrations.conftest import PAIRS, as_chat  # noqa: E402

from reprdpo import cli  # noqa: E402
from reprdpo.data import load_preferences  # noqa: E402
from reprdpo.errors import UserError  # noqa: E402
from reprdpo.files import read_json  # noqa: E402
from reprdpo.integrations.trl import (  # noqa: E402
    RepresentationDPOConfig,
    RepresentationDPOTrainer,
)
from reprdpo.models import load_causal_lm, load_tokenizer  # noqa: E402
from reprdpo.reward import HybridReward  # noqa: E402
from reprdpo.training import ReprDPOConfig, ReprDPOTrainer  # noqa: E402

Make = Callable[..., Any]
TRL_METRICS = {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"}
TRL_METRICS |= {"logps/rejected", "logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy", "num_tokens"}
HYBRID_METRICS = {f"hybrid/{name}" for name in ("chosen", "rejected", "accuracies", "margins", "nll")}
HYBRID_METRICS |= {f"confidence/{name}" for name in ("mean", "std", "min", "max")}


def logged(trainer: Any) -> list[dict[str, Any]]:
    """The log lines of training and evaluation, without what they took."""
    took = ("_runtime", "_per_second", "train_", "total_flos")
    lines = [
        {name: value for name, value in line.items() if not any(part in name for part in took)}
        for line in trainer.state.log_history
    ]
    return [line for line in lines if "loss" in line or "eval_loss" in line]


def parameters(module: torch.nn.Module) -> list[Tensor]:
    return [value.detach().clone() for value in module.state_dict().values()]


def run(cls: type, config: Any, **arguments: Any) -> Any:
    trainer = cls(args=config, **arguments)
    trainer.train()
    return trainer


def reference(model_dir: str) -> Any:
    """A reference some way from the policy, so that no reward is 0 but for rounding."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss_type": "ipo", "precompute_ref_log_probs": True, "per_device_train_batch_size": 3},
        {"loss_type": "hinge", "beta": 2.0, "gradient_accumulation_steps": 2, "logging_steps": 2, "max_steps": 4},
        {"loss_type": ["apo_zero", "apo_down", "sigmoid"], "loss_weights": [0.5, 2.0, 1.0]},
        {"loss_type": "robust", "label_smoothing": 0.2},
        {"max_length": 6, "precompute_ref_log_probs": True, "gradient_checkpointing": False},
        {"sync_ref_model": True, "ref_model_sync_steps": 1},
        {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4},
    ],
    ids=lambda settings: "-".join(settings) or "default",
)
def test_without_a_reward_it_is_trls_trainer(
    make_config: Make, model_dir: str, pairs: Dataset, settings: dict[str, Any]
) -> None:
    """Every logged number, over several steps, and the weights after them."""
    data = {"train_dataset": pairs, "eval_dataset": pairs}
    theirs, ours = (
        run(
            cls,
            make_config(trl.DPOConfig, cls.__name__, **settings),
            model=model_dir,
            ref_model=reference(model_dir),
            **data,
        )
        for cls in (trl.DPOTrainer, RepresentationDPOTrainer)
    )
    for wanted, got in zip(logged(theirs), logged(ours), strict=True):
        assert got == pytest.approx(wanted, rel=1e-3, abs=1e-4)
        assert {name.removeprefix("eval_") for name in got} >= TRL_METRICS
    for wanted, got in zip(parameters(theirs.model), parameters(ours.model), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


def test_a_mixture_keeps_trls_auxiliary_loss(make_config: Make, tokenizer: Any, pairs: Dataset, tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        initializer_range=0.3,
        router_aux_loss_coef=0.5,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral")
    tokenizer.save_pretrained(tmp_path / "mixtral")
    model = str(tmp_path / "mixtral")
    lines = [
        logged(
            run(
                cls,
                make_config(trl.DPOConfig, cls.__name__, max_steps=2),
                model=model,
                ref_model=reference(model),
                train_dataset=pairs,
            )
        )
        for cls in (trl.DPOTrainer, RepresentationDPOTrainer)
    ]
    assert lines[1][0]["aux_loss"] > 0
    for wanted, got in zip(*lines, strict=True):
        assert got == pytest.approx(wanted, rel=1e-3, abs=1e-4)


def logps(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Summed log-probs of a batch of TRL's collator, by log_softmax over whole logits."""
    tokens = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
    scored = batch["completion_mask"][:, 1:]
    chosen, rejected = (tokens.gather(-1, batch["input_ids"][:, 1:, None])[..., 0] * scored).sum(1).chunk(2)
    return chosen, rejected


def cdpo(model: Any, batch: dict[str, Tensor], gamma: Any, beta: float) -> Tensor:
    chosen, rejected = logps(model, batch)
    delta = beta * ((chosen - batch["ref_chosen_logps"]) - (rejected - batch["ref_rejected_logps"]))
    return (-gamma * F.logsigmoid(delta) - (1 - gamma) * F.logsigmoid(-delta)).mean()


SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "learning_rate": 0.05}


def whole_batch(trainer: Any) -> dict[str, Tensor]:
    return trainer.data_collator(list(trainer.train_dataset))


def test_label_smoothing_is_conservative_dpo(make_config: Make, model_dir: str, pairs: Dataset) -> None:
    """The formula that TRL's own sigmoid loss leaves out: gamma = 1 - eps."""
    settings = {**SGD, "beta": 0.5, "precompute_ref_log_probs": True, "per_device_train_batch_size": len(pairs)}
    config = make_config(trl.DPOConfig, label_smoothing=0.1, **settings)
    trainer = run(RepresentationDPOTrainer, config, model=model_dir, train_dataset=pairs)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    batch = whole_batch(trainer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    lines = logged(trainer)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    for line in lines:
        loss = cdpo(model, batch, 0.9, 0.5)
        assert line["loss"] == pytest.approx(loss.item(), abs=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize(("pool", "conversational"), [("last", False), ("last", True), ("mean", False), ("mean", True)])
def test_with_a_reward_policy_and_reward_follow_the_formulas(
    make_config: Make,
    make_reward: Make,
    model_dir: str,
    pairs: Dataset,
    chats: Dataset,
    pool: str,
    conversational: bool,
) -> None:
    """Eq. 5 under Eq. 8 for the policy, Eq. 7 for the reward, read at EOS whatever the chat template puts after it."""
    settings = {**SGD, "beta": 0.5, "precompute_ref_log_probs": True, "per_device_train_batch_size": len(pairs)}
    reward, follower = make_reward(pool), make_reward(pool)
    data = chats if conversational else pairs
    config = make_config(trl.DPOConfig, **settings)
    trainer = run(RepresentationDPOTrainer, config, model=model_dir, train_dataset=data, reward=reward)
    model, batch = AutoModelForCausalLM.from_pretrained(model_dir), whole_batch(trainer)
    eos = (batch["input_ids"] == trainer.processing_class.eos_token_id).long()
    assert (batch["input_ids"][0, batch["attention_mask"][0].sum() - 1] == 1) == (not conversational)
    last = (torch.arange(eos.shape[1]) * eos * batch["completion_mask"]).amax(1)
    policy, adam = torch.optim.SGD(model.parameters(), lr=0.05), torch.optim.Adam(follower.parameters(), lr=1e-3)
    for line in logged(trainer):
        with torch.no_grad():
            masked = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
            layers = torch.stack(model(**masked, output_hidden_states=True).hidden_states[1:], dim=2)
        first = last if pool == "last" else torch.zeros_like(last)
        states = torch.stack([row[a : b + 1].mean(0) for row, a, b in zip(layers, first, last, strict=True)])
        chosen, rejected = follower(states).reward.chunk(2)
        gamma = torch.sigmoid(follower.alpha * (chosen - rejected)).detach()
        loss = cdpo(model, batch, gamma, 0.5)
        assert line["loss"] == pytest.approx(loss.item(), abs=1e-4)
        assert line["confidence/mean"] == pytest.approx(gamma.mean().item(), abs=1e-4)
        assert line["hybrid/margins"] == pytest.approx((chosen - rejected).mean().item(), abs=1e-3)
        assert set(line) >= TRL_METRICS | HYBRID_METRICS
        for step, objective in ((policy, loss), (adam, -F.logsigmoid(chosen - rejected - 1.0).mean())):
            step.zero_grad()
            objective.backward()
            step.step()
    for got, expected in zip(reward.parameters(), follower.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


def test_the_state_is_read_at_the_responses_own_last_eos_or_its_last_token(
    make_config: Make, make_reward: Make, model_dir: str, pairs: Dataset
) -> None:
    """Of responses cut before their EOS, whose prompt has one, too."""
    trainer = RepresentationDPOTrainer(
        model=model_dir, args=make_config(trl.DPOConfig), train_dataset=pairs, reward=make_reward()
    )
    eos = trainer.processing_class.eos_token_id
    rows = [[5, eos, 6, 7, 0], [5, eos, 6, eos, 7], [5, eos, eos, 7, eos]]
    inputs = {
        "input_ids": torch.tensor(rows),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0], [1] * 5, [1] * 5]),
        "completion_mask": torch.tensor([[0, 0, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1]]),
    }
    assert trainer._last_read(inputs, torch.arange(5)).tolist() == [3, 3, 4]


def test_cached_reference_log_probs_are_named_by_rounding_and_lengths_too(
    make_config: Make, model_dir: str, pairs: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []

    def precompute(self: Any, dataset: Dataset, *_: Any) -> Dataset:
        names.append(self._precompute_model_hash)
        return dataset

    monkeypatch.setattr(trl.DPOTrainer, "_precompute_ref_logps", precompute)
    for settings in ({}, {}, {"bf16": True}, {"max_length": 6}):
        config = make_config(trl.DPOConfig, precompute_ref_log_probs=True, **settings)
        RepresentationDPOTrainer(args=config, model=reference(model_dir), train_dataset=pairs)
    assert names[0] == names[1]
    assert len(set(names)) == 3


def test_accumulating_equals_the_larger_batch(
    make_config: Make, make_reward: Make, model_dir: str, pairs: Dataset
) -> None:
    """Policy and reward alike: the reward is updated once an optimizer step, on all its pairs."""
    ends = []
    for size, accumulate in ((4, 1), (2, 2)):
        reward = make_reward()
        config = make_config(
            trl.DPOConfig,
            f"batches-of-{size}",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            **SGD,
        )
        trainer = run(RepresentationDPOTrainer, config, model=model_dir, train_dataset=pairs, reward=reward)
        ends.append((parameters(trainer.model) + parameters(reward), logged(trainer)))
    for large, small in zip(*(end[0] for end in ends), strict=True):
        torch.testing.assert_close(small, large, rtol=1e-3, atol=1e-5)
    weighted = ("entropy", "logits/", "mean_token_accuracy")  # TRL's means of the means of micro-batches
    for large, small in zip(*(end[1] for end in ends), strict=True):
        kept = {name: value for name, value in large.items() if not name.startswith(weighted)}
        if large["step"] == 1:  # policy and reference tie but for rounding
            kept.pop("rewards/accuracies", None)
        assert {name: small[name] for name in kept} == pytest.approx(kept, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("case", ["precomputed", "reference model", "lora"])
def test_resuming_changes_no_bit(
    make_config: Make, make_reward: Make, model_dir: str, pairs: Dataset, tmp_path: Path, case: str
) -> None:
    """A killed run resumed by new objects logs the same lines and ends with the same weights, reward and Adam state."""
    settings = {"precompute_ref_log_probs": case == "precomputed", "max_steps": 6, "logging_steps": 2}
    settings |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    settings |= {"save_strategy": "steps", "save_steps": 3}

    def build(name: str) -> tuple[Any, HybridReward]:
        reward = make_reward()
        extra = {"peft_config": lora()} if case == "lora" else {}
        config = make_config(trl.DPOConfig, name, **settings)
        return (
            RepresentationDPOTrainer(model=model_dir, args=config, train_dataset=pairs, reward=reward, **extra),
            reward,
        )

    straight, straight_reward = build("straight")
    straight.train()
    killed, _ = build("killed")
    original = killed.training_step

    def training_step(*args: Any) -> Tensor:
        if killed.state.global_step == 5:
            raise KeyboardInterrupt
        return original(*args)

    killed.training_step = training_step
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    torch.rand(11)
    resumed, resumed_reward = build("killed")
    resumed.train(resume_from_checkpoint=True)

    assert logged(resumed) == logged(straight)
    for got, expected in zip(parameters(resumed.model), parameters(straight.model), strict=True):
        assert torch.equal(got, expected)
    for got, expected in zip(parameters(resumed_reward), parameters(straight_reward), strict=True):
        assert torch.equal(got, expected)
    histogram = "confidence_histogram.json"
    assert read_json(tmp_path / "killed" / histogram) == read_json(tmp_path / "straight" / histogram)


def lora(**settings: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], **settings)


def adapted(kind: str, model_dir: str) -> dict[str, Any]:
    peft = pytest.importorskip("peft")
    if kind == "peft_config":
        return {"model": model_dir, "peft_config": lora()}
    if kind == "virtual tokens":
        return {"model": model_dir, "peft_config": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)}
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    return {"model": peft.get_peft_model(base, lora(init_lora_weights=False))}


@pytest.mark.parametrize("kind", ["peft_config", "adapter with weights", "virtual tokens"])
def test_adapters_are_trls(make_config: Make, make_reward: Make, model_dir: str, pairs: Dataset, kind: str) -> None:
    """The base, or the adapter as it came, is the reference; the reward knows the base under the adapter."""
    settings = {"learning_rate": 5e-2, "save_strategy": "steps", "save_steps": 3}
    theirs, ours, hybrid = (
        run(cls, make_config(trl.DPOConfig, name, **settings), train_dataset=pairs, **adapted(kind, model_dir), **extra)
        for name, cls, extra in (
            ("theirs", trl.DPOTrainer, {}),
            ("ours", RepresentationDPOTrainer, {}),
            ("hybrid", RepresentationDPOTrainer, {"reward": make_reward()}),
        )
    )
    for wanted, got in zip(logged(theirs)[1:], logged(ours)[1:], strict=True):
        assert got == pytest.approx(wanted, rel=2e-3, abs=1e-3)
    for trainer in (ours, hybrid):
        lines = logged(trainer)
        if kind != "virtual tokens":  # which are random, so that the policy does not start as the reference
            assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
            assert lines[-1]["loss"] < lines[0]["loss"]
    checkpoint = Path(hybrid.args.output_dir) / "checkpoint-3"
    assert (checkpoint / "adapter_model.safetensors").is_file()
    assert not (checkpoint / "model.safetensors").exists()
    HybridReward.from_pretrained(checkpoint / "reward").check_base(AutoModelForCausalLM.from_pretrained(model_dir))


def test_checkpoints_and_saved_models_hold_the_reward(
    make_config: Make, make_reward: Make, model_dir: str, pairs: Dataset, tmp_path: Path
) -> None:
    """The one of their step; the best model comes back with its own."""
    reward = make_reward()
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_logps/chosen", "greater_is_better": False}
    config = make_config(trl.DPOConfig, precompute_ref_log_probs=True, **evaluated, **best)
    data = {"train_dataset": pairs, "eval_dataset": pairs}
    trainer = run(RepresentationDPOTrainer, config, model=model_dir, reward=reward, **data)
    saved = [
        HybridReward.from_pretrained(tmp_path / "run" / f"checkpoint-{step}" / "reward").state_dict() for step in (1, 3)
    ]
    assert not torch.equal(saved[0]["probe_weight"], saved[1]["probe_weight"])
    assert {"model.safetensors", "optimizer.pt", "representation_state.safetensors", "reward"} <= {
        path.name for path in (tmp_path / "run" / "checkpoint-3").iterdir()
    }
    kept = HybridReward.from_pretrained(Path(trainer.state.best_model_checkpoint) / "reward")
    assert torch.equal(reward.probe_weight, kept.probe_weight)
    trainer.save_model(str(tmp_path / "final"))
    again = HybridReward.from_pretrained(tmp_path / "final" / "reward")
    assert all(map(torch.equal, parameters(reward), parameters(again)))


def test_evaluation_moves_nothing_and_logs_what_training_does(
    make_config: Make, make_reward: Make, model_dir: str, pairs: Dataset, chats: Dataset
) -> None:
    reward = make_reward()
    sets = {"plain": pairs.select(range(5)), "chat": chats}
    config = make_config(RepresentationDPOConfig, per_device_eval_batch_size=3)
    trainer = RepresentationDPOTrainer(
        model=model_dir, args=config, train_dataset=pairs, eval_dataset=sets, reward=reward
    )
    before = parameters(trainer.model) + parameters(reward)
    metrics = trainer.evaluate()
    assert metrics["eval_plain_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert {f"eval_{name}" for name in TRL_METRICS | HYBRID_METRICS} <= set(trainer.state.log_history[0])
    assert all(map(torch.equal, before, parameters(trainer.model) + parameters(reward)))


@pytest.mark.parametrize("size", [3, 8])
def test_compute_metrics_gets_every_sequence_once(
    make_config: Make, make_reward: Make, model_dir: str, pairs: Dataset, size: int
) -> None:
    """Eight pairs in batches of three: the last one is not full."""
    found: list[Any] = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        found.append(prediction)
        return {"rows": len(prediction.predictions)}

    trainer = RepresentationDPOTrainer(
        model=model_dir,
        args=make_config(trl.DPOConfig, per_device_eval_batch_size=size, include_for_metrics=["inputs", "loss"]),
        train_dataset=pairs,
        eval_dataset=pairs,
        reward=make_reward(),
        compute_metrics=compute_metrics,
    )
    assert trainer.evaluate()["eval_rows"] == 2 * len(pairs)
    assert found[0].predictions.shape[2] == trainer.model.config.vocab_size
    assert len(found[0].inputs) == len(found[0].label_ids) == 2 * len(pairs)
    padding = (-100, trainer.processing_class.pad_token_id)
    rows = sorted(tuple(int(i) for i in row if i not in padding) for row in found[0].label_ids)
    wanted = [ids for pair in trainer.eval_dataset for ids in (pair["chosen_ids"], pair["rejected_ids"])]
    prompts = [pair["prompt_ids"] for pair in trainer.eval_dataset for _ in range(2)]
    assert rows == sorted((*prompt, *ids) for prompt, ids in zip(prompts, wanted, strict=True))
    assert len(found[0].losses) == len(pairs)


@pytest.mark.parametrize("precompute", [False, True])
def test_bf16_starts_at_log_2(
    make_config: Make, make_reward: Make, model_dir: str, pairs: Dataset, precompute: bool
) -> None:
    """Policy and reference go through the same ops, so rounding does not part them."""
    config = make_config(trl.DPOConfig, bf16=True, precompute_ref_log_probs=precompute, precompute_ref_batch_size=4)
    trainer = run(RepresentationDPOTrainer, config, model=model_dir, train_dataset=pairs, reward=make_reward())
    lines = logged(trainer)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=0.02 if precompute else 1e-4)
    assert all(math.isfinite(value) for line in lines for value in line.values())


def readme_script() -> tuple[str, str]:
    """The script of the section on TRL, before and after."""
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    (diff,) = re.findall(r"```diff\n(.*?)```", text, flags=re.DOTALL)
    before, after = (
        "".join(line[1:] for line in diff.splitlines(keepends=True) if line[0] in f" {sign}") for sign in "-+"
    )
    return before, after


def test_the_readme_turns_a_script_of_trls_into_the_method(
    model_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it stands, on weights stored in bf16, which TRL loads as float32 and `reprdpo fit` does not."""
    monkeypatch.chdir(tmp_path)
    load_causal_lm(model_dir).to(torch.bfloat16).save_pretrained("path/to/model")
    load_tokenizer(model_dir).save_pretrained("path/to/model")
    rows = [pair | {"prompt": f"{pair['prompt']}{' to me' * k}"} for pair in PAIRS for k in range(3)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["fit", "--model", "path/to/model", "--preferences", "pairs.jsonl", "--output", "reward"]) == 0
    before, after = readme_script()
    for script, method in ((before, False), (after, True)):
        names: dict[str, Any] = {}
        exec(
            compile(
                script.replace("DPOConfig(", "DPOConfig(use_cpu=True, report_to='none', max_steps=2, "),
                "README.md",
                "exec",
            ),
            names,
        )
        trainer = names["trainer"]
        assert isinstance(trainer, RepresentationDPOTrainer) == method
        assert ("confidence/mean" in trainer.state.log_history[0]) == method
    assert (Path("aligned") / "checkpoint-2" / "reward" / "reward.json").is_file()


def test_a_streamed_dataset(make_config: Make, make_reward: Make, model_dir: str, pairs: Dataset) -> None:
    config = make_config(trl.DPOConfig)
    stream = pairs.to_iterable_dataset()
    lines = logged(run(RepresentationDPOTrainer, config, model=model_dir, train_dataset=stream, reward=make_reward()))
    assert lines[-1]["loss"] < lines[0]["loss"]


def implicit(pair: dict[str, str]) -> dict[str, Any]:
    """TRL's format without a prompt: chosen and rejected both begin with it."""
    prompt, chosen, rejected = as_chat(pair).values()
    return {"chosen": prompt + chosen, "rejected": prompt + rejected}


@pytest.mark.parametrize("form", [dict, as_chat, implicit])
@pytest.mark.parametrize("source", ["trl", "reprdpo"])
def test_one_dataset_serves_both_trainers(
    make_config: Make, make_reward: Make, model_dir: str, tokenizer: Any, tmp_path: Path, form: Any, source: str
) -> None:
    """A file of TRL's in ReprDPOTrainer and what this library reads in TRL's: the same tokens but for what a chat
    template puts after EOS, so the same training."""
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(form(pair)) + "\n" for pair in PAIRS))
    ours = load_preferences(path)
    theirs = load_dataset("json", data_files=str(path), split="train") if source == "trl" else ours
    tokenizer.chat_template = tokenizer.chat_template.replace(" + '\n' ", " ")
    size = {"per_device_train_batch_size": len(PAIRS), **SGD}
    common = {"reward": make_reward()}
    one = run(
        RepresentationDPOTrainer,
        make_config(trl.DPOConfig, "one", **size),
        model=model_dir,
        train_dataset=theirs,
        processing_class=tokenizer,
        **common,
    )
    common = {"reward": make_reward()}
    config = make_config(ReprDPOConfig, "two", **size)
    two = ReprDPOTrainer(load_causal_lm(model_dir), config, train_dataset=ours, processing_class=tokenizer, **common)
    two.train()
    for got, expected in zip(logged(one), logged(two), strict=True):
        shared = set(got) & set(expected)
        assert shared >= HYBRID_METRICS | {"loss", "logps/chosen", "rewards/margins"}
        for name in shared - {"rewards/accuracies"}:
            assert got[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize(
    ("settings", "with_reward", "cure"),
    [
        ({"loss_type": "sppo_hard"}, False, "loss_type.*sigmoid"),
        ({"loss_type": ["sigmoid", "sft"]}, True, "loss_type.*trl.DPOTrainer"),
        ({"label_smoothing": 0.1}, True, "label_smoothing.*set it to 0"),
        ({"label_smoothing": 1.5}, False, "label_smoothing"),
        ({"label_smoothing": 0.5, "loss_type": "robust"}, False, "below 0.5"),
        ({"loss_type": "robust"}, True, "robust.*sigmoid"),
        ({"ld_alpha": 0.5}, False, "ld_alpha.*None"),
        ({"f_divergence_type": "js_divergence"}, False, "f_divergence_type.*reverse_kl"),
        ({"use_weighting": True}, True, "use_weighting.*False"),
    ],
)
def test_what_has_no_meaning_here_is_refused_before_work_starts(
    make_config: Make, make_reward: Make, settings: dict[str, Any], with_reward: bool, cure: str
) -> None:
    """The model's folder does not exist, so nothing can have been loaded."""
    config = make_config(trl.DPOConfig, **settings)
    with pytest.raises(UserError, match=cure):
        RepresentationDPOTrainer("nowhere", None, config, reward=make_reward() if with_reward else None)


@pytest.mark.parametrize("by_name", [True, False])
def test_a_reward_of_another_base_is_refused_before_the_reference_is_computed(
    make_config: Make, make_reward: Make, model_dir: str, pairs: Dataset, tmp_path: Path, by_name: bool
) -> None:
    other = reference(model_dir)
    other.save_pretrained(tmp_path / "other")
    load_tokenizer(model_dir).save_pretrained(tmp_path / "other")
    computed = []

    class Watched(RepresentationDPOTrainer):
        def compute_ref_log_probs(self, *args: Any) -> Any:
            computed.append(args)
            return super().compute_ref_log_probs(*args)

    model = str(tmp_path / "other") if by_name else AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    arguments = {"model": model, "train_dataset": pairs, "reward": make_reward()}
    settings = {"precompute_ref_log_probs": True}
    with pytest.raises(UserError, match="other weights"):
        Watched(args=make_config(trl.DPOConfig, **settings), **arguments)
    assert not computed
    Watched(args=make_config(RepresentationDPOConfig, allow_reward_descendant=True, **settings), **arguments)
    assert computed


def test_a_checkpoint_of_the_other_sort_is_refused(
    make_config: Make, make_reward: Make, model_dir: str, pairs: Dataset, tmp_path: Path
) -> None:
    saved = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    common = {"model": model_dir, "train_dataset": pairs}
    run(trl.DPOTrainer, make_config(trl.DPOConfig, "theirs", **saved), **common)
    run(RepresentationDPOTrainer, make_config(trl.DPOConfig, "hybrid", **saved), reward=make_reward(), **common)
    for name, reward, cure in (("theirs", make_reward(), "without a reward"), ("hybrid", None, "pass reward=")):
        trainer = RepresentationDPOTrainer(args=make_config(trl.DPOConfig, name), reward=reward, **common)
        with pytest.raises(UserError, match=cure):
            trainer.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-2"))
    trainer = RepresentationDPOTrainer(args=make_config(trl.DPOConfig, "theirs"), **common)
    trainer.train(resume_from_checkpoint=str(tmp_path / "theirs" / "checkpoint-2"))
    assert trainer.state.global_step == 3


def test_a_vision_language_processor_is_refused(make_config: Make, model_dir: str, pairs: Dataset) -> None:
    class Processor(ProcessorMixin):
        def __init__(self) -> None:
            pass

    with pytest.raises(UserError, match="vision-language"):
        RepresentationDPOTrainer(
            model_dir, args=make_config(trl.DPOConfig), train_dataset=pairs, processing_class=Processor()
        )


def test_the_config_reads_its_fields_from_a_command_line(tmp_path: Path) -> None:
    words = ["--output_dir", str(tmp_path), "--alpha", "3", "--loss_type", "ipo", "--reward_margin", "0.5"]
    (config,) = HfArgumentParser(RepresentationDPOConfig).parse_args_into_dataclasses([*words, "--use_cpu"])
    assert (config.alpha, config.reward_margin, config.loss_type) == (3.0, 0.5, ["ipo"])
    with pytest.raises(UserError, match="confidence_floor"):
        RepresentationDPOConfig(output_dir=str(tmp_path), use_cpu=True, confidence_floor=2.0)
