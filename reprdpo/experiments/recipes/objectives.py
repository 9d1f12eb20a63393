"""The confidence under other objectives than DPO's."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from reprdpo.errors import UserError
from reprdpo.experiments.config import Variant
from reprdpo.experiments.experiment import Job
from reprdpo.experiments.finished_run import FinishedRun
from reprdpo.experiments.results import Cell, Column, Figure, Interval, Ordering, Result, Series, Table
from reprdpo.ops.reference import PAIR_LOSSES

TITLE = "The reward's confidence under other objectives"
QUESTION = "Does the confidence help objectives other than DPO's as well?"
# Needs one known noise for all pairs: it has no form under a confidence of each pair's own.
FIXED_ONLY = "robust"


@dataclass(frozen=True)
class Options:
    """Attributes:
    objectives: pair losses (loss_type of the trainer), beside the run's own.
    train: training arguments of one objective, by its name (say, its beta).
    """

    objectives: tuple[str, ...] = ("ipo", "hinge", "simpo", "robust", "gdpo", "kto")
    train: dict[str, dict[str, Any]] = field(default_factory=dict)


def run(job: Job) -> Result:
    _check(job.options)
    finished = job.pipeline(variants=_variants(job.options))
    pairs = {"sigmoid": ("dpo_ranked", "reprdpo")}
    pairs |= {name: (f"{name}-fixed", f"{name}-confidence") for name in job.options.objectives}
    compared = {name: rows for name, rows in pairs.items() if rows[1] in finished.rows}
    rows = [_row(finished, name, *rows) for name, rows in pairs.items()]
    return Result(
        tables=[
            Table("objectives", TITLE, _COLUMNS, rows, "Both are trained on the same pairs, ranked by the reward.")
        ],
        figures=[_figure(finished, pairs)],
        orderings=[_ordering(finished, name, *rows) for name, rows in compared.items()],
        notes=[
            "robust takes one known label noise (here that of its fixed confidence), so it stands without confidence "
            "alone; gdpo without confidence is DPO itself.",
            "Objectives differ in the scale of their loss: compare a row's two rates, not the rows.",
        ],
        not_run=[] if job.scale == "paper" else ["The published version's 7B weights."],
    )


_COLUMNS = [
    Column("objective", "Objective", "text"),
    Column("fixed", "Toxic without confidence", "share"),
    Column("confidence", "Toxic with it", "share"),
    Column("difference", "Difference", "share"),
    Column("p", "p"),
]


def _check(options: Options) -> None:
    known = (*PAIR_LOSSES, "kto")
    for name in (*options.objectives, *options.train):
        if name not in known or name == "sigmoid":
            raise UserError(f"options.objectives: {name!r} is none of {', '.join(n for n in known if n != 'sigmoid')}")


def _variants(options: Options) -> dict[str, Variant]:
    variants = {}
    for name in options.objectives:
        train = {**options.train.get(name, {}), "loss_type": name}
        # A label that may be wrong is what robust corrects for; for the others the label is taken as right.
        plain = {"fixed_confidence": 0.9} if name == FIXED_ONLY else {}
        variants[f"{name}-fixed"] = Variant("dpo_ranked", name, train=train | plain)
        if name != FIXED_ONLY:
            variants[f"{name}-confidence"] = Variant("reprdpo", f"{name} with confidence", train=train)
    return variants


def _row(finished: FinishedRun, objective: str, fixed: str, confidence: str) -> dict[str, Cell]:
    row: dict[str, Cell] = {"objective": objective, "fixed": finished.table_row(fixed)["toxic"]}
    if confidence not in finished.rows:
        return row
    with_it = {"confidence": finished.table_row(confidence)["toxic"]}
    return row | with_it | finished.difference(confidence, fixed)


def _ordering(finished: FinishedRun, objective: str, fixed: str, confidence: str) -> Ordering:
    return dataclasses.replace(
        finished.below(confidence, fixed), claim=f"{objective} with confidence below {objective} without"
    )


def _figure(finished: FinishedRun, pairs: dict[str, tuple[str, str]]) -> Figure:
    series = []
    for place, label in enumerate(("without confidence", "with confidence")):
        cells = [_toxic(finished, rows[place]) for rows in pairs.values()]
        series.append(Series(label, [c.value for c in cells], low=[c.low for c in cells], high=[c.high for c in cells]))
    return Figure("objectives", TITLE, "bars", "objective", "toxic rate", series, categories=list(pairs))


def _toxic(finished: FinishedRun, name: str) -> Interval:
    found = finished.table_row(name)["toxic"] if name in finished.rows else None
    return found if isinstance(found, Interval) else Interval(None)
