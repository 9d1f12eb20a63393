"""Where a run's inputs come from: the sandbox world, or the user's own files."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from reprdpo.data import kind_of, load_preferences, load_prompts, load_responses
from reprdpo.errors import UserError
from reprdpo.experiments.config import SANDBOX, RunConfig
from reprdpo.files import content_hash


@dataclass(frozen=True)
class Inputs:
    """What a run reads: pairs to fit and train on, prompts to sample for, prompts and text to evaluate on.

    ``red_team`` prompts count into the toxic rate, ``borderline`` ones (None: not given) into over-refusal; perplexity
    is that of ``benign`` responses (columns prompt, response). ``held_out`` are pairs over other prompts than those of
    ``preferences``.
    """

    model: str
    preferences: Dataset
    held_out: Dataset
    demonstrations: Dataset
    prompts: Dataset
    red_team: Dataset
    borderline: Dataset | None
    benign: Dataset
    where: str


def read_inputs(config: RunConfig) -> Inputs:
    """Read and check every input file of ``config``.

    Raises:
        UserError: a file that is missing, empty or holds a row that cannot be used.
    """
    return _sandbox_inputs(config) if config.model == SANDBOX else _file_inputs(config)


def _sandbox_inputs(config: RunConfig) -> Inputs:
    from reprdpo.data.sandbox import load_sandbox

    sandbox, asked = load_sandbox(config.cache_dir or default_cache(), scale=config.scale), config.evaluate
    return Inputs(
        model=str(sandbox.model_dir),
        preferences=load_preferences(sandbox.preferences, limit=config.limit),
        held_out=load_preferences(sandbox.held_out),
        demonstrations=load_responses(sandbox.sft),
        prompts=load_prompts(sandbox.train_prompts),
        red_team=first(load_prompts(asked.prompts or sandbox.harmful_prompts), asked.limit),
        borderline=first(load_prompts(asked.borderline_prompts or sandbox.borderline_prompts), asked.limit),
        benign=load_responses(asked.benign_text or sandbox.benign_text),
        where=str(sandbox.preferences),
    )


def _file_inputs(config: RunConfig) -> Inputs:
    assert config.preferences is not None
    skip, settings = config.skip_invalid, config.evaluate
    pairs = load_preferences(config.preferences, limit=config.limit, skip_invalid=skip)
    training, held_out = split_by_prompt(pairs, config.holdout)
    if not len(training) or not len(held_out):
        raise UserError(
            f"{config.preferences}: {len(pairs)} pairs are too few to hold {config.holdout:.0%} of the prompts out; "
            "give more pairs, or another holdout"
        )
    red_team = load_prompts(settings.prompts, skip_invalid=skip) if settings.prompts else distinct_prompts(held_out)
    borderline = load_prompts(settings.borderline_prompts, skip_invalid=skip) if settings.borderline_prompts else None
    prompts = load_prompts(config.prompts, skip_invalid=skip) if config.prompts else distinct_prompts(training)
    asked = {"prompts": prompts, "evaluate.prompts": red_team, "evaluate.borderline_prompts": borderline}
    _check_kinds(pairs, {name: rows for name, rows in asked.items() if rows is not None})
    return Inputs(
        model=config.model,
        preferences=training,
        held_out=held_out,
        demonstrations=_chosen(training),
        prompts=prompts,
        red_team=first(red_team, settings.limit),
        borderline=None if borderline is None else first(borderline, settings.limit),
        benign=load_responses(settings.benign_text) if settings.benign_text else _chosen(held_out),
        where=config.preferences,
    )


def _check_kinds(pairs: Dataset, asked: dict[str, Dataset]) -> None:
    """Refuse prompts that would be put to the model in another form than the pairs it is aligned with."""
    kind = kind_of(pairs[0]["prompt"])
    for name, rows in asked.items():
        if kind_of(rows[0]["prompt"]) != kind:
            turns = "chat" if kind == "chat" else "plain or human"
            raise UserError(
                f"{name}: its prompts are {kind_of(rows[0]['prompt'])} where the preferences are {kind}; "
                f"write ?turns={turns} after the source (docs/datasets.md)"
            )


def default_cache() -> Path:
    """``REPRDPO_CACHE``, or ``reprdpo`` in the user's cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return Path(os.environ.get("REPRDPO_CACHE", home / "reprdpo"))


def split_by_prompt(pairs: Dataset, holdout: float) -> tuple[Dataset, Dataset]:
    """Pairs to train on and pairs held out; a prompt is on one side whatever else the file holds, in any order."""
    held_out = [int(content_hash(prompt), 16) % 10_000 < holdout * 10_000 for prompt in pairs["prompt"]]
    rows = range(len(pairs))
    return pairs.select([row for row in rows if not held_out[row]]), pairs.select(
        [row for row in rows if held_out[row]]
    )


def flip_labels(pairs: Dataset, share: float) -> Dataset:
    """The pairs with the texts of chosen and rejected exchanged in the ``share`` of rows whose content hashes lowest.

    The same rows every time, and those of a smaller share among those of a larger one. Safety labels stay where they
    are, and so become as wrong as the preference.
    """
    rows = [content_hash(row["prompt"], row["chosen"], row["rejected"]) for row in pairs]
    flipped = set(sorted(range(len(pairs)), key=lambda row: (rows[row], row))[: round(share * len(pairs))])

    def exchange(row: dict[str, Any], number: int) -> dict[str, Any]:
        return row | {"chosen": row["rejected"], "rejected": row["chosen"]} if number in flipped else row

    if not flipped:
        return pairs
    return pairs.map(exchange, with_indices=True, features=pairs.features, load_from_cache_file=False, desc="flipping")


def distinct_prompts(pairs: Dataset) -> Dataset:
    """The pairs' prompts, each once, in order of first appearance."""
    seen: dict[str, int] = {}
    for row, prompt in enumerate(pairs["prompt"]):
        seen.setdefault(content_hash(prompt), row)
    kept = pairs.select(list(seen.values())).select_columns(["prompt", "category", "source"])
    return kept.add_column("harmful", [None] * len(kept))


def first(dataset: Dataset, limit: int | None) -> Dataset:
    """The first ``limit`` rows, or all."""
    return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))


def _chosen(pairs: Dataset) -> Dataset:
    return pairs.select_columns(["prompt", "chosen", "category", "source"]).rename_column("chosen", "response")
