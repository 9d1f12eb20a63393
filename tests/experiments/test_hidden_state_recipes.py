"""The recipes that read hidden states, on the smallest sandbox: their numbers against those found another way."""

# ruff: noqa: RUF001  Greek letters are what the tables show

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from reprdpo.data import TokenizeConfig
from reprdpo.data.sandbox import load_sandbox
from reprdpo.errors import UserError
from reprdpo.experiments.recipes._movement import Draw, Moved, Scores, compare, drawn, score, sequence_logps
from reprdpo.experiments.stages import Policy
from reprdpo.files import read_json, read_jsonl
from reprdpo.models import Quantization, load_causal_lm, load_tokenizer
from reprdpo.reward import HybridReward
from reprdpo.sampling import read_samples

Experiment = Callable[..., dict[str, Any]]
SETTINGS = {"evaluate": {"limit": 2}, "fit": {"folds": 3}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experiments")


@pytest.fixture(scope="module")
def experiment(folder: Path, tiny_experiment: Callable[..., Path]) -> Experiment:
    def run(name: str, output_dir: Path = folder, **arguments: Any) -> dict[str, Any]:
        settings = SETTINGS | arguments.pop("settings", {})
        return read_json(tiny_experiment(name, output_dir, settings=settings, **arguments) / "result.json")

    return run


@pytest.fixture(scope="module")
def hypothesis(experiment: Experiment) -> dict[str, Any]:
    return experiment("hypothesis")


@pytest.fixture(scope="module")
def finished(hypothesis: dict[str, Any], folder: Path) -> Path:
    """The run that the experiments share."""
    (run,) = (folder / "tiny" / "runs").iterdir()
    return run


def rows(result: dict[str, Any], table: int = 0, key: str | None = None) -> dict[str, dict[str, Any]]:
    found = result["tables"][table]
    return {row[key or found["columns"][0]["key"]]: row for row in found["rows"]}


def test_reward_evaluation(experiment: Experiment, tmp_path: Path) -> None:
    result = experiment("reward_evaluation", tmp_path)
    methods = rows(result, key="method")
    assert {"Gated reward", "Gated reward, α = 7.5 as published", "SWIFT head, mean of the response"} < methods.keys()
    assert all(row["accuracy"]["n"] == 48 for row in methods.values())
    assert sum(row["accuracy"]["n"] for row in rows(result, 1, "category").values()) == 48
    layers, reliability = result["figures"]
    assert layers["series"][0]["x"] == [1, 2, 3]
    assert layers["lines"][0]["y"] == methods["Gated reward"]["accuracy"]["value"]
    assert all(0.5 <= x <= 1 for series in reliability["series"] for x in series["x"])
    assert len(result["orderings"]) == 5
    assert not (tmp_path / "tiny" / "runs").exists()


def test_reward_evaluation_of_given_states(experiment: Experiment, tmp_path: Path) -> None:
    """A layer that tells all, and a claim that shows it."""
    chosen, rejected = torch.randn(2, 60, 5, 8)
    chosen[:, 2, 0] += 6
    save_file({"chosen": chosen.clone(), "rejected": rejected.clone()}, tmp_path / "states.safetensors")
    options = {"states": str(tmp_path / "states.safetensors")}
    result = experiment("reward_evaluation", tmp_path, options=options)
    accuracy = {method: row["accuracy"]["value"] for method, row in rows(result, key="method").items()}
    assert accuracy["Best layer, chosen within the training folds"] > 0.95 > 0.7 > accuracy["Last-layer probe"]
    assert result["figures"][0]["series"][0]["y"][1] == max(result["figures"][0]["series"][0]["y"])
    (last,) = (claim for claim in result["orderings"] if "Last-layer probe below" in claim["claim"])
    assert last["held"] is True
    assert last["high"] < 0
    with pytest.raises(UserError, match="holds another run"):
        experiment("reward_evaluation", tmp_path, options=options | {"keep_embedding": True})


def test_reward_evaluation_of_published_formats(experiment: Experiment, cache_dir: Path, tmp_path: Path) -> None:
    """Pairs as PKU-SafeRLHF and RewardBench publish theirs, by subset; every pair is counted."""
    rows_of = [row for _, row in read_jsonl(load_sandbox(cache_dir, scale="tiny").preferences)]
    pku, bench = tmp_path / "pku.jsonl", tmp_path / "bench.jsonl"
    pku.write_text(
        "".join(
            json.dumps(
                {
                    "prompt": row["prompt"],
                    "response_0": row["rejected"],
                    "response_1": row["chosen"],
                    "is_response_0_safe": number % 5 == 0,
                    "is_response_1_safe": True,
                    "safer_response_id": 1,
                    "better_response_id": 0,
                }
            )
            + "\n"
            for number, row in enumerate(rows_of)
        )
    )
    bench.write_text(
        "".join(
            json.dumps(
                {name: row[name] for name in ("prompt", "chosen", "rejected")}
                | {"id": number, "subset": ("refusals-offensive", "xstest-should-refuse")[number % 2]}
            )
            + "\n"
            for number, row in enumerate(rows_of)
        )
    )
    options = {"pairs": {"pku": str(pku), "bench": f"reward-bench:{bench}"}, "methods": ["gated", "swift"]}
    result = experiment("reward_evaluation", tmp_path / "out", options=options)
    counts = {(row["data"], row["method"]): row["accuracy"]["n"] for row in result["tables"][0]["rows"]}
    assert counts[("pku", "Gated reward")] == counts[("bench", "Gated reward")] == len(rows_of)
    subsets = {row["category"]: row["accuracy"]["n"] for row in result["tables"][1]["rows"] if row["data"] == "bench"}
    assert subsets == {"refusals-offensive": 24, "xstest-should-refuse": 24}


def test_figure1(experiment: Experiment, finished: Path) -> None:
    """Before alignment the probes and the gate are those that the run's own fit reported."""
    result = experiment("figure1")
    report = read_json(finished / "fit" / "report.json")
    before, after = result["figures"][0]["series"]
    assert before["y"] == pytest.approx(report["layer_accuracy"], abs=1e-6)
    assert result["figures"][0]["lines"][0]["y"] == pytest.approx(report["gated_accuracy"], abs=1e-6)
    assert len(after["y"]) == 3
    assert list(rows(result)) == ["1", "2", "3", "gated"]
    assert len(result["orderings"]) == 4


def test_figure2(experiment: Experiment, finished: Path, tmp_path: Path) -> None:
    result = experiment("figure2", options={"points": 10})
    assert [figure["name"] for figure in result["figures"]] == [
        "layer-2-before", "layer-2-after", "layer-3-before", "layer-3-after"
    ]  # fmt: skip
    for figure in result["figures"]:
        assert [(len(series["x"]), len(series["y"])) for series in figure["series"]] == [(10, 10)] * 2
    planes = result["tables"][0]["rows"]
    assert all(0 < row["second"] < row["first"] < 1 and row["accuracy"]["n"] == 48 for row in planes)
    assert planes[0]["first"] != planes[1]["first"]


def test_hypothesis(hypothesis: dict[str, Any]) -> None:
    ranking, sets = hypothesis["tables"]
    assert [row["system"] for row in sets["rows"]] == ["DPO", "cDPO* (ours)"]
    assert len(ranking["rows"]) == 6
    for row in ranking["rows"]:
        assert -1 <= row["tau"]["low"] <= row["tau"]["value"] <= row["tau"]["high"] <= 1
        assert row["swapped"]["value"] == pytest.approx((1 - row["tau"]["value"]) / 2)
    for row in sets["rows"]:
        assert 1 / 4 <= row["effective"]["value"] <= 1
        assert 0 < row["shared"]["value"] < 1
        assert row["ratio"]["value"] == pytest.approx(row["overlap"]["value"] / row["floor"]["value"])
    assert len(hypothesis["orderings"]) == 6
    bars = hypothesis["figures"][0]
    assert len(bars["categories"]) == len(bars["series"][0]["y"]) == 5


def test_scores_are_the_runs_own(finished: Path) -> None:
    """The reference's rewards are those of the sampling; a sequence's log-probability is the model's."""
    where = finished / "systems" / "sft" / "seed-0" / "model"
    draws = [drawn(record) for record in read_samples(finished / "samples" / "responses.jsonl")]
    policy = Policy(str(where), TokenizeConfig(max_length=128), "auto", False, Quantization())
    found = score(policy, {"fixed_reward": HybridReward.from_pretrained(finished / "reward")}, draws)
    kept = [
        response["reward"]
        for record in read_samples(finished / "samples" / "responses.jsonl")
        for response in record["responses"]
        if response["text"].strip()
    ]
    np.testing.assert_allclose(np.concatenate(found.rewards["fixed_reward"]), kept, rtol=1e-4, atol=1e-4)

    model, tokenizer = load_causal_lm(where), load_tokenizer(where)
    text = draws[0].prompt + draws[0].texts[0]
    end = [] if draws[0].truncated[0] else [tokenizer.eos_token_id]
    ids = torch.tensor([[*tokenizer(text).input_ids, *end]])
    if not draws[0].truncated[0] and ids[0, -2] == tokenizer.eos_token_id:
        ids = ids[:, :-1]
    start = ids.shape[1] - int(found.tokens[0][0])
    logps = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[start - 1 :]
    assert found.logp[0][0] == pytest.approx(logps.sum().item(), rel=1e-4)
    row = {"input_ids": ids[0].tolist(), "response_start": start}
    assert sequence_logps(model, [row])[0] == pytest.approx(logps.sum().item(), rel=1e-4)


def _compared(log_ratio: float, order: list[int], fresh: list[str]) -> Moved:
    texts = ["a b c", "d e f", "g h i", "g h i"]
    draws = [Draw(number, "x", texts, [False] * 4) for number in range(3)]
    first = np.array([1.0, 2.0, 3.0, 3.0])
    second = np.array([*order, order[2]], dtype=float)
    old = Scores([first - 9] * 3, [np.full(4, 3.0)] * 3, {"fixed_reward": [first] * 3})
    new = Scores([first - 9 + log_ratio] * 3, old.tokens, {"fixed_reward": [second] * 3, "reward": [second] * 3})
    return compare(draws, old, new, [texts] * 3, [fresh] * 3, n=3)


def test_a_policy_that_did_not_move() -> None:
    found = _compared(0.0, [1, 2, 3], ["a b c", "d e f", "g h i", "g h i"])
    assert all(np.all(tau == 1) for tau in found.tau.values())
    assert np.all(found.nats == 0)
    assert all(np.allclose(moved, 0) for moved in found.movement().values())


def test_a_ranking_reversed_over_a_set_that_stays() -> None:
    found = _compared(0.0, [3, 2, 1], ["a b c", "d e f", "g h i", "g h i"])
    movement = found.movement()
    assert movement["Ranking by R, probes as before"] == pytest.approx([2, 2, 2])
    assert movement["Ranking by log π(y | x)"] == pytest.approx([0, 0, 0])
    assert movement["Set, by n-grams"] == pytest.approx([0, 0, 0])


def test_a_set_that_went_under_a_ranking_that_stays() -> None:
    found = _compared(-math.log(4), [1, 2, 3], ["a b c", "x", "y", "z"])
    assert found.tau["reward"] == pytest.approx([1, 1, 1])
    assert found.nats == pytest.approx([-math.log(4) / 3] * 3)
    assert found.shared == pytest.approx([1 / 4] * 3)
    assert found.effective == pytest.approx([1, 1, 1])
    assert found.text_ratio.mean() == pytest.approx(1 / 4)


def test_texts_that_never_agree_tell_nothing() -> None:
    draws = [Draw(0, "x", ["a b c", "d e f"], [False] * 2)]
    side = Scores([np.arange(2.0)], [np.ones(2)], {"fixed_reward": [np.arange(2.0)], "reward": [np.arange(2.0)]})
    found = compare(draws, side, side, [["g h i"]], [["a b c"]], n=3)
    assert found.blind
    assert np.isnan(found.movement()["Set, by n-grams"]).all()


def test_a_text_drawn_twice_counts_once_in_the_ranking() -> None:
    draw = Draw(0, "x", ["a", "b", "a", "c", "b"], [False] * 5)
    assert draw.distinct == [0, 1, 3]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("figure1", {"options": {"system": "sft"}}, "'sft' is not aligned in this run; it has reprdpo"),
        ("figure2", {"options": {"depths": [0.0]}}, r"options.depths: each must lie in \(0, 1\]"),
        ("figure2", {"options": {"axes": "both"}}, "options.axes: expected one of 'own', 'before'"),
        (
            "hypothesis",
            {"options": {"systems": ["online"]}},
            "'online' is not aligned in this run; it has dpo, reprdpo",
        ),
        (
            "hypothesis",
            {"options": {"systems": ["dpo"]}, "settings": {"systems": ["sft", "dpo"]}},
            "none of them ranks the reference's responses",
        ),
        ("reward_evaluation", {"options": {"states": "nowhere.safetensors"}}, "nowhere.safetensors: no such file"),
        ("reward_evaluation", {"options": {"methods": ["best"]}}, "methods: 'best' is unknown"),
    ],
)
def test_mistakes_are_said_before_work(
    experiment: Experiment, name: str, arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        experiment(name, tmp_path, **arguments)
    assert not list(tmp_path.rglob("settings.json"))


@pytest.mark.slow
def test_real_states_as_published(experiment: Experiment, real_dir: Path, tmp_path: Path) -> None:
    """METHOD's figures, of a larger set, within three standard errors of 80 pairs."""
    options = {"states": str(real_dir / "states" / "llama2_7b_last_token.safetensors")}
    result = experiment("reward_evaluation", tmp_path, settings={"fit": {"folds": 5}}, options=options)
    accuracy = result["figures"][0]["series"][0]["y"]
    for layer, published in [(1, 0.77), (8, 0.88), (13, 0.90), (20, 0.91), (32, 0.90)]:
        assert accuracy[layer - 1] == pytest.approx(published, abs=3 * (published * (1 - published) / 80) ** 0.5)


@pytest.mark.slow
def test_a_real_model_and_real_pairs(experiment: Experiment, real_dir: Path, tmp_path: Path) -> None:
    settings = {
        "model": str(real_dir / "models" / "stories260K"),
        "preferences": str(real_dir / "pairs" / "refusal_direction.jsonl"),
        "limit": 120,
        "data": {"max_length": 160, "truncation_mode": "keep_end"},
        "sample": {"num_responses": 8, "limit": 24, "max_new_tokens": 16},
        "evaluate": {"judge": "keyword-refusal", "limit": 2},
        "systems": ["base", "dpo", "reprdpo"],
    }
    pairs = {"hh": str(real_dir / "pairs" / "hh_harmless.jsonl")}
    found = experiment("reward_evaluation", tmp_path, settings=settings, options={"pairs": pairs})
    assert {row["data"] for row in found["tables"][0]["rows"]} == {"preferences", "hh"}
    assert all(row["accuracy"]["n"] == 120 for row in found["tables"][0]["rows"])
    found = experiment("hypothesis", tmp_path, settings=settings, options={"prompts": 24})
    assert all(row["tau"]["n"] >= 12 for row in found["tables"][0]["rows"])
