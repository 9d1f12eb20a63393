"""What the library needs of a transformers causal LM: loading it, its decoder, its layers, its lm_head."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from reprdpo.errors import UserError
from reprdpo.files import looks_local


def load_causal_lm(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal LM in evaluation mode from a folder or a hub name.

    A :class:`~pathlib.Path`, or a string that looks like one, is never looked for on the hub.

    Raises:
        UserError: no configuration or weights at ``path``, weights that are torn or do not fill the architecture,
            or an architecture without a causal LM head.
    """
    options = {"trust_remote_code": trust_remote_code, **_where(path, "model")}
    weights = list(Path(path).glob("*.safetensors"))
    size = sum(file.stat().st_size for file in weights) if weights else None
    try:
        AutoConfig.from_pretrained(**options)
        with progress_bars(size):
            model, info = AutoModelForCausalLM.from_pretrained(**options, dtype=dtype, output_loading_info=True)
    except (ImportError, OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path}: no causal LM could be loaded: {_first_line(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{path}: the weights lack {len(missing)} of the model's parameters (first: {missing[0]}), "
            f"which would be random; give the folder of a whole {type(model).__name__}"
        )
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise UserError(f"{path}: DeepSpeed partitioned the model on loading; load it before making the config")
    return model.to(device).eval() if device is not None else model.eval()


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer that has an end-of-sequence token; the padding token defaults to it.

    Raises:
        UserError: no tokenizer at ``path``, or one without an end-of-sequence token.
    """
    options = {"trust_remote_code": trust_remote_code, **_where(path, "tokenizer")}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**options)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no tokenizer could be loaded: {_first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: the tokenizer has no end-of-sequence token, where the reward is read; set eos_token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextlib.contextmanager
def progress_bars(size: int | None) -> Iterator[None]:
    """transformers' progress bars while ``size`` bytes of weights move: off where that takes no time."""
    if size is None or size > 2**30 or not hf_logging.is_progress_bar_enabled():
        yield
        return
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.enable_progress_bar()


def decoder(model: nn.Module) -> nn.Module:
    """The model without its head: the module whose output has ``last_hidden_state``."""
    found = unwrap(model).get_decoder()
    if found is None or found is unwrap(model):
        raise UserError(f"{type(model).__name__}: no decoder under the head (get_decoder() gives none)")
    return found


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The L decoder layers, in order: the one module list of the decoder as long as its configuration says."""
    stack = decoder(model)
    wanted = unwrap(model).config.get_text_config().num_hidden_layers
    for child in stack.children():
        if isinstance(child, nn.ModuleList) and len(child) == wanted:
            return child
    raise UserError(f"{type(model).__name__}: no list of {wanted} decoder layers under {type(stack).__name__}")


def output_head(model: nn.Module) -> Any:
    """The lm_head: a module with ``weight`` [V, D] and perhaps ``bias`` [V]; see :mod:`reprdpo.heads` for its use."""
    head = unwrap(model).get_output_embeddings()
    if head is None or not hasattr(head, "weight"):
        raise UserError(f"{type(model).__name__}: no lm_head (get_output_embeddings() gives none)")
    return head


def unwrap(model: nn.Module) -> Any:
    """The model under the wrapper of DistributedDataParallel, torch.compile or peft."""
    wrapped: Any = model
    while True:
        if hasattr(wrapped, "module"):
            wrapped = wrapped.module
        elif hasattr(wrapped, "_orig_mod"):
            wrapped = wrapped._orig_mod
        elif hasattr(wrapped, "get_base_model"):
            wrapped = wrapped.get_base_model()
        else:
            return wrapped


def matmul_parameters(module: nn.Module) -> int:
    """How many parameters lie outside embedding tables: those that multiply every token."""
    tables = {id(p) for child in module.modules() if isinstance(child, nn.Embedding) for p in child.parameters()}
    return sum(p.numel() for p in module.parameters() if id(p) not in tables)


def forward_flop(model: nn.Module, tokens: int, scored: int = 0) -> int:
    """Matmul FLOP of a forward over ``tokens``, the head applied to ``scored`` of them."""
    return 2 * matmul_parameters(decoder(model)) * tokens + (
        2 * output_head(model).weight.numel() * scored if scored else 0
    )


def model_fingerprint(model: nn.Module) -> str:
    """A hash of the parameters' names, shapes and bytes: equal for equal models, whatever their folder is called."""
    digest = hashlib.sha256()
    for name, parameter in sorted(unwrap(model).named_parameters()):
        digest.update(json.dumps([name, list(parameter.shape), str(parameter.dtype)]).encode())
        flat = parameter.detach().cpu().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def base_fingerprint(model: nn.Module) -> str:
    """A hash of what a model was trained from: equal with and without peft's adapters, in whatever dtype it is held.

    A dtype that rounds the values makes another model of it; one that only holds them wider does not.
    """
    digest = hashlib.sha256()
    for name, parameter in _base_parameters(unwrap(model)):
        flat = _narrowest(parameter.detach().cpu().contiguous().view(-1))
        digest.update(json.dumps([name, list(parameter.shape), str(flat.dtype)]).encode())
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _narrowest(values: Tensor) -> Tensor:
    """The same values in the first dtype that holds them exactly, so that how they were loaded leaves no trace."""
    for dtype in (torch.bfloat16, torch.float16):
        narrow = values.to(dtype)
        if values.dtype.is_floating_point and torch.equal(narrow.to(values.dtype), values):
            return narrow
    return values


def _base_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names, as they are without peft, and parameters, in order, without those that peft's wrappers add."""
    added: set[int] = set()
    for module in model.modules():
        for inner in ("base_layer", "original_module"):
            if isinstance(wrapped := getattr(module, inner, None), nn.Module):
                added |= {id(p) for p in module.parameters()} - {id(p) for p in wrapped.parameters()}
    found = [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) not in added]
    return sorted((name.replace(".base_layer.", ".").replace(".original_module.", "."), p) for name, p in found)


def _where(path: str | Path, what: str) -> dict[str, Any]:
    """``from_pretrained``'s place and whether it is local; a local place must be a folder."""
    place = Path(path).expanduser()
    local = looks_local(path)
    if local and not place.is_dir():
        came = "is a file" if place.exists() else "no such folder"
        raise UserError(f"{path}: {came}; give the folder of a transformers {what} (with config.json)")
    return {"pretrained_model_name_or_path": str(place if local else path), "local_files_only": local}


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
