"""What the library needs of a transformers causal LM: loading it, its decoder, its layers, its lm_head."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import deepspeed
from transformers.utils import logging as hf_logging

from reprdpo.errors import UserError, first_line
from reprdpo.files import looks_local

_ADAPTERS_FILE = "adapter_config.json"
_NARROWING_CHUNK = 1 << 20
_HASHING_THREADS = 8


@dataclass(frozen=True)
class Quantization:
    """How bitsandbytes holds the weights of linear layers, the head's apart; the names are those of TRL's ModelConfig.

    Raises:
        UserError: both widths at once.
    """

    load_in_4bit: bool = field(default=False, metadata={"help": "hold the linear layers' weights in 4 bits (QLoRA)"})
    load_in_8bit: bool = field(default=False, metadata={"help": "hold the linear layers' weights in 8 bits"})
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = field(default="nf4", metadata={"help": "the 4-bit numbers: nf4, fp4"})
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "quantise the 4-bit weights' scales as well"})

    def __post_init__(self) -> None:
        if self.load_in_4bit and self.load_in_8bit:
            raise UserError("load_in_4bit: cannot be together with load_in_8bit; choose one")

    def config(self, dtype: torch.dtype) -> BitsAndBytesConfig | None:
        """What ``from_pretrained`` takes, None without quantisation; 4-bit weights are multiplied in ``dtype``.

        Raises:
            UserError: bitsandbytes is not installed.
        """
        if not (self.load_in_4bit or self.load_in_8bit):
            return None
        if find_spec("bitsandbytes") is None:
            name = "load_in_4bit" if self.load_in_4bit else "load_in_8bit"
            raise UserError(f"{name}: needs bitsandbytes, which is not installed: pip install 'reprdpo[peft]'")
        if self.load_in_8bit:
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=self.use_bnb_nested_quant,
            bnb_4bit_compute_dtype=dtype,
        )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A block in which the model is in evaluation mode; it is left in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def accelerator() -> torch.device | None:
    """The accelerator, where there is one."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def load_causal_lm(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    quantization: Quantization | None = None,
) -> PreTrainedModel:
    """Load a causal LM in evaluation mode from a folder or a hub name; a folder of peft's adapters brings its base.

    A :class:`~pathlib.Path`, or a string that looks like one, is never looked for on the hub.

    Raises:
        UserError: no configuration or weights at ``path``, weights that are torn or do not fill the architecture,
            an architecture without a causal LM head, or quantisation without bitsandbytes.
    """
    if (Path(path).expanduser() / _ADAPTERS_FILE).is_file():
        return _with_adapters(
            path, dtype=dtype, device=device, trust_remote_code=trust_remote_code, quantization=quantization
        )
    options = {"trust_remote_code": trust_remote_code, **_where(path, "model")}
    weights = list(Path(path).glob("*.safetensors"))
    size = sum(file.stat().st_size for file in weights) if weights else None
    try:
        config = AutoConfig.from_pretrained(**options)
        held = (quantization or Quantization()).config(_dtype_of(dtype, config))
        if held is not None:
            options |= {"quantization_config": held, "device_map": {"": device or "cpu"}}
        with progress_bars(size), _whole():
            model, info = AutoModelForCausalLM.from_pretrained(**options, dtype=dtype, output_loading_info=True)
    except (ImportError, OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise _not_loaded(path, "causal LM", error) from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{path}: the weights lack {len(missing)} of the model's parameters (first: {missing[0]}), "
            f"which would be random; give the folder of a whole {type(model).__name__}"
        )
    if held is not None:
        keep_quantised_weights(model)
    return model.to(device).eval() if device is not None and held is None else model.eval()


@contextlib.contextmanager
def _whole() -> Iterator[None]:
    """Load whole where a ZeRO-3 configuration is alive, which would have transformers partition what it loads.

    The reward's check and the reference read all weights; the engine partitions them when training starts.
    """
    alive = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = alive


def keep_quantised_weights(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights at a CPU's inference, which rounds their scales for good."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer that has an end-of-sequence token; the padding token defaults to it.

    Raises:
        UserError: no tokenizer at ``path``, or one without an end-of-sequence token.
    """
    options = {"trust_remote_code": trust_remote_code, **_where(path, "tokenizer")}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**options)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _not_loaded(path, "tokenizer", error) from error
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
    whole = unwrap(model)
    found = whole.get_decoder()
    if found is None or found is whole:  # Llama 4's text model does not find its own
        found = next((child for child in whole.children() if isinstance(child, PreTrainedModel)), None)
    if found is None:
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
    return sum(_numel(p) for p in module.parameters() if id(p) not in tables)


def forward_flop(model: nn.Module, tokens: int, scored: int = 0) -> int:
    """Matmul FLOP of a forward over ``tokens``, the head applied to ``scored`` of them."""
    return 2 * matmul_parameters(decoder(model)) * tokens + (
        2 * output_head(model).weight.numel() * scored if scored else 0
    )


def model_fingerprint(model: nn.Module) -> str:
    """A hash of the parameters' names, shapes and bytes: equal for equal models, whatever their folder is called."""
    causal_lm = unwrap(model)
    return _hash([*causal_lm.named_parameters(), *_quantisation_state(causal_lm)], lambda flat: flat)


def base_fingerprint(model: nn.Module) -> str:
    """A hash of what a model was trained from: equal with and without peft's adapters, in whatever dtype it is held.

    A dtype that rounds the values makes another model of it, as quantisation does; one that only holds them wider does
    not. Takes a read of all weights.
    """
    causal_lm = unwrap(model)
    added = _added_by_peft(causal_lm)
    parameters = [(name, parameter) for name, parameter in causal_lm.named_parameters() if id(parameter) not in added]
    return _hash(
        [(_without_peft(name), value) for name, value in (*parameters, *_quantisation_state(causal_lm))], _narrowest
    )


def _hash(tensors: Iterable[tuple[str, Tensor]], held: Callable[[Tensor], Tensor]) -> str:
    """Of names, shapes, dtypes and bytes, each tensor flat and as ``held`` gives it; several at a time."""

    def digest(named: tuple[str, Tensor]) -> bytes:
        name, tensor = named
        flat = held(tensor.detach().cpu().contiguous().view(-1))
        head = json.dumps([name, list(tensor.shape), str(flat.dtype)]).encode()
        return hashlib.sha256(head + hashlib.sha256(flat.view(torch.uint8).numpy().data).digest()).digest()

    with ThreadPoolExecutor(_HASHING_THREADS) as pool:  # hashlib lets go of the interpreter
        digests = pool.map(digest, sorted(tensors, key=lambda named: named[0]))
        return hashlib.sha256(b"".join(digests)).hexdigest()[:16]


def _narrowest(values: Tensor) -> Tensor:
    """The same values in the first dtype that holds them exactly, so that how they were loaded leaves no trace."""
    if not values.dtype.is_floating_point or values.dtype == torch.bfloat16:
        return values
    wider = (torch.float32,) if values.dtype == torch.float64 else ()
    for dtype in (torch.bfloat16, torch.float16, *wider):
        parts = []
        for part in values.split(_NARROWING_CHUNK):
            parts.append(part.to(dtype))
            if not torch.equal(parts[-1].to(values.dtype), part):
                break
        else:
            return torch.cat(parts)
    return values


def _numel(parameter: nn.Parameter) -> int:
    """The weights in a parameter; 4-bit ones lie packed."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def _quantisation_state(model: nn.Module) -> list[tuple[str, Tensor]]:
    """What the layers of a quantised model save beside their parameters: the scales."""
    if not getattr(model, "is_quantized", False):
        return []
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    known |= {name for name, _ in model.named_buffers()}
    return [(name, value) for name, value in model.state_dict().items() if name not in known]


def _added_by_peft(model: nn.Module) -> set[int]:
    """The parameters that peft's wrappers hold beside those of the modules they wrap, by id."""
    added: set[int] = set()
    for module in model.modules():
        for inner in ("base_layer", "original_module"):
            if isinstance(wrapped := getattr(module, inner, None), nn.Module):
                added |= {id(p) for p in module.parameters()} - {id(p) for p in wrapped.parameters()}
    return added


def _without_peft(name: str) -> str:
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def _with_adapters(path: str | Path, **options: Any) -> Any:
    """peft's adapters in the folder ``path`` on the base model that they name."""
    if find_spec("peft") is None:
        raise UserError(f"{path}: holds LoRA adapters, which need peft: pip install 'reprdpo[peft]'")
    from peft import PeftConfig, PeftModel

    folder = str(Path(path).expanduser())
    try:
        base = PeftConfig.from_pretrained(folder).base_model_name_or_path
        model = load_causal_lm(base or "", **options)
        return PeftModel.from_pretrained(model, folder).eval()
    except UserError as error:
        raise UserError(f"{path}: the base model of these adapters: {error}") from error
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise _not_loaded(path, "adapters", error) from error


def _dtype_of(dtype: str | torch.dtype, config: Any) -> torch.dtype:
    """The dtype that weights are loaded in."""
    if dtype == "auto":
        return getattr(config.get_text_config(), "dtype", None) or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _where(path: str | Path, what: str) -> dict[str, Any]:
    """``from_pretrained``'s place and whether it is local; a local place must be a folder."""
    place = Path(path).expanduser()
    local = looks_local(path)
    if local and not place.is_dir():
        came = "is a file" if place.exists() else "no such folder"
        raise UserError(f"{path}: {came}; give the folder of a transformers {what} (with config.json)")
    return {"pretrained_model_name_or_path": str(place if local else path), "local_files_only": local}


def _not_loaded(path: str | Path, what: str, error: BaseException) -> UserError:
    why = first_line(error).rstrip(".")
    cure = "" if looks_local(path) else "; there is no such folder here: check it, or the hub's name and the connection"
    return UserError(f"{path}: no {what} could be loaded: {why}{cure}")
