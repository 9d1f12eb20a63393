"""The trainer against the formulas: step 0, the modes, accumulation, resuming, what is logged."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from reprdpo import costs
from reprdpo.data import PreferenceCollator
from reprdpo.errors import UserError
from reprdpo.files import read_json, read_jsonl
from reprdpo.ops import linear_preference
from reprdpo.reward import HybridReward
from reprdpo.training import ReprDPOTrainer, last_checkpoint, reference_logps
from reprdpo.training.base import disable_dropout

Make = Callable[..., Any]

DPO_METRICS = {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"}
DPO_METRICS |= {"logps/chosen", "logps/rejected"}
HYBRID_METRICS = {f"hybrid/{name}" for name in ("chosen", "rejected", "accuracies", "margins", "nll")}
HYBRID_METRICS |= {f"confidence/{name}" for name in ("mean", "std", "min", "max")}


def logged(output_dir: str | Path) -> list[dict[str, Any]]:
    """The metrics, without what they cost, which no two runs share."""
    lines = [line for _, line in read_jsonl(Path(output_dir) / "metrics.jsonl")]
    return [{name: value for name, value in line.items() if not name.startswith("cost/")} for line in lines]


def untied(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the accuracy of the first step, where policy and reference tie but for rounding."""
    return [{name: v for name, v in line.items() if line["step"] > 1 or name != "rewards/accuracies"} for line in lines]


def parameters(module: torch.nn.Module) -> list[Tensor]:
    return [value.detach().clone() for value in module.state_dict().values()]


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.3, None])
def test_step_0_costs_log_2(make_model: Make, make_reward: Make, make_config: Make, pairs: Dataset, gamma: Any) -> None:
    """Policy and reference are the same, whatever the confidence."""
    source = {"confidence_source": "reward"} if gamma is None else {"fixed_confidence": gamma}
    settings = {"confidence_source": "fixed", **source, "beta": 0.1, "max_steps": 1}
    reward = make_reward() if gamma is None else None
    model = make_model(attention_dropout=0.5)
    trainer = ReprDPOTrainer(model, make_config(**settings), train_dataset=pairs, reward=reward)
    trainer.train()
    assert logged(trainer.args.output_dir)[0]["loss"] == pytest.approx(math.log(2), abs=0.1 * 1e-4)


@pytest.mark.parametrize(("strategy", "steps"), [("steps", [1, 3, 5]), ("no", [1])])
def test_the_last_step_is_logged(
    make_model: Make, make_config: Make, pairs: Dataset, strategy: str, steps: list[int]
) -> None:
    settings = {"confidence_source": "fixed", "logging_steps": 3, "logging_strategy": strategy, "max_steps": 5}
    trainer = ReprDPOTrainer(make_model(), make_config(**settings), train_dataset=pairs)
    trainer.train()
    assert [line["step"] for line in logged(trainer.args.output_dir)] == steps


def manual_step(model: Any, batch: dict[str, Tensor], ref: tuple[Tensor, Tensor], gamma: Any, beta: float) -> Tensor:
    """Eq. 5 by log_softmax over whole logits."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    scored = batch["labels"] != -100
    tokens = logits.gather(-1, batch["labels"].clamp(min=0)[..., None])[..., 0]
    chosen, rejected = (tokens * scored).sum(1).chunk(2)
    delta = beta * ((chosen - ref[0]) - (rejected - ref[1]))
    return (-gamma * F.logsigmoid(delta) - (1 - gamma) * F.logsigmoid(-delta)).mean()


PLAIN = {"alpha": "auto", "squash": False, "confidence_floor": 0.0, "reward_margin": 1.0, "reward_learning_rate": 1e-3}
# Far from what is taken where nothing is set.
SET = {"alpha": 3.0, "squash": True, "confidence_floor": 0.55, "reward_margin": 0.2, "reward_learning_rate": 0.03}


@pytest.mark.parametrize(
    ("source", "pool", "own"),
    [("fixed", "last", PLAIN), ("reward", "last", PLAIN), ("reward", "mean", PLAIN), ("reward", "last", SET)],
    ids=["fixed-last", "reward-last", "reward-mean", "settings"],
)
def test_updates_are_those_of_the_formula(
    make_model: Make,
    make_reward: Make,
    make_config: Make,
    pairs: Dataset,
    source: str,
    pool: str,
    own: dict[str, Any],
) -> None:
    """Three SGD steps: the policy follows Eq. 5 under Eq. 8, and the reward Eq. 7, one step behind."""
    beta, rate = 0.5, 0.05
    settings = {"beta": beta, "confidence_source": source, "fixed_confidence": 0.8, "learning_rate": rate}
    plain = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 3}
    config = make_config(per_device_train_batch_size=len(pairs), **settings, **plain, **own)
    reward = make_reward(pool)
    trainer = ReprDPOTrainer(make_model(), config, train_dataset=pairs, reward=reward)
    rows = list(trainer.train_dataset)
    trainer.train()

    model, follower = make_model(), make_reward(pool)
    batch = PreferenceCollator(0)(rows)
    ref = batch["ref_chosen_logps"], batch["ref_rejected_logps"]
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    adam = torch.optim.Adam(follower.parameters(), lr=own["reward_learning_rate"])
    alpha = follower.alpha if own["alpha"] == "auto" else own["alpha"]
    lengths = batch["attention_mask"].sum(1)
    for line in logged(config.output_dir):
        with torch.no_grad():
            masked = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
            layers = torch.stack(model(**masked, output_hidden_states=True).hidden_states[1:], dim=2)
        first = lengths - 1 if pool == "last" else torch.zeros_like(lengths)
        spans = zip(layers, first, lengths, strict=True)
        states = torch.stack([row[start:stop].mean(0) for row, start, stop in spans])
        chosen, rejected = follower(states).reward.chunk(2)
        gap = chosen.sigmoid() - rejected.sigmoid() if own["squash"] else chosen - rejected
        gamma = torch.sigmoid(alpha * gap).clamp(min=own["confidence_floor"]).detach() if source == "reward" else 0.8
        loss = manual_step(model, batch, ref, gamma, beta)
        nll = -F.logsigmoid(chosen - rejected - own["reward_margin"]).mean()
        assert line["loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert line["hybrid/margins"] == pytest.approx((chosen - rejected).mean().item(), abs=1e-4)
        assert line["hybrid/nll"] == pytest.approx(nll.item(), abs=1e-4)
        for step, objective in ((optimizer, loss), (adam, nll)):
            step.zero_grad()
            objective.backward()
            step.step()
    for got, expected in zip(trainer.model.parameters(), model.parameters(), strict=True):
        assert torch.allclose(got, expected, atol=1e-5)
    for got, expected in zip(reward.parameters(), follower.parameters(), strict=True):
        assert torch.allclose(got, expected, atol=1e-5)


def test_accumulating_equals_the_larger_batch(
    make_model: Make, make_reward: Make, make_config: Make, pairs: Dataset, tmp_path: Path
) -> None:
    """Policy and reward alike: the reward is updated once an optimizer step, on all its pairs, and so is counted."""
    ends, counted = [], []
    for name, size, accumulate in (("large", 4, 1), ("small", 2, 2)):
        reward = make_reward()
        config = make_config(
            output_dir=str(tmp_path / name),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            max_steps=3,
            optim="sgd",
        )
        trainer = ReprDPOTrainer(make_model(), config, train_dataset=pairs, reward=reward)
        trainer.train()
        ends.append((parameters(trainer.model), parameters(reward), logged(config.output_dir)))
        counted.append([line["cost/reward_flop"] for _, line in read_jsonl(tmp_path / name / "metrics.jsonl")])
    size = reward.probe_weight.shape
    step = costs.reward_flop(*size, sequences=8, gradients=True) + costs.reward_step_flop(*size)
    assert counted == [[step] * 3] * 2
    for large, small in zip(*(end[0] + end[1] for end in ends), strict=True):
        assert torch.allclose(large, small, atol=1e-5)
    for large, small in zip(untied(ends[0][2]), untied(ends[1][2]), strict=True):
        assert small == pytest.approx({**large, "epoch": small["epoch"]}, abs=1e-4)


@pytest.mark.parametrize(
    ("saved", "settings"),
    [
        (3, {}),
        (3, {"logging_steps": 2}),
        (4, {"per_device_train_batch_size": 7, "gradient_accumulation_steps": 1}),
        (2, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 3}),
        (3, {"confidence_source": "fixed", "disable_dropout": False}),
    ],
)
def test_resuming_changes_no_bit(
    make_model: Make,
    make_reward: Make,
    make_config: Make,
    pairs: Dataset,
    tmp_path: Path,
    saved: int,
    settings: dict[str, Any],
) -> None:
    """A killed run resumed by new objects logs the same lines and ends with the same weights, reward and Adam state."""

    def build(name: str) -> tuple[ReprDPOTrainer, HybridReward]:
        reward = make_reward()
        config = make_config(
            output_dir=str(tmp_path / name), max_steps=6, save_strategy="steps", save_steps=saved, **settings
        )
        return ReprDPOTrainer(make_model(attention_dropout=0.3), config, train_dataset=pairs, reward=reward), reward

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
    resumed.train(resume_from_checkpoint=last_checkpoint(resumed.args.output_dir))

    assert logged(tmp_path / "killed") == logged(tmp_path / "straight")
    for got, expected in zip(parameters(resumed.model), parameters(straight.model), strict=True):
        assert torch.equal(got, expected)
    for got, expected in zip(parameters(resumed_reward), parameters(straight_reward), strict=True):
        assert torch.equal(got, expected)
    histogram = "confidence_histogram.json"
    if resumed.args.confidence_source == "reward":
        assert read_json(tmp_path / "killed" / histogram) == read_json(tmp_path / "straight" / histogram)


def test_resuming_without_a_whole_checkpoint_is_told(make_model: Make, make_config: Make, pairs: Dataset) -> None:
    config = make_config(confidence_source="fixed")
    trainer = ReprDPOTrainer(make_model(), config, train_dataset=pairs)
    with pytest.raises(UserError, match="no whole checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    torn = Path(config.output_dir) / "checkpoint-2"
    torn.mkdir(parents=True)
    with pytest.raises(UserError, match="checkpoint-2"):
        trainer.train(resume_from_checkpoint=str(torn))


def test_what_is_logged(make_model: Make, make_reward: Make, make_config: Make, pairs: Dataset, tmp_path: Path) -> None:
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 2}
    config = make_config(output_dir=str(tmp_path / "hybrid"), **evaluated)
    data = {"train_dataset": pairs, "eval_dataset": pairs.select(range(5))}
    ReprDPOTrainer(make_model(), config, reward=make_reward(), **data).train()
    steps = logged(config.output_dir)
    assert [line["step"] for line in steps] == [1, 2, 2]
    assert set(steps[0]) >= {"loss", "grad_norm", "learning_rate"} | DPO_METRICS | HYBRID_METRICS
    assert {f"eval_{name}" for name in {"loss"} | DPO_METRICS | HYBRID_METRICS} <= set(steps[2])
    counts = read_json(tmp_path / "hybrid" / "confidence_histogram.json")
    assert (sum(counts["initial"]), sum(counts["final"]), len(counts["edges"])) == (8, 8, 21)

    config = make_config(output_dir=str(tmp_path / "dpo"), confidence_source="fixed", **evaluated)
    ReprDPOTrainer(make_model(), config, **data).train()
    names = set().union(*logged(config.output_dir))
    assert names >= DPO_METRICS
    assert not any("hybrid/" in name or "confidence/" in name for name in names)


def test_evaluation_moves_neither_policy_nor_reward(
    make_model: Make, make_reward: Make, make_config: Make, pairs: Dataset
) -> None:
    reward = make_reward()
    trainer = ReprDPOTrainer(make_model(), make_config(), eval_dataset=pairs, reward=reward)
    before = parameters(trainer.model) + parameters(reward)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert all(map(torch.equal, before, parameters(trainer.model) + parameters(reward)))


@pytest.mark.parametrize("batch_size", [2, 5])
def test_evaluation_is_a_mean_over_pairs(
    make_model: Make, make_reward: Make, make_config: Make, pairs: Dataset, batch_size: int
) -> None:
    """Whatever the batches: five pairs in batches of two are not three equal parts."""
    config = make_config(per_device_eval_batch_size=batch_size, max_steps=2)
    few = pairs.select(range(5))
    trainer = ReprDPOTrainer(make_model(), config, pairs, few, reward=make_reward())
    trainer.train()
    means = trainer.evaluate()
    each = [trainer.evaluate(trainer.eval_dataset.select([row])) for row in range(5)]
    assert len({one["eval_loss"] for one in each}) == 5
    for name in {f"eval_{name}" for name in (*DPO_METRICS, *HYBRID_METRICS, "loss")} - {"eval_confidence/std"}:
        combined = {"min": min, "max": max}.get(name.split("/")[-1], lambda values: sum(values) / 5)
        assert means[name] == pytest.approx(combined([one[name] for one in each]), abs=1e-5), name


def test_the_best_model_comes_back_with_its_reward(
    make_model: Make, make_reward: Make, make_config: Make, pairs: Dataset
) -> None:
    """The evaluation that chooses is told the first checkpoint is best, long before the end."""
    steps = {"max_steps": 4, "save_steps": 1, "eval_steps": 1, "save_strategy": "steps", "eval_strategy": "steps"}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "rewards/chosen", "greater_is_better": False}
    reward = make_reward()
    trainer = ReprDPOTrainer(make_model(), make_config(**steps, **best), pairs, pairs.select([0]), reward=reward)
    scores = iter([0.0, 1.0, 2.0, 3.0])
    evaluation_loop = trainer.evaluation_loop

    def scripted(*args: Any, **kwargs: Any) -> Any:
        output = evaluation_loop(*args, **kwargs)
        output.metrics["eval_rewards/chosen"] = next(scores)
        return output

    trainer.evaluation_loop = scripted
    trainer.train()
    folder = Path(trainer.args.output_dir)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    saved, last = (HybridReward.from_pretrained(folder / f"checkpoint-{step}" / "reward") for step in (1, 4))
    for got, wanted, other in zip(*map(parameters, (reward, saved, last)), strict=True):
        assert torch.equal(got, wanted)
        assert not torch.equal(got, other)
    model = type(trainer.model).from_pretrained(folder / "checkpoint-1")
    assert torch.equal(trainer.model.lm_head.weight, model.lm_head.weight)


def test_a_frozen_reward_stays(make_model: Make, make_reward: Make, make_config: Make, pairs: Dataset) -> None:
    reward = make_reward()
    before = parameters(reward)
    config = make_config(update_reward=False, reward_margin=40.0)
    ReprDPOTrainer(make_model(), config, train_dataset=pairs, reward=reward).train()
    assert all(map(torch.equal, before, parameters(reward)))
    line = logged(config.output_dir)[0]
    assert line["hybrid/nll"] == pytest.approx(40.0 - line["hybrid/margins"], abs=1e-3)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing")  # the name that every transformers 5 has
def test_checkpointing_activations_changes_nothing(
    make_model: Make, make_reward: Make, make_config: Make, pairs: Dataset, tmp_path: Path
) -> None:
    lines = []
    for name, settings in (
        ("plain", {}),
        ("checkpointed", {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}),
    ):
        config = make_config(output_dir=str(tmp_path / name), **settings)
        ReprDPOTrainer(make_model(), config, train_dataset=pairs, reward=make_reward()).train()
        lines.append(logged(config.output_dir))
    assert lines[0] == lines[1]


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16(make_model: Make, make_reward: Make, make_config: Make, pairs: Dataset, autocast: bool) -> None:
    model = make_model() if autocast else make_model().to(torch.bfloat16)
    config = make_config(bf16=autocast, allow_reward_descendant=True, per_device_train_batch_size=len(pairs))
    ReprDPOTrainer(model, config, train_dataset=pairs, reward=make_reward()).train()
    lines = logged(config.output_dir)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=0.02)
    assert all(math.isfinite(value) for line in lines for value in line.values())


def test_the_saved_reward_is_the_trained_one_and_nothing_is_pickled_beside_it(
    make_model: Make, make_reward: Make, make_config: Make, pairs: Dataset, tmp_path: Path
) -> None:
    reward = make_reward()
    trainer = ReprDPOTrainer(make_model(), make_config(), train_dataset=pairs, reward=reward)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    again = HybridReward.from_pretrained(tmp_path / "model" / "reward")
    assert all(map(torch.equal, parameters(reward), parameters(again)))
    assert not list((tmp_path / "model").rglob("*.bin"))
    assert json.loads((tmp_path / "model" / "training_args.json").read_text())["beta"] == 0.1


class HostReads(TorchDispatchMode):
    """Collects the operations that would make the host wait for a device, outside the model's own forward."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.in_model = False
        model.register_forward_pre_hook(lambda *_: setattr(self, "in_model", True))
        model.register_forward_hook(lambda *_: setattr(self, "in_model", False))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "equal")
        if not self.in_model and func.overloadpacket.__name__ in waits:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_step_never_waits_for_the_device(
    make_model: Make, make_reward: Make, make_config: Make, pairs: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_preference, "check_scored_index", lambda *_: None)  # reads values on the CPU only
    model = make_model()
    config = make_config(logging_steps=100, max_steps=3)
    trainer = ReprDPOTrainer(model, config, train_dataset=pairs, reward=make_reward())
    reads, original = HostReads(model), trainer.training_step

    def training_step(*args: Any) -> Tensor:
        with reads:
            return original(*args)

    trainer.training_step = training_step
    trainer.train()
    assert reads.seen == []
    with reads:
        trainer._windows[True].drain(lambda row: row)
        torch.ones(1).item()
    assert reads.seen == ["aten._local_scalar_dense.default"]


def test_disable_dropout_reaches_probabilities_kept_as_numbers(make_model: Make) -> None:
    model = make_model(attention_dropout=0.5)
    model.extra = torch.nn.Dropout(0.3)
    disable_dropout(model)
    assert model.extra.p == 0
    assert all(layer.self_attn.attention_dropout == 0 for layer in model.model.layers)


def test_a_reference_of_its_own(make_model: Make, make_config: Make, pairs: Dataset, tmp_path: Path) -> None:
    """Its log-probs are not taken for the policy's, nor the policy's for its, where both lie in one cache."""
    other = make_model()
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    for ref_model in (None, other):
        config = make_config(confidence_source="fixed", reference_cache_dir=str(tmp_path / "cache"))
        trainer = ReprDPOTrainer(make_model(), config, train_dataset=pairs, ref_model=ref_model)
        expected = reference_logps(ref_model or make_model(), pairs, pad_token_id=0, progress=False)
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            assert list(trainer.train_dataset[name]) == pytest.approx(list(expected[name]), abs=1e-4)


def test_the_reference_rounds_as_the_policy_will(make_model: Make, make_config: Make, pairs: Dataset) -> None:
    trainer = ReprDPOTrainer(make_model(), make_config(confidence_source="fixed", bf16=True), train_dataset=pairs)
    options = {"pad_token_id": 0, "collator": trainer.data_collator, "progress": False}
    rounded = reference_logps(make_model(), pairs, autocast_dtype=torch.bfloat16, **options)["ref_chosen_logps"]
    found = list(trainer.train_dataset["ref_chosen_logps"])
    assert found == list(rounded)
    assert found != pytest.approx(list(reference_logps(make_model(), pairs, **options)["ref_chosen_logps"]), abs=1e-4)


def test_a_loss_without_reference_computes_none(make_model: Make, make_config: Make, pairs: Dataset) -> None:
    config = make_config(loss_type="simpo", confidence_source="fixed")
    ReprDPOTrainer(make_model(), config, train_dataset=pairs).train()
    assert all(math.isfinite(line["loss"]) for line in logged(config.output_dir))
    assert not (Path(config.output_dir) / "reference").exists()


def test_mistakes(make_model: Make, make_config: Make, pairs: Dataset) -> None:
    with pytest.raises(UserError, match="confidence_source"):
        ReprDPOTrainer(make_model(), make_config(), train_dataset=pairs)
    text = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(UserError, match="processing_class"):
        ReprDPOTrainer(make_model(), make_config(confidence_source="fixed"), train_dataset=text)
