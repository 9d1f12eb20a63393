"""Files that are whole or absent: atomic writes, JSON and JSON lines, content hashes."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

from reprdpo.errors import UserError


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a forbidden place or a file in a folder's stead into a :class:`UserError` naming ``path``."""
    full = f"{path}: the disk is full; free some and run this again"
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(full) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise UserError(f"{path}: cannot be written ({error.strerror}); choose another folder") from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            raise UserError(f"{path}: another file or folder is in its way ({error.strerror}); move one") from error
        raise
    except Exception as error:
        # Writers in Rust and C++ raise kinds of their own: SafetensorError, RuntimeError.
        if not isinstance(error, UserError) and _disk_is_full(path):
            raise UserError(full) from error
        raise


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; rename it into place when the block ends well."""
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
    temporary = Path(name)
    try:
        with disk_errors(path):
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(folder: str | Path) -> None:
    """Refuse, before work is begun for it, a folder that cannot be made or written to; nothing is made.

    Raises:
        UserError: a file is in its way, or it or the nearest folder above may not be written to.
    """
    folder = Path(folder)
    with disk_errors(folder):
        nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
        if not nearest.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@contextlib.contextmanager
def unmade_on_error(folder: str | Path) -> Iterator[None]:
    """Where the block fails, take away those of ``folder`` and its parents that it made and left empty."""
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically; NaN and infinities become null."""
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file; :class:`UserError` where it is missing or is not JSON."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not JSON ({error}); delete it and run the command that made it again") from None


def json_line(value: Any) -> str:
    """``value`` as a line of JSON; NaN and infinities become null."""
    return json.dumps(finite(value), ensure_ascii=False, allow_nan=False) + "\n"


def write_jsonl(path: str | Path, values: Iterable[Any]) -> None:
    """Write each as :func:`json_line`, atomically."""
    write_text(path, "".join(map(json_line, values)))


def read_jsonl(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Yield ``(line number, value)`` from a file of our own writing; a torn last line is passed over."""
    path = Path(path)
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    with file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield number, json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise UserError(f"{path}, line {number}: is not JSON ({error}); delete it and run again") from None


class JsonlWriter:
    """Append JSON lines, each one handed to the system at once; a torn last line left by a killed run is cut first."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                _cut_torn_line(self.path)
            self._file = self.path.open("a", encoding="utf-8")

    def write(self, value: Any) -> None:
        with disk_errors(self.path):
            self._file.write(json_line(value))
            self._file.flush()

    def close(self) -> None:
        with disk_errors(self.path):
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def looks_local(place: str | Path) -> bool:
    """Whether ``place`` is meant as a path here; a hub name is ``name`` or ``owner/name`` with no folder ``owner``."""
    path = Path(place).expanduser()
    return (
        isinstance(place, Path)
        or place.startswith((".", "/", "~"))
        or place.count("/") > 1
        or path.exists()
        or (path.parent != Path() and path.parent.exists())
    )


def finite(value: Any) -> Any:
    """``value`` with every NaN and infinity, at any depth, replaced by None."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def content_hash(*values: Any) -> str:
    """A short stable hash of JSON-able values and of files, given as :class:`~pathlib.Path`, by their content."""
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, Path):
            try:
                with value.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise UserError(f"{value}: cannot be read ({error.strerror})") from None
        else:
            digest.update(json.dumps(value, sort_keys=True, default=str).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def _cut_torn_line(path: Path) -> None:
    """Cut what follows the last newline, reading backwards by blocks."""
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        position = end
        while position:
            start = max(0, position - 65536)
            file.seek(start)
            newline = file.read(position - start).rfind(b"\n")
            if newline >= 0:
                position = start + newline + 1
                break
            position = start
        if position != end:
            file.truncate(position)


def _disk_is_full(path: Path) -> bool:
    folder = next(parent for parent in (path, *path.resolve().parents) if parent.is_dir())
    return shutil.disk_usage(folder).free < 2**20


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
