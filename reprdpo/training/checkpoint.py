"""Checkpoints: nested state in one safetensors file, and which checkpoint of a run is whole."""

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from reprdpo import files
from reprdpo.errors import UserError

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def save_state(path: str | Path, state: Any) -> None:
    """Write dicts, lists, numbers, strings, None and tensors, nested at will, atomically as one safetensors file."""
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_flatten(state, tensors))
    with files.atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"structure": structure})


def load_state(path: str | Path) -> Any:
    """Read back what :func:`save_state` wrote, tensors on the CPU.

    Raises:
        UserError: the file is missing or torn.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return _unflatten(json.loads(file.metadata()["structure"]), file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); resume from an earlier checkpoint") from None


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest whole checkpoint under ``output_dir``, or None; one whose writing was cut short is passed over."""
    found = [(int(match[1]), path) for path in Path(output_dir).glob("checkpoint-*") if (match := _number(path))]
    return next((str(path) for _, path in sorted(found, reverse=True) if is_whole(path)), None)


def is_whole(checkpoint: str | Path) -> bool:
    """Whether the trainer state, which is written last, is there and entire."""
    try:
        json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _number(path: Path) -> re.Match[str] | None:
    return _CHECKPOINT.fullmatch(path.name)


def _flatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):  # as pairs: JSON would turn an optimizer's integer keys into strings
        return {"dict": [[key, _flatten(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list": [_flatten(item, tensors) for item in value]}
    return {"value": value}


def _unflatten(node: dict[str, Any], file: Any) -> Any:
    kind, content = next(iter(node.items()))
    if kind == "tensor":
        return file.get_tensor(content)
    if kind == "dict":
        return {key: _unflatten(item, file) for key, item in content}
    if kind == "list":
        return [_unflatten(item, file) for item in content]
    return content
