"""Reward evaluation: how well rewards read from hidden states rank pairs they have not seen."""

# ruff: noqa: RUF001  Greek letters are what the tables show

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from reprdpo.errors import UserError
from reprdpo.experiments.config import RunConfig
from reprdpo.experiments.experiment import Job
from reprdpo.experiments.recipes._states import (
    Labelled,
    base_policy,
    below,
    interval,
    labelled_pairs,
    labelled_states,
    layer_series,
    read_pairs,
)
from reprdpo.experiments.results import Column, Figure, Line, Ordering, Result, Series, Table
from reprdpo.reward import Calibration, RewardEvaluation, evaluate_rewards, read_states
from reprdpo.reward.evaluation import METHODS
from reprdpo.statistics import clustered_share, wilson

TITLE = "Reward evaluation: pair accuracy, AUC and calibration of rewards read from hidden states"
QUESTION = "Does the gated reward rank unseen pairs better than one layer's probe, or a SWIFT head, does?"

_COLUMNS = [
    Column("data", "Pairs", "text"),
    Column("method", "Reward", "text"),
    Column("accuracy", "Pair accuracy", "share"),
    Column("auc", "AUC"),
    Column("ece", "ECE of γ"),
    Column("ece_noise", "ECE were it calibrated"),
    Column("nll", "NLL of γ"),
    Column("alpha", "α"),
]
_RIVALS = ("last_layer", "best_layer", "mean_layers", "swift", "swift_mean")


@dataclass(frozen=True)
class Options:
    """``states`` is a safetensors file as `reprdpo fit --states` takes it, evaluated instead of the model's own pairs.

    ``pairs`` names further pair files, each with a name; ``methods`` are keys of METHODS.
    """

    states: str | None = field(default=None, metadata={"help": "safetensors file with chosen and rejected [P, L, D]"})
    keep_embedding: bool = field(default=False, metadata={"help": "take row 0 of the states as a layer too"})
    pairs: dict[str, str] = field(default_factory=dict, metadata={"help": "further pair files, by name"})
    methods: tuple[str, ...] = field(default=tuple(METHODS), metadata={"help": "which rewards to compare"})

    def __post_init__(self) -> None:
        for name in self.methods:
            if name not in METHODS:
                raise UserError(f"options.methods: {name!r} is unknown; known: {', '.join(METHODS)}")


def run(job: Job) -> Result:
    options, config = job.options, job.config
    tables: list[dict[str, Any]] = []
    categories: list[dict[str, Any]] = []
    figures: list[Figure] = []
    orderings: list[Ordering] = []
    data_sets = _data_sets(config, options)
    job.begin()
    for name, read in data_sets.items():
        data = read()
        job.say(f"{name}: {len(data.groups)} pairs")
        # A file of pooled states has no means over the response.
        methods = [key for key in options.methods if key != "swift_mean" or data.means is not None]
        found = evaluate_rewards(
            data.chosen,
            data.rejected,
            config.fit,
            groups=data.groups,
            mean_states=data.means,
            methods=methods,
            chosen_is_safe=data.chosen_is_safe,
            rejected_is_safe=data.rejected_is_safe,
        )
        tables += _rows(name, found)
        categories += _by_category(name, data, found)
        figures += [_by_layer(name, found), _reliability(name, found)]
        orderings += [
            below(f"{name}, accuracy: {METHODS[rival]} below {METHODS['gated']}", found.compare(rival, "gated"))
            for rival in _RIVALS
            if rival in found.methods
        ]
    shown = [Table("methods", "Rewards on held-out pairs", _COLUMNS, tables, _NOTE)]
    if categories:
        columns = [_COLUMNS[0], Column("category", "Category", "text"), _COLUMNS[2]]
        shown.append(Table("categories", "Gated reward by category", columns, categories))
    return Result(tables=shown, figures=figures, orderings=orderings, notes=_NOTES, not_run=_not_run(job))


def _data_sets(config: RunConfig, options: Options) -> dict[str, Callable[[], Labelled]]:
    """The data sets by name, their files read and checked, their states to be read one after the other."""
    found: dict[str, Callable[[], Labelled]] = {}
    sets = {name: read_pairs(path, config) for name, path in options.pairs.items()}
    if options.states is None:
        sets = {"preferences": labelled_pairs(config)} | sets
    else:
        states = Labelled(*read_states(options.states, drop_embedding=not options.keep_embedding))
        found["states"] = lambda: states
    if sets:
        policy, means = base_policy(config), "swift_mean" in options.methods
        found |= {name: partial(labelled_states, policy, data, config, means=means) for name, data in sets.items()}
    return found


def _rows(name: str, found: RewardEvaluation) -> list[dict[str, Any]]:
    rows = []
    for score in found.methods.values():
        row: dict[str, Any] = {"data": name, "method": score.label, "accuracy": interval(score.accuracy)}
        if score.calibration is not None:
            row |= {
                "auc": interval(score.auc),
                "ece": score.calibration.ece,
                "ece_noise": score.ece_noise,
                "nll": score.calibration.nll,
                "alpha": score.calibration.alpha,
            }
        rows.append(row)
    paper = found.paper_calibration
    row = {"data": name, "method": "Gated reward, α = 7.5 as published", "accuracy": rows[0]["accuracy"]}
    return [rows[0], row | {"ece": paper.ece, "nll": paper.nll, "alpha": paper.alpha}, *rows[1:]]


def _by_category(name: str, data: Labelled, found: RewardEvaluation) -> list[dict[str, Any]]:
    labels, right = data.category or [], found.methods["gated"].right
    rows = []
    for category in sorted({label or "" for label in labels}):
        at = [row for row, label in enumerate(labels) if (label or "") == category]
        share = clustered_share([right[row] for row in at], [data.groups[row] for row in at])
        rows.append({"data": name, "category": category or "(none)", "accuracy": interval(share)})
    return rows if len(rows) > 1 else []


def _by_layer(name: str, found: RewardEvaluation) -> Figure:
    lines = [
        Line(METHODS[method], found.methods[method].accuracy.value)
        for method in ("gated", "swift")
        if method in found.methods
    ]
    return Figure(
        f"layers-{name}",
        f"Pair accuracy by layer: {name}",
        "line",
        "Layer",
        "Pair accuracy",
        [layer_series("Probe of one layer", found)],
        lines=lines,
        note=f"{found.num_pairs} pairs, {found.folds}-fold by prompt ({found.num_groups}); 95 % intervals.",
    )


def _reliability(name: str, found: RewardEvaluation) -> Figure:
    fitted = found.methods["gated"].calibration
    assert fitted is not None
    series = [_bins("α fitted", fitted), _bins("α = 7.5", found.paper_calibration)]
    return Figure(
        f"reliability-{name}",
        f"Calibration of γ: {name}",
        "reliability",
        "Confidence max(γ, 1 - γ)",
        "Pairs ranked right",
        series,
        note="Held-out pairs in ten bins of confidence, each with Wilson's 95 % interval; on the diagonal γ is right.",
    )


def _bins(label: str, found: Calibration) -> Series:
    bins = [b for b in found.bins if b.confidence is not None and b.accuracy is not None]
    low, high = zip(*(wilson(b.accuracy or 0.0, b.count, 1.96) for b in bins), strict=True)
    return Series(label, y=[b.accuracy for b in bins], x=[b.confidence or 0.0 for b in bins], low=low, high=high)


_NOTE = (
    "Cross-validated by prompt: scaling, probes, gate, heads, the choice of a layer and α see the other folds alone. "
    "Intervals: other prompts, 95 %. The two oracles choose with the test pairs in sight: upper bounds, not rewards."
)
_NOTES = [
    "ECE is of max(γ, 1 - γ) over ten bins; beside it what a perfectly calibrated γ would show on as many pairs.",
    "SWIFT (arXiv 2505.12225) reads every token of the response through a gate, and the embedding output too. Of the "
    "last token alone its gate cancels; of the response's mean it is the published variant without the gate. Here the "
    "same cross-entropy is minimised to the end under an L2 penalty, where the release stops AdamW early.",
]


def _not_run(job: Job) -> list[str]:
    if job.scale == "paper":
        return []
    return [
        "PKU-SafeRLHF, hh-rlhf and RewardBench on 7B weights: give --model and --option pairs.NAME=FILE.",
        "The token-gated SWIFT head, which needs every token's states.",
    ]
