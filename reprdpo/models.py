"""What the library needs of a transformers causal LM: loading it, its decoder, its layers, its head."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from reprdpo import ops
from reprdpo.errors import UserError
from reprdpo.files import looks_local


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
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path}: no causal LM could be loaded: {_first_line(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{path}: the weights lack {len(missing)} of the model's parameters (first: {missing[0]}), "
            f"which would be random; give the folder of a whole {type(model).__name__}"
        )
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


def output_head(model: nn.Module) -> nn.Module:
    """The lm_head: a module with ``weight`` [V, D] and perhaps ``bias`` [V]."""
    head = unwrap(model).get_output_embeddings()
    if head is None or not hasattr(head, "weight"):
        raise UserError(f"{type(model).__name__}: no lm_head (get_output_embeddings() gives none)")
    return head


def head_spec(model: nn.Module) -> HeadSpec:
    """The head's weight and bias, and the logit scale (Cohere, Granite) and softcap (Gemma 2) of the configuration.

    :func:`check_head` says whether a model's own logits agree.
    """
    head: Any = output_head(model)
    config = unwrap(model).config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    return HeadSpec(
        head.weight, getattr(head, "bias", None), _logit_scale(config), None if softcap is None else float(softcap)
    )


def token_logps(model: nn.Module, hidden: Tensor, labels: Tensor, scored_index: Tensor) -> Tensor:
    """Log-probs [B, T] float32 of shifted ``labels`` under final hidden states [B, T, D], 0 where not scored."""
    head = head_spec(model)
    logps = ops.linear_logprob(
        hidden,
        head.weight,
        labels,
        bias=head.bias,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        scored_index=scored_index,
    )
    assert isinstance(logps, Tensor)
    return logps


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Compare the logits of a few tokens with what :func:`head_spec` makes of the decoder's states.

    Raises:
        UserError: they differ, so that log-probabilities read through the head alone would be wrong.
    """
    found = unwrap(model)
    spec = head_spec(model)
    ids_BT = torch.arange(min(8, spec.weight.shape[0]), device=spec.weight.device)[None]
    was_training = found.training
    found.eval()
    logits_BTV = found(input_ids=ids_BT).logits.float()
    hidden_BTD = decoder(model)(input_ids=ids_BT).last_hidden_state
    found.train(was_training)
    mine_BTV = nn.functional.linear(hidden_BTD.to(spec.weight.dtype), spec.weight, spec.bias).float() * spec.logit_scale
    if spec.softcap is not None:
        mine_BTV = spec.softcap * torch.tanh(mine_BTV / spec.softcap)
    error = (logits_BTV - mine_BTV).abs().max()
    if not error <= 8 * torch.finfo(spec.weight.dtype).eps * logits_BTV.abs().max().clamp(min=1.0):
        raise UserError(
            f"{type(found).__name__}: its logits are not softcap(scale * (W h + b)) of its last hidden state "
            f"(off by {error:.2g}); this architecture's head is not supported"
        )


def unwrap(model: nn.Module) -> Any:
    """The model under DistributedDataParallel's or torch.compile's wrapper."""
    wrapped: Any = model
    while hasattr(wrapped, "module") or hasattr(wrapped, "_orig_mod"):
        wrapped = wrapped.module if hasattr(wrapped, "module") else wrapped._orig_mod
    return wrapped


def matmul_parameters(module: nn.Module) -> int:
    """How many parameters lie outside embedding tables: those that multiply every token."""
    tables = {id(p) for child in module.modules() if isinstance(child, nn.Embedding) for p in child.parameters()}
    return sum(p.numel() for p in module.parameters() if id(p) not in tables)


def forward_flop(model: nn.Module, tokens: int, scored: int = 0) -> int:
    """Matmul FLOP of a forward over ``tokens``, the head applied to ``scored`` of them."""
    return 2 * matmul_parameters(decoder(model)) * tokens + (
        2 * head_spec(model).weight.numel() * scored if scored else 0
    )


def model_fingerprint(model: nn.Module) -> str:
    """A hash of the parameters' names, shapes and bytes: equal for equal models, whatever their folder is called."""
    digest = hashlib.sha256()
    for name, parameter in sorted(unwrap(model).named_parameters()):
        digest.update(json.dumps([name, list(parameter.shape), str(parameter.dtype)]).encode())
        flat = parameter.detach().cpu().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _logit_scale(config: Any) -> float:
    # MPT keeps an unused `logit_scale`; HyperCLOVA X multiplies by the name Granite divides by.
    scale = 1.0 if config.model_type == "mpt" else getattr(config, "logit_scale", None) or 1.0
    for multiplier in ("lm_head_multiplier", "output_multiplier"):
        scale *= getattr(config, multiplier, None) or 1.0
    scaling = getattr(config, "logits_scaling", None) or 1.0
    return float(scale * scaling if config.model_type.startswith("hyperclovax") else scale / scaling)


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
