"""A run folder read into plain dataclasses: the one place of the report that knows file names and JSON keys."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reprdpo.errors import UserError
from reprdpo.files import read_json, read_jsonl

# The systems of the paper's Table 1, in its order; a run may hold some of them, and others.
PAPER_SYSTEMS = {
    "base": "base",
    "sft": "SFT",
    "dpo": "DPO",
    "rs": "RS",
    "dpo_ranked": "DPO*",
    "reprdpo": "cDPO*",
    "online": "online",
}
# What is set side by side: the first of each that the run has.
BEFORE, AFTER = ("base", "sft"), ("reprdpo", "cdpo_fixed", "dpo_ranked", "dpo", "online")
ENDS = ("low", "high")
FIT_FACTS = {
    "num_pairs": "pairs",
    "num_groups": "groups (prompts)",
    "folds": "folds",
    "num_layers": "layers",
    "hidden_size": "hidden size",
    "gate": "gate",
    "margin": "margin",
    "alpha": "alpha",
    "held_out_nll": "held-out loss",
    "train_accuracy": "accuracy on its own pairs",
    "seconds": "seconds",
}
MAX_SAMPLES = 12


@dataclass(frozen=True)
class Rate:
    """A share of n with its 95 % interval; None where the run does not tell."""

    rate: float | None = None
    low: float | None = None
    high: float | None = None
    k: int | None = None
    n: int | None = None


@dataclass(frozen=True)
class Stage:
    status: str
    seconds: float | None
    flop: float | None = None
    peak_bytes: float | None = None


@dataclass(frozen=True)
class ReliabilityBin:
    """Held-out pairs of about one confidence, and the share of them the reward ranks right."""

    confidence: float
    accuracy: float
    count: float


@dataclass(frozen=True)
class Calibration:
    """How far the confidence at one alpha can be believed, with the expected calibration error."""

    alpha: float
    ece: float
    bins: list[ReliabilityBin]


@dataclass(frozen=True)
class Histogram:
    """Counts of pairs by confidence, one series or more over the same edges."""

    edges: list[float]
    counts: dict[str, list[float]]


@dataclass(frozen=True)
class Fit:
    """The reward's fit: cross-validated pair accuracy of each layer's probe and of the gate, and its confidence."""

    layers: list[Rate]
    gated: Rate
    calibrations: list[Calibration]  # at the alpha in use, then at the paper's
    histogram: Histogram | None
    facts: dict[str, str]  # the fit's other numbers, in words


@dataclass(frozen=True)
class Training:
    """One system's training: for each metric a list with one {step: value} a seed."""

    system: str
    metrics: dict[str, list[dict[int, float]]]
    histograms: list[Histogram]


@dataclass(frozen=True)
class Evaluation:
    """One seed of one system as the judge saw it."""

    system: str
    seed: int
    judge: str
    toxic: Rate
    by_category: dict[str, Rate]
    overrefusal: Rate
    perplexity: float | None
    responses: Path | None


@dataclass(frozen=True)
class SystemSummary:
    """One system over its seeds."""

    system: str
    label: str
    toxic: Rate
    unjudged: int | None
    seeds: int | None
    overrefusal: float | None
    perplexity: float | None


@dataclass(frozen=True)
class Ordering:
    """One of the paper's claims about two systems; `held` is None where it could not be decided."""

    claim: str
    held: bool | None
    detail: str


@dataclass(frozen=True)
class Reply:
    text: str
    verdict: str


@dataclass(frozen=True)
class Sample:
    """One prompt with the answers of the two systems compared."""

    prompt: str
    category: str
    before: Reply
    after: Reply


@dataclass(frozen=True)
class Run:
    """What a run folder holds; a part that is not there is None or empty."""

    path: Path
    name: str
    command: str
    config: dict[str, Any]
    config_hash: str
    versions: dict[str, str]
    stages: dict[str, Stage]
    fit: Fit | None
    trainings: list[Training]
    evaluations: list[Evaluation]
    summary: list[SystemSummary]
    orderings: list[Ordering]
    overhead: list[str]
    compared: tuple[str, str] | None
    samples: list[Sample]

    def label(self, system: str) -> str:
        """The name of a system as the tables print it."""
        return next((row.label for row in self.summary if row.system == system), PAPER_SYSTEMS.get(system, system))

    def absent(self) -> list[str]:
        """One sentence for each part that is not there, and one saying which command makes them."""
        with_gamma = [training for training in self.trainings if "confidence/mean" in training.metrics]
        parts = [
            ("Probe accuracy and calibration", "fit/report.json", self.fit),
            ("Training curves", "systems/*/seed-*/metrics.jsonl", self.trainings),
            (
                "Confidence histogram",
                "confidence_histogram.json",
                not with_gamma or any(t.histograms for t in with_gamma),
            ),
            ("Table of toxic rates", "evaluation/summary.json", self.summary),
            ("Samples before and after", "evaluation/*.responses.jsonl of two systems", self.samples),
        ]
        sentences = [f"{what}: absent, as there is no {where}." for what, where, there in parts if not there]
        missing = [label for key, label in PAPER_SYSTEMS.items() if key not in {row.system for row in self.summary}]
        if self.summary and missing:
            sentences.append(f"Systems of the paper's table that are not in this run: {', '.join(missing)}.")
        unfinished = [name for name, stage in self.stages.items() if stage.status != "done"]
        if unfinished:
            sentences.append(f"Not finished: {', '.join(unfinished)}.")
        if unfinished or not self.summary:
            sentences.append(f"To go on where it stopped: {self.command}")
        elif sentences:
            sentences.append(
                "All its stages are done: name what is absent in the config, with a new output_dir, and run that."
            )
        return sentences


def load_run(run_dir: str | Path) -> Run:
    """Read the run folder ``run_dir``; :class:`UserError` where it is none, or where a file of it is broken."""
    path = Path(run_dir)
    if not (path / "run.json").is_file():
        raise UserError(f"{path}: is not a run folder (no run.json in it); give the folder that `reprdpo run` wrote")
    with _naming(path / "run.json"):
        head = read_json(path / "run.json")
        stages = {
            str(name): Stage(
                str(stage["status"]), *(_number(stage.get(key)) for key in ("seconds", "flop", "peak_bytes"))
            )
            for name, stage in head.get("stages", {}).items()
        }
        versions = {str(package): str(version) for package, version in head.get("versions", {}).items()}
        config = dict(head.get("config", {}))
    summary, orderings = _read_summary(path / "evaluation" / "summary.json")
    order = list(dict.fromkeys([*(row.system for row in summary), *PAPER_SYSTEMS]))
    evaluations = _read_evaluations(path, order)
    compared, samples = _read_samples(evaluations)
    return Run(
        path=path,
        name=str(head.get("name") or path.resolve().name),
        command=str(head.get("command") or "reprdpo run CONFIG.yaml"),
        config=config,
        config_hash=str(head.get("config_hash", "")),
        versions=versions,
        stages=stages,
        fit=_read_fit(path / "fit" / "report.json"),
        trainings=_read_trainings(path / "systems", order),
        evaluations=evaluations,
        summary=summary,
        orderings=orderings,
        overhead=_read_overhead(path / "overhead.json"),
        compared=compared,
        samples=samples,
    )


def _read_fit(path: Path) -> Fit | None:
    if not path.is_file():
        return None
    with _naming(path):
        report = read_json(path)
        accuracy = [float(value) for value in report["layer_accuracy"]]
        low, high = (report.get(f"layer_accuracy_{end}") or [None] * len(accuracy) for end in ("low", "high"))
        histogram = report.get("confidence_histogram")
        return Fit(
            layers=[Rate(a, _number(b), _number(c)) for a, b, c in zip(accuracy, low, high, strict=True)],
            gated=_rate(
                {"rate": report["gated_accuracy"]} | {end: report.get(f"gated_accuracy_{end}") for end in ENDS}
            ),
            calibrations=[_calibration(report[key]) for key in ("calibration", "paper_calibration") if report.get(key)],
            histogram=_histogram(histogram, {"held-out pairs": "counts"}) if histogram else None,
            facts={words: _words(report[key]) for key, words in FIT_FACTS.items() if report.get(key) is not None},
        )


def _calibration(value: dict[str, Any]) -> Calibration:
    bins = [
        ReliabilityBin(float(row["confidence"]), float(row["accuracy"]), float(row["count"]))
        for row in value["bins"]
        if row["count"]
    ]
    return Calibration(float(value["alpha"]), float(value["ece"]), bins)


def _histogram(value: dict[str, Any], series: dict[str, str]) -> Histogram:
    """``series`` maps the words of a series to its key."""
    counts = {words: [float(count) for count in value[key]] for words, key in series.items()}
    if any(len(column) != len(value["edges"]) - 1 for column in counts.values()):
        raise ValueError("edges must be one more than the counts")
    return Histogram([float(edge) for edge in value["edges"]], counts)


def _read_trainings(root: Path, order: list[str]) -> list[Training]:
    trainings = []
    folders = [folder for folder in root.glob("*") if folder.is_dir()]
    for folder in sorted(folders, key=lambda folder: _place(folder.name, order)):
        training = Training(folder.name, {}, [])
        # SFT comes before the seeds of the alignment, so its log may lie in the system's own folder
        for seed in [folder, *sorted(folder.glob("seed-*"), key=lambda path: (len(path.name), path.name))]:
            if (seed / "metrics.jsonl").is_file():
                for name, values in _read_metrics(seed / "metrics.jsonl").items():
                    training.metrics.setdefault(name, []).append(values)
            if (seed / "confidence_histogram.json").is_file():
                with _naming(seed / "confidence_histogram.json"):
                    value = read_json(seed / "confidence_histogram.json")
                    training.histograms.append(_histogram(value, {"first pairs": "initial", "last pairs": "final"}))
        if training.metrics:
            trainings.append(training)
    return trainings


def _read_metrics(path: Path) -> dict[str, dict[int, float]]:
    """Every metric as {step: value}; a step logged twice (a resumed run) keeps its last value."""
    metrics: dict[str, dict[int, float]] = {}
    with _naming(path):
        for number, line in read_jsonl(path):
            with _naming(path, number):
                step = int(line["step"])
                for name, value in line.items():
                    if name != "step" and isinstance(value, (int, float)):
                        metrics.setdefault(name, {})[step] = float(value)
    return {name: dict(sorted(values.items())) for name, values in metrics.items()}


def _read_evaluations(run_dir: Path, order: list[str]) -> list[Evaluation]:
    evaluations = []
    for path in (run_dir / "evaluation").glob("*.json"):
        if not re.fullmatch(r".+-seed-\d+", path.stem):
            continue
        with _naming(path):
            value = read_json(path)
            responses = run_dir / value["responses"] if value.get("responses") else None
            evaluations.append(
                Evaluation(
                    system=str(value["system"]),
                    seed=int(value["seed"]),
                    judge=str(value.get("judge", "")),
                    toxic=_rate(value["toxic"]),
                    by_category={str(name): _rate(rate) for name, rate in value.get("by_category", {}).items()},
                    overrefusal=_rate(value.get("overrefusal")),
                    perplexity=_number(value.get("perplexity")),
                    responses=responses,
                )
            )
    return sorted(evaluations, key=lambda row: (_place(row.system, order), row.seed))


def _read_overhead(path: Path) -> list[str]:
    if not path.is_file():
        return []
    with _naming(path):
        return [str(line) for line in read_json(path)["lines"]]


def _read_summary(path: Path) -> tuple[list[SystemSummary], list[Ordering]]:
    if not path.is_file():
        return [], []
    with _naming(path):
        value = read_json(path)
        systems = [
            SystemSummary(
                system=str(row["system"]),
                label=str(row.get("label") or row["system"]),
                toxic=_rate(
                    {"rate": row["toxic_mean"], "n": row.get("n")} | {end: row.get(f"toxic_{end}") for end in ENDS}
                ),
                unjudged=_integer(row.get("unparsed")),
                seeds=_seed_count(row.get("seeds")),
                overrefusal=_number(row.get("overrefusal_mean")),
                perplexity=_number(row.get("perplexity_mean")),
            )
            for row in value["systems"]
        ]
        orderings = [
            Ordering(str(row["claim"]), row["held"], str(row.get("detail", ""))) for row in value.get("orderings", [])
        ]
        return systems, orderings


def _read_samples(evaluations: list[Evaluation]) -> tuple[tuple[str, str] | None, list[Sample]]:
    """The first prompt of each category, then the next ones, answered by the start and by the method."""
    answered = {row.system: row.responses for row in reversed(evaluations) if row.responses and row.responses.is_file()}
    before = next((name for name in BEFORE if name in answered), None)
    after = next((name for name in AFTER if name in answered), None)
    if before is None or after is None:
        return None, []
    old, new = _read_responses(answered[before]), _read_responses(answered[after])
    shared = [key for key in old if key in new]
    nth: dict[str, int] = {}
    rank = {}
    for key in shared:
        category = old[key][1]
        rank[key] = nth[category] = nth.get(category, -1) + 1
    chosen = sorted(shared, key=lambda key: rank[key])[:MAX_SAMPLES]
    return (before, after), [Sample(old[k][0], old[k][1], old[k][2], new[k][2]) for k in chosen]


def _read_responses(path: Path | None) -> dict[str, tuple[str, str, Reply]]:
    """prompt key -> (prompt, category, reply); the first reply where a prompt has several."""
    responses: dict[str, tuple[str, str, Reply]] = {}
    assert path is not None
    for number, line in read_jsonl(path):
        with _naming(path, number):
            prompt = _text(line["prompt"])
            verdict = {True: "unsafe", False: "safe"}.get(line.get("unsafe"), "")
            if line.get("refusal"):
                verdict = f"{verdict}, refusal".removeprefix(", ")
            reply = Reply(str(line["response"]), verdict)
            responses.setdefault(prompt, (prompt, str(line.get("category") or ""), reply))
    return responses


def _text(prompt: Any) -> str:
    """A plain prompt as it is, a chat as one paragraph a message."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _words(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _place(system: str, order: list[str]) -> tuple[int, str]:
    return (order.index(system) if system in order else len(order), system)


def _rate(value: Any) -> Rate:
    if not isinstance(value, dict):
        return Rate(_number(value))
    low, high = _number(value.get("low")), _number(value.get("high"))
    return Rate(_number(value["rate"]), low, high, _integer(value.get("k")), _integer(value.get("n")))


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _integer(value: Any) -> int | None:
    return None if value is None else int(value)


def _seed_count(value: Any) -> int | None:
    return len(value) if isinstance(value, list) else _integer(value)


@contextlib.contextmanager
def _naming(path: Path, line: int | None = None) -> Iterator[None]:
    """Turn a missing or misshapen field into a :class:`UserError` that names the file."""
    where = f"{path}, line {line}" if line else str(path)
    cure = "delete it and run the command that made it again"
    try:
        yield
    except KeyError as error:
        raise UserError(f"{where}: field {error} is missing; {cure}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where}: holds something other than expected ({error}); {cure}") from error
