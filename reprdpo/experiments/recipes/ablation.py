"""The method with one setting changed at a time."""

from collections.abc import Iterable
from dataclasses import dataclass

from reprdpo.experiments.config import Variant
from reprdpo.experiments.experiment import Job
from reprdpo.experiments.finished_run import COLUMNS, FinishedRun, accuracy_of
from reprdpo.experiments.results import Cell, Column, Result, Table
from reprdpo.files import read_json

TITLE = "Ablation of the method's settings"
QUESTION = "Which of alpha, mu, gate, pooling, label noise and number of responses does the method hang on?"
DEFAULT = "reprdpo"


@dataclass(frozen=True)
class Options:
    """The values to try of each setting, beside the run's own; an empty list leaves a factor out.

    Attributes:
        alpha: steepness of gamma (Eq. 8).
        mu: margin of Eq. 7, in the fit and in training alike.
        gate: how layers are mixed.
        pool: which state is read.
        label_noise: share of the preferences exchanged; each also for DPO on the preferences.
        num_responses: responses ranked a prompt, of those drawn.
    """

    alpha: tuple[float, ...] = (0.5, 1.0, 7.5)
    mu: tuple[float, ...] = (0.0, 3.0)
    gate: tuple[str, ...] = ("static", "vote")
    pool: tuple[str, ...] = ("mean",)
    label_noise: tuple[float, ...] = (0.2, 0.4)
    num_responses: tuple[int, ...] = (2, 4)


def run(job: Job) -> Result:
    factors = {name: variants for name, variants in _factors(job).items() if variants}
    finished = job.pipeline(variants={name: v for variants in factors.values() for name, v in variants.items()})
    return Result(
        tables=[_table(finished, factor, variants) for factor, variants in factors.items()],
        orderings=[finished.below(f"noise-{share:g}", f"dpo-noise-{share:g}") for share in job.options.label_noise],
        notes=[
            "A difference is that of the row's toxic rate and the first row's, paired by prompt over all seeds; p is "
            "two-sided and of one comparison, not of all of them together.",
        ],
        not_run=[] if job.scale == "paper" else ["The paper's 7B weights."],
    )


def _factors(job: Job) -> dict[str, dict[str, Variant]]:
    """The variants of each factor, by the factor's words."""
    options = job.options

    def named(name: str, label: str, values: Iterable[object], **sections: str) -> dict[str, Variant]:
        """``sections``: the key that takes the value, by section."""
        return {
            f"{name}-{_words(value)}": Variant(
                DEFAULT,
                f"{label} {_words(value)}",
                **{section: {key: value} for section, key in sections.items()},  # type: ignore[arg-type]
            )
            for value in values
        }

    noise: dict[str, Variant] = {}
    for share in options.label_noise:
        for system, before in ((DEFAULT, ""), ("dpo", "dpo-")):
            label = "DPO" if system == "dpo" else "cDPO*"
            noise[f"{before}noise-{share:g}"] = Variant(system, f"{label}, {share:.0%} exchanged", label_noise=share)
    return {
        "Steepness alpha of the confidence": named("alpha", "alpha", options.alpha, train="alpha"),
        "Margin mu of the reward's loss": named("mu", "mu", options.mu, fit="margin", train="reward_margin"),
        "Gate": named("gate", "gate", options.gate, fit="gate"),
        "Pooled state": named("pool", "pool", options.pool, fit="pool"),
        "Label noise": noise,
        "Responses ranked a prompt": named("n", "N", options.num_responses, sample="best_of"),
    }


def _table(finished: FinishedRun, factor: str, variants: dict[str, Variant]) -> Table:
    names = [DEFAULT, *(["dpo"] if any(variant.system == "dpo" for variant in variants.values()) else []), *variants]
    columns = [
        COLUMNS[0],
        COLUMNS[1],
        Column("difference", "Difference", "share"),
        Column("p", "p"),
        Column("accuracy", "Reward's pair accuracy", "share"),
        *COLUMNS[2:],
    ]
    key = "-".join(factor.lower().split())
    note = f"The first row is the run's own: {_own(finished)}."
    return Table(key, factor, columns, [_row(finished, name) for name in names], note)


def _row(finished: FinishedRun, name: str) -> dict[str, Cell]:
    row = {**finished.table_row(name), **_accuracy(finished, name)}
    if name == DEFAULT:
        return row
    return row | finished.difference(name, DEFAULT)


def _accuracy(finished: FinishedRun, name: str) -> dict[str, Cell]:
    """Of the reward the row reads, cross-validated on its own (perhaps noisy) labels."""
    report = finished.fit_report(name)
    if report is None:
        return {}
    return {"accuracy": accuracy_of(report)}


def _own(finished: FinishedRun) -> str:
    fit, report = finished.config.fit, read_json(finished / "fit" / "report.json")
    alpha = finished.config.training_arguments(DEFAULT)["alpha"]
    chosen = f"auto, here {report['alpha']:.3g}" if alpha == "auto" else str(alpha)
    of = finished.config.sample.best_of or finished.config.sample.num_responses
    return f"alpha {chosen}, mu {fit.margin:g}, gate {fit.gate}, pool {fit.pool}, {of} responses"


def _words(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
