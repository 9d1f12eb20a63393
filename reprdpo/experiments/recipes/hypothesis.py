"""The hypothesis (section 3.1): alignment moves the ranking of a prompt's responses, and hardly their set.

For each prompt x, y_1 .. y_N are the responses the run drew from the reference policy pi_0; pi is the policy after
alignment.

The ranking is that of y_1 .. y_N by a score f_0 before and f after: R, read from each policy's own states (after: with
the probes that moved along in training, where they did); R with the probes as they were; and log pi(y | x). Spearman's
rho and Kendall's tau compare the two; a ranking's movement is 1 - tau: 0 the same, 1 unrelated, 2 reversed.

The set is compared in two ways.
- By likelihood, with r_i = log pi(y_i | x) - log pi_0(y_i | x): nats per token mean(r_i / |y_i|); the share of the
  draws left for pi, (sum w)^2 / (N sum w^2) with w = exp r; and the probability mass both policies share,
  sum_y min(pi_0, pi) = E_{y ~ pi_0} min(1, exp r), whose movement is 1 minus it, their total variation. It falls with
  every token that may differ, so a small change of long texts shows large.
- By text: the overlap (Dice) of word n-grams of y_1 .. y_N with those of N fresh responses of pi, beside that with N
  fresh ones of pi_0 itself, which is what two draws of one policy share. Its movement is
  1 - overlap(pi) / overlap(pi_0): 0 where pi's draw is as like the old set as another draw of pi_0, 1 where nothing is
  shared.
"""

# ruff: noqa: RUF001  Greek letters are what the tables show

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from reprdpo.errors import UserError
from reprdpo.experiments.experiment import Job
from reprdpo.experiments.recipes._movement import RANKINGS, Draw, Moved, compare, drawn, joined, score
from reprdpo.experiments.recipes._states import below, check_aligned, interval, policy_of
from reprdpo.experiments.results import Column, Figure, Interval, Ordering, Result, Series, Table
from reprdpo.experiments.stages import Policy
from reprdpo.experiments.systems import SYSTEMS
from reprdpo.sampling import SamplingConfig, TransformersEngine, read_samples, sample_responses
from reprdpo.statistics import ClusteredMean, FloatArray, clustered_mean, clustered_share

TITLE = "The hypothesis: the ranking of a prompt's responses moves, their set hardly"
QUESTION = "Does alignment change the order of a prompt's eight responses more than it changes which responses come?"

Statistic = Callable[[FloatArray, Iterable[object]], ClusteredMean]


@dataclass(frozen=True)
class Options:
    """What is compared with the reference: the systems, on how many of the prompts that the run sampled for."""

    systems: tuple[str, ...] = field(default=("dpo", "reprdpo"), metadata={"help": "aligned systems to look at"})
    prompts: int = field(default=100, metadata={"help": "prompts to compare on, from the run's samples"})
    ngram: int = field(default=3, metadata={"help": "words of an n-gram"})


def run(job: Job) -> Result:
    config, options = job.config, job.options
    for system in options.systems:
        check_aligned("systems", system, config)
    if not any(SYSTEMS[name].pairs == "ranked" for name in config.systems):
        raise UserError("systems: none of them ranks the reference's responses, which are compared; add reprdpo")
    finished = job.pipeline()
    records = read_samples(finished / "samples" / "responses.jsonl")[: options.prompts]
    draws = [draw for draw in map(drawn, records) if len(draw.distinct) > 2]
    if len(draws) < 2:
        raise UserError(
            f"{finished.path}: {len(draws)} prompts with three different responses; sample more or hotter ones"
        )
    reference = policy_of(finished, "reference")
    fitted = finished.reward()
    old = score(reference, {"fixed_reward": fitted}, draws)
    again = _fresh(reference, draws, job, "reference")
    moved = {}
    for system in options.systems:
        of_seeds = []
        for seed in config.seeds:
            policy = policy_of(finished, system, seed)
            own = finished.moved_reward(system, seed) or fitted
            job.say(f"comparing {system} seed {seed} with the reference")
            new = score(policy, {"fixed_reward": fitted, "reward": own}, draws)
            of_seeds.append(
                compare(draws, old, new, again, _fresh(policy, draws, job, f"{system}-seed-{seed}"), n=options.ngram)
            )
        moved[SYSTEMS[system].label] = joined(of_seeds)
    left = len(records) - len(draws)
    return Result(
        tables=[_rankings(moved), _sets(moved)],
        figures=[_bars(moved), _cloud(moved)],
        orderings=[claim for label, found in moved.items() for claim in _claims(label, found)],
        notes=[
            f"{len(draws)} prompts with {config.sample.num_responses} responses each; {left} more had fewer than three "
            "different ones. Intervals are for other prompts, not for other seeds, 95 %.",
            "Movement: 0 where nothing moved, 1 where before and after have nothing to do with each other; 1 - τ of a "
            "ranking, 1 - overlap / overlap of two draws of the reference for texts, total variation for probability.",
            *_warnings(config.sample, next(iter(moved.values()))),
        ],
        not_run=[] if job.scale == "paper" else ["The paper's Llama-2-7B weights and its prompts."],
    )


def _fresh(policy: Policy, draws: Sequence[Draw], job: Job, name: str) -> list[list[str]]:
    """As many new responses of ``policy`` to each prompt as the run drew, kept in the experiment's folder."""
    sampling = job.config.sampling()
    sampling = dataclasses.replace(sampling, seed=sampling.seed + 1)
    path = job.folder / f"{name}.jsonl"
    prompts = [{"prompt": draw.prompt} for draw in draws]
    engine = TransformersEngine(policy.model(), policy.tokenizer())
    records = read_samples(sample_responses(engine, prompts, path, sampling, progress=False))
    return [[response["text"] for response in record["responses"]] for record in records]


def _mean(values: FloatArray, groups: Sequence[int], statistic: Statistic = clustered_mean) -> ClusteredMean:
    """Over prompts where there is a value: a ranking that is all ties has no correlation."""
    there = ~np.isnan(values)
    if not there.any():
        return ClusteredMean(math.nan, math.nan, math.nan, 0, 0, math.nan)
    return statistic(values[there], [group for group, is_there in zip(groups, there, strict=True) if is_there])


def _share(values: FloatArray, groups: Sequence[int]) -> Interval | None:
    return interval(_mean(values, groups, clustered_share))


def _correlation(values: FloatArray, groups: Sequence[int]) -> Interval | None:
    """The mean of values in [-1, 1]."""
    found = _mean((values + 1) / 2, groups, clustered_share)
    return Interval(2 * found.value - 1, 2 * found.low - 1, 2 * found.high - 1, found.n)


def _rankings(moved: dict[str, Moved]) -> Table:
    rows = [
        {
            "system": label,
            "ranking": RANKINGS[name],
            "rho": _correlation(found.rho[name], found.groups),
            "tau": _correlation(found.tau[name], found.groups),
            "swapped": _share((1 - found.tau[name]) / 2, found.groups),
        }
        for label, found in moved.items()
        for name in RANKINGS
    ]
    columns = [
        Column("system", "System", "text"),
        Column("ranking", "Ranking by", "text"),
        Column("rho", "Spearman's ρ"),
        Column("tau", "Kendall's τ"),
        Column("swapped", "Pairs that changed order", "share"),
    ]
    return Table("rankings", "Does the ranking move? (1: not at all, 0: unrelated)", columns, rows)


def _sets(moved: dict[str, Moved]) -> Table:
    rows = [
        {
            "system": label,
            "nats": interval(_mean(found.nats, found.groups)),
            "effective": _share(found.effective, found.groups),
            "shared": _share(found.shared, found.groups),
            "overlap": _share(found.overlap, found.groups),
            "floor": _share(found.floor, found.groups),
            "ratio": interval(_mean(found.text_ratio, found.groups)),
        }
        for label, found in moved.items()
    ]
    columns = [
        Column("system", "System", "text"),
        Column("nats", "Log-likelihood of the old set, nats per token"),
        Column("effective", "Effective sample size / N", "share"),
        Column("shared", "Probability mass shared", "share"),
        Column("overlap", "n-grams shared with a new draw", "share"),
        Column("floor", "... of the reference itself", "share"),
        Column("ratio", "Ratio of the two", "share"),
    ]
    return Table("sets", "Does the set move?", columns, rows)


def _bars(moved: dict[str, Moved]) -> Figure:
    categories = list(next(iter(moved.values())).movement())
    series = []
    for label, found in moved.items():
        means = [_mean(values, found.groups) for values in found.movement().values()]
        series.append(
            Series(
                label,
                y=[mean.value for mean in means],
                low=[mean.low for mean in means],
                high=[mean.high for mean in means],
            )
        )
    return Figure("movement", TITLE, "bars", "", "Movement (0 none, 1 unrelated)", series, categories)


def _cloud(moved: dict[str, Moved]) -> Figure:
    series = []
    for label, found in moved.items():
        there = ~np.isnan(found.rho["reward"])
        series.append(Series(label, y=found.rho["reward"][there].tolist(), x=found.shared[there].tolist()))
    x, y = "Probability mass shared with the reference", "Spearman's ρ of R before and after"
    return Figure("prompts", "Ranking against set, prompt by prompt", "scatter", x, y, series)


def _claims(label: str, found: Moved) -> list[Ordering]:
    movement, groups = found.movement(), found.groups
    text, mass = movement["Set, by n-grams"], movement["Set, by probability mass"]
    ranking = 1 - found.tau["reward"]
    claims = {
        "movement of the set by n-grams below that of the ranking by R": text - ranking,
        "movement of the set by probability mass below that of the ranking by R": mass - ranking,
        "n-grams shared with the new policy's draw below those with the old one's": found.overlap - found.floor,
    }
    return [
        below(f"{label}: {claim}", _mean(values, groups), unit="of 1", factor=1) for claim, values in claims.items()
    ]


def _warnings(sample: SamplingConfig, found: Moved) -> list[str]:
    said = []
    if (sample.temperature, sample.top_p, sample.top_k) != (1, 1, 0):
        said.append(
            "Responses were not drawn at temperature 1 from all tokens: no likelihood ratio is of what drew them."
        )
    if found.blind:
        said.append(
            f"Two draws of the reference share {found.floor.mean():.1%} of their n-grams, too little to tell whether a "
            "set moved; take shorter ones (--option ngram=1)."
        )
    return said
