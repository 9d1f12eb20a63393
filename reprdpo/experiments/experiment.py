"""An experiment: a recipe at a scale, on a model, in a folder of its own beside the pipeline runs it shares."""

import dataclasses
import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

import reprdpo
from reprdpo.errors import UserError
from reprdpo.experiments.config import SANDBOX, RunConfig, build
from reprdpo.experiments.finished_run import FinishedRun
from reprdpo.experiments.pipeline import Say
from reprdpo.experiments.pipeline import run as run_pipeline
from reprdpo.experiments.results import FORMAT, RESULT_FILE, Result
from reprdpo.experiments.run_folder import (
    SETTINGS_FILE,
    checked_settings,
    command_line,
    comparable,
    shared_settings,
    source_commit,
)
from reprdpo.files import content_hash, read_json, write_json

RECIPES = "reprdpo.experiments.recipes"
SECONDS_FILE = "seconds.json"
SCALES = {
    "tiny": "seconds, on the smallest sandbox: shows that it runs, says nothing about the method",
    "small": "minutes on a laptop: the sandbox, or any small model",
    "paper": "the paper's settings, for 7B weights on GPUs",
}


@dataclass(frozen=True)
class Job:
    """What a recipe works with: the pipeline's settings, its own options, and the experiment's folder.

    A recipe calls ``begin`` when it has checked what it was given and starts to work (:meth:`pipeline` does): from then
    on the folder is this experiment's.
    """

    name: str
    scale: str
    config: RunConfig
    options: Any
    folder: Path
    runs: Path
    say: Say
    begin: Callable[[], None] = lambda: None

    def pipeline(self, **changes: Any) -> FinishedRun:
        """Run the pipeline with ``changes`` of the settings (fields of RunConfig).

        Experiments whose settings differ in systems, variants, seeds and evaluation alone share its folder.
        """
        config = dataclasses.replace(self.config, **changes)
        folder = self.runs / content_hash(shared_settings(asdict(config)))[:12]
        return run_pipeline(
            dataclasses.replace(config, output_dir=str(folder)), self.say, more_evaluations=True, begin=self.begin
        )


def experiment_names() -> list[str]:
    """Every recipe there is, in order of name."""
    return sorted(
        entry.name[:-3] for entry in files(RECIPES).iterdir() if entry.name.endswith(".py") and entry.name[0] != "_"
    )


def describe(name: str) -> str:
    """What the experiment ``name`` asks, in a sentence."""
    return str(_recipe(name).QUESTION)


def run_experiment(
    name: str,
    *,
    scale: str = "small",
    output_dir: str | Path = "runs/experiments",
    settings: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    say: Say = print,
) -> Path:
    """Run the experiment ``name``; the same command again goes on where it stopped. Returns the experiment's folder.

    ``settings`` replace the recipe's pipeline settings (RunConfig), ``options`` its own. The result's ``seconds`` are
    those of every start in the folder together.

    Raises:
        UserError: no such experiment or scale, a setting that does not exist or does not fit, a folder that holds
            another experiment.
    """
    recipe, began = _recipe(name), time.perf_counter()
    root = Path(output_dir) / scale
    config, chosen = _configure(name, recipe, scale, root / name, settings or {}, options or {})
    folder = root / name
    held = checked_settings(folder, {"experiment": name, "run": comparable(asdict(config)), "options": asdict(chosen)})

    spent = folder / SECONDS_FILE
    earlier = read_json(spent)["seconds"] if spent.exists() else 0.0

    def begin() -> None:
        write_json(folder / SETTINGS_FILE, held)

    try:
        result: Result = recipe.run(Job(name, scale, config, chosen, folder, root / "runs", say, begin))
        begin()
    finally:
        seconds = earlier + time.perf_counter() - began
        if (folder / SETTINGS_FILE).exists():  # else nothing began, and the folder is not claimed
            write_json(spent, {"seconds": seconds})
    write_json(
        folder / RESULT_FILE,
        {
            "format": FORMAT,
            "name": name,
            "title": recipe.TITLE,
            "question": recipe.QUESTION,
            "command": command_line(),
            "commit": source_commit(),
            "version": reprdpo.__version__,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": config.model,
            "scale": scale,
            "seeds": list(config.seeds),
            "seconds": seconds,
            **result.to_json(),
        },
    )
    return folder


def _configure(
    name: str, recipe: Any, scale: str, folder: Path, settings: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[RunConfig, Any]:
    if scale not in SCALES:
        raise UserError(f"scale {scale!r}: there is none of this name; give one of {', '.join(SCALES)}")
    own = _read(f"{name}.yaml")
    at_scale = own.get("scales", {}).get(scale, {})
    base = _read(f"scales/{scale}.yaml")
    for_others = base.pop("other_models", {})
    if settings.get("model", SANDBOX) != SANDBOX:
        base = merge(base, for_others)
    elif scale == "paper":
        raise UserError("model: missing; the scale 'paper' is for weights of your own (--model, --preferences)")
    layers: Sequence[Mapping[str, Any]] = (own.get("run", {}), at_scale.get("run", {}), settings)
    for layer in layers:
        base = merge(base, layer)
    config = build(RunConfig, base | {"output_dir": str(folder)})
    return config, build(
        recipe.Options, merge(merge(own.get("options", {}), at_scale.get("options", {})), options), "options"
    )


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``below`` with the keys of ``above`` over it, section by section."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def _recipe(name: str) -> Any:
    if name not in experiment_names():
        raise UserError(f"experiment {name!r}: there is none of this name; there are {', '.join(experiment_names())}")
    return importlib.import_module(f"{RECIPES}.{name}")


def _read(name: str) -> dict[str, Any]:
    return yaml.safe_load((files(RECIPES) / name).read_text(encoding="utf-8")) or {}
