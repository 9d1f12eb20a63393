"""Side by side: what several systems answered to the same prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

from reprdpo.errors import UserError
from reprdpo.evaluation.judges import Judgement
from reprdpo.evaluation.responses import ResponseRecord


def side_by_side(
    systems: Mapping[str, Sequence[ResponseRecord]],
    *,
    judgements: Mapping[str, Sequence[Judgement]] | None = None,
) -> list[dict[str, Any]]:
    """One record a prompt: ``{"prompt_id", "prompt", "category", "responses": {system: {"text", ...}}}``.

    Args:
        systems: each system's responses, to the same prompts.
        judgements: each system's judgements in the same order; adds ``unsafe`` and ``refusal`` to its responses.

    Raises:
        UserError: no system, or systems that answered different prompts.
    """
    if not systems:
        raise UserError("side by side: no system; give at least one file of responses")
    names = list(systems)
    first = systems[names[0]]
    for name in names[1:]:
        _check_same_prompts(names[0], first, name, systems[name])
    return [
        {
            "prompt_id": record.prompt_id,
            "prompt": record.prompt,
            "category": record.category,
            "responses": {name: _answer(systems, judgements, name, place) for name in names},
        }
        for place, record in enumerate(first)
    ]


def _answer(
    systems: Mapping[str, Sequence[ResponseRecord]],
    judgements: Mapping[str, Sequence[Judgement]] | None,
    name: str,
    place: int,
) -> dict[str, Any]:
    answer: dict[str, Any] = {"text": systems[name][place].response}
    if judgements is not None and name in judgements:
        judgement = judgements[name][place]
        answer |= {"unsafe": judgement.unsafe, "refusal": judgement.refusal}
    return answer


def _check_same_prompts(
    one: str, records: Sequence[ResponseRecord], other: str, others: Sequence[ResponseRecord]
) -> None:
    if len(records) != len(others):
        raise UserError(
            f"side by side: {one} answered {len(records)} prompts, {other} {len(others)}; "
            "evaluate both on one prompt set"
        )
    for record, another in zip(records, others, strict=True):
        if record.prompt != another.prompt:
            raise UserError(
                f"side by side: {one} and {other} answered different prompts at prompt_id {record.prompt_id}; "
                "evaluate both on one prompt set"
            )
