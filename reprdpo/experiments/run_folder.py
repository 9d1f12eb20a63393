"""A run's folder: which configuration it holds, which stages are done, and who is working in it.

Systems, variants and seeds may be added to a folder, as none of them changes what the others are; and, where the caller
allows it, evaluations, each under settings of its own.
"""

import fcntl
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

import reprdpo
from reprdpo import costs
from reprdpo.data import local_files
from reprdpo.errors import UserError
from reprdpo.experiments.config import RunConfig
from reprdpo.files import check_writable, content_hash, disk_errors, read_json, write_json

FORMAT = 1
SETTINGS_FILE = "settings.json"
# The settings that are sources of data.
_DATA = ("preferences", "prompts", "prompt_sets", "borderline_prompts", "benign_text", "pairs")


class RunFolder:
    """The folder of one run. A stage that is done is not done again; another run's folder is refused.

    A new one is made with the first stage, so that a configuration that is refused leaves nothing behind.

    ``evaluation`` names the folder in it where answers are judged under the configuration's evaluate section: the first
    one's is "evaluation"; with ``more_evaluations`` others get one of their own, without it they are refused.
    """

    def __init__(self, config: RunConfig, *, more_evaluations: bool = False) -> None:
        self.path = Path(config.output_dir)
        self._config = asdict(config)
        check_writable(self.path)
        self._lock: TextIO | None = None
        if self._file.exists():
            self._take_lock()
        try:
            self.state = self._open()
            self.evaluation = self._open_evaluation(more_evaluations)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let others work in the folder."""
        if self._lock is not None:
            self._lock.close()

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def _file(self) -> Path:
        return self.path / "run.json"

    def done(self, stage: str) -> bool:
        return self.state["stages"].get(stage, {}).get("status") == "done"

    def forget(self, stage: str) -> None:
        """Have a stage done again, what it read having changed."""
        self.state["stages"].pop(stage, None)

    def stage(self, name: str, work: Callable[[], None], say: Callable[[str], None]) -> None:
        """Do ``work`` unless it is done; record what it cost, over every start it needed."""
        if self.done(name):
            say(f"{name}: done before")
            return
        self._claim()
        say(f"{name} ...")
        before, status = self.state["stages"].get(name, {}), "stopped"
        try:
            with costs.stage() as cost:
                work()
            status = "done"
        finally:
            self.state["stages"][name] = {"status": status, **cost.to_json(before)}
            self._save()
        say(f"{name}: done in {self.state['stages'][name]['seconds']:.1f} s")

    def _open(self) -> dict[str, Any]:
        inputs = _input_hashes(_without_evaluation(self._config))
        if self._file.exists():
            state = read_json(self._file)
            _refuse_other_reference(self.path, state.get("config", {}), self._config)
            _refuse_other(self.path, shared_settings(state.get("config", {})), shared_settings(self._config))
            _refuse_other(self.path, state.get("inputs", {}), inputs)
            state["config"] = self._union(state["config"])
            return state | {"config_hash": content_hash(comparable(state["config"]))}
        with disk_errors(self.path):
            found = self.path.iterdir() if self.path.exists() else ()
            others = [entry.name for entry in found if entry.name != ".lock"]
        if others:
            raise UserError(
                f"{self.path}: is not a run's folder and not empty ({others[0]}); choose another output_dir"
            )
        return {
            "format": FORMAT,
            "name": self.path.resolve().name,
            "config": self._config,
            "config_hash": content_hash(comparable(self._config)),
            "inputs": inputs,
            "versions": _versions(),
            "commit": source_commit(),
            "command": command_line(),
            "stages": {},
            "evaluations": {},
        }

    def _union(self, old: dict[str, Any]) -> dict[str, Any]:
        """The configuration begun with, and the systems, variants and seeds that are added now."""
        variants = old.get("variants", {})
        for name in variants.keys() & self._config["variants"].keys():
            if content_hash(variants[name]) != content_hash(self._config["variants"][name]):
                difference = _first_difference(variants[name], self._config["variants"][name], f"variants.{name}")
                raise UserError(f"{self.path}: {difference}; give the variant another name")
        added = {key: list(dict.fromkeys([*old[key], *self._config[key]])) for key in ("systems", "seeds")}
        return old | added | {"variants": variants | self._config["variants"]}

    def _open_evaluation(self, more: bool) -> str:
        found = self.state.setdefault("evaluations", {})
        section = self._config["evaluate"]
        wanted = {"settings": comparable(section), "inputs": _input_hashes(section)}
        for name, settings in found.items():
            if content_hash(settings) == content_hash(wanted):
                return str(name)
        if found and not more:
            first = next(iter(found.values()))
            _refuse_other(self.path, {"evaluate": first["settings"]}, {"evaluate": wanted["settings"]})
            _refuse_other(self.path, first["inputs"], wanted["inputs"])
        name = f"evaluation-{len(found) + 1}" if found else "evaluation"
        found[name] = wanted
        return name

    def _claim(self) -> None:
        """Make the folder this run's; refused where another process did so meanwhile."""
        if self._lock is None:
            with disk_errors(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            if self._file.exists():
                raise UserError(f"{self.path}: another process began a run in this folder; run this again")
        self._save()

    def _save(self) -> None:
        write_json(self._file, self.state)

    def _take_lock(self) -> None:
        with disk_errors(self.path):
            handle = (self.path / ".lock").open("w")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.close()
            raise UserError(f"{self.path}: another process is working in this folder; wait for it or stop it") from None
        self._lock = handle


def row_dir(run: Path, name: str, seed: int = 0) -> Path:
    """Where the training of a run's row lies."""
    return run / "systems" / name / f"seed-{seed}"


def shared_settings(config: dict[str, Any]) -> dict[str, Any]:
    """What every system of a run has in common, and runs that share a folder with it."""
    added = ("systems", "variants", "seeds", "evaluate")
    reference = "sft" if "sft" in config["systems"] else "base"
    return {key: value for key, value in comparable(config).items() if key not in added} | {"reference": reference}


def checked_settings(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """``settings`` with the hashes of the files they name; refused where ``folder`` was begun with others.

    The caller writes them to ``folder``/settings.json once work can start.
    """
    inputs = {"inputs": _input_hashes(settings)}
    if (folder / SETTINGS_FILE).exists():
        held = read_json(folder / SETTINGS_FILE)
        there = {"inputs": held.pop("inputs", {})}
        _refuse_other(folder, held, settings)  # first, as it says more than a file's hash does
        _refuse_other(folder, there, inputs)
    return settings | inputs


def _refuse_other_reference(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    there, here = ("sft" in config["systems"] for config in (old, new))
    if there != here:
        raise UserError(
            f"{folder}: 'sft' is {'one' if there else 'none'} of its systems, here it is {'one' if here else 'none'}; "
            "all others start from it and are measured against it, so it can be neither added nor left out: choose "
            "another folder"
        )


def _refuse_other(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    if content_hash(old) != content_hash(new):
        raise UserError(
            f"{folder}: holds another run ({_first_difference(old, new)}); choose another folder, or delete this one"
        )


def _without_evaluation(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "evaluate"}


def _input_hashes(config: dict[str, Any], *, data: bool = False) -> dict[str, str]:
    """The content hash of every file the configuration names, so that a run never goes on with other data.

    Of folders, those under the names of _DATA, or of all where the mapping is of ``data``: others are models'.
    """
    found: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= _input_hashes(value, data=key in _DATA)
        elif isinstance(value, str):
            files = local_files(value, folders=data or key in _DATA)
            found |= {str(file): content_hash(file) for file in files}
    return found


def comparable(config: Any) -> Any:
    """What must be the same for a run to go on: all but places, and how generation is batched and requested."""
    if not isinstance(config, dict):
        return config
    requests = ("base_url", "concurrency", "request_timeout", "request_retries", "api_key_env")
    free = ("output_dir", "cache_dir", "batch_size", *requests)
    return {key: comparable(value) for key, value in config.items() if key not in free}


def _first_difference(old: Any, new: Any, where: str = "") -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            if _plain(old.get(key)) != _plain(new.get(key)):
                return _first_difference(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    return f"{where} is {_plain(old)!r} there, {_plain(new)!r} here"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def command_line() -> str:
    """The command this process was started with, wherever the program lies."""
    name = Path(sys.argv[0]).name
    return shlex.join(["reprdpo" if name == "__main__.py" else name, *sys.argv[1:]])


def source_commit() -> str | None:
    """The commit of the source tree this runs from, "+" behind it where files were changed; None where it is none."""
    own = Path(reprdpo.__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(own.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", own.name)  # an installed package may lie within somebody else's tree
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _versions() -> dict[str, str]:
    found = {"reprdpo": reprdpo.__version__, "python": platform.python_version(), "cores": str(os.cpu_count())}
    for package in ("torch", "triton", "transformers", "datasets", "accelerate"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
