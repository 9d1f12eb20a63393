"""The configuration of a run: one dataclass, read strictly from YAML."""

import dataclasses
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from reprdpo.data import TokenizeConfig
from reprdpo.errors import UserError, did_you_mean
from reprdpo.evaluation import known_judges
from reprdpo.experiments.systems import SYSTEMS
from reprdpo.models import Quantization
from reprdpo.reward import RewardFitConfig
from reprdpo.sampling import EngineConfig, SamplingConfig
from reprdpo.training import OnlineDPOConfig, ReprDPOConfig, ReprSFTConfig, RewardModelConfig
from reprdpo.training.presets import preset_values

SANDBOX = "sandbox"
# Training arguments that a run's own settings decide, and which of these do.
_OF_THE_RUN = {
    "output_dir": "output_dir",
    "seed": "seeds",
    "max_length": "data.max_length",
    "max_prompt_length": "data.max_prompt_length",
    "truncation_mode": "data.truncation_mode",
}
_VARIANT_NAME = re.compile(r"[a-z0-9][a-z0-9_.=-]*")


@dataclass(frozen=True)
class FitSection(RewardFitConfig):
    """How the reward is fitted; see RewardFitConfig."""

    limit: int | None = field(default=None, metadata={"help": "pairs to fit on (default: all)"})
    layers: Literal["all", "best", "worst", "last", "random"] = field(
        default="all",
        metadata={"help": "all, mixed by the gate; or one: best or worst by cross-validation, last, random (by seed)"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_least("fit", 1, limit=self.limit)


@dataclass(frozen=True)
class SampleSection(EngineConfig, SamplingConfig):
    """How responses are drawn from the reference policy and paired; see SamplingConfig, and EngineConfig for where."""

    limit: int | None = field(default=None, metadata={"help": "prompts to sample for (default: all)"})
    top: int = field(default=1, metadata={"help": "responses from the top of a prompt's ranking to pair"})
    bottom: int = field(default=1, metadata={"help": "responses from the bottom of a prompt's ranking to pair"})
    min_gap: float = field(default=0.0, metadata={"help": "smallest reward gap of a pair"})
    best_of: int | None = field(
        default=None,
        metadata={"help": "responses of a prompt that are ranked, the first of those drawn (default: all)"},
    )

    def __post_init__(self) -> None:
        SamplingConfig.__post_init__(self)
        EngineConfig.__post_init__(self)
        _check_least("sample", 1, limit=self.limit, top=self.top, bottom=self.bottom)
        _check_least("sample", 0, min_gap=self.min_gap)
        if self.best_of is not None and not 1 <= self.best_of <= self.num_responses:
            raise UserError(f"best_of: must be from 1 to num_responses ({self.num_responses}), not {self.best_of}")


@dataclass(frozen=True)
class OnlineSection:
    """How the online baseline draws its pairs: responses of the moving policy, scored by a reward model of its size."""

    prompts_per_round: int = field(default=256, metadata={"help": "prompts sampled anew at each round"})
    num_responses: int = field(default=2, metadata={"help": "responses a prompt; best and worst make the pair"})
    reward_model: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "training arguments of the reward model (Bradley-Terry)"}
    )

    def __post_init__(self) -> None:
        _check_least("online", 1, prompts_per_round=self.prompts_per_round)
        _check_least("online", 2, num_responses=self.num_responses)


@dataclass(frozen=True)
class EvaluateSection:
    """What the aligned policies are asked, and who judges."""

    judge: str = field(default="keyword-refusal", metadata={"help": ", ".join(known_judges()) + " (docs/judges.md)"})
    prompts: str | None = field(
        default=None, metadata={"help": "red-team prompts, a source (default: prompts held out of the preferences)"}
    )
    borderline_prompts: str | None = field(
        default=None, metadata={"help": "benign prompts that look harmful, for over-refusal"}
    )
    benign_text: str | None = field(
        default=None, metadata={"help": "preference file whose chosen answers give the perplexity (default: held out)"}
    )
    limit: int | None = field(default=None, metadata={"help": "prompts of each kind (default: all)"})
    max_new_tokens: int = field(default=128, metadata={"help": "tokens of a response"})
    temperature: float = field(default=1.0, metadata={"help": "0 is greedy"})
    batch_size: int = field(default=64, metadata={"help": "sequences generated together"})

    def __post_init__(self) -> None:
        _check_least("evaluate", 1, limit=self.limit)
        self.sampling(1, 0)  # says what is wrong with it

    def sampling(self, num_responses: int, seed: int) -> SamplingConfig:
        """How a policy answers; a prompt that is too long is cut at its start."""
        return SamplingConfig(
            num_responses=num_responses,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            batch_size=self.batch_size,
            seed=seed,
            truncation_mode="keep_end",
        )


@dataclass(frozen=True)
class Variant:
    """A system under other settings: a further row of the run's tables. What is unset is as in the run."""

    system: str = field(metadata={"help": "the system it is"})
    label: str | None = field(default=None, metadata={"help": "its name in tables (default: its own)"})
    label_noise: float | None = None
    fit: dict[str, Any] = field(default_factory=dict)
    sample: dict[str, Any] = field(default_factory=dict)
    online: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunConfig:
    """A run of the whole pipeline. Paths are relative to the folder the command is called from."""

    output_dir: str = field(metadata={"help": "the run's folder; the same command again goes on where it stopped"})
    model: str = field(default=SANDBOX, metadata={"help": "folder or hub name of a causal LM, or 'sandbox'"})
    preferences: str | None = field(
        default=None, metadata={"help": "labelled preferences, a source (docs/datasets.md)"}
    )
    prompts: str | None = field(default=None, metadata={"help": "prompts to sample for (default: the preferences')"})
    systems: tuple[str, ...] = field(default=("base", "reprdpo"), metadata={"help": ", ".join(SYSTEMS)})
    variants: dict[str, Variant] = field(
        default_factory=dict, metadata={"help": "systems under other settings, by a name of their own"}
    )
    seeds: tuple[int, ...] = field(default=(0,), metadata={"help": "seeds of the alignment stage"})
    limit: int | None = field(default=None, metadata={"help": "preference pairs to read (default: all)"})
    holdout: float = field(default=0.1, metadata={"help": "share of prompts held out of fitting and training"})
    label_noise: float = field(
        default=0.0, metadata={"help": "share of the preferences whose chosen and rejected are exchanged"}
    )
    skip_invalid: bool = field(default=False, metadata={"help": "drop pairs that cannot be used instead of stopping"})
    dtype: str = field(default="auto", metadata={"help": "auto, float32, bfloat16, float16"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that comes with the model"})
    quantization: Quantization = field(default_factory=Quantization)
    scale: Literal["demo", "tiny"] = field(default="demo", metadata={"help": "size of the sandbox world"})
    cache_dir: str | None = field(default=None, metadata={"help": "where the sandbox's base model is kept"})
    data: TokenizeConfig = field(default_factory=TokenizeConfig)
    sft: dict[str, Any] = field(default_factory=dict, metadata={"help": "training arguments of SFT"})
    fit: FitSection = field(default_factory=FitSection)
    sample: SampleSection = field(default_factory=SampleSection)
    train: dict[str, Any] = field(default_factory=dict, metadata={"help": "training arguments of every DPO system"})
    train_overrides: dict[str, dict[str, Any]] = field(
        default_factory=dict, metadata={"help": "training arguments of one system, by its name"}
    )
    online: OnlineSection = field(default_factory=OnlineSection)
    evaluate: EvaluateSection = field(default_factory=EvaluateSection)

    def __post_init__(self) -> None:
        for name in (*self.systems, *self.train_overrides):
            if name not in SYSTEMS:
                raise UserError(
                    f"systems: {name!r} is unknown{did_you_mean(name, SYSTEMS)}; known: {', '.join(SYSTEMS)}"
                )
        if not self.systems or not self.seeds:
            raise UserError("systems and seeds: each must name at least one")
        for name, items in (("systems", self.systems), ("seeds", self.seeds)):
            if len(set(items)) < len(items):
                raise UserError(f"{name}: {', '.join(map(str, items))} names one twice; name each once")
        if self.model != SANDBOX and self.preferences is None:
            raise UserError(f"preferences: missing; model {self.model!r} needs a preference file to be aligned with")
        if not 0 < self.holdout < 1:
            raise UserError(f"holdout: must be between 0 and 1, not {self.holdout}")
        if not 0 <= self.label_noise <= 0.5:
            raise UserError(f"label_noise: must be from 0 to 0.5, not {self.label_noise}")
        _check_training("train", self.train, ReprDPOConfig)
        _check_training("sft", self.sft, ReprSFTConfig)
        _check_training("online.reward_model", self.online.reward_model, RewardModelConfig)
        for system, values in self.train_overrides.items():
            _check_training(f"train_overrides.{system}", values, _trainer_config(system))
        for name in self.variants:
            self.variant(name)

    def training_arguments(self, system: str) -> dict[str, Any]:
        """``train`` with the overrides of one system over it, and what their preset gives the fields they leave out."""
        given = {**self.train, **self.train_overrides.get(system, {})}
        return preset_values(given.get("preset")) | given

    def sampling(self) -> SamplingConfig:
        """How prompts are answered; one over the limits meets what the data section says, as in training."""
        settings = {f.name: getattr(self.sample, f.name) for f in dataclasses.fields(SamplingConfig)}
        if self.data.truncation_mode in ("keep_end", "keep_start"):
            settings["truncation_mode"] = self.data.truncation_mode
        return SamplingConfig(**settings)

    def variant(self, name: str) -> "RunConfig":
        """The settings that the variant ``name`` runs under, its system the only one in them.

        Raises:
            UserError: a name that cannot be one, a system or setting that does not exist or does not fit.
        """
        variant, where = self.variants[name], f"variants.{name}"
        if not _VARIANT_NAME.fullmatch(name) or name in SYSTEMS or "-seed-" in name:
            raise UserError(
                f"{where}: a variant's name is lower-case letters, digits and any of _ . = -, and none of the "
                f"systems' ({', '.join(SYSTEMS)})"
            )
        system = variant.system
        if system not in SYSTEMS:
            raise UserError(f"{where}.system: {system!r} is unknown{did_you_mean(system, SYSTEMS)}")
        if system in ("base", "sft"):
            raise UserError(f"{where}.system: {system!r} is what all is measured against; give it a run of its own")
        _check_training(f"{where}.train", variant.train, _trainer_config(system))
        own_training = {**self.train_overrides.get(system, {}), **variant.train}
        return dataclasses.replace(
            self,
            systems=(system,),
            variants={},
            label_noise=self.label_noise if variant.label_noise is None else variant.label_noise,
            fit=override(self.fit, variant.fit, f"{where}.fit"),
            sample=override(self.sample, variant.sample, f"{where}.sample"),
            online=override(self.online, variant.online, f"{where}.online"),
            train_overrides={system: own_training} if own_training else {},
        )


def load_config(path: str | Path, **overrides: Any) -> RunConfig:
    """Read a run's YAML file; ``overrides`` that are not None replace its top-level keys.

    Raises:
        UserError: no such file, not YAML, a key that does not exist, a value of the wrong type.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; see `reprdpo run --help` for an example") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of keys, got {type(values).__name__}; see `reprdpo run --help`")
    values |= {key: value for key, value in overrides.items() if value is not None}
    try:
        return build(RunConfig, values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def build(cls: type[Any], values: dict[str, Any], where: str = "") -> Any:
    """An instance of the dataclass ``cls`` from plain values, every key and type checked."""
    hints, known = get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls) if f.init}
    _check_keys(where, values, cls)
    missing = [name for name, f in known.items() if _required(f) and name not in values]
    if missing:
        raise UserError(
            f"{_dotted(where, missing[0])}: missing; {known[missing[0]].metadata.get('help', 'is required')}"
        )
    built = {key: _convert(hints[key], value, _dotted(where, key)) for key, value in values.items()}
    try:
        return cls(**built)
    except ValueError as error:
        message = " ".join(str(error).split())
        raise UserError(f"{where}: {message}" if where else message) from None


def override(section: Any, values: Mapping[str, Any], where: str) -> Any:
    """The dataclass instance ``section`` with plain ``values`` over its own, every key and type checked."""
    cls = type(section)
    _check_keys(where, values, cls)
    hints = get_type_hints(cls)
    converted = {key: _convert(hints[key], value, _dotted(where, key)) for key, value in values.items()}
    try:
        return dataclasses.replace(section, **converted)
    except (UserError, ValueError) as error:
        raise UserError(f"{where}: {error}") from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected a mapping of keys, got {value!r}")
        return build(hint, value, where)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"{where}: expected one of {', '.join(map(repr, arguments))}, got {value!r}")
        return value
    if origin in (tuple, list, Sequence):
        items = value if isinstance(value, (list, tuple)) else [value]
        return (list if origin is list else tuple)(_convert(arguments[0], item, where) for item in items)
    if origin is dict or hint is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected a mapping of keys, got {value!r}")
        if arguments and dataclasses.is_dataclass(arguments[1]):
            return {str(key): _convert(arguments[1], item, _dotted(where, str(key))) for key, item in value.items()}
        return value
    return _convert_scalar(hint, value, where)


def _convert_union(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in choices:
        return None
    for choice in choices:
        if choice is type(None):
            continue
        try:
            return _convert(choice, value, where)
        except UserError as error:
            last = error
    raise last


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-5 as text
        except ValueError:
            pass
    elif isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    quote = " (no, off, yes and on are booleans in YAML: quote them)" if hint is str and isinstance(value, bool) else ""
    raise UserError(f"{where}: expected {getattr(hint, '__name__', hint)}, got {value!r}{quote}")


def _check_least(section: str, least: int, **values: float | None) -> None:
    """What a stage would refuse after the work of those before it."""
    for name, value in values.items():
        if value is not None and not value >= least:
            raise UserError(f"{section}.{name}: must be at least {least}, not {value}")


def _trainer_config(system: str) -> type[Any]:
    return OnlineDPOConfig if SYSTEMS[system].pairs == "online" else ReprDPOConfig


def _check_training(where: str, values: Mapping[str, Any], cls: type[Any]) -> None:
    _check_keys(where, values, cls)
    for name in values:
        if name in _OF_THE_RUN and not (name == "seed" and cls in (ReprSFTConfig, RewardModelConfig)):
            raise UserError(f"{where}.{name}: is decided for the whole run; set {_OF_THE_RUN[name]} instead")


def _check_keys(where: str, values: Mapping[str, Any], cls: type[Any]) -> None:
    known = [f.name for f in dataclasses.fields(cls) if f.init]
    for key in values:
        if key not in known:
            raise UserError(f"{_dotted(where, str(key))}: no such key{did_you_mean(str(key), known)}")


def _required(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _dotted(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
