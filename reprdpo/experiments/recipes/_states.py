"""What the recipes about hidden states share: reading them of a policy, and intervals as a result shows them."""

import math
from dataclasses import dataclass

from datasets import Dataset
from torch import Tensor

from reprdpo.data import load_preferences
from reprdpo.errors import UserError
from reprdpo.experiments.config import SANDBOX, RunConfig
from reprdpo.experiments.finished_run import FinishedRun
from reprdpo.experiments.results import Interval, Ordering, Series
from reprdpo.experiments.sources import first, read_inputs
from reprdpo.experiments.stages import Policy, safety_labels
from reprdpo.experiments.systems import SYSTEMS
from reprdpo.reward import RewardEvaluation, extract_pair_states
from reprdpo.statistics import ClusteredMean, p_words


@dataclass(frozen=True)
class PairSet:
    """Labelled pairs, and where they were read."""

    pairs: Dataset
    where: str


@dataclass(frozen=True)
class Labelled:
    """Pooled states [P, L, D] of P pairs with what a fit wants to know of them; ``means`` are over the responses."""

    chosen: Tensor
    rejected: Tensor
    groups: list[int]
    chosen_is_safe: list[bool | None] | None = None
    rejected_is_safe: list[bool | None] | None = None
    category: list[str | None] | None = None
    means: tuple[Tensor, Tensor] | None = None


def labelled_pairs(config: RunConfig) -> PairSet:
    """The preference pairs that ``config`` names: the sandbox's, or the whole of the user's file."""
    if config.model == SANDBOX and config.preferences is None:
        inputs = read_inputs(config)
        return PairSet(inputs.preferences, inputs.where)
    assert config.preferences is not None
    return read_pairs(config.preferences, config)


def read_pairs(source: str, config: RunConfig) -> PairSet:
    """Another pair set, read as the run's own is."""
    return PairSet(load_preferences(source, limit=config.limit, skip_invalid=config.skip_invalid), source)


def base_policy(config: RunConfig) -> Policy:
    """The model that ``config`` names, before any training."""
    path = read_inputs(config).model if config.model == SANDBOX else config.model
    return Policy.of(config, path)


def labelled_states(policy: Policy, data: PairSet, config: RunConfig, *, means: bool = False) -> Labelled:
    """The policy's states of both sides of every pair, pooled as ``config.fit`` says."""
    rows = first(policy.tokenize(data.pairs, data.where), config.fit.limit)
    model, pad = policy.model(), policy.tokenizer().pad_token_id
    chosen, rejected = extract_pair_states(model, rows, pad_token_id=pad, pool=config.fit.pool)
    averaged = None
    if means:
        averaged = extract_pair_states(model, rows, pad_token_id=pad, pool="mean", response_only=True)
    category = list(rows["category"]) if "category" in rows.column_names else None
    return Labelled(chosen, rejected, list(rows["prompt_id"]), category=category, means=averaged, **safety_labels(rows))


def policy_of(run: FinishedRun, system: str, seed: int = 0) -> Policy:
    """The policy that answers as ``system`` in a run; "reference" is where its alignment starts from."""
    if system == "reference":
        system = "sft" if "sft" in run.config.systems else "base"
    return Policy.of(run.config, run.model(system, seed))


def check_aligned(option: str, system: str, config: RunConfig) -> None:
    """
    Raises:
        UserError: ``system`` is not one that this run trains on pairs.
    """
    aligned = [name for name in config.systems if SYSTEMS[name].pairs is not None]
    if system not in aligned:
        raise UserError(
            f"options.{option}: {system!r} is not aligned in this run; it has {', '.join(aligned) or 'none'}"
        )


def interval(found: ClusteredMean | None) -> Interval | None:
    """A clustered mean as a cell of a table."""
    return None if found is None else Interval(found.value, found.low, found.high, found.n)


def layer_series(label: str, found: RewardEvaluation) -> Series:
    """The pair accuracy of each layer's probe, counted from 1, with its interval."""
    accuracy = found.layer_accuracy
    return Series(
        label,
        y=[layer.value for layer in accuracy],
        x=[float(layer) for layer in range(1, found.num_layers + 1)],
        low=[layer.low for layer in accuracy],
        high=[layer.high for layer in accuracy],
    )


def below(claim: str, found: ClusteredMean, *, unit: str = "points", factor: float = 100) -> Ordering:
    """The claim "A below B", with its test; ``found`` is the mean of A - B."""
    held = {(True, False): True, (False, True): False}.get((found.high < 0, found.low > 0))
    p = found.p if found.p is not None else math.nan
    shown = [f"{factor * value:+.{1 if factor == 100 else 3}f}" for value in (found.value, found.low, found.high)]
    detail = (
        f"{shown[0]} {unit}, 95 % interval [{shown[1]}, {shown[2]}], {p_words(p)}, "
        f"n = {found.n} in {found.groups} prompts"
    )
    return Ordering(claim, held, found.value, found.low, found.high, p, detail)
