"""What the library needs of a transformers causal LM: loading it, its decoder, its layers, its head."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from reprdpo.errors import UserError


class HeadSpec(NamedTuple):
    """How a model turns its final hidden states into logits: ``softcap * tanh(scale * (h W^T + b) / softcap)``."""

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None


def load_causal_lm(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal LM in evaluation mode from a folder or a hub name.

    Raises:
        UserError: no configuration or no weights at ``path``, or an architecture without a causal LM head.
    """
    _check_folder(path, "model")
    try:
        AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: no causal LM could be loaded: {_first_line(error)}") from error
    return model.to(device).eval() if device is not None else model.eval()


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer that has an end-of-sequence token; the padding token defaults to it.

    Raises:
        UserError: no tokenizer at ``path``, or one without an end-of-sequence token.
    """
    _check_folder(path, "tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no tokenizer could be loaded: {_first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: the tokenizer has no end-of-sequence token, where the reward is read; set eos_token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


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


def output_head(model: nn.Module) -> nn.Module:
    """The lm_head: a module with ``weight`` [V, D] and perhaps ``bias`` [V]."""
    head = unwrap(model).get_output_embeddings()
    if head is None or not hasattr(head, "weight"):
        raise UserError(f"{type(model).__name__}: no lm_head (get_output_embeddings() gives none)")
    return head


def head_spec(model: nn.Module) -> HeadSpec:
    """The head's weight and bias, and the logit scale (Cohere, Granite) and softcap (Gemma 2) of the configuration."""
    head: Any = output_head(model)
    config = unwrap(model).config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        scale /= float(divisor)
    softcap = getattr(config, "final_logit_softcapping", None)
    return HeadSpec(head.weight, getattr(head, "bias", None), scale, None if softcap is None else float(softcap))


def unwrap(model: nn.Module) -> Any:
    """The model under DistributedDataParallel's or torch.compile's wrapper."""
    wrapped: Any = model
    while hasattr(wrapped, "module") or hasattr(wrapped, "_orig_mod"):
        wrapped = wrapped.module if hasattr(wrapped, "module") else wrapped._orig_mod
    return wrapped


def model_fingerprint(model: nn.Module) -> str:
    """A hash of the parameters' names, shapes and bytes: equal for equal models, whatever their folder is called."""
    digest = hashlib.sha256()
    for name, parameter in sorted(unwrap(model).named_parameters()):
        digest.update(json.dumps([name, list(parameter.shape), str(parameter.dtype)]).encode())
        flat = parameter.detach().cpu().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _check_folder(path: str | Path, what: str) -> None:
    looks_local = str(path).startswith((".", "/", "~")) or Path(path).exists()
    if looks_local and not Path(path).is_dir():
        raise UserError(f"{path}: is not a folder; give the folder of a transformers {what} (with config.json)")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
