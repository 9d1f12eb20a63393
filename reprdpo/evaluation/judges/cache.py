"""Judging with a memory: what a judge has said of a text is kept in a file and not asked again."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from reprdpo.data import Text as Prompt
from reprdpo.errors import UserError
from reprdpo.evaluation.judges.judgement import Judge, Judgement, ModelJudge, paired
from reprdpo.files import JsonlWriter, content_hash, read_jsonl

FORMAT = "reprdpo-judgements-1"


def judge_responses(
    judge: Judge | ModelJudge,
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    *,
    cache_dir: str | Path | None = None,
) -> list[Judgement]:
    """One judgement a response, in order; everything that judges responses goes through here.

    A judge that costs (:class:`ModelJudge`) is asked once about equal texts, and where ``cache_dir`` is given, every
    judgement is a line in ``cache_dir/NAME-FINGERPRINT.jsonl`` as soon as it is made: a run that was killed goes on
    from there. The file belongs to one judge's content, so another model, prompt or setting writes another file.

    Raises:
        UserError: unequal lengths, what the judge itself raises, or a cache file that holds something else.
    """
    if not isinstance(judge, ModelJudge):
        return judge.judge(prompts, responses)
    pairs = paired(prompts, responses)
    keys = [content_hash(prompt, response) for prompt, response in pairs]
    path = None if cache_dir is None else Path(cache_dir) / f"{_slug(judge.name)}-{judge.fingerprint()}.jsonl"
    known = {} if path is None else _read(path)
    missing = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in known}
    if missing:
        _ask(judge, missing, known, path)
    return [known[key] for key in keys]


def _ask(
    judge: ModelJudge,
    missing: dict[str, tuple[Prompt, str]],
    known: dict[str, Judgement],
    path: Path | None,
) -> None:
    """Add the judgement of every missing text to ``known``, and to the file as it comes."""
    names = list(missing)
    writer = None if path is None else JsonlWriter(path)
    try:
        if writer is not None and not writer.path.stat().st_size:
            writer.write({"format": FORMAT, "judge": judge.name, "fingerprint": judge.fingerprint()})
        judged = judge.stream(*map(list, zip(*missing.values(), strict=True)))
        for place, judgement in tqdm(judged, desc=judge.name, total=len(names), unit=" responses", delay=2):
            known[names[place]] = judgement
            if writer is not None:
                writer.write({"key": names[place], **dataclasses.asdict(judgement)})
    finally:
        if writer is not None:
            writer.close()


def _read(path: Path) -> dict[str, Judgement]:
    if not path.exists():
        return {}
    lines = list(read_jsonl(path))
    if lines and (not isinstance(lines[0][1], dict) or lines[0][1].get("format") != FORMAT):
        raise UserError(f"{path}, line 1: is no header of judgements; delete the file, it is written anew")
    known: dict[str, Judgement] = {}
    for number, value in lines[1:]:
        fields: dict[str, Any] = dict(value) if isinstance(value, dict) else {}
        try:
            key = fields.pop("key")
            known[key] = Judgement(**fields)
        except (KeyError, TypeError):
            raise UserError(f"{path}, line {number}: is no judgement; delete the line and run again") from None
    return known


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")
