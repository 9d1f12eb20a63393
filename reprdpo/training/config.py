"""Settings of the trainers: dataclasses that HfArgumentParser reads from the command line or from YAML."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from reprdpo.data import TokenizeConfig
from reprdpo.errors import UserError
from reprdpo.ops.reference import PAIR_LOSSES
from reprdpo.training.kto import LOSS_TYPE as KTO
from reprdpo.training.presets import DEFAULTS, PRESETS, preset_values

# Where and how fast, and names for what other fields say.
_INDECISIVE = {"max_tokens_per_device", "precompute_ref_batch_size", "preset", "reference_cache_dir"}


def _help(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class BaseConfig(TrainingArguments):
    """What every trainer here shares: transformers' arguments with other defaults, and how text becomes tokens."""

    data_seed: int | None = _help(None, "Seed of the order of the data (default: that of --seed).")
    logging_steps: float = _help(10, "Log every so many optimizer steps.")
    logging_first_step: bool = _help(True, "Log the first step, where the policy still is the reference.")
    logging_nan_inf_filter: bool = _help(False, "Replace NaN losses in the log; costs a device synchronisation a step.")
    remove_unused_columns: bool = _help(False, "Must stay False: the collators read columns the model does not take.")
    prediction_loss_only: bool = _help(True, "Evaluation returns metrics, not logits.")
    ddp_find_unused_parameters: bool | None = _help(False, "Whether DDP looks for parameters without a gradient.")
    max_length: int = _help(1024, "Longest sequence of prompt and response, in tokens.")
    max_prompt_length: int | None = _help(None, "Longest prompt, in tokens; unset: limited by max_length alone.")
    truncation_mode: Literal["error", "keep_end", "keep_start", "drop"] = _help(
        "error", "What happens to a row over the limits: refuse the data, cut the prompt, or leave the row out."
    )
    max_tokens_per_device: int | None = _help(
        None, "Most tokens, padding included, in one forward; larger batches are split, which changes no loss."
    )
    disable_dropout: bool = _help(True, "Set every dropout probability of the model to 0.")

    def __post_init__(self) -> None:
        if self.data_seed is None:  # the order of the data must not hang on draws made before training
            self.data_seed = self.seed
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False
        super().__post_init__()
        self._check_fields()

    def tokenize_config(self) -> TokenizeConfig:
        """How prompts and responses are tokenised under these settings."""
        return TokenizeConfig(
            max_length=self.max_length,
            max_prompt_length=self.max_prompt_length,
            truncation_mode=self.truncation_mode,
        )

    def decisive_fields(self) -> set[str]:
        """Names of the settings that decide the course of training, so that a resumed run must keep them."""
        own = {f.name for f in fields(self)} - {f.name for f in fields(TrainingArguments)}
        theirs = {"data_seed", "global_batch_size", "learning_rate", "optim", "seed", "train_sampling_strategy"}
        return own - _INDECISIVE | theirs

    def _check_fields(self) -> None:
        if self.remove_unused_columns:
            raise UserError("remove_unused_columns: the collators need every column; leave it False")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "an integer of at least 1")
        workers = self.dataloader_num_workers
        _check(workers >= 0, "dataloader_num_workers", workers, "an integer of at least 0")
        for name in ("learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            _check(math.isfinite(value) and value >= 0, name, value, "a number of at least 0")
        _check(self.save_steps > 0, "save_steps", self.save_steps, "a number above 0")
        _check(self.max_length >= 2, "max_length", self.max_length, "an integer of at least 2")
        tokens = self.max_tokens_per_device
        _check(tokens is None or tokens >= 1, "max_tokens_per_device", tokens, "an integer of at least 1, or unset")
        if self.max_prompt_length is not None:
            allowed = 1 <= self.max_prompt_length < self.max_length
            _check(
                allowed, "max_prompt_length", self.max_prompt_length, f"1 to {self.max_length - 1} (below max_length)"
            )


@dataclass
class AdapterConfig:
    """LoRA by peft, the model itself frozen; fields of the configs of trainers that can; TRL's ModelConfig's names."""

    use_peft: bool = _help(False, "Train LoRA adapters on the model instead of the model itself.")
    lora_r: int = _help(16, "Rank of the adapters.")
    lora_alpha: int = _help(32, "The adapters' output is scaled by lora_alpha / lora_r.")
    lora_dropout: float = _help(0.0, "Dropout before the adapters; needs disable_dropout off.")
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Modules that get adapters, by the ends of their names, or all-linear (default: peft's)."},
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained whole, and saved with the adapters."}
    )
    use_rslora: bool = _help(False, "Scale by lora_alpha / sqrt(lora_r) instead.")

    def check_adapters(self, *, disable_dropout: bool) -> None:
        """
        Raises:
            UserError: a value out of its range, or one that would do nothing.
        """
        for f in fields(AdapterConfig):
            if not self.use_peft and getattr(self, f.name) != f.default:
                raise UserError(f"{f.name}: says nothing without LoRA; set use_peft as well, or leave it out")
        _check(self.lora_r >= 1, "lora_r", self.lora_r, "an integer of at least 1")
        _check(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "a number from 0 to below 1")
        if self.lora_dropout and disable_dropout:
            raise UserError(f"lora_dropout: {self.lora_dropout}, but disable_dropout sets it to 0; set that to false")


@dataclass
class ReprSFTConfig(AdapterConfig, BaseConfig):
    """Settings of :class:`~reprdpo.training.ReprSFTTrainer`."""

    learning_rate: float = _help(2e-5, "The initial learning rate.")

    def _check_fields(self) -> None:
        super()._check_fields()
        self.check_adapters(disable_dropout=self.disable_dropout)


@dataclass
class RewardModelConfig(BaseConfig):
    """Settings of :func:`~reprdpo.training.train_reward_model`."""

    learning_rate: float = _help(1e-5, "The initial learning rate.")
    margin: float = _help(0.0, "m of the loss -log sigma(r_c - r_r - m).")


@dataclass
class ConfidenceConfig:
    """How gamma is read from a reward, and how the reward learns: fields of every config of a trainer that has one."""

    alpha: float | str | None = _help(None, 'Steepness of gamma, or "auto" (default): the one fitted with the reward.')
    squash: bool | None = _help(None, "gamma from squashed rewards; unset: as the reward was fitted.")
    confidence_floor: float | None = _help(None, "Smallest gamma (default: none).")
    confidence_reduce: Literal["batch"] | None = _help(
        None, '"batch": every pair takes the mean gamma of its batch on its process.'
    )
    update_reward: bool = _help(True, "Update the reward once per optimizer step on the batch's own states.")
    reward_learning_rate: float = _help(1e-3, "Learning rate of the reward's own Adam.")
    reward_margin: float = _help(None, f"mu of Eq. 7 in the update (default {DEFAULTS['reward_margin']}).")
    allow_reward_descendant: bool = _help(
        False, "Accept a reward fitted on other weights of the same architecture (say, before supervised fine-tuning)."
    )

    def alpha_or(self, fitted: float) -> float:
        """The steepness set here, or with "auto" the ``fitted`` one."""
        return self.alpha if isinstance(self.alpha, float) else fitted

    def check_confidence(self) -> None:
        """Fill what is unset with the library's defaults.

        Raises:
            UserError: a value out of its range.
        """
        self.alpha = _alpha(DEFAULTS["alpha"] if self.alpha is None else self.alpha)
        if self.reward_margin is None:
            self.reward_margin = DEFAULTS["reward_margin"]
        rate = self.reward_learning_rate
        _check(math.isfinite(rate) and rate > 0, "reward_learning_rate", rate, "a positive number")
        _check(math.isfinite(self.reward_margin), "reward_margin", self.reward_margin, "a finite number")
        if self.confidence_floor is not None:
            _check(0 <= self.confidence_floor <= 1, "confidence_floor", self.confidence_floor, "a number from 0 to 1")
        _check(
            self.confidence_reduce in (None, "batch"), "confidence_reduce", self.confidence_reduce, '"batch" or unset'
        )


@dataclass
class ReprDPOConfig(ConfidenceConfig, AdapterConfig, BaseConfig):
    """Settings of :class:`~reprdpo.training.ReprDPOTrainer`; names are TRL's where the meaning is the same.

    beta, learning_rate, per_device_train_batch_size, alpha and reward_margin, where left unset, take the preset's
    value, or the library's default without a preset.

    The modes: ``confidence_source="reward"`` is the method; ``"fixed"`` with ``fixed_confidence=1.0`` is DPO and with
    1 - eps is conservative DPO.
    """

    preset: str | None = _help(None, 'Named settings for fields left unset: "paper" (arXiv 2503.10093, A.3).')
    beta: float = _help(None, f"Strength of the pull to the reference (default {DEFAULTS['beta']}).")
    learning_rate: float = _help(None, f"The initial learning rate (default {DEFAULTS['learning_rate']}).")
    per_device_train_batch_size: int = _help(
        None, f"Pairs per device and batch (default {DEFAULTS['per_device_train_batch_size']})."
    )
    loss_type: str = _help(
        "sigmoid",
        f"The pair loss: {', '.join(PAIR_LOSSES)} (reprdpo.ops.preference_loss), or kto (reprdpo.training.kto).",
    )
    packing: Literal["auto", "prefix", "varlen", "padded"] = _help(
        "auto",
        "How pairs lie in a batch: prefix (the prompt once, several pairs a row), varlen (sequences end to end, by "
        "flash attention), or padded; auto: what its lengths make cheapest of those that the model can be served.",
    )
    max_row_tokens: int = _help(4096, "Longest row of packing=prefix; its attention mask has its square in bytes.")
    attn_implementation: str | None = _help(
        None, "The policy's attention: sdpa, eager, flex_attention, flash_attention_2, ... (default: as it was loaded)."
    )
    precompute_ref_batch_size: int = _help(16, "Sequences a batch when reference log-probs are computed.")
    reference_cache_dir: str | None = _help(
        None, "Where reference log-probs are cached by content (default: OUTPUT_DIR/reference)."
    )
    confidence_source: Literal["reward", "fixed"] = _help("reward", "Where gamma comes from: the reward, or a number.")
    fixed_confidence: float = _help(1.0, "gamma of confidence_source=fixed: 1 is DPO, 1 - eps is cDPO.")

    def __post_init__(self) -> None:
        if self.preset is not None and self.preset not in PRESETS:
            raise UserError(f"preset: {self.preset!r} is none of {', '.join(sorted(PRESETS))}")
        for name, value in preset_values(self.preset).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        super().__post_init__()

    def _check_fields(self) -> None:
        super()._check_fields()
        self.check_confidence()
        self.check_adapters(disable_dropout=self.disable_dropout)
        known = (*PAIR_LOSSES, KTO)
        _check(self.loss_type in known, "loss_type", self.loss_type, f"one of {', '.join(known)}")
        if self.loss_type == "robust":
            noise_known = self.confidence_source == "fixed" and self.fixed_confidence > 0.5
            _check(noise_known, "loss_type", "robust", "a fixed confidence over 0.5 with it")
        _check(math.isfinite(self.beta) and self.beta > 0, "beta", self.beta, "a positive number")
        packings = ("auto", "prefix", "varlen", "padded")
        _check(self.packing in packings, "packing", self.packing, f"one of {', '.join(packings)}")
        _check(self.max_row_tokens >= 1, "max_row_tokens", self.max_row_tokens, "an integer of at least 1")
        _check(0 <= self.fixed_confidence <= 1, "fixed_confidence", self.fixed_confidence, "a number from 0 to 1")
        split = {
            "max_tokens_per_device": self.max_tokens_per_device is not None,
            "gradient_accumulation_steps": self.gradient_accumulation_steps > 1,
        }
        if self.confidence_reduce == "batch" and (by := [name for name, splits in split.items() if splits]):
            raise UserError(f"confidence_reduce: a batch that {by[0]} splits has no gamma; unset one")
        batch = self.precompute_ref_batch_size
        _check(batch >= 1, "precompute_ref_batch_size", batch, "an integer of at least 1")


@dataclass
class OnlineDPOConfig(ReprDPOConfig):
    """Settings of :class:`~reprdpo.training.OnlineDPOTrainer`."""

    resample_steps: int | str | None = _help(
        100, 'Optimizer steps between two draws of fresh pairs, or "epoch": when a round\'s pairs are used up.'
    )

    def _check_fields(self) -> None:
        super()._check_fields()
        if isinstance(self.resample_steps, str) and self.resample_steps.isdigit():
            self.resample_steps = int(self.resample_steps)
        steps = self.resample_steps
        allowed = steps == "epoch" or (isinstance(steps, int) and steps >= 1)
        _check(allowed, "resample_steps", steps, 'an integer of at least 1, or "epoch"')
        _check(self.max_steps > 0, "max_steps", self.max_steps, "the number of steps: online data has no length")


def _check(allowed: bool, name: str, value: Any, expected: str) -> None:
    if not allowed:
        raise UserError(f"{name}: got {value!r}, expected {expected}")


def _alpha(value: Any) -> float | str:
    if value == "auto":
        return "auto"
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    _check(math.isfinite(number) and number > 0, "alpha", value, 'a positive number or "auto"')
    return number
