"""Files of rows: JSON lines, JSON, CSV, Parquet, folders of them, saved data sets, and data sets of the hub."""

import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from reprdpo.data.schema import PREFERENCES, PROMPTS, RESPONSES, InvalidRowError
from reprdpo.errors import UserError, first_line
from reprdpo.files import looks_local

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
COMPRESSED = (".gz", ".xz")
HUB_OPTIONS = ("name", "data_dir")

_SPLIT_WORDS = {"train": "train", "test": "test"} | dict.fromkeys(("validation", "valid", "dev"), "validation")
_SHARD = re.compile(r"(\w+)-\d{5}-of-\d{5}")
_LFS_POINTER = b"version https://git-lfs"


class Row(NamedTuple):
    """A row as it was found; ``place`` is its line or row number counted from 1, ``value`` perhaps an error."""

    place: str
    value: Any


def read_rows(place: str | Path, split: str = "train", hub: Mapping[str, str] | None = None) -> Iterator[Row]:
    """The rows of a file, of a folder's files of one split, of a saved data set, or of a data set on the hub.

    Args:
        place: a local path, or a name on the hub where nothing here is meant by it.
        split: of a folder, told by the files' or their folders' names (none is "train"), or of a data set.
        hub: further arguments of ``load_dataset``: name, data_dir.

    Raises:
        UserError: nothing there, a file that cannot be read, or no such split.
    """
    path = Path(place).expanduser()
    local = path.is_dir() or _suffix(path) in SUFFIXES or looks_local(place)
    if local and hub:
        raise UserError(f"{place}: is not on the hub, and {', '.join(hub)} means nothing to it; leave it out")
    if path.is_dir():
        return _folder_rows(path, split)
    if not local:
        return _dataset_rows(_open_named(str(place), split, hub or {}))
    if not path.exists():
        raise UserError(f"{place}: no such file; check the path")
    if _suffix(path) not in SUFFIXES:
        raise UserError(f"{place}: '{path.suffix}' is not a kind of file read here; give one of {', '.join(SUFFIXES)}")
    if split != "train":
        raise UserError(f"{place}: is one file and has no split '{split}'; leave the split out")
    return _file_rows(path)


def files_of(place: str | Path, split: str = "train") -> list[Path]:
    """The local files that :func:`read_rows` reads; none where ``place`` is nothing here."""
    path = Path(place).expanduser()
    if not path.is_dir():
        return [path] if path.is_file() else []
    if _is_saved(path):
        part = path / split
        return [file for file in sorted((part if part.is_dir() else path).rglob("*")) if file.is_file()]
    return _by_split(path).get(split, [])


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def _file_rows(path: Path) -> Iterator[Row]:
    return {".parquet": _parquet_rows, ".csv": _csv_rows}.get(_suffix(path), _json_rows)(path)


def _folder_rows(path: Path, split: str) -> Iterator[Row]:
    if _is_saved(path):
        return _dataset_rows(_open_saved(path, split))
    splits = _by_split(path)
    if not splits:
        raise UserError(f"{path}: holds no file to read; expected {', '.join(SUFFIXES)} in it")
    if split not in splits:
        raise UserError(f"{path}: has no split '{split}'; it has {', '.join(sorted(splits))}")
    return (
        Row(f"{file.relative_to(path)}, {row.place}", row.value) for file in splits[split] for row in _file_rows(file)
    )


def _is_saved(folder: Path) -> bool:
    return (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists()


def _by_split(folder: Path) -> dict[str, list[Path]]:
    """The files in a folder, at any depth, that could hold rows, in order."""
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts)
        if file.is_file() and _suffix(file) in SUFFIXES and not hidden and file.name != "dataset_infos.json":
            found.setdefault(_split_of(parts), []).append(file)
    return found


def _split_of(parts: tuple[str, ...]) -> str:
    """The split that a file's path in its folder tells, by its own name first."""
    for part in reversed(parts):
        if shard := _SHARD.match(part):
            return shard[1]
        for word in re.split(r"[\W_]+", part):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
    return "train"


def _open_saved(path: Path, split: str) -> Dataset:
    try:
        saved = load_from_disk(str(path))
    except Exception as error:
        raise UserError(f"{path}: the saved data set cannot be read ({first_line(error)}); save it again") from error
    if not isinstance(saved, DatasetDict):
        return saved
    if split not in saved:
        raise UserError(f"{path}: has no split '{split}'; it has {', '.join(saved)}")
    return saved[split]


def _open_named(name: str, split: str, hub: Mapping[str, str]) -> Dataset:
    # Whatever the hub, the network or a data file can raise ends here as one line.
    try:
        return load_dataset(name, split=split, **hub)
    except Exception as error:
        raise UserError(
            f"{name}: cannot be loaded as a data set, split '{split}' ({first_line(error)}); check both"
        ) from error


def _dataset_rows(dataset: Iterable[Any]) -> Iterator[Row]:
    return (Row(f"row {number}", row) for number, row in enumerate(dataset, start=1))


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with path.open("rb") as head:
            _refuse_pointer(path, head.readline())
        with pq.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            yield from _dataset_rows(rows)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: is not a whole Parquet file ({first_line(error)}); write it again") from error


def _json_rows(path: Path) -> Iterator[Row]:
    """The rows of JSON lines, or of one JSON list, whatever the file is called: a published .jsonl.gz holds a list."""
    lines = ((number, line) for number, line in enumerate(_lines(path), start=1) if line.strip())
    for number, line in lines:
        if line.lstrip().startswith(b"[") and number == 1:
            rows = _parse(line + b"".join(rest for _, rest in lines))
            if isinstance(rows, InvalidRowError):
                raise UserError(f"{path}: {rows}")
            yield from _dataset_rows(rows)
        else:
            yield Row(f"line {number}", _parse(line))


def _csv_rows(path: Path) -> Iterator[Row]:
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
            yield Row(f"line {reader.line_num}", row)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: is not CSV ({error}); quote the field") from error


def _lines(path: Path) -> Iterator[bytes]:
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        if path.suffix in COMPRESSED:
            with path.open("rb") as head:
                _refuse_pointer(path, head.readline())
        with opener(path, "rb") as file:
            for number, line in enumerate(file):
                if number == 0:
                    _refuse_pointer(path, line)
                yield line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
    except (gzip.BadGzipFile, lzma.LZMAError, EOFError, zlib.error) as error:
        kind = "gzip" if path.suffix == ".gz" else "xz"
        raise UserError(f"{path}: is not a whole {kind} file ({error}); fetch it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _refuse_pointer(path: Path, line: bytes) -> None:
    if line.startswith(_LFS_POINTER):
        raise UserError(f"{path}: is a Git LFS pointer, not the data; run `git lfs pull` where it was cloned")


def _parse(content: bytes) -> Any:
    try:
        return json.loads(content.decode())
    except UnicodeDecodeError as error:
        return InvalidRowError(f"is not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8")
    except (ValueError, RecursionError) as error:  # a ValueError too: an integer of thousands of digits
        return InvalidRowError(f"is not JSON ({error}); write one JSON object a line (or a list in a .json file)")
