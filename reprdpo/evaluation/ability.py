"""General ability: multiple-choice tasks (MMLU) through lm-evaluation-harness, each question's outcome kept."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reprdpo.errors import UserError
from reprdpo.models import evaluating

_METRIC = "acc"


@dataclass(frozen=True)
class AbilityConfig:
    """What is asked. Without ``folder`` the tasks are the harness' own, of any name it knows ("mmlu" is a group)."""

    tasks: tuple[str, ...] = field(default=("mmlu",), metadata={"help": "tasks of lm-evaluation-harness"})
    folder: str | None = field(default=None, metadata={"help": "folder of task files, searched instead of its own"})
    num_fewshot: int | None = field(default=None, metadata={"help": "worked examples (default: the task's own)"})
    limit: int | None = field(default=None, metadata={"help": "questions a task (default: all)"})
    batch_size: int = field(default=8, metadata={"help": "sequences a forward"})
    network: bool = field(default=False, metadata={"help": "may fetch the tasks' data"})


def load_tasks(config: AbilityConfig) -> dict[str, Any]:
    """The harness' task objects by name, groups resolved; a way to find every mistake before a model is loaded.

    Raises:
        UserError: lm-eval is not installed, no such task, a task file that cannot be used, or data that is not here.
    """
    harness = _harness()
    manager = harness.tasks.TaskManager(include_path=config.folder, include_defaults=config.folder is None)
    if config.folder is not None and not manager.all_tasks:
        raise UserError(f"{config.folder}: holds no task of lm-evaluation-harness; give a folder with task .yaml files")
    for name in config.tasks:
        if name not in manager.all_tasks:
            place = config.folder or "lm-evaluation-harness"
            raise UserError(f"task {name!r}: {place} has none of this name; `lm-eval ls tasks` lists its own")
    try:
        with _network(config.network):
            loaded = manager.load(list(config.tasks))["tasks"]
    except Exception as error:  # whatever the hub, the data's reader or the task's file raises
        cure = "" if config.network else "; set network=true once, or give a folder of tasks over local data"
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"tasks {', '.join(config.tasks)}: cannot be loaded ({reason[:300]}){cure}") from error
    for task in loaded.values():
        shots = task.get_config("num_fewshot") or 0
        task.set_config(key="num_fewshot", value=shots if config.num_fewshot is None else config.num_fewshot)
        task.set_fewshot_seed(seed=harness.defaults.DEFAULT_OTHER_SEED)
    return dict(sorted(loaded.items()))


def ability(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: AbilityConfig,
    tasks: Mapping[str, Any] | None = None,
) -> dict[str, list[bool]]:
    """Whether ``model`` answers each question right, by task and in the order of its questions.

    The harness asks and scores (the likeliest of the choices, its ``acc``); the model's training mode stays as it was.

    Args:
        model: a causal LM.
        tokenizer: its tokenizer.
        config: what is asked.
        tasks: what :func:`load_tasks` gave for ``config`` (default: loaded here).

    Raises:
        UserError: as :func:`load_tasks`, or a task that has no right and wrong answers.
    """
    harness, tasks = _harness(), load_tasks(config) if tasks is None else tasks
    with evaluating(model), _network(config.network):
        asked = harness.models.huggingface.HFLM(model, tokenizer=tokenizer, batch_size=config.batch_size)
        found = harness.evaluate(asked, {"tasks": dict(tasks)}, limit=config.limit, bootstrap_iters=0)
    return {name: _outcomes(name, samples) for name, samples in sorted(found["samples"].items())}


def _outcomes(task: str, samples: list[dict[str, Any]]) -> list[bool]:
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    if not ordered or any(sample.get(_METRIC) not in (0, 1) for sample in ordered):
        raise UserError(f"task {task!r}: has no questions with right and wrong answers ({_METRIC}); give another task")
    return [bool(sample[_METRIC]) for sample in ordered]


def _harness() -> Any:
    """lm_eval with the parts that are used here."""
    try:
        import lm_eval
        import lm_eval.defaults
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise UserError(f"lm-evaluation-harness is not here ({error}); pip install 'reprdpo[eval]'") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return lm_eval


@contextmanager
def _network(allowed: bool) -> Iterator[None]:
    """Keep datasets and the hub client from asking the network, which they read from the environment at import."""
    import datasets.config
    import huggingface_hub.constants

    modules: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = module.HF_HUB_OFFLINE or not allowed
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value
