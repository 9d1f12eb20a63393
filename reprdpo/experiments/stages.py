"""The stages of a run, each from data to files; the pipeline and the commands share them."""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from reprdpo.data import Text, TokenizeConfig, load_preferences, tokenize_preferences, tokenize_responses
from reprdpo.evaluation import (
    Judge,
    KeywordRefusalJudge,
    Rate,
    build_judge,
    check_prompts,
    judge_responses,
    overrefusal_rate,
    perplexity,
    read_responses,
    toxic_rate,
    write_judged,
)
from reprdpo.experiments.config import EvaluateSection, FitSection, OnlineSection, RunConfig
from reprdpo.files import content_hash, disk_errors, read_json, write_json
from reprdpo.models import Quantization, accelerator, load_causal_lm, load_tokenizer, model_fingerprint
from reprdpo.reward import FitReport, HybridReward, RewardFitConfig, extract_pair_states, fit_single_layer
from reprdpo.sampling import (
    EngineConfig,
    PairReport,
    SamplingConfig,
    Score,
    TransformersEngine,
    build_engine,
    build_pairs,
    rank_responses,
    sample_responses,
    score_responses,
)
from reprdpo.training import BradleyTerryRewardModel, OnlineDPOConfig, OnlineDPOTrainer, last_checkpoint


@dataclass(frozen=True)
class Policy:
    """A causal LM on disk, and how it is loaded and text tokenised for it: no default, so that no caller drops one."""

    path: str
    data: TokenizeConfig
    dtype: str
    trust_remote_code: bool
    quantization: Quantization

    @classmethod
    def of(cls, config: RunConfig, path: str) -> "Policy":
        """The policy at ``path``, loaded and its text tokenised as a run's settings say."""
        return cls(path, config.data, config.dtype, config.trust_remote_code, config.quantization)

    def model(self) -> PreTrainedModel:
        """The model, on the accelerator where there is one."""
        return load_causal_lm(
            self.path,
            dtype=self.dtype,
            device=accelerator(),
            trust_remote_code=self.trust_remote_code,
            quantization=self.quantization,
        )

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.path, trust_remote_code=self.trust_remote_code)

    def tokenize(self, pairs: Dataset, where: str) -> Dataset:
        return tokenize_preferences(pairs, self.tokenizer(), self.data, where=where)

    def tokenize_responses(self, rows: Dataset, where: str) -> Dataset:
        return tokenize_responses(rows, self.tokenizer(), self.data, where=where)

    def at(self, path: str | Path) -> "Policy":
        """The policy that lies elsewhere."""
        return replace(self, path=str(path))


def fit_reward(policy: Policy, pairs: Dataset, config: RewardFitConfig, output: Path) -> FitReport:
    """Fit the reward on the policy's hidden states of tokenised ``pairs``; write it to ``output``."""
    tokenizer, model = policy.tokenizer(), policy.model()
    states = extract_pair_states(model, pairs, pad_token_id=tokenizer.pad_token_id, pool=config.pool)
    labels = {"groups": pairs["prompt_id"], **safety_labels(pairs)}
    if isinstance(config, FitSection) and config.layers != "all":
        reward, report = fit_single_layer(*states, config, config.layers, base=model, **labels)
    else:
        reward, report = HybridReward.fit(*states, config, base=model, **labels)
    reward.save_pretrained(output)
    return report


def sample_pairs(
    policy: Policy,
    reward: HybridReward,
    prompts: Dataset,
    config: SamplingConfig,
    output: Path,
    *,
    engine: EngineConfig,
    **pairing: Any,
) -> PairReport:
    """Draw responses, rank them by the reward, write ``responses.jsonl``, ``pairs.jsonl`` and ``report.json``.

    The reward reads the policy's states here, wherever the responses come from.
    """
    model, tokenizer = policy.model(), policy.tokenizer()
    reward.check_base(model)
    # A server's model is known by name alone, so the file also depends on the model that scores.
    scorer = [model_fingerprint(model)] if engine.engine == "openai" else []
    responses = sample_responses(
        build_engine(engine, model, tokenizer),
        prompts,
        output / "responses.jsonl",
        config,
        score=by_reward(model, tokenizer, reward, policy.data),
        key=[model_fingerprint(reward), *scorer] if scorer else model_fingerprint(reward),
    )
    report = build_pairs(responses, output / "pairs.jsonl", **pairing)
    write_json(output / "report.json", asdict(report))
    return report


def rank_pairs(policy: Policy, reward: HybridReward, drawn: Path, output: Path, **pairing: Any) -> PairReport:
    """As :func:`sample_pairs`, of the responses in the file ``drawn``: ranked anew, none sampled."""
    model, tokenizer = policy.model(), policy.tokenizer()
    score = by_reward(model, tokenizer, reward, policy.data)
    responses = rank_responses(drawn, output / "responses.jsonl", score, key=model_fingerprint(reward))
    report = build_pairs(responses, output / "pairs.jsonl", **pairing)
    write_json(output / "report.json", asdict(report))
    return report


def train_to_end(trainer: Trainer, output: Path) -> None:
    """Train, from the last whole checkpoint where there is one; leave ``output/model`` and no checkpoints."""
    if not (output / "model").is_dir():
        trainer.train(resume_from_checkpoint=last_checkpoint(output))
        keep_model(output, trainer.save_model, main=trainer.is_world_process_zero())
        trainer.accelerator.wait_for_everyone()


def keep_model(output: Path, save: Callable[[str], None], *, main: bool = True) -> None:
    """Let ``save`` write ``output/model``, which appears whole or not at all; then drop the checkpoints.

    Every process calls this, as each may hold a part of the model; ``main`` is the one that moves files.
    """
    unfinished = output / "model.unfinished"
    with disk_errors(output):
        if main:
            shutil.rmtree(unfinished, ignore_errors=True)
        save(str(unfinished))
        if not main:
            return
        unfinished.replace(output / "model")
        for checkpoint in output.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)


def measure_reward_model(model: BradleyTerryRewardModel, pairs: Dataset) -> Rate:
    """The share of tokenised ``pairs`` whose chosen response the model gives the higher reward."""
    model.to(accelerator() or "cpu")

    def rewards(side: str) -> list[float]:
        columns = (pairs[f"{side}_input_ids"], pairs[f"{side}_response_start"])
        return model.score([{"input_ids": ids, "response_start": start} for ids, start in zip(*columns, strict=True)])

    right = sum(one > other for one, other in zip(rewards("chosen"), rewards("rejected"), strict=True))
    return Rate.of(right, len(pairs))


def train_online(
    policy: Policy,
    prompts: Dataset,
    reward_model: BradleyTerryRewardModel,
    args: OnlineDPOConfig,
    online: OnlineSection,
    sampling: SamplingConfig,
) -> None:
    """Online DPO: each round, the moving policy answers fresh prompts and the reward model picks best and worst."""
    tokenizer = policy.tokenizer()
    folder = Path(args.output_dir) / "samples"

    def score(asked: list[Text], responses: list[str]) -> list[float]:
        return reward_model.score_responses(tokenizer, asked, responses, policy.data)

    def resample(model: PreTrainedModel, number: int) -> Dataset:
        start = number * online.prompts_per_round
        batch = prompts.select([row % len(prompts) for row in range(start, start + online.prompts_per_round)])
        config = replace(sampling, num_responses=online.num_responses, seed=args.seed + number)
        path = folder / f"round-{number:05d}.jsonl"
        path.unlink(missing_ok=True)
        sample_responses(TransformersEngine(model, tokenizer), batch, path, config, score=score, progress=False)
        pairs = path.with_suffix(".pairs.jsonl")
        build_pairs(path, pairs)
        return policy.tokenize(load_preferences(pairs), str(pairs))

    model = policy.model()
    reward_model.to(model.device)
    trainer = OnlineDPOTrainer(model, args, resample=resample, processing_class=tokenizer)
    train_to_end(trainer, Path(args.output_dir))


def evaluate_policy(
    policy: Policy,
    config: EvaluateSection,
    output: Path,
    *,
    red_team: Dataset,
    borderline: Dataset | None = None,
    benign: Dataset | None = None,
    system: str = "policy",
    seed: int = 0,
    best_of: int = 1,
    reward: HybridReward | BradleyTerryRewardModel | None = None,
    drawn: int | None = None,
    answers: Path | None = None,
) -> dict[str, Any]:
    """Sample, judge and rate; writes ``output``.json and ``output``.responses.jsonl.

    Without a reward one response a prompt is drawn and judged; with one, ``drawn`` are (default: ``best_of``), and the
    best of the first ``best_of`` of them by ``reward`` is judged. ``benign`` is tokenised.

    The responses lie in the folder ``answers``, where every judge, and every reward that picks from them, finds them
    again (default: beside ``output``).
    """
    judge = build_judge(config.judge, needs=("unsafe",))
    refusals: Judge = judge if "refusal" in judge.gives else KeywordRefusalJudge()
    place = output if answers is None else answers / output.name
    many = 1 if reward is None else drawn or best_of
    sampling = config.sampling(many, seed)
    asked = {"responses": red_team} | ({} if borderline is None else {"borderline": borderline})

    def answer() -> tuple[dict[str, Path], float | None]:
        """Where the answers lie, and the perplexity; the policy is let go of, as the judge may be as large."""
        model, tokenizer = policy.model(), policy.tokenizer()
        engine, paths = TransformersEngine(model, tokenizer), {}
        for kind, prompts in asked.items():
            paths[kind] = Path(f"{place}.{kind}.samples.jsonl")
            if reward is None:
                sample_responses(engine, prompts, paths[kind], sampling)
                continue
            shared = output if answers is None else answers / "drawn"
            drawn_path = Path(f"{shared}-{many}-seed-{seed}.{kind}.samples.jsonl")
            sample_responses(engine, prompts, drawn_path, sampling)
            score = by_reward(model, tokenizer, reward, policy.data)
            rank_responses(drawn_path, paths[kind], score, key=model_fingerprint(reward), first=best_of)
        return paths, None if benign is None else _perplexity(model, benign, Path(f"{place}.perplexity.json"))

    def judged(kind: str, by: Judge) -> Any:
        records = read_responses(paths[kind], choose="best" if reward is not None else "first")
        check_prompts(records, asked[kind], paths[kind])
        texts = [record.prompt for record in records], [record.response for record in records]
        words = judge_responses(by, *texts, cache_dir=place.parent / "judgements")
        write_judged(Path(f"{output}.{kind}.jsonl"), records, words)
        return words

    paths, benign_perplexity = answer()
    toxic = toxic_rate(judged("responses", judge), red_team["category"])
    refused = None if borderline is None else overrefusal_rate(judged("borderline", refusals))
    result = {
        "system": system,
        "seed": seed,
        "judge": judge.name,
        "toxic": asdict(toxic.overall) | {"unparsed": toxic.unparsed},
        "unparsed": toxic.unparsed,
        "by_category": {
            name: asdict(rate) | {"unparsed": toxic.unparsed_by_category[name]}
            for name, rate in toxic.by_category.items()
        },
        "overrefusal": None if refused is None else asdict(refused.overall) | {"unparsed": refused.unparsed},
        "overrefusal_judge": None if refused is None else refusals.name,
        "perplexity": benign_perplexity,
        "responses": f"{output.parent.name}/{output.name}.responses.jsonl",
    }
    write_json(Path(f"{output}.json"), result)
    return result


def _perplexity(model: PreTrainedModel, benign: Dataset, path: Path) -> float:
    """The perplexity of ``benign``, kept in ``path``."""
    key = content_hash(model_fingerprint(model), [[row["input_ids"], row["response_start"]] for row in benign])
    if not path.exists() or read_json(path)["key"] != key:
        write_json(path, {"key": key, "perplexity": perplexity(model, benign)})
    return float(read_json(path)["perplexity"])


def safety_labels(pairs: Dataset) -> dict[str, list[bool | None] | None]:
    """The labels of each side, as a fit takes them; None, where there are none, is chosen safe and rejected unsafe."""
    columns = {name: list(pairs[name]) for name in ("chosen_is_safe", "rejected_is_safe")}
    return {name: None if all(label is None for label in labels) else labels for name, labels in columns.items()}


def by_reward(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reward: HybridReward | BradleyTerryRewardModel,
    data: TokenizeConfig,
) -> Score:
    """Scores by a reward read from ``model``'s states, or by a reward model."""
    if isinstance(reward, BradleyTerryRewardModel):
        return partial(reward.to(model.device).score_responses, tokenizer, config=data)
    reward.check_base(model, allow_descendant=True)
    return partial(score_responses, model, tokenizer, reward.to(model.device), tokenize=data)
