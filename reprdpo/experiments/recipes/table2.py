"""Table 2: how toxic the best of several responses are, ranked by two rewards, before and after alignment."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from reprdpo.data.sandbox.world import CATEGORIES
from reprdpo.errors import UserError
from reprdpo.evaluation import Judge, Judgement, build_judge, compare
from reprdpo.experiments.experiment import Job
from reprdpo.experiments.finished_run import FinishedRun
from reprdpo.experiments.responses_at import Answerer, Responses, Tally, best, rate, tally
from reprdpo.experiments.results import Cell, Column, Figure, Interval, Ordering, Result, Series, Table
from reprdpo.experiments.sources import read_inputs
from reprdpo.reward import HybridReward
from reprdpo.training import BradleyTerryRewardModel

TITLE = "Table 2: hazard categories and toxic rate of the best of several responses"
QUESTION = (
    "Does the representation reward rank safe responses first, as a reward model does, before and after alignment?"
)

POLICIES = {"before": "sft", "after": "reprdpo"}
REWARDS = {"representation": "R", "reward_model": "BT"}
ALL = "all"
ANY, UNNAMED = "any category (toxic rate)", "no category named"


@dataclass(frozen=True)
class Options:
    """How many responses are drawn, and how many of the best are looked at."""

    num_responses: int = field(default=8, metadata={"help": "responses a prompt"})
    top: tuple[int, ...] = field(default=(1, 2, 4), metadata={"help": "how many of the best"})

    def __post_init__(self) -> None:
        if not self.top or not all(1 <= many < self.num_responses for many in self.top):
            raise UserError(
                f"top: {list(self.top)} of {self.num_responses} responses; give numbers below num_responses"
            )


@dataclass(frozen=True)
class Judged:
    """One policy at one seed: a judgement a response, and which places each selection holds, by its key."""

    judgements: list[list[Judgement]]
    chosen: dict[str, list[list[int]]]

    def tally(self, selection: str, category: str | None) -> Tally:
        """Unsafe responses among ``selection``, of one category or of any (None)."""
        outcomes = [[_outcome(judgement, category) for judgement in row] for row in self.judgements]
        return tally(outcomes, self.chosen[selection])


def run(job: Job) -> Result:
    judge = build_judge(job.config.evaluate.judge, needs={"unsafe"})
    done = job.pipeline()
    judged = {when: [_judge(job, done, judge, name, seed) for seed in done.seeds] for when, name in POLICIES.items()}
    rows = _categories(judge, judged)
    names = "category" in judge.gives
    note = (
        f"Share of responses judged unsafe ({judge.name}), by the category the judge names. A prompt's responses are "
        "not independent: a cell is the mean over prompts of the share among a prompt's responses, its 95 % interval a "
        "closed form with prompts as clusters, crossed with seeds. R: the representation reward, read from the states "
        "of the policy that answers (after alignment as the training left it); BT: a Bradley-Terry reward model of the "
        f"same base. {len(judged['before'][0].judgements)} prompts, {len(done.seeds)} seeds."
    )
    titles = {"before": "before alignment (SFT reference)", "after": "after alignment (ours)"}
    return Result(
        tables=[
            Table(f"table2_{when}", f"{TITLE}, {titles[when]}", _columns(job), rows[when], note) for when in POLICIES
        ],
        figures=[_figure(job, judged)],
        orderings=_orderings(job, judged),
        not_run=[
            *([] if job.scale == "paper" else ["The paper's 7B weights, and Llama Guard's categories (--judge)."]),
            *([] if names else [f"The distribution over categories: the judge {judge.name} names none."]),
        ],
    )


def _judge(job: Job, done: FinishedRun, judge: Judge, name: str, seed: int) -> Judged:
    responses, chosen = _draw(job, done, name, seed)
    return Judged(responses.judgements(judge, job.folder / "judgements"), chosen)


def _draw(job: Job, done: FinishedRun, name: str, seed: int) -> tuple[Responses, dict[str, list[list[int]]]]:
    """The responses of one policy, and which of them each selection holds."""
    many, answerer = job.options.num_responses, Answerer(done, name, seed)
    responses = answerer.draw(read_inputs(done.config).red_team, many, job.folder / "responses")
    rewards: dict[str, HybridReward | BradleyTerryRewardModel] = {
        "representation": done.moved_reward(name, seed) or done.reward(),
        "reward_model": done.reward_model(),
    }
    scores = {reward: answerer.score(responses, reward, found) for reward, found in rewards.items()}
    chosen = {_key(reward, top): best(scores[reward], top) for reward in REWARDS for top in job.options.top}
    return responses, chosen | {ALL: [list(range(many)) for _ in responses.prompts]}


def _key(reward: str, top: int) -> str:
    return f"{reward}_{top}"


def _outcome(judgement: Judgement, category: str | None) -> bool | None:
    if judgement.unsafe is None or category is None:
        return judgement.unsafe
    return judgement.unsafe and (judgement.category or UNNAMED) == category


def _columns(job: Job) -> list[Column]:
    best = [
        Column(_key(reward, top), f"{short} top-{top}", "share")
        for reward, short in REWARDS.items()
        for top in job.options.top
    ]
    return [Column("category", "Category", "text"), *best, Column(ALL, f"All {job.options.num_responses}", "share")]


def _categories(judge: Judge, judged: dict[str, list[Judged]]) -> dict[str, list[dict[str, Cell]]]:
    """The rows of each policy's table: every category of the judge's list or found, the same in both; then any."""
    found = {
        judgement.category or UNNAMED
        for runs in judged.values()
        for one in runs
        for row in one.judgements
        for judgement in row
        if judgement.unsafe
    }
    known = _known(judge)
    named = [*known, *sorted(found - set(known))] if "category" in judge.gives else []
    tables: dict[str, list[dict[str, Cell]]] = {}
    for when, runs in judged.items():
        tables[when] = [{"category": name, **_cells(runs, name)} for name in named]
        tables[when].append({"category": ANY, **_cells(runs, None)})
    return tables


def _known(judge: Judge) -> list[str]:
    """The judge's own list of categories, where it has one."""
    if judge.name == "sandbox":
        return [category.label for category in CATEGORIES]
    return [f"{code} {name}" for code, name in getattr(judge, "categories", {}).items()]


def _cells(runs: Sequence[Judged], category: str | None) -> dict[str, Interval]:
    return {selection: rate([one.tally(selection, category) for one in runs]) for selection in runs[0].chosen}


def _figure(job: Job, judged: dict[str, list[Judged]]) -> Figure:
    tops = [*job.options.top, job.options.num_responses]
    series = []
    for when, runs in judged.items():
        cells = _cells(runs, None)
        for reward, short in REWARDS.items():
            line = [*(cells[_key(reward, top)] for top in job.options.top), cells[ALL]]
            series.append(
                Series(
                    f"{short}, {when}",
                    [cell.value for cell in line],
                    x=[float(top) for top in tops],
                    low=[cell.low for cell in line],
                    high=[cell.high for cell in line],
                    group=when,
                )
            )
    title = "Toxic rate of the best responses by reward"
    return Figure("table2_rates", title, "line", f"Best of {tops[-1]} looked at", "Toxic rate", series)


def _orderings(job: Job, judged: dict[str, list[Judged]]) -> list[Ordering]:
    """The shape of the paper's table: ranking finds safer responses, the reward model more so, alignment does too."""
    first, label = job.options.top[0], f"top-{job.options.top[0]}"

    def below(claim: str, low: tuple[str, str], high: tuple[str, str]) -> Ordering:
        shares = [[one.tally(selection, None).shares for one in judged[when]] for when, selection in (low, high)]
        return Ordering.of(claim, compare(*shares))

    found = []
    for when in POLICIES:
        by_reward, by_model = (when, _key("representation", first)), (when, _key("reward_model", first))
        found.append(below(f"{label} by R below all, {when}", by_reward, (when, ALL)))
        found.append(below(f"{label} by BT below all, {when}", by_model, (when, ALL)))
        found.append(below(f"{label} by BT below {label} by R, {when}", by_model, by_reward))
    for name, selection in (("all", ALL), (f"{label} by R", _key("representation", first))):
        found.append(below(f"{name}: after below before", ("after", selection), ("before", selection)))
    return found
