"""Files are whole or absent, whatever interrupts the writing."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from reprdpo.errors import UserError
from reprdpo.files import (
    JsonlWriter,
    atomic_path,
    check_writable,
    content_hash,
    disk_errors,
    finite,
    looks_local,
    read_json,
    read_jsonl,
    unmade_on_error,
    write_json,
    write_jsonl,
    write_text,
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.json"
    write_json(path, {"é": [1.5, float("nan"), (float("-inf"), None)]})
    assert read_json(path) == {"é": [1.5, None, [None, None]]}
    assert [found.name for found in path.parent.iterdir()] == ["a.json"]
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask, "readable by whom the umask says, not by the owner alone"


def test_lines_written_are_read_and_numbers_that_json_lacks_are_null(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ({"é": value} for value in (1, float("nan"))))
    assert (tmp_path / "a.jsonl").read_text(encoding="utf-8") == '{"é": 1}\n{"é": null}\n'
    assert list(read_jsonl(tmp_path / "a.jsonl")) == [(1, {"é": 1}), (2, {"é": None})]
    write_jsonl(tmp_path / "a.jsonl", [])
    assert list(read_jsonl(tmp_path / "a.jsonl")) == []


def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def interrupted() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_where_nothing_can_be_written_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    check_writable(tmp_path / "new" / "folder")
    for place in ("file", "file/folder", "nowhere"):
        with pytest.raises(UserError, match=f"{place}: another file or folder is in its way"):
            check_writable(tmp_path / place)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(UserError, match=r"folder: cannot be written \(Permission denied\); choose another folder"):
        check_writable(tmp_path / "new" / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "nowhere"]


def test_folders_made_for_nothing_are_taken_away(tmp_path: Path) -> None:
    def fail(folder: Path, *, write: bool) -> None:
        with unmade_on_error(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if write:
                (folder / "kept.txt").touch()
            raise KeyboardInterrupt

    (tmp_path / "there").mkdir()
    for name, write in (("there/new/folder", False), ("there", False), ("written/folder", True)):
        with pytest.raises(KeyboardInterrupt):
            fail(tmp_path / name, write=write)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "there",
        "written",
        "written/folder",
        "written/folder/kept.txt",
    ]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    path = tmp_path / "a.json"
    write_json(path, "old")

    def full(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=rf"^{path}: the disk is full; free some"):
        write_json(path, "new")
    assert read_json(path) == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_under_a_line_writer(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "a.jsonl")
    writer.write({"kept": 1})
    writer._file.close()
    writer._file = open("/dev/full", "a", encoding="utf-8")  # noqa: SIM115
    with pytest.raises(UserError, match=r"a\.jsonl: the disk is full"):
        writer.write({"lost": 2})
    with pytest.raises(UserError, match="the disk is full"):
        writer.close()
    assert list(read_jsonl(tmp_path / "a.jsonl")) == [(1, {"kept": 1})]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="another file or folder is in its way"):
        write_text(tmp_path / "file" / "a.txt", "x")
    with pytest.raises(UserError, match="another file or folder is in its way"):
        write_text(tmp_path, "x")
    with pytest.raises(UserError, match="another file or folder is in its way"):
        JsonlWriter(tmp_path)
    denied = PermissionError(errno.EACCES, "Permission denied")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.mkstemp", lambda **_: (_ for _ in ()).throw(denied))
        with pytest.raises(UserError, match="cannot be written"):
            write_text(tmp_path / "b.txt", "x")


def test_reading_what_is_not_there_or_not_json(tmp_path: Path) -> None:
    for read in (read_json, lambda path: list(read_jsonl(path)), content_hash):
        with pytest.raises(UserError, match=r"nothing: cannot be read \(No such file"):
            read(tmp_path / "nothing")
    (tmp_path / "a").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        read_json(tmp_path / "a")
    (tmp_path / "b").write_text("1\nx\n")
    with pytest.raises(UserError, match="b, line 2: is not JSON"):
        list(read_jsonl(tmp_path / "b"))


@pytest.mark.parametrize("torn", [b"", b'{"n": 2', b"\xc3", b"x" * 70_000, b"x" * 65_536])
@pytest.mark.parametrize("whole", [b"", b'{"n": 1}\n', b'"' + b"y" * 65_533 + b'"\n', b'{"n": 1}\n' * 30_000])
def test_a_torn_last_line_is_passed_over_and_cut(tmp_path: Path, whole: bytes, torn: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(whole + torn)
    assert len(list(read_jsonl(path))) == whole.count(b"\n")
    with JsonlWriter(path) as writer:
        assert path.read_bytes() == whole
        writer.write({"n": float("nan")})
        assert path.read_bytes() == whole + b'{"n": null}\n', "handed to the system before the file is closed"
    JsonlWriter(path).close()
    assert path.read_bytes() == whole + b'{"n": null}\n'


def test_finite_reaches_every_depth_and_keeps_the_rest() -> None:
    inf = float("inf")
    assert finite({"a": [1, (inf, "inf")], "b": {"c": -inf, "d": True}}) == {
        "a": [1, [None, "inf"]],
        "b": {"c": None, "d": True},
    }


def test_content_hash_is_of_content(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"abc")
    other.write_bytes(b"abc")
    assert content_hash(one) == content_hash(other)
    assert content_hash({"a": 1, "b": 2}) == content_hash(json.loads('{"b": 2, "a": 1}'))
    other.write_bytes(b"abd")
    assert len({content_hash(one), content_hash(other), content_hash("abc"), content_hash("ab", "c")}) == 4
    assert content_hash(1, 23) != content_hash(12, 3)


def test_hub_names_and_local_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert all(map(looks_local, ["runs", "runs/model", "./x", "../x", "/x", "~/x", "a/b/c", Path("owner/name")]))
    assert not any(map(looks_local, ["gpt2", "owner/name"]))


@pytest.mark.parametrize(("free", "kind"), [(0, UserError), (2**30, RuntimeError)])
def test_a_writer_of_another_language_on_a_full_disk(
    free: int, kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(kind), disk_errors(tmp_path / "not" / "there"):
        raise RuntimeError("unexpected pos 64 vs 0")
