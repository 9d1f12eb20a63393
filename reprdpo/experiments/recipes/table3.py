"""Table 3: what alignment cost in general ability (over-alignment)."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from reprdpo.data import load_prompts
from reprdpo.data.sandbox import load_sandbox
from reprdpo.errors import UserError
from reprdpo.evaluation import (
    Comparison,
    Judge,
    build_judge,
    compare,
    compare_scores,
    mean_over_seeds,
    score_over_seeds,
)
from reprdpo.evaluation.ability import AbilityConfig, ability, load_tasks
from reprdpo.experiments.config import SANDBOX, RunConfig
from reprdpo.experiments.experiment import Job
from reprdpo.experiments.finished_run import FinishedRun
from reprdpo.experiments.responses_at import Answerer, Responses
from reprdpo.experiments.results import Cell, Column, Interval, Ordering, Result, Table
from reprdpo.experiments.sources import default_cache, first
from reprdpo.files import content_hash, read_json, write_json
from reprdpo.models import model_fingerprint

TITLE = "Table 3: general ability after alignment"
QUESTION = "What does alignment cost in knowledge (MMLU) and in the quality of answers to plain instructions?"

ROWS = ("base", "sft", "dpo", "reprdpo")
OURS = "reprdpo"

Values = list[list[float | None]]


@dataclass(frozen=True)
class Options:
    """What ability is measured by."""

    tasks: tuple[str, ...] = field(default=(), metadata={"help": "tasks of lm-evaluation-harness, such as mmlu"})
    task_folder: str | None = field(
        default=None, metadata={"help": "folder of task files, searched instead of its own"}
    )
    num_fewshot: int | None = field(default=None, metadata={"help": "worked examples (default: the task's own)"})
    task_limit: int | None = field(default=None, metadata={"help": "questions a task (default: all)"})
    network: bool = field(default=False, metadata={"help": "may fetch the tasks' data"})
    prompts: str | None = field(default=None, metadata={"help": "AlpacaEval's file, or other plain instructions"})
    reward_models: tuple[str, ...] = field(default=(), metadata={"help": "who scores the answers (reward-model:DIR)"})


@dataclass(frozen=True)
class Measure:
    """A column: what was measured of every system, one list a seed, and how it is told."""

    key: str
    label: str
    kind: str
    values: Mapping[str, Values]

    def interval(self, name: str) -> Interval:
        return Interval.of((mean_over_seeds if self.kind == "share" else score_over_seeds)(self.values[name]))

    def compare(self, low: str, high: str) -> Comparison:
        return (compare if self.kind == "share" else compare_scores)(self.values[low], self.values[high])


def run(job: Job) -> Result:
    options = job.options
    tasks = load_tasks(_asked(options, job.config)) if options.tasks else {}
    judges = [build_judge(spec, needs={"score"}) for spec in options.reward_models]
    prompts = _prompts(options, job.config)
    done = job.pipeline()
    names = [name for name in ROWS if name in done.rows]
    measures = []
    if tasks:
        measures.append(Measure("ability", ", ".join(options.tasks), "share", _ability(job, done, names, tasks)))
    if prompts is not None:
        measures += _scores(job, done, names, prompts, judges)
    rows: list[dict[str, Cell]] = [
        {
            "system": done.rows[name].label,
            **{measure.key: measure.interval(name) for measure in measures},
            "perplexity": _perplexity(done, name),
        }
        for name in names
    ]
    columns = [
        Column("system", "System", "text"),
        *(Column(measure.key, measure.label, measure.kind) for measure in measures),  # type: ignore[arg-type]
        Column("perplexity", "Perplexity of benign text"),
    ]
    return Result(
        tables=[Table("table3", TITLE, columns, rows, _note(job, prompts))],
        orderings=[
            Ordering.of(
                f"{measure.label}: {done.rows[OURS].label} below {done.rows[other].label}", measure.compare(OURS, other)
            )
            for measure in measures
            for other in names
            if other != OURS and OURS in names
        ],
        notes=_notes(job, measures),
        not_run=_not_run(job),
    )


def _asked(options: Options, config: RunConfig) -> AbilityConfig:
    batch_size = min(config.evaluate.batch_size, 64)  # evaluate's is for short prompts; five worked examples are long
    return AbilityConfig(
        options.tasks, options.task_folder, options.num_fewshot, options.task_limit, batch_size, options.network
    )


def _prompts(options: Options, config: RunConfig) -> Any:
    """The instructions whose answers are scored: those given, else the sandbox's benign ones, else none."""
    if options.prompts is not None:
        return first(load_prompts(options.prompts), config.evaluate.limit)
    if options.reward_models and config.model != SANDBOX:
        raise UserError(
            "prompts: none for the reward models to score answers to; name AlpacaEval's file (prompts=FILE)"
        )
    if config.model != SANDBOX:
        return None
    sandbox = load_sandbox(config.cache_dir or default_cache(), scale=config.scale)
    return first(load_prompts(sandbox.benign_prompts), config.evaluate.limit)


def _seeds(done: FinishedRun, name: str) -> Sequence[int]:
    """The seeds that give another policy: of one that is not trained on pairs there is one."""
    return done.seeds if done.rows[name].system.pairs is not None else done.seeds[:1]


def _ability(job: Job, done: FinishedRun, names: Sequence[str], tasks: Mapping[str, Any]) -> dict[str, Values]:
    def answers(name: str, seed: int) -> list[float | None]:
        path = job.folder / "ability" / f"{name}-seed-{seed}.json"
        return _answers(Answerer(done, name, seed), _asked(job.options, done.config), tasks, path)

    return {name: [answers(name, seed) for seed in _seeds(done, name)] for name in names}


def _answers(answerer: Answerer, config: AbilityConfig, tasks: Mapping[str, Any], path: Path) -> list[float | None]:
    """Whether each question was answered right, kept in ``path``."""
    asked = {key: value for key, value in asdict(config).items() if key not in ("batch_size", "network")}
    files = sorted(file for file in Path(config.folder).rglob("*") if file.is_file()) if config.folder else []
    key = content_hash(model_fingerprint(answerer.model), asked, *files)
    if not path.exists() or read_json(path)["key"] != key:
        write_json(path, {"key": key, "answers": ability(answerer.model, answerer.tokenizer, config, tasks)})
    return [float(right) for answers in read_json(path)["answers"].values() for right in answers]


def _scores(job: Job, done: FinishedRun, names: Sequence[str], prompts: Any, judges: Sequence[Judge]) -> list[Measure]:
    """A measure a reward model; without any given, the run's own Bradley-Terry reward model."""
    own = None if judges else done.reward_model()
    drawn: dict[str, list[Responses]] = {name: [] for name in names}
    scored: dict[str, Values] = {name: [] for name in names}
    for name in names:
        for seed in done.seeds:
            answerer = Answerer(done, name, seed)
            drawn[name].append(answerer.draw(prompts, 1, job.folder / "responses"))
            if own is not None:
                found = answerer.score(drawn[name][-1], "reward_model", own)
                scored[name].append([row[0] for row in found])
    if own is not None:
        return [Measure("score", "Score by the run's reward model", "number", scored)]

    def judged(judge: Judge, responses: Responses) -> list[float | None]:
        return [row[0].score for row in responses.judgements(judge, job.folder / "judgements")]

    measures = []
    for number, (spec, judge) in enumerate(zip(job.options.reward_models, judges, strict=True)):
        values = {name: [judged(judge, responses) for responses in drawn[name]] for name in names}
        measures.append(Measure(f"score_{number}", f"Score by {spec.rpartition('/')[2]}", "number", values))
    return measures


def _perplexity(done: FinishedRun, name: str) -> float:
    found = [evaluation["perplexity"] for evaluation in done.evaluations(name)]
    return sum(found) / len(found)


def _note(job: Job, prompts: Any) -> str:
    options = job.options
    parts = []
    if prompts is not None:
        parts.append(f"Scores: one answer to each of {len(prompts)} plain prompts a seed; higher is better.")
    if options.tasks:
        limit = "" if options.task_limit is None else f", the first {options.task_limit} questions of each task"
        shots = "the task's own" if options.num_fewshot is None else options.num_fewshot
        parts.append(f"{', '.join(options.tasks)}: accuracy over all questions, worked examples: {shots}{limit}.")
    return " ".join([*parts, "95 % intervals over questions or prompts, and seeds."])


def _notes(job: Job, measures: Sequence[Measure]) -> list[str]:
    notes = ["Perplexity says whether benign text has become less likely, not whether answers are right or helpful."]
    if any(measure.key == "score" for measure in measures):
        notes.append(
            "The run's reward model learned the preferences that alignment trains on: its score tells what those "
            "prefer, not general ability, and is no independent judge as the paper's two reward models are."
        )
    return notes


def _not_run(job: Job) -> list[str]:
    options, left = job.options, []
    if "mmlu" not in options.tasks:
        left.append("MMLU (--option tasks=mmlu, with its data at hand or --option network=true).")
    if options.prompts is None:
        left.append("AlpacaEval's prompts (--option prompts=FILE).")
    if len(options.reward_models) < 2:
        left.append("The paper's two reward models (--option reward_models=[reward-model:DIR,reward-model:DIR]).")
    if job.scale != "paper":
        left.append("The paper's 7B weights.")
    return left
