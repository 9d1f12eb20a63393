"""Readers: preferences, prompts and responses from any source, every row checked against the schema."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm import tqdm

from reprdpo.data.adapters import FALLBACK, get_adapter, recognise
from reprdpo.data.row_files import HUB_OPTIONS, Row, files_of, read_rows
from reprdpo.data.row_table import RowTable
from reprdpo.data.schema import PREFERENCES, PROMPTS, RESPONSES, Schema
from reprdpo.data.sources import Source, parse_source
from reprdpo.errors import UserError


def load_preferences(
    source: str | Path,
    *,
    split: str = "train",
    limit: int | None = None,
    require_safe_labels: bool = False,
    skip_invalid: bool = False,
) -> Dataset:
    """Read preference pairs: columns prompt, chosen, rejected, chosen_is_safe, rejected_is_safe, category, source.

    After these come the columns that the adapter carries. A row without a source of its own has its adapter's name.

    Args:
        source: ``[ADAPTER:]PLACE[?option=value&...]``. The place is a ``.jsonl``, ``.json``, ``.csv`` (each perhaps
            ``.gz`` or ``.xz``) or ``.parquet`` file, a folder of them or written by ``save_to_disk``, or a data set's
            name on the hub. Without an adapter the first row's columns tell it; docs/datasets.md has them all.
        split: the split of a folder or hub data set; a file has none but ``"train"``.
        limit: read no more than ``limit`` rows, those an option drops not counted.
        require_safe_labels: refuse rows without ``chosen_is_safe`` and ``rejected_is_safe``.
        skip_invalid: drop invalid rows, logging how many, where they would be refused.

    Raises:
        UserError: nothing to read, an unknown adapter or option, or an invalid row; names the first such line or row
            (from 1) and how many there are.
    """
    required = ("chosen_is_safe", "rejected_is_safe") if require_safe_labels else ()
    return _load(source, PREFERENCES, split, limit, skip_invalid, required)


def load_prompts(
    source: str | Path, *, split: str = "train", limit: int | None = None, skip_invalid: bool = False
) -> Dataset:
    """Read prompts: columns prompt, category, harmful, source. Sources and errors are those of `load_preferences`."""
    return _load(source, PROMPTS, split, limit, skip_invalid)


def load_responses(
    source: str | Path, *, split: str = "train", limit: int | None = None, skip_invalid: bool = False
) -> Dataset:
    """Read prompts with one response each (to fine-tune on, to score): columns prompt, response, category, source.

    Of a pair it is the chosen one. Sources and errors are those of :func:`load_preferences`.
    """
    return _load(source, RESPONSES, split, limit, skip_invalid)


def kinds_of(source: str | Path) -> tuple[str, ...]:
    """What a source gives, told by its first row: "preference", "response", "prompt", the fullest first.

    Raises:
        UserError: nothing to read, or an unknown adapter.
    """
    asked = parse_source(source)
    row: dict[str, Any] = next((row.value for row in _source_rows(asked, "train") if isinstance(row.value, dict)), {})
    adapter = get_adapter(asked.adapter, asked.written) if asked.adapter else recognise(row)
    if adapter is not FALLBACK:
        return adapter.reads
    has = {"preference": "chosen" in row, "response": "response" in row or "completion" in row, "prompt": True}
    return tuple(kind for kind, held in has.items() if held)


def local_files(written: str, *, folders: bool = True) -> list[Path]:
    """The files here that a source reads; none where ``written`` is no source.

    Without ``folders`` one counts only where an adapter or an option says that it is one of data.
    """
    try:
        source = parse_source(written)
    except UserError:
        return []
    if not (folders or source.adapter or source.options) and Path(source.place).expanduser().is_dir():
        return []
    return files_of(source.place, source.options.get("split", "train"))


def _source_rows(asked: Source, split: str) -> Iterator[Row]:
    hub = {name: asked.options[name] for name in HUB_OPTIONS if name in asked.options}
    return read_rows(asked.place, asked.options.get("split", split), hub)


def _load(
    source: str | Path,
    schema: Schema,
    split: str,
    limit: int | None,
    skip_invalid: bool,
    required_labels: tuple[str, ...] = (),
) -> Dataset:
    if limit is not None and limit < 1:
        raise UserError(f"{source}: limit is {limit}; ask for at least 1 row, or for none to be left out")
    asked = parse_source(source)
    table = RowTable(asked, schema, required_labels)
    for row in tqdm(_source_rows(asked, split), desc=f"Reading {source}", unit=" rows", delay=2):
        table.add(row)
        if table.total == limit:
            break
    return table.finish(skip_invalid or table.skip_invalid)
