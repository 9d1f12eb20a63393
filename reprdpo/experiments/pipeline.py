"""A run: the stages in order, for every system and seed asked for, each done once."""

import gc
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from reprdpo.data import load_preferences
from reprdpo.errors import UserError
from reprdpo.evaluation import build_judge
from reprdpo.experiments.config import SANDBOX, RunConfig, build
from reprdpo.experiments.finished_run import REWARD_MODEL_REPORT, FinishedRun
from reprdpo.experiments.overhead import OVERHEAD_FILE, overhead
from reprdpo.experiments.rows import DRAW, FIT, PAIRING, REWARD_MODEL, Row, rows_of
from reprdpo.experiments.run_folder import RunFolder, row_dir
from reprdpo.experiments.sources import Inputs, first, flip_labels, read_inputs
from reprdpo.experiments.stages import (
    Policy,
    evaluate_policy,
    fit_reward,
    keep_model,
    measure_reward_model,
    rank_pairs,
    sample_pairs,
    train_online,
    train_to_end,
)
from reprdpo.experiments.summary import evaluated_seeds, write_summary
from reprdpo.experiments.systems import SYSTEMS
from reprdpo.files import content_hash, write_json
from reprdpo.reward import HybridReward
from reprdpo.training import (
    BradleyTerryRewardModel,
    OnlineDPOConfig,
    ReprDPOConfig,
    ReprDPOTrainer,
    ReprSFTConfig,
    ReprSFTTrainer,
    RewardModelConfig,
    train_reward_model,
)

Say = Callable[[str], None]


def run(
    config: RunConfig, say: Say = print, *, more_evaluations: bool = False, begin: Callable[[], None] | None = None
) -> FinishedRun:
    """Run the pipeline, going on where an earlier start stopped.

    Systems, variants and seeds that the folder has and ``config`` has not stay as they are. ``more_evaluations`` lets
    a folder be evaluated once more, by another judge or on other prompts, beside what is there. ``begin`` is called
    when everything was checked, before the first stage.

    Raises:
        UserError: input that cannot be used (said before any stage starts), or a folder that holds another run.
    """
    folder = RunFolder(config, more_evaluations=more_evaluations)
    try:
        pipeline = Pipeline(config, folder)
        pipeline.check()
        if begin is not None:
            begin()
        for name, work in pipeline.stages():
            if name.startswith("evaluate ") and not folder.done(name):
                folder.forget(pipeline.summary_stage)
            folder.stage(name, work, say)
            gc.collect()
        return FinishedRun(folder.path, folder.path / folder.evaluation, config, pipeline.inputs.model)
    finally:
        folder.close()


class Pipeline:
    """What the stages share: the inputs, the reference policy, the folder."""

    def __init__(self, config: RunConfig, folder: RunFolder) -> None:
        self.config, self.folder = config, folder
        self.rows = rows_of(config)
        self._tokenized: dict[str, Dataset] = {}
        first_evaluation = folder.evaluation == "evaluation"
        self._of_evaluation = "" if first_evaluation else f" ({folder.evaluation})"
        self.summary_stage = f"summary{self._of_evaluation}"

    def check(self) -> None:
        """Read every input and build every configuration, so that what is wrong is said before work starts."""
        for name in ("preferences", "prompts"):
            if self.config.model == SANDBOX and getattr(self.config, name) is not None:
                raise UserError(f"{name}: the sandbox is aligned on its own; name a model for yours, or leave it out")
        build_judge(self.config.evaluate.judge, needs=("unsafe",))
        _ = self.base_pairs, self.benign
        self._sft_config()
        for row in self.rows:
            if row.trains_reward_model():
                self._reward_model_config(row)
            if row.system.pairs is not None:
                self._dpo_config(row, self.config.seeds[0])
        self._check_server()

    def stages(self) -> list[tuple[str, Callable[[], Any]]]:
        """The stages this configuration needs, in order; one that several rows need stands once."""
        planned: dict[str, Callable[[], Any]] = {}
        if "sft" in self.config.systems:
            planned["sft"] = self.sft
        for row in self.rows:
            if row.fits():
                planned.setdefault(_named("fit", row.differs(FIT)), partial(self.fit, row))
        for row in self.rows:
            if row.system.pairs == "ranked":
                if self._reranks(row):  # what the run's own reward ranked first
                    planned.setdefault("fit", partial(self.fit, self._plain_row))
                    planned.setdefault("sample", partial(self.sample, self._plain_row))
                planned.setdefault(_named("sample", row.differs((*FIT, *DRAW))), partial(self.sample, row))
        for row in self.rows:
            if row.trains_reward_model():
                planned.setdefault(_named("reward model", row.differs(REWARD_MODEL)), partial(self.reward_model, row))
        for row in self.rows:
            for seed in self.config.seeds:
                if row.system.pairs is not None:
                    planned[f"train {row.name} seed {seed}"] = partial(self.train, row, seed)
                planned[f"evaluate {row.name} seed {seed}{self._of_evaluation}"] = partial(self.evaluate, row, seed)
        return [*planned.items(), (self.summary_stage, self.summarise)]

    def sft(self) -> None:
        rows = self.base.tokenize_responses(self.inputs.demonstrations, self.inputs.where)
        args = self._sft_config()
        trainer = ReprSFTTrainer(self.base.model(), args, rows, processing_class=self.base.tokenizer())
        train_to_end(trainer, Path(args.output_dir))

    def fit(self, row: Row) -> None:
        pairs = first(self.labelled_pairs(row), row.config.fit.limit)
        report = fit_reward(self.reference, pairs, row.config.fit, self.reward_dir(row))
        write_json(self.folder / "fit" / f"{row.differs(FIT) or 'report'}.json", report.to_json())

    def sample(self, row: Row) -> None:
        settings, output = row.config.sample, self._samples_dir(row)
        pairing = {
            "top_k": settings.top,
            "bottom_k": settings.bottom,
            "min_gap": settings.min_gap,
            "first": settings.best_of,
        }
        if self._reranks(row):
            drawn = self._samples_dir(self._plain_row) / "responses.jsonl"
            rank_pairs(self.reference, self.reward(row), drawn, output, **pairing)
            return
        prompts = first(self.inputs.prompts, settings.limit)
        sampling = row.config.sampling()
        sample_pairs(self.reference, self.reward(row), prompts, sampling, output, engine=settings, **pairing)

    def reward_model(self, row: Row) -> None:
        output = self._reward_model_dir(row)
        if not (output / "model").is_dir():
            args = self._reward_model_config(row)
            model = train_reward_model(self.reference.model(), self.labelled_pairs(row), args)
            keep_model(output, model.save_pretrained)
        held_out = self.base.tokenize(self.inputs.held_out, self.inputs.where)
        accuracy = measure_reward_model(self._reward_model(row), held_out)
        write_json(output / REWARD_MODEL_REPORT, {"held_out_accuracy": asdict(accuracy)})

    def train(self, row: Row, seed: int) -> None:
        args = self._dpo_config(row, seed)
        if isinstance(args, OnlineDPOConfig):
            scorer = self._reward_model(row)
            train_online(self.reference, self.inputs.prompts, scorer, args, row.config.online, row.config.sampling())
            return
        trainer = ReprDPOTrainer(
            self.reference.model(),
            args,
            train_dataset=self.ranked_pairs(row) if row.system.pairs == "ranked" else self.labelled_pairs(row),
            processing_class=self.reference.tokenizer(),
            reward=self.reward(row) if row.system.confidence == "reward" else None,
        )
        train_to_end(trainer, Path(args.output_dir))

    def evaluate(self, row: Row, seed: int) -> None:
        settings, picks = row.config.sample, row.system.best_of
        reward: Any = None
        if picks is not None:
            reward = self.reward(row) if picks == "reward" else self._reward_model(row)
        asked = self.folder.state["evaluations"][self.folder.evaluation]
        asked = {**asked, "settings": {**asked["settings"], "judge": None}}
        evaluate_policy(
            self._policy(row, seed),
            self.config.evaluate,
            self.folder / self.folder.evaluation / f"{row.name}-seed-{seed}",
            red_team=self.inputs.red_team,
            borderline=self.inputs.borderline,
            benign=self.benign,
            system=row.name,
            seed=seed,
            best_of=1 if picks is None else settings.best_of or settings.num_responses,
            drawn=settings.num_responses,
            reward=reward,
            answers=self.folder / "answers" / content_hash(asked),
        )

    def summarise(self) -> None:
        """The table of all that was evaluated here, now and before."""
        evaluated = evaluated_seeds(self.folder.state["stages"], self._of_evaluation)
        every = rows_of(build(RunConfig, self.folder.state["config"]))
        write_summary(
            self.folder / self.folder.evaluation,
            [(row, evaluated[row.name]) for row in every if row.name in evaluated],
        )
        if found := overhead(self.folder.state["stages"]):
            write_json(self.folder / OVERHEAD_FILE, found)

    @cached_property
    def inputs(self) -> Inputs:
        return read_inputs(self.config)

    @cached_property
    def base(self) -> Policy:
        return Policy.of(self.config, self.inputs.model)

    @cached_property
    def reference(self) -> Policy:
        """Where alignment starts from and what it is measured against: SFT where the run has it, else the base."""
        return self.base.at(self._model_dir("sft")) if "sft" in self.config.systems else self.base

    @cached_property
    def base_pairs(self) -> Dataset:
        """The preferences, tokenised, as they were given."""
        return self.base.tokenize(self.inputs.preferences, self.inputs.where)

    def labelled_pairs(self, row: Row) -> Dataset:
        """The preferences, tokenised, with the share of wrong labels that ``row`` is given."""
        share = row.config.label_noise
        if not share:
            return self.base_pairs
        return self._tokenized_once(
            f"label noise {share}", lambda: flip_labels(self.inputs.preferences, share), self.inputs.where
        )

    def ranked_pairs(self, row: Row) -> Dataset:
        """The policy's own responses, paired by the reward."""
        path = self._samples_dir(row) / "pairs.jsonl"
        return self._tokenized_once(str(path), lambda: load_preferences(path), str(path))

    def _tokenized_once(self, key: str, read: Callable[[], Dataset], where: str) -> Dataset:
        """Tokenised pairs, kept for the other rows and seeds that train on them."""
        if key not in self._tokenized:
            self._tokenized[key] = self.base.tokenize(read(), where)
        return self._tokenized[key]

    @cached_property
    def benign(self) -> Dataset:
        return self.base.tokenize_responses(self.inputs.benign, self.inputs.where)

    def reward(self, row: Row) -> HybridReward:
        """The reward as it was fitted; training moves a copy of its own."""
        return HybridReward.from_pretrained(self.reward_dir(row))

    def reward_dir(self, row: Row) -> Path:
        differs = row.differs(FIT)
        return self.folder / "rewards" / differs if differs else self.folder / "reward"

    @cached_property
    def _plain_row(self) -> Row:
        return Row("", "", SYSTEMS["dpo_ranked"], self.config, {})

    def _reranks(self, row: Row) -> bool:
        """Whether the row's pairs are of the responses that the run draws anyway."""
        own = row.differs((*FIT, *DRAW))
        return bool(own) and not row.differs(DRAW, but=PAIRING)

    def _samples_dir(self, row: Row) -> Path:
        return self.folder / "samples" / row.differs((*FIT, *DRAW))

    def _reward_model(self, row: Row) -> BradleyTerryRewardModel:
        return BradleyTerryRewardModel.from_pretrained(self._reward_model_dir(row) / "model")

    def _reward_model_dir(self, row: Row) -> Path:
        differs = row.differs(REWARD_MODEL)
        return self.folder / "reward_models" / differs if differs else self.folder / "reward_model"

    def _check_server(self) -> None:
        """Ask the server that samples for its model, unless it cannot run yet: it may have to serve what SFT makes."""
        settings = self.config.sample
        needed = any(row.system.pairs == "ranked" for row in self.rows) and not self.folder.done("sample")
        if settings.engine == "openai" and needed and (self.folder.done("sft") or "sft" not in self.config.systems):
            settings.server().fingerprint()

    def _policy(self, row: Row, seed: int) -> Policy:
        if row.system.pairs is not None:
            return self.base.at(self._model_dir(row.name, seed))
        return self.base if row.name == "base" else self.reference

    def _model_dir(self, name: str, seed: int = 0) -> Path:
        return row_dir(self.folder.path, name, seed) / "model"

    def _sft_config(self) -> ReprSFTConfig:
        return build(ReprSFTConfig, {"output_dir": str(row_dir(self.folder.path, "sft"))} | self.config.sft, "sft")

    def _reward_model_config(self, row: Row) -> RewardModelConfig:
        settings = {"output_dir": str(self._reward_model_dir(row))} | row.config.online.reward_model
        return build(RewardModelConfig, settings, "online.reward_model")

    def _dpo_config(self, row: Row, seed: int) -> ReprDPOConfig:
        settings: dict[str, Any] = {
            "output_dir": str(row_dir(self.folder.path, row.name, seed)),
            "seed": seed,
            "reference_cache_dir": str(self.folder / "reference"),
            "confidence_source": "reward" if row.system.confidence == "reward" else "fixed",
        }
        if row.system.confidence != "reward":
            settings["fixed_confidence"] = row.system.confidence
        cls = OnlineDPOConfig if row.system.pairs == "online" else ReprDPOConfig
        where = "train" if row.name in SYSTEMS else f"variants.{row.name}.train"
        return build(cls, settings | row.config.training_arguments(row.system.name), where)


def _named(stage: str, differs: str) -> str:
    return f"{stage} ({differs})" if differs else stage
