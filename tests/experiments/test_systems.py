"""Each row is trained, answers and is compared as its system says, each seed for itself."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset

from reprdpo.experiments import RunConfig, pipeline, stages
from reprdpo.experiments.config import EvaluateSection, OnlineSection, Variant
from reprdpo.experiments.finished_run import FinishedRun
from reprdpo.experiments.pipeline import Pipeline
from reprdpo.experiments.rows import DRAW, FIT, REWARD_MODEL, rows_of
from reprdpo.experiments.run_folder import RunFolder
from reprdpo.experiments.stages import Policy, evaluate_policy, fit_reward, train_online
from reprdpo.experiments.summary import write_summary
from reprdpo.files import read_json, read_jsonl
from reprdpo.reward import RewardFitConfig
from reprdpo.sampling import SamplingConfig
from reprdpo.sampling.best_of_n import FORMAT
from reprdpo.training import OnlineDPOConfig

SYSTEMS = ("base", "sft", "dpo", "rs", "cdpo_fixed", "reprdpo")


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": str(number), "chosen": "a", "rejected": "b"} for number in range(20)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RunConfig(
        output_dir=str(tmp_path / "run"), model="base", preferences=str(pairs), systems=SYSTEMS, seeds=(3, 5)
    )


@pytest.fixture
def planned(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    """A pipeline whose data and models are their own names."""
    monkeypatch.setattr(Pipeline, "labelled_pairs", lambda self, row: "labelled")
    monkeypatch.setattr(Pipeline, "ranked_pairs", lambda self, row: "ranked")
    monkeypatch.setattr(Pipeline, "reward", lambda self, row: "reward")
    monkeypatch.setattr(Pipeline, "benign", None)
    monkeypatch.setattr(Policy, "model", lambda self: self.path)
    monkeypatch.setattr(Policy, "tokenizer", lambda self: None)
    return Pipeline(config, RunFolder(config))


@pytest.mark.parametrize(
    ("name", "pairs", "confidence"),
    [("dpo", "labelled", 1.0), ("cdpo_fixed", "ranked", 0.9), ("reprdpo", "ranked", "reward")],
)
def test_a_row_is_trained_as_its_system_says(
    name: str, pairs: str, confidence: Any, planned: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[SimpleNamespace] = []

    def trainer(model: Any, args: Any, **given: Any) -> None:
        made.append(SimpleNamespace(model=model, args=args, **given))

    monkeypatch.setattr(pipeline, "ReprDPOTrainer", trainer)
    monkeypatch.setattr(pipeline, "train_to_end", lambda trainer, output: None)
    row = next(row for row in planned.rows if row.name == name)
    for seed in (3, 5):
        planned.train(row, seed)
    assert [(each.args.seed, Path(each.args.output_dir).name) for each in made] == [(3, "seed-3"), (5, "seed-5")]
    for each in made:
        assert each.model.endswith("sft/seed-0/model")
        assert each.train_dataset == pairs
        if confidence == "reward":
            assert (each.args.confidence_source, each.reward) == ("reward", "reward")
        else:
            found = each.args.confidence_source, each.args.fixed_confidence, each.reward
            assert found == ("fixed", confidence, None)


def test_a_row_answers_as_its_system_says(planned: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def evaluate(policy: Policy, settings: Any, output: Path, **given: Any) -> None:
        path = policy.path.removeprefix(f"{planned.folder.path}/systems/")
        asked.append((output.name, path, *(given[name] for name in ("seed", "best_of", "drawn", "reward"))))

    monkeypatch.setattr(pipeline, "evaluate_policy", evaluate)
    for row in planned.rows:
        planned.evaluate(row, 5)
    drawn = planned.config.sample.num_responses
    assert asked == [
        ("base-seed-5", "base", 5, 1, drawn, None),
        ("sft-seed-5", "sft/seed-0/model", 5, 1, drawn, None),
        ("dpo-seed-5", "dpo/seed-5/model", 5, 1, drawn, None),
        ("rs-seed-5", "sft/seed-0/model", 5, drawn, drawn, "reward"),
        ("cdpo_fixed-seed-5", "cdpo_fixed/seed-5/model", 5, 1, drawn, None),
        ("reprdpo-seed-5", "reprdpo/seed-5/model", 5, 1, drawn, None),
    ]


def test_recipes_read_the_policies_that_the_run_trained(config: RunConfig) -> None:
    finished = FinishedRun(Path("run"), Path("run/evaluation"), config, "base")
    found = [finished.model(name, seed) for name in ("base", "rs", "reprdpo") for seed in (3, 5)]
    sft, ours = "run/systems/sft/seed-0/model", "run/systems/reprdpo/seed-{}/model"
    assert found == ["base", "base", sft, sft, ours.format(3), ours.format(5)]


def test_rows_of_wrong_labels_have_rewards_of_their_own(config: RunConfig) -> None:
    variants = {"noisy": Variant("reprdpo", label_noise=0.3), "hot": Variant("reprdpo", sample={"temperature": 2.0})}
    rows = {row.name: row for row in rows_of(RunConfig(**vars(config) | {"variants": variants}))}
    assert rows["noisy"].differs(FIT) == rows["noisy"].differs(REWARD_MODEL) == "label_noise=0.3"
    assert (rows["noisy"].differs(DRAW), rows["hot"].differs(FIT), rows["reprdpo"].differs(FIT)) == ("", "", "")
    assert rows["hot"].differs(DRAW) == "sample.temperature=2.0"


@pytest.mark.parametrize("seed", [0, 7])
def test_online_rounds_have_prompts_and_draws_of_their_own(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[list[str], int]] = []
    resample: list[Callable[..., Any]] = []

    def sample(engine: Any, prompts: Dataset, path: Path, config: SamplingConfig, **given: Any) -> None:
        drawn.append((list(prompts["prompt"]), config.seed))

    monkeypatch.setattr(stages, "sample_responses", sample)
    for name in ("TransformersEngine", "build_pairs", "load_preferences", "train_to_end"):
        monkeypatch.setattr(stages, name, lambda *_: None)
    monkeypatch.setattr(stages, "OnlineDPOTrainer", lambda *_, **given: resample.append(given["resample"]))
    model = torch.nn.Linear(1, 1)
    policy: Any = SimpleNamespace(tokenizer=lambda: None, model=lambda: SimpleNamespace(device="cpu"))
    policy.tokenize = lambda *_: None
    args = OnlineDPOConfig(output_dir=str(tmp_path), max_steps=1, seed=seed, confidence_source="fixed")
    prompts = Dataset.from_dict({"prompt": ["a", "b", "c"]})
    train_online(policy, prompts, model, args, OnlineSection(prompts_per_round=2), SamplingConfig())  # type: ignore[arg-type]
    for number in range(3):
        resample[0](None, number)
    assert drawn == [(["a", "b"], seed), (["c", "a"], seed + 1), (["b", "c"], seed + 2)]


def test_the_best_of_the_first_n_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewards = {"first": 1.0, "better": 2.0, "best": 9.0, "worst": 0.0}

    def sample(engine: Any, prompts: Dataset, path: Path, config: SamplingConfig) -> None:
        answers = [{"text": text, "reward": None, "truncated": False} for text in [*rewards][: config.num_responses]]
        record = {"prompt_id": 0, "prompt": "p", "responses": answers}
        path.write_text(json.dumps({"format": FORMAT, "key": None}) + "\n" + json.dumps(record) + "\n")

    def by_reward(*_: Any) -> Callable[..., list[float]]:
        return lambda asked, texts: [rewards[text] for text in texts]

    monkeypatch.setattr(stages, "sample_responses", sample)
    monkeypatch.setattr(stages, "by_reward", by_reward)
    monkeypatch.setattr(stages, "TransformersEngine", lambda *_: None)
    monkeypatch.setattr(stages, "model_fingerprint", lambda reward: "r")
    policy: Any = SimpleNamespace(model=lambda: None, tokenizer=lambda: None, data=None)
    asked = Dataset.from_dict({"prompt": ["p"], "category": [None]})
    reward: Any = object()
    for name, given in {
        "first": {},
        "better": {"reward": reward, "best_of": 2, "drawn": 4},
        "best": {"reward": reward, "best_of": 4},
    }.items():
        evaluate_policy(policy, EvaluateSection(), tmp_path / name, red_team=asked, **given)  # type: ignore[arg-type]
        ((_, line),) = read_jsonl(tmp_path / f"{name}.responses.jsonl")
        assert line["response"] == name


def test_a_system_of_fewer_unsafe_answers_is_below(config: RunConfig, tmp_path: Path) -> None:
    for name, unsafe in (("sft", 2), ("base", 30)):
        for seed in config.seeds:
            row = {"prompt": "p", "response": "r", "refusal": False}
            lines = [row | {"prompt_id": number, "unsafe": number < unsafe} for number in range(40)]
            (tmp_path / f"{name}-seed-{seed}.responses.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
            result = {"overrefusal": None, "perplexity": None}
            (tmp_path / f"{name}-seed-{seed}.json").write_text(json.dumps(result))
    finished = FinishedRun(tmp_path, tmp_path, config, "base")
    write_summary(tmp_path, [(finished.rows[name], config.seeds) for name in ("base", "sft")])
    (summarised,) = read_json(tmp_path / "summary.json")["orderings"]
    found = finished.below("sft", "base")
    assert found.claim == summarised["claim"] == "SFT below Base"
    assert (found.held, summarised["held"]) == (True, True)
    assert found.difference == summarised["difference"] == pytest.approx(-0.7)
    assert finished.below("base", "sft").held is False


def test_a_reward_is_fitted_by_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def fit(*states: Any, **labels: Any) -> Any:
        given.update(labels)
        return SimpleNamespace(save_pretrained=lambda folder: None), "report"

    monkeypatch.setattr(stages, "extract_pair_states", lambda *_, **__: ("chosen", "rejected"))
    monkeypatch.setattr(stages.HybridReward, "fit", fit)
    policy: Any = SimpleNamespace(model=lambda: "model", tokenizer=lambda: SimpleNamespace(pad_token_id=0))
    columns = {"prompt_id": [0, 0, 2], "chosen_is_safe": [True, None, True], "rejected_is_safe": [None] * 3}
    assert fit_reward(policy, Dataset.from_dict(columns), RewardFitConfig(), tmp_path) == "report"
    assert list(given["groups"]) == [0, 0, 2]
    assert (given["base"], given["chosen_is_safe"], given["rejected_is_safe"]) == ("model", [True, None, True], None)


def test_a_perplexity_is_kept_for_its_model_and_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[Any] = []
    monkeypatch.setattr(stages, "perplexity", lambda model, rows: counted.append(model) or len(counted))
    monkeypatch.setattr(stages, "model_fingerprint", str)
    texts = [Dataset.from_dict({"input_ids": [[5, 6, 7]], "response_start": [start]}) for start in (1, 2)]
    asked = [("a", texts[0]), ("a", texts[0]), ("b", texts[0]), ("b", texts[1])]
    found = [stages._perplexity(model, text, tmp_path / "p.json") for model, text in asked]  # type: ignore[arg-type]
    assert found == [1, 1, 2, 3]
