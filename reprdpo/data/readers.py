"""Readers: JSON lines, JSON, CSV, Parquet, saved folders and hub data sets, all checked against the schema."""

import csv
import gzip
import io
import json
import logging
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from tqdm import tqdm

from reprdpo.data.schema import PREFERENCES, PROMPTS, RESPONSES, InvalidRowError, Kind, Schema, kind_of, normalise_row
from reprdpo.errors import UserError
from reprdpo.files import looks_local

logger = logging.getLogger(__name__)

_FILES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")


class _Row(NamedTuple):
    """A row as it was found; ``place`` is its line or row number counted from 1, ``value`` perhaps an error."""

    place: str
    value: Any


def load_preferences(
    source: str | Path,
    *,
    split: str = "train",
    limit: int | None = None,
    require_safe_labels: bool = False,
    skip_invalid: bool = False,
) -> Dataset:
    """Read preference pairs: columns prompt, chosen, rejected, chosen_is_safe, rejected_is_safe, category, source.

    Args:
        source: a ``.jsonl``, ``.json``, ``.csv`` (each perhaps ``.gz``) or ``.parquet`` file, a folder written by
            ``save_to_disk`` or holding data files, or a data set's name on the hub.
        split: the split of a folder or hub data set; a file has none but ``"train"``.
        limit: read no more than the first ``limit`` rows.
        require_safe_labels: refuse rows without ``chosen_is_safe`` and ``rejected_is_safe``.
        skip_invalid: drop invalid rows, logging how many, where they would be refused.

    Raises:
        UserError: nothing to read, or an invalid row; names the first such line or row (from 1) and how many there are.
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

    Sources and errors are those of :func:`load_preferences`.
    """
    return _load(source, RESPONSES, split, limit, skip_invalid)


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
    columns: dict[str, list[Any]] = {name: [] for name in (*schema.texts, *schema.labels)}
    kind: Kind | None = None
    bad: list[str] = []
    total = 0
    rows = tqdm(_rows(source, split), desc=f"Reading {source}", unit=" rows", delay=2)
    for total, row in enumerate(rows, start=1):
        try:
            if isinstance(row.value, InvalidRowError):
                raise row.value
            checked = normalise_row(row.value, schema, required_labels=required_labels)
            came = kind_of(checked["prompt"])
            if kind is not None and came != kind:
                raise InvalidRowError(f"is {came} where the rows before are {kind}; keep one kind in one file")
        except InvalidRowError as error:
            bad.append(f"{row.place}: {error}")
        else:
            kind = came
            for name, values in columns.items():
                values.append(checked[name])
        if total == limit:
            break
    if not total:
        raise UserError(f"{source}: is empty; expected rows with {', '.join(schema.texts)}")
    if bad and not skip_invalid:
        raise UserError(f"{source}, {bad[0]} ({len(bad)} bad of {total}; skip_invalid leaves bad ones out)")
    if kind is None:
        raise UserError(f"{source}: none of {total} rows is a valid {schema.name}; the first is {bad[0]}")
    if bad:
        logger.warning("%s: left out %d invalid of %d rows; the first is %s", source, len(bad), total, bad[0])
    return Dataset.from_dict(columns, features=schema.features(kind))


def _rows(source: str | Path, split: str) -> Iterator[_Row]:
    path = Path(source).expanduser()
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if path.is_dir():
        return _dataset_rows(_open_folder(path, split))
    if suffix not in _FILES and not looks_local(source):
        return _dataset_rows(_open_named(str(source), split))
    if not path.exists():
        raise UserError(f"{source}: no such file; check the path")
    if suffix not in _FILES:
        raise UserError(f"{source}: '{path.suffix}' is not a kind of file read here; give one of {', '.join(_FILES)}")
    if split != "train":
        raise UserError(f"{source}: is one file and has no split '{split}'; leave the split out")
    return {".parquet": _parquet_rows, ".csv": _csv_rows, ".json": _json_rows}.get(suffix, _jsonl_rows)(path)


def _open_folder(path: Path, split: str) -> Dataset:
    if not (path / "dataset_info.json").exists() and not (path / "dataset_dict.json").exists():
        return _open_named(str(path), split)
    try:
        saved = load_from_disk(str(path))
    except Exception as error:
        raise UserError(f"{path}: the saved data set cannot be read ({_first_line(error)}); save it again") from error
    if not isinstance(saved, DatasetDict):
        return saved
    if split not in saved:
        raise UserError(f"{path}: has no split '{split}'; it has {', '.join(saved)}")
    return saved[split]


def _open_named(name: str, split: str) -> Dataset:
    # Whatever the hub, the network or a data file can raise ends here as one line.
    try:
        return load_dataset(name, split=split)
    except Exception as error:
        raise UserError(
            f"{name}: cannot be loaded as a data set, split '{split}' ({_first_line(error)}); check both"
        ) from error


def _dataset_rows(dataset: Iterable[Any]) -> Iterator[_Row]:
    return (_Row(f"row {number}", row) for number, row in enumerate(dataset, start=1))


def _parquet_rows(path: Path) -> Iterator[_Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            yield from _dataset_rows(rows)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: is not a whole Parquet file ({_first_line(error)}); write it again") from error


def _jsonl_rows(path: Path) -> Iterator[_Row]:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            yield _Row(f"line {number}", _parse(line))


def _json_rows(path: Path) -> Iterator[_Row]:
    content = b"".join(_lines(path))
    if not content.lstrip().startswith(b"["):
        yield from _jsonl_rows(path)
        return
    rows = _parse(content)
    if isinstance(rows, InvalidRowError):
        raise UserError(f"{path}: {rows}")
    yield from _dataset_rows(rows)


def _csv_rows(path: Path) -> Iterator[_Row]:
    try:
        text = b"".join(_lines(path)).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
    booleans = {"true": True, "false": False}
    labels = PREFERENCES.labels | PROMPTS.labels | RESPONSES.labels
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for cells in reader:
            row: dict[str, Any] = {name: cell or None for name, cell in cells.items()}
            for name in labels:
                if labels[name] is bool and row.get(name):
                    row[name] = booleans.get(row[name].lower(), row[name])
            yield _Row(f"line {reader.line_num}", row)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: is not CSV ({error}); quote the field") from error


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file):
                yield line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: is not a whole gzip file ({error}); fetch it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _parse(content: bytes) -> Any:
    try:
        return json.loads(content.decode())
    except UnicodeDecodeError as error:
        return InvalidRowError(f"is not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8")
    except (json.JSONDecodeError, RecursionError) as error:
        return InvalidRowError(f"is not JSON ({error}); write one JSON object a line (or a list in a .json file)")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
