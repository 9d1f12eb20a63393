"""Figure 4: over-refusal, as full compliance, partial refusal and full refusal of safe and of unsafe prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reprdpo.data import load_prompts
from reprdpo.errors import UserError
from reprdpo.evaluation import Judge, Judgement, build_judge, compare
from reprdpo.evaluation.xstest import LABELS, compliance_classes, in_class
from reprdpo.experiments.config import SANDBOX, RunConfig
from reprdpo.experiments.experiment import Job
from reprdpo.experiments.finished_run import FinishedRun
from reprdpo.experiments.responses_at import Answerer, Responses, Tally, best, rate, tally
from reprdpo.experiments.results import Cell, Column, Figure, Interval, Ordering, Result, Series, Table
from reprdpo.experiments.sources import read_inputs

TITLE = "Figure 4: refusal of safe and unsafe prompts"
QUESTION = "Does alignment make a model refuse safe prompts that only look unsafe?"

KINDS = ("safe", "unsafe")
OURS = "reprdpo"

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Options:
    """What is asked, and who says what a refusal is."""

    prompts: str | None = field(
        default=None,
        metadata={"help": "XSTest's file, or any prompts labelled harmful or not (default: the run's own)"},
    )
    judge: str | None = field(default=None, metadata={"help": "who judges compliance (default: evaluate.judge)"})


@dataclass(frozen=True)
class Judged:
    """One system at one seed: the judgement [P][1] of the response it gives to each prompt."""

    judgements: list[list[Judgement]]

    def tally(self, name: str, places: Sequence[int]) -> Tally:
        """The responses of class ``name`` among those to the prompts at ``places``."""
        return tally(in_class([self.judgements[place] for place in places], name), [[0]] * len(places))


def run(job: Job) -> Result:
    judge = build_judge(job.options.judge or job.config.evaluate.judge, needs={"refusal"})
    rows = _prompts(job.options, job.config)
    places = {kind: [at for at, row in enumerate(rows) if row["harmful"] == (kind == "unsafe")] for kind in KINDS}
    done = job.pipeline()
    judged = {name: [_judge(job, done, judge, name, rows, seed) for seed in done.seeds] for name in done.rows}
    classes = compliance_classes(judge)
    shares = {
        (name, kind): {found: rate([one.tally(found, places[kind]) for one in judged[name]]) for found in classes}
        for name in judged
        for kind in KINDS
        if places[kind]
    }
    note = (
        f"Judge: {judge.name}, {len(classes)} classes. {len(places['safe'])} safe and {len(places['unsafe'])} unsafe "
        f"prompts, {len(done.seeds)} seeds; 95 % intervals over prompts and seeds."
    )
    return Result(
        tables=[_table(done, shares, classes, note)],
        figures=[_figure(done, shares, classes, kind, note) for kind in KINDS if places[kind]],
        orderings=_orderings(done, judged, places),
        notes=_notes(job, judge, classes),
        not_run=_not_run(job, classes),
    )


def _prompts(options: Options, config: RunConfig) -> list[dict[str, Any]]:
    """The prompts with their labels; the run's borderline and red-team prompts where no others are given.

    Raises:
        UserError: prompts that are not labelled, or none that are safe.
    """
    if options.prompts is not None:
        rows = [_row(row, row["harmful"]) for row in load_prompts(options.prompts)]
        unlabelled = [at for at, row in enumerate(rows) if row["harmful"] is None]
        if unlabelled:
            raise UserError(
                f"{options.prompts}: prompt {unlabelled[0]} is not labelled harmful or not; give XSTest's file, or "
                "prompts with a field 'harmful'"
            )
        return rows
    inputs = read_inputs(config)
    if inputs.borderline is None:
        raise UserError("prompts: none are given; name XSTest's file (--option prompts=FILE)")
    return [_row(row, False) for row in inputs.borderline] + [_row(row, True) for row in inputs.red_team]


def _row(row: Mapping[str, Any], harmful: bool | None) -> dict[str, Any]:
    return {"prompt": row["prompt"], "category": row.get("category"), "harmful": harmful}


def _judge(job: Job, done: FinishedRun, judge: Judge, name: str, rows: Rows, seed: int) -> Judged:
    return Judged(_draw(job, done, name, rows, seed).judgements(judge, job.folder / "judgements"))


def _draw(job: Job, done: FinishedRun, name: str, rows: Rows, seed: int) -> Responses:
    """The one response of a system to each prompt; of a best-of-N system the one its reward ranks first."""
    picks, answerer, folder = done.rows[name].system.best_of, Answerer(done, name, seed), job.folder / "responses"
    if picks is None:
        return answerer.draw(rows, 1, folder)
    sample = done.config.sample
    responses = answerer.draw(rows, sample.best_of or sample.num_responses, folder)
    reward = done.reward() if picks == "reward" else done.reward_model()
    return responses.only(best(answerer.score(responses, picks, reward), 1))


def _table(
    done: FinishedRun, shares: Mapping[tuple[str, str], Mapping[str, Interval]], classes: Sequence[str], note: str
) -> Table:
    columns = [
        Column("system", "System", "text"),
        Column("prompts", "Prompts", "text"),
        *(Column(name, LABELS[name], "share") for name in LABELS if name in classes),
    ]
    rows: list[dict[str, Cell]] = [
        {"system": done.rows[name].label, "prompts": kind, **found} for (name, kind), found in shares.items()
    ]
    return Table("figure4", TITLE, columns, rows, note)


def _figure(
    done: FinishedRun,
    shares: Mapping[tuple[str, str], Mapping[str, Interval]],
    classes: Sequence[str],
    kind: str,
    note: str,
) -> Figure:
    cells = {name: found for (name, of), found in shares.items() if of == kind}
    series = [
        Series(
            label,
            [found[name].value for found in cells.values()],
            low=[found[name].low for found in cells.values()],
            high=[found[name].high for found in cells.values()],
        )
        for name, label in LABELS.items()
        if name in classes
    ]
    labels = [done.rows[name].label for name in cells]
    return Figure(
        f"figure4_{kind}",
        f"{kind.capitalize()} prompts",
        "bars",
        "System",
        "Share of prompts",
        series,
        labels,
        note=note,
    )


def _orderings(
    done: FinishedRun, judged: Mapping[str, Sequence[Judged]], places: Mapping[str, Sequence[int]]
) -> list[Ordering]:
    """Full refusal under the method beside every other system's, of safe prompts and of unsafe ones."""
    if OURS not in judged:
        return []

    def refused(name: str, kind: str) -> list[list[float | None]]:
        return [one.tally("refusal", places[kind]).shares for one in judged[name]]

    ours = done.rows[OURS].label
    found = []
    for other in (name for name in judged if name != OURS):
        label = done.rows[other].label
        if places["safe"]:
            claim = f"{ours} below {label} in full refusal of safe prompts"
            found.append(Ordering.of(claim, compare(refused(OURS, "safe"), refused(other, "safe"))))
        if places["unsafe"]:
            claim = f"{label} below {ours} in full refusal of unsafe prompts"
            found.append(Ordering.of(claim, compare(refused(other, "unsafe"), refused(OURS, "unsafe"))))
    return found


def _notes(job: Job, judge: Judge, classes: Sequence[str]) -> list[str]:
    notes = ["The orderings set the method beside every other system; they are not claims of the paper."]
    if "partial" not in classes:
        notes.append(f"The judge {judge.name} tells refusal from the rest: a partial one is in either.")
    if job.options.prompts is None and job.config.model == SANDBOX:
        notes.append(
            "Safe prompts are the sandbox's borderline ones, unsafe prompts its harmful ones. Its oracle calls a "
            "response without a refusing form compliance, even where it gives nothing."
        )
    return notes


def _not_run(job: Job, classes: Sequence[str]) -> list[str]:
    left = []
    if job.options.prompts is None:
        left.append("XSTest's own prompts (--option prompts=FILE).")
    if job.scale != "paper":
        left.append("The paper's 7B weights.")
    if "partial" not in classes:
        left.append("Three classes, which take an instruct judge (--option judge=instruct:xstest@DIR).")
    return left
