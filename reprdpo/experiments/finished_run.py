"""A run of the pipeline whose stages are done, as recipes read it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from reprdpo.evaluation import Rate, compare, mean_over_seeds
from reprdpo.experiments.config import RunConfig
from reprdpo.experiments.results import Cell, Column, Interval, Ordering
from reprdpo.experiments.rows import FIT, Row, rows_of
from reprdpo.experiments.run_folder import row_dir
from reprdpo.experiments.summary import Outcomes, read_outcomes
from reprdpo.files import read_json, read_jsonl
from reprdpo.reward import HybridReward
from reprdpo.training import BradleyTerryRewardModel
from reprdpo.training.confidence import REWARD_FOLDER
from reprdpo.training.metrics import METRICS_FILE

REWARD_MODEL_REPORT = "report.json"

# The columns of :meth:`FinishedRun.table_row`.
COLUMNS = (
    Column("system", "System", "text"),
    Column("toxic", "Toxic", "share"),
    Column("overrefusal", "Over-refusal", "share"),
    Column("perplexity", "Perplexity of benign answers"),
)


def share_of(outcomes: Outcomes) -> Interval:
    """The mean rate over seeds, with its interval for other prompts and other seeds."""
    return Interval.of(mean_over_seeds(outcomes))


def accuracy_of(report: Mapping[str, Any]) -> Interval:
    """The cross-validated pair accuracy of a fit's report, with Wilson's interval."""
    pairs = report["num_pairs"]
    rate = Rate.of(round(report["gated_accuracy"] * pairs), pairs)
    return Interval(report["gated_accuracy"], rate.low, rate.high, pairs)


@dataclass(frozen=True)
class FinishedRun:
    """Where a run lies, and what it was asked for: its systems, variants and seeds, of all that the folder may hold.

    Attributes:
        path: the run's folder.
        evaluation: the folder of judged answers in it.
        config: what was asked for.
        base_model: folder or hub name of the base model.
    """

    path: Path
    evaluation: Path
    config: RunConfig
    base_model: str

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @cached_property
    def rows(self) -> dict[str, Row]:
        return {row.name: row for row in rows_of(self.config)}

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.config.seeds

    def model(self, name: str, seed: int) -> str:
        """The folder (or hub name) of the policy that answers as the row ``name``."""
        if name == "base" or (self.rows[name].system.pairs is None and "sft" not in self.config.systems):
            return self.base_model
        if self.rows[name].system.pairs is None:
            return str(row_dir(self.path, "sft") / "model")
        return str(row_dir(self.path, name, seed) / "model")

    def reward(self) -> HybridReward:
        """The run's reward as it was fitted."""
        return HybridReward.from_pretrained(self.path / "reward")

    def moved_reward(self, name: str, seed: int) -> HybridReward | None:
        """The reward as the training of the row ``name`` left it; None where it moved none."""
        folder = Path(self.model(name, seed)) / REWARD_FOLDER
        return HybridReward.from_pretrained(folder) if folder.is_dir() else None

    def reward_model(self) -> BradleyTerryRewardModel:
        """The reward model that the run trained."""
        return BradleyTerryRewardModel.from_pretrained(self.path / "reward_model" / "model")

    def outcomes(self, name: str, what: Literal["unsafe", "refusal"] = "unsafe") -> Outcomes:
        """Whether each answer was unsafe, or each one to a borderline prompt a refusal; one list a seed.

        None where the judge gave no word. No list where no borderline prompts were asked.
        """
        if what == "refusal" and self.evaluations(name)[0]["overrefusal"] is None:
            return []
        return read_outcomes(self.evaluation, name, self.seeds, what)

    def evaluations(self, name: str) -> list[dict[str, Any]]:
        """What the judge found, a seed each."""
        return [read_json(self.evaluation / f"{name}-seed-{seed}.json") for seed in self.seeds]

    def fit_report(self, name: str) -> dict[str, Any] | None:
        """Of the reward that the row reads; None where it reads none."""
        row = self.rows[name]
        return read_json(self.path / "fit" / f"{row.differs(FIT) or 'report'}.json") if row.fits() else None

    def reward_accuracies(self) -> list[dict[str, Cell]]:
        """Pair accuracy of the run's own rewards: that of the hidden states, and the trained reward model, if any."""
        found: list[dict[str, Cell]] = []
        fitted = self.path / "fit" / "report.json"
        if fitted.exists():
            report = read_json(fitted)
            accuracy = accuracy_of(report)
            found.append({"reward": "Hidden states, gated", "accuracy": accuracy, "on": "preferences, cross-validated"})
        trained = self.path / "reward_model" / REWARD_MODEL_REPORT
        if trained.exists():
            rate = read_json(trained)["held_out_accuracy"]
            accuracy = Interval(rate["rate"], rate["low"], rate["high"], rate["n"])
            where = "pairs of prompts held out"
            found.append({"reward": "Reward model (Bradley-Terry)", "accuracy": accuracy, "on": where})
        return found

    def metrics(self, name: str) -> list[list[dict[str, Any]]]:
        """The lines of the training's log, a list a seed."""
        logs = [row_dir(self.path, name, seed) / METRICS_FILE for seed in self.seeds]
        return [[line for _, line in read_jsonl(log)] for log in logs]

    def table_row(self, name: str) -> dict[str, Cell]:
        """The row ``name`` of a table with :data:`COLUMNS`."""
        perplexities = [one["perplexity"] for one in self.evaluations(name)]
        refusals = self.outcomes(name, "refusal")
        return {
            "system": self.rows[name].label,
            "toxic": share_of(self.outcomes(name)),
            "overrefusal": share_of(refusals) if refusals else None,
            "perplexity": None if None in perplexities else fmean(perplexities),
        }

    def below(self, low: str, high: str) -> Ordering:
        """The claim that the row ``low`` is less toxic than ``high``, with its test, paired by prompt."""
        claim = f"{self.rows[low].label} below {self.rows[high].label}"
        return Ordering.of(claim, compare(self.outcomes(low), self.outcomes(high)))

    def difference(self, name: str, other: str) -> dict[str, Cell]:
        """The toxic rate of the row ``name`` less that of ``other``, paired by prompt, and its p."""
        found = compare(self.outcomes(name), self.outcomes(other))
        return {"difference": Interval.of(found), "p": found.p}

    def orderings(self, claims: Sequence[tuple[str, str]]) -> list[Ordering]:
        """:meth:`below` of every claim whose two rows are there."""
        return [self.below(low, high) for low, high in claims if low in self.rows and high in self.rows]
