"""Best-of-N: responses to a prompt set, scored, in a JSONL file that a killed run goes on with."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from reprdpo.errors import UserError
from reprdpo.files import JsonlWriter, atomic_path, content_hash, read_jsonl
from reprdpo.sampling.engine import Engine, Prompt, Response, SamplingConfig

FORMAT = "reprdpo-samples-1"
_RANKED_AT_ONCE = 256  # prompts

Drawn = tuple[dict[str, Any], list[Response]]
Score = Callable[[list[Prompt], list[str]], Sequence[float]]


def sample_responses(
    engine: Engine,
    prompts: Sequence[Mapping[str, Any]],
    path: str | Path,
    config: SamplingConfig,
    *,
    score: Score | None = None,
    key: Any = None,
    progress: bool = True,
) -> Path:
    """Draw and score ``config.num_responses`` responses a prompt; return ``path``.

    The file's first line is a header that names prompts, model and configuration; then one line a prompt:
    ``{"prompt_id", "prompt", "category", "harmful", "responses": [{"text", "reward", "truncated"}, ...]}``, in prompt
    order once complete. Lines already there are kept and a torn last line is cut, so a kill loses at most the batch in
    flight, and the whole run and the resumed one write the same file. What an engine gave before it failed is written.

    Args:
        engine: where responses come from.
        prompts: rows with ``prompt`` and perhaps ``category`` and ``harmful`` (a dataset or a list).
        path: the file.
        config: how to draw; ``batch_size`` may differ between runs of one file.
        score: prompts and responses, one of each a response, to rewards; see
            :func:`~reprdpo.sampling.scoring.score_responses`. A reward that is not finite is written as null.
        key: what else the file depends on and the header should name (say, the reward's hash).
        progress: show a progress bar.

    Raises:
        UserError: no prompts, ``path`` holds responses to other prompts or of another model or configuration, or the
            engine's.
    """
    path = Path(path)
    if len(prompts) == 0:
        raise UserError(f"{path}: no prompts to sample from; give a prompt file with at least one line")
    rows = [_without_responses(number, row) for number, row in enumerate(prompts)]
    header = _header(engine, rows, config, scored=score is not None, key=key)
    present = _records_present(path, header, len(rows))
    if len(present) < len(rows):
        batches = (_scored(drawn, config, score) for drawn in _drawn(engine, rows, present, config))
        with tqdm(total=len(rows), desc="sampling", unit="prompt", disable=not progress, delay=2) as bar:
            _append(path, header, batches, len(present), bar)
        _sort_file(path)
    return path


def rank_responses(
    source: str | Path,
    path: str | Path,
    score: Score,
    *,
    key: Any,
    first: int | None = None,
) -> Path:
    """Score the responses that ``source`` holds, by another reward, in a file of the same form; return ``path``.

    Nothing is drawn. Lines already in ``path`` are kept.

    Args:
        source: a whole file of :func:`sample_responses`.
        path: the file to write.
        score: as :func:`sample_responses` takes it.
        key: what names the reward (its hash); stands in the header.
        first: responses of each prompt that are kept, in the order they were drawn (default: all).

    Raises:
        UserError: a source that cannot be read or has fewer responses to a prompt than ``first``, or a ``path`` that
            holds other responses or other rewards.
    """
    source, path = Path(source), Path(path)
    header, records = _read(source)
    if first is not None and any(len(record["responses"]) < first for record in records):
        raise UserError(f"{source}: holds fewer than {first} responses to a prompt; draw more (num_responses)")
    header |= {"scored": True, "key": content_hash(header["key"], key, first)}
    present = _records_present(path, header, len(records))
    missing = [
        record | {"responses": record["responses"][:first]} for record in records if record["prompt_id"] not in present
    ]
    chunks = (missing[start : start + _RANKED_AT_ONCE] for start in range(0, len(missing), _RANKED_AT_ONCE))
    with tqdm(total=len(records), desc="ranking", unit="prompt", delay=2) as bar:
        _append(path, header, (_ranked_anew(chunk, score) for chunk in chunks), len(present), bar)
    return path


def _append(
    path: Path, header: dict[str, Any], batches: Iterable[list[dict[str, Any]]], present: int, bar: "tqdm[Any]"
) -> None:
    """Write the records as they come, behind the ``header`` where the file is new."""
    batches = iter(batches)
    first = next(batches, [])  # what is refused is refused here, before a file is made
    with JsonlWriter(path) as writer:
        if not path.stat().st_size:
            writer.write(header)
        bar.update(present)
        for records in itertools.chain([first], batches):
            for record in records:
                writer.write(record)
            bar.update(len(records))


def _ranked_anew(records: list[dict[str, Any]], score: Score) -> list[dict[str, Any]]:
    asked = [record["prompt"] for record in records for _ in record["responses"]]
    rewards = iter(score(asked, [response["text"] for record in records for response in record["responses"]]))
    return [
        record | {"responses": [answer | {"reward": float(next(rewards))} for answer in record["responses"]]}
        for record in records
    ]


def read_samples(path: str | Path) -> list[dict[str, Any]]:
    """The records of a file of :func:`sample_responses`, by prompt id.

    Raises:
        UserError: no such file, not a file of samples, nothing in it, or a prompt id twice.
    """
    return _read(Path(path))[1]


def best_of_n(record: Mapping[str, Any]) -> dict[str, Any]:
    """The response (``{"text", "reward", "truncated"}``) of highest reward; the first one where none has a reward."""
    scored = [response for response in record["responses"] if response["reward"] is not None]
    return max(scored, key=lambda response: response["reward"]) if scored else record["responses"][0]


def _without_responses(number: int, row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "prompt_id": number,
        "prompt": row["prompt"],
        "category": row.get("category"),
        "harmful": row.get("harmful"),
    }


def _header(
    engine: Engine, rows: list[dict[str, Any]], config: SamplingConfig, *, scored: bool, key: Any
) -> dict[str, Any]:
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(SamplingConfig)}
    del settings["batch_size"]  # changes no response, and a run that ran out of memory goes on with a smaller one
    return {
        "format": FORMAT,
        "prompts": content_hash(rows),
        "model": engine.fingerprint(),
        "config": settings,
        "scored": scored,
        "key": content_hash(key),
    }


def _records_present(path: Path, header: dict[str, Any], num_prompts: int) -> dict[int, dict[str, Any]]:
    if not path.exists() or b"\n" not in path.read_bytes():
        return {}
    found, records = _read(path)
    for field, wanted in header.items():
        if found.get(field) != wanted:
            what = {"prompts": "another prompt set", "model": "another model", "config": "another configuration"}
            differs = what.get(field, f"another {field!r}")
            raise UserError(f"{path}: holds responses of {differs}; delete it or write to another file")
    stray = [record["prompt_id"] for record in records if not 0 <= record["prompt_id"] < num_prompts]
    if stray:
        raise UserError(f"{path}: prompt_id {stray[0]} is not one of {num_prompts} prompts; delete it and run again")
    return {record["prompt_id"]: record for record in records}


def _read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file of sampled responses; run `reprdpo sample` first")
    lines = list(read_jsonl(path))
    if not lines:
        raise UserError(f"{path}: is empty; run `reprdpo sample` again")
    header = lines[0][1]
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise UserError(f"{path}, line 1: is no header of sampled responses; give a file written by `reprdpo sample`")
    records: dict[int, dict[str, Any]] = {}
    for number, record in lines[1:]:
        if not isinstance(record, dict) or not isinstance(record.get("prompt_id"), int) or not record.get("responses"):
            raise UserError(f"{path}, line {number}: lacks prompt_id or responses; delete the line and run again")
        if record["prompt_id"] in records:
            raise UserError(f"{path}, line {number}: prompt_id {record['prompt_id']} stands twice; delete one of them")
        records[record["prompt_id"]] = record
    return header, [records[number] for number in sorted(records)]


def _drawn(
    engine: Engine, rows: list[dict[str, Any]], present: Collection[int], config: SamplingConfig
) -> Iterator[list[Drawn]]:
    """The missing rows with their responses, about ``batch_size`` responses at a time.

    All rows are sorted by length, the longest first, so that a prompt too long, or memory too small, shows at once.
    """
    by_length = sorted(rows, key=lambda row: (-_length(row["prompt"]), row["prompt_id"]))
    size = config.prompts_per_batch
    if getattr(engine, "independent", False):
        missing = [row for row in by_length if row["prompt_id"] not in present]
        yield from _asked(engine, missing, config, size)
        return
    for start in range(0, len(by_length), size):
        batch = by_length[start : start + size]
        # A resumed run draws a batch as the unbroken one did, and drops what it has.
        if any(row["prompt_id"] not in present for row in batch):
            for drawn in _asked(engine, batch, config, size):
                yield [(row, answers) for row, answers in drawn if row["prompt_id"] not in present]


def _asked(engine: Engine, rows: list[dict[str, Any]], config: SamplingConfig, size: int) -> Iterator[list[Drawn]]:
    """The engine's answers by ``size``; those at hand when it fails come before its error."""
    prompts, ids = [row["prompt"] for row in rows], [row["prompt_id"] for row in rows]
    at_hand: list[Drawn] = []
    answered = engine.generate(prompts, config, prompt_ids=ids)
    try:
        for place, answers in answered:
            at_hand.append((rows[place], answers))
            if len(at_hand) == size:
                yield at_hand
                at_hand = []
    except Exception:
        if at_hand:
            yield at_hand
        raise
    finally:
        if isinstance(answered, Generator):
            answered.close()  # a server's requests end with the one who asked
    if at_hand:
        yield at_hand


def _length(prompt: Prompt) -> int:
    return len(prompt) if isinstance(prompt, str) else sum(len(message["content"]) for message in prompt)


def _scored(drawn: list[Drawn], config: SamplingConfig, score: Score | None) -> list[dict[str, Any]]:
    prompts = [row["prompt"] for row, _ in drawn]
    responses = [answers for _, answers in drawn]
    rewards: list[Sequence[float | None]] = [[None] * len(answers) for answers in responses]
    if score is not None:
        flat = score(
            [prompt for prompt, answers in zip(prompts, responses, strict=True) for _ in answers],
            [answer.text for answers in responses for answer in answers],
        )
        starts = range(0, len(flat), config.num_responses)
        rewards = [[float(reward) for reward in flat[start : start + config.num_responses]] for start in starts]
    return [
        {**row, "responses": [_as_json(*pair) for pair in zip(answers, scores, strict=True)]}
        for (row, answers), scores in zip(drawn, rewards, strict=True)
    ]


def _as_json(response: Response, reward: float | None) -> dict[str, Any]:
    return {"text": response.text, "reward": reward, "truncated": response.truncated}


def _sort_file(path: Path) -> None:
    """Rewrite the lines by prompt id, each as it stands."""
    header, *lines = path.read_bytes().split(b"\n")[:-1]
    by_id = sorted(lines, key=lambda line: json.loads(line)["prompt_id"])
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"".join(line + b"\n" for line in [header, *by_id]))
