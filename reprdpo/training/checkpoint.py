"""Checkpoints: nested state in one safetensors file, which of them may be resumed, sharded ones in one process."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from reprdpo import files
from reprdpo.errors import UserError

Kind = Literal["plain", "sharded", "gathered", "deepspeed"]

ARGUMENTS_FILE = "training_args.json"
_SHARDED_MODEL, _SHARDED_OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"  # accelerate's names
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


def kind_of(checkpoint: str | Path) -> Kind:
    """How a checkpoint was written: by one process or replicas, by FSDP in shards or gathered, or by DeepSpeed."""
    folder = Path(checkpoint)
    if (folder / _SHARDED_MODEL).is_dir():
        return "sharded"
    if (folder / f"{_SHARDED_MODEL.removesuffix('_0')}.bin").is_file():
        return "gathered"
    return "deepspeed" if (folder / "latest").is_file() else "plain"


def check_resumable(checkpoint: str | Path, arguments: Mapping[str, Any], *, fsdp: bool, deepspeed: bool) -> None:
    """Refuse a checkpoint that a run under ``arguments`` (as JSON has them) would not go on from, but go off from.

    Raises:
        UserError: an engine that cannot read it, or another value of a setting that decides the course of training.
    """
    kind = kind_of(checkpoint)
    wanted = {"fsdp": ("sharded", "gathered"), "deepspeed": ("deepspeed",), "neither": ("plain", "sharded")}
    engine = "fsdp" if fsdp else "deepspeed" if deepspeed else "neither"
    if kind not in wanted[engine]:
        raise UserError(
            f"{checkpoint}: a {kind} checkpoint cannot be resumed "
            + ("without FSDP and DeepSpeed" if engine == "neither" else f"under {engine.replace('fsdp', 'FSDP')}")
            + "; resume under the engine that wrote it (FSDP's sharded checkpoints also resume on one process)"
        )
    path = Path(checkpoint) / ARGUMENTS_FILE
    saved = files.read_json(path) if path.is_file() else {}
    changed = [name for name in arguments if name in saved and saved[name] != arguments[name]]
    if changed:
        name = changed[0]
        raise UserError(
            f"{checkpoint}: was trained with {name} {saved[name]!r}, not {arguments[name]!r}; "
            "set it so to go on, or choose another output_dir to start anew"
        )


def load_sharded_model(model: nn.Module, checkpoint: str | Path) -> None:
    """Read weights that FSDP2 saved in shards into a model that is whole."""
    state = get_model_state_dict(model)
    dcp.load({"model": state}, checkpoint_id=Path(checkpoint) / _SHARDED_MODEL, no_dist=True)
    set_model_state_dict(model, state)


def load_sharded_optimizer(model: nn.Module, optimizer: Optimizer, checkpoint: str | Path) -> None:
    """Read the state of an optimizer that FSDP2 saved in shards into that of a whole model."""
    state = get_optimizer_state_dict(model, optimizer)
    dcp.load({"optimizer": state}, checkpoint_id=Path(checkpoint) / _SHARDED_OPTIMIZER, no_dist=True)
    set_optimizer_state_dict(model, optimizer, state)


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
