"""Preference pairs from the top and the bottom of each prompt's ranking."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

from reprdpo.data import in_kind
from reprdpo.errors import UserError
from reprdpo.files import write_jsonl
from reprdpo.sampling.best_of_n import read_samples


@dataclasses.dataclass(frozen=True)
class PairReport:
    """What :func:`build_pairs` made and left out.

    Attributes:
        n_prompts: prompts in the file of samples.
        n_prompts_with_pairs: prompts that gave at least one pair.
        n_pairs: pairs written.
        n_responses: responses read.
        skipped: counts of what was left out: responses that are ``empty_response``, ``identical_text`` or
            ``no_reward``, prompts with ``too_few_responses`` after that, pairs with a ``gap_too_small``.
        n_truncated: responses that ran into ``max_new_tokens``; they take part.
        mean_gap: mean reward gap of the pairs.
    """

    n_prompts: int
    n_prompts_with_pairs: int
    n_pairs: int
    n_responses: int
    skipped: dict[str, int]
    n_truncated: int
    mean_gap: float


def build_pairs(
    samples_path: str | Path,
    out_path: str | Path,
    *,
    top_k: int = 1,
    bottom_k: int = 1,
    min_gap: float = 0.0,
    first: int | None = None,
) -> PairReport:
    """Pair each of a prompt's ``top_k`` responses by reward with each of its ``bottom_k``; write them to ``out_path``.

    Of a prompt's responses only the ``first`` take part, in the order they were drawn (default: all).
    Rows follow the preference schema, ``source`` being "sampled", with ``chosen_reward`` and ``rejected_reward``.
    Empty responses, second copies of a text and responses without a reward do not take part; a pair needs a gap
    above 0 and of at least ``min_gap``, and no two responses are paired twice.

    Raises:
        UserError: a bad argument or samples file, or no pair at all.
    """
    for name, value in (("top_k", top_k), ("bottom_k", bottom_k)):
        if value < 1:
            raise UserError(f"build_pairs: {name} is {value}; give 1 or more")
    if not min_gap >= 0:
        raise UserError(f"build_pairs: min_gap is {min_gap}; give 0 or more")
    records = [record | {"responses": record["responses"][:first]} for record in read_samples(samples_path)]
    skipped: Counter[str] = Counter()
    rows: list[dict[str, Any]] = []
    fruitful = 0
    for record in records:
        pairs = _pairs(_ranked(record["responses"], skipped), top_k, bottom_k, min_gap, skipped)
        fruitful += bool(pairs)
        rows += [_row(record, chosen, rejected) for chosen, rejected in pairs]
    if not rows:
        reasons = ", ".join(f"{reason} {count}" for reason, count in skipped.most_common()) or "no prompts"
        raise UserError(
            f"{samples_path}: gives no pair ({reasons}); score the responses, or sample more or hotter ones"
        )
    write_jsonl(out_path, rows)
    responses = [response for record in records for response in record["responses"]]
    return PairReport(
        n_prompts=len(records),
        n_prompts_with_pairs=fruitful,
        n_pairs=len(rows),
        n_responses=len(responses),
        skipped=dict(skipped),
        n_truncated=sum(bool(response.get("truncated")) for response in responses),
        mean_gap=sum(row["chosen_reward"] - row["rejected_reward"] for row in rows) / len(rows),
    )


def _ranked(responses: list[dict[str, Any]], skipped: Counter[str]) -> list[dict[str, Any]]:
    """The responses that can be paired, highest reward first; ties keep the order they were drawn in."""
    usable: dict[str, dict[str, Any]] = {}
    for response in responses:
        text = response["text"].strip()
        if not text:
            skipped["empty_response"] += 1
        elif response["reward"] is None:
            skipped["no_reward"] += 1
        elif text in usable:
            skipped["identical_text"] += 1
        else:
            usable[text] = response
    return sorted(usable.values(), key=lambda response: -response["reward"])


def _pairs(
    ranked: list[dict[str, Any]], top_k: int, bottom_k: int, min_gap: float, skipped: Counter[str]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    if len(ranked) < 2:
        skipped["too_few_responses"] += 1
        return []
    first_of_bottom = max(0, len(ranked) - bottom_k)
    pairs = []
    for top in range(min(top_k, len(ranked))):
        for bottom in range(max(top + 1, first_of_bottom), len(ranked)):
            gap = ranked[top]["reward"] - ranked[bottom]["reward"]
            if gap > 0 and gap >= min_gap:
                pairs.append((ranked[top], ranked[bottom]))
            else:
                skipped["gap_too_small"] += 1
    return pairs


def _row(record: dict[str, Any], chosen: dict[str, Any], rejected: dict[str, Any]) -> dict[str, Any]:
    return {
        "prompt": record["prompt"],
        "chosen": in_kind(record["prompt"], chosen["text"]),
        "rejected": in_kind(record["prompt"], rejected["text"]),
        "category": record.get("category"),
        "source": "sampled",
        "chosen_reward": chosen["reward"],
        "rejected_reward": rejected["reward"],
    }
