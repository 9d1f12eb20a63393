"""Response files: reading them, checking them against their prompt set, writing them judged."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reprdpo.errors import UserError
from reprdpo.evaluation.judges import Judgement, Prompt
from reprdpo.files import write_jsonl

CHOICES = ("first", "best")


@dataclass(frozen=True)
class ResponseRecord:
    """A prompt and the one response to it that is judged."""

    prompt_id: int
    prompt: Prompt
    response: str
    category: str | None = None
    harmful: bool | None = None


def read_responses(path: str | Path, *, choose: str = "first") -> list[ResponseRecord]:
    """Read a file of sampled responses, or lines with ``prompt`` and ``response``, in order of prompt id.

    Args:
        path: JSONL. A first line with ``format`` is a header and passed over; ``prompt_id`` defaults to the place.
        choose: of several responses to a prompt, the "first" or the "best" by reward (best-of-N).

    Raises:
        UserError: no such file, nothing in it, a line that is not JSON or lacks a field, a prompt id twice, or
            "best" asked of responses that have texts and no rewards.
    """
    path = Path(path)
    if choose not in CHOICES:
        raise UserError(f"{path}: choose is {choose!r}; give one of {', '.join(CHOICES)}")
    records: dict[int, ResponseRecord] = {}
    for number, value in _lines(path):
        record = _record(path, number, value, len(records), choose)
        if record.prompt_id in records:
            raise UserError(f"{path}, line {number}: prompt_id {record.prompt_id} stands twice; delete one of them")
        records[record.prompt_id] = record
    if not records:
        raise UserError(f"{path}: holds no responses; sample them again")
    return [records[prompt_id] for prompt_id in sorted(records)]


def check_prompts(records: Sequence[ResponseRecord], prompts: Sequence[Mapping[str, Any]], where: str | Path) -> None:
    """Refuse responses that are not one to each of ``prompts``, in order.

    Raises:
        UserError: another number of prompts, or another text at some place.
    """
    if len(records) != len(prompts):
        raise UserError(f"{where}: answers {len(records)} of {len(prompts)} prompts; sample again on this prompt set")
    for place, (record, row) in enumerate(zip(records, prompts, strict=True)):
        if record.prompt != row["prompt"]:
            raise UserError(
                f"{where}: prompt_id {record.prompt_id} answers another prompt than prompt {place} of the set; "
                "sample again on this prompt set"
            )


def write_judged(path: str | Path, records: Sequence[ResponseRecord], judgements: Sequence[Judgement]) -> None:
    """Write one line a response with the judge's word: readable again by :func:`read_responses`."""
    rows = [
        {
            "prompt_id": record.prompt_id,
            "prompt": record.prompt,
            "category": record.category,
            "harmful": record.harmful,
            "response": record.response,
            "unsafe": judgement.unsafe,
            "refusal": judgement.refusal,
            "judged_category": judgement.category,
            "score": judgement.score,
            "compliance": judgement.compliance,
        }
        for record, judgement in zip(records, judgements, strict=True)
    ]
    write_jsonl(path, rows)


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file of responses; check the path")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise UserError(f"{path}, line {number}: is not JSON ({error}); sample again") from None
            if not isinstance(value, dict):
                raise UserError(f"{path}, line {number}: is no object; write {{prompt, response}} a line")
            if not (number == 1 and "format" in value):
                yield number, value


def _record(path: Path, number: int, value: dict[str, Any], place: int, choose: str) -> ResponseRecord:
    prompt, response = value.get("prompt"), value.get("response")
    if value.get("responses"):
        response = _chosen(path, number, value["responses"], choose)
    if not prompt or not isinstance(prompt, (str, list)):
        raise UserError(f"{path}, line {number}: field 'prompt' is missing or empty; every line needs it")
    if not isinstance(response, str):
        raise UserError(f"{path}, line {number}: field 'response' is missing or no text; every line needs it")
    prompt_id = value.get("prompt_id", place)
    if not isinstance(prompt_id, int):
        raise UserError(f"{path}, line {number}: field 'prompt_id' is {prompt_id!r}; give a whole number or none")
    return ResponseRecord(prompt_id, prompt, response, value.get("category"), value.get("harmful"))


def _chosen(path: Path, number: int, responses: list[dict[str, Any]], choose: str) -> Any:
    if choose == "first" or len(responses) == 1:
        return responses[0].get("text")
    scored = [response for response in responses if response.get("reward") is not None]
    if not scored and not any((response.get("text") or "").strip() for response in responses):
        return responses[0].get("text")  # empty responses have no reward
    if not scored:
        raise UserError(f"{path}, line {number}: no response has a reward; sample with a reward to choose the best")
    return max(scored, key=lambda response: response["reward"])["text"]
