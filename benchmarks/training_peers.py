"""One training run to put side by side: the same model, pairs, optimizer and precision under this trainer and TRL's.

Pairs come as tokens with their reference log-probs, so that a step is all that is left to do. Token ids and weights are
random: time does not depend on them.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tokenizers
import torch
from datasets import Dataset
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainerCallback

from benchmarks.device import PeakMemory, synchronise
from benchmarks.harness import import_peer
from reprdpo import models
from reprdpo.reward import HybridReward
from reprdpo.training import ReprDPOConfig, ReprDPOTrainer
from reprdpo.training.reference import reference_logps

BETA = 0.1
PARTS = ("decoder forward", "reward", "head forward", "head backward", "decoder backward", "optimizer", "other")


@dataclass(frozen=True)
class Pairs:
    """Tokens of a pair's two sequences, a number a pair; ``share`` of each is the prompt."""

    lengths: tuple[int, ...]
    share: float

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """In both sequences of every pair, without padding."""
        return 2 * sum(self.lengths)

    @property
    def scored(self) -> int:
        return 2 * sum(length - self._prompt(length) for length in self.lengths)

    def _prompt(self, length: int) -> int:
        return round(self.share * length)

    def dataset(self, vocabulary: int) -> Dataset:
        """Columns of ReprDPOTrainer, without the reference log-probs."""
        generator = torch.Generator().manual_seed(0)

        def draw(count: int) -> list[int]:
            ids: list[int] = torch.randint(3, vocabulary, (count,), generator=generator).tolist()
            return ids

        rows = []
        for number, length in enumerate(self.lengths):
            start = self._prompt(length)
            prompt = draw(start)
            row: dict[str, Any] = {"pair_id": number}
            for side in ("chosen", "rejected"):
                row[f"{side}_input_ids"] = prompt + draw(length - start)
                row[f"{side}_response_start"] = start
            rows.append(row)
        return Dataset.from_list(rows)


@dataclass(frozen=True)
class Run:
    """What both trainers are told."""

    pairs: Pairs
    steps: int
    bf16: bool = False
    learning_rate: float = 1e-5

    def arguments(self, folder: str) -> dict[str, Any]:
        return {
            "output_dir": folder,
            "max_steps": self.steps,
            "per_device_train_batch_size": len(self.pairs),
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": "constant",
            "optim": "adamw_torch_fused",
            "beta": BETA,
            "bf16": self.bf16,
            "disable_dropout": True,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": not torch.cuda.is_available(),
            "disable_tqdm": True,
        }


@dataclass
class Steps:
    """What a run took: a number a step, the first of which also allocates the optimizer's state."""

    losses: list[float]
    parts: list[dict[str, float]]
    peak_bytes: int
    batch_tokens: int

    @property
    def seconds(self) -> list[float]:
        """Of each step but the first."""
        return [sum(parts.values()) for parts in self.parts[1:]]

    def median_parts(self) -> dict[str, float]:
        names = [name for name in PARTS if any(parts.get(name) for parts in self.parts)]
        return {name: statistics.median(parts.get(name, 0.0) for parts in self.parts[1:]) for name in names}


def with_reference(dataset: Dataset, model: nn.Module, *, bf16: bool) -> Dataset:
    return reference_logps(
        model,
        dataset,
        pad_token_id=0,
        batch_size=2 * len(dataset),
        autocast_dtype=torch.bfloat16 if bf16 else None,
        progress=False,
    )


def ours(
    run: Run, model: LlamaForCausalLM, dataset: Dataset, folder: str, *, reward: bool = False, **options: Any
) -> Trainer:
    """With the reward gamma goes all its way and then has a floor of 1, so that the loss stays DPO's."""
    source: dict[str, Any] = {"confidence_source": "fixed"}
    if reward:
        source = {"confidence_source": "reward", "confidence_floor": 1.0}
    return ReprDPOTrainer(
        model=model,
        args=ReprDPOConfig(**run.arguments(folder), **source, **options),
        train_dataset=dataset,
        reward=_random_reward(model) if reward else None,
    )


def trl(run: Run, model: LlamaForCausalLM, dataset: Dataset, folder: str) -> Trainer:
    peer = import_peer("trl")

    class PreparedDPOTrainer(peer.DPOTrainer):  # type: ignore[name-defined]
        """Takes tokens and reference log-probs as they come."""

        def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
            return dataset

        def _precompute_ref_logps(self, dataset: Dataset, *_: Any) -> Dataset:
            return dataset

    trainer: Trainer = PreparedDPOTrainer(
        model=model,
        args=peer.DPOConfig(
            **run.arguments(folder), max_length=None, precompute_ref_log_probs=True, remove_unused_columns=False
        ),
        train_dataset=dataset.map(_trl_row, remove_columns=[n for n in dataset.column_names if "ref_" not in n]),
        processing_class=_tokenizer(),
    )
    return trainer


def train(
    build: Callable[..., Trainer],
    run: Run,
    config: LlamaConfig,
    device: str,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Steps:
    """``run.steps`` steps of a freshly seeded model under the trainer that ``build`` makes."""
    with tempfile.TemporaryDirectory() as folder:
        model = seeded_model(config, device, dtype)
        dataset = with_reference(run.pairs.dataset(config.vocab_size), model, bf16=run.bf16)
        trainer = build(run, model, dataset, folder, **options)
        clock = _Clock(trainer, device)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Steps(losses, clock.parts[: run.steps], clock.memory.bytes, clock.batch_tokens)


def loss_error(losses: list[float], expected: list[float]) -> float:
    """The largest relative difference of two runs' losses; NaN counts."""
    return max(abs(a - b) / abs(b) if math.isfinite(a) else math.nan for a, b in zip(losses, expected, strict=True))


def seeded_model(config: LlamaConfig, device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)


class _Clock(TrainerCallback):
    """Tells the parts of a trainer's steps apart, and takes the memory of the last one.

    A step ends where the next begins: logging and loading its batch are "other". Log-probs and loss are the head's,
    whose backward ends when the decoder's last states have their gradient.
    """

    def __init__(self, trainer: Trainer, device: str) -> None:
        self.parts: list[dict[str, float]] = [{}]
        self.batch_tokens = 0
        self.memory = PeakMemory(device)
        self._device = device
        self._last = 0.0
        self._wrap(trainer, "compute_loss", "head forward")
        self._wrap(trainer, "training_step", "decoder backward")
        decoder = models.decoder(trainer.model)
        decoder.register_forward_pre_hook(self._embeds, with_kwargs=True)
        decoder.register_forward_hook(self._decoded)
        trainer.add_callback(self)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._last = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == state.max_steps - 1:
            self.memory.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._mark("optimizer")
        if state.global_step == state.max_steps:
            self.memory.__exit__(None, None, None)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if reward := logs.get("cost/reward_seconds"):
            self.parts[-1]["reward"] = reward
            self.parts[-1]["head forward"] -= reward
        if "loss" in logs:
            self._mark("other")
            self.parts.append({})

    def _wrap(self, trainer: Trainer, name: str, part: str) -> None:
        method = getattr(trainer, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            self._mark(part)
            return result

        setattr(trainer, name, timed)

    def _embeds(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.batch_tokens = kwargs["input_ids"].numel()
        self._mark("other")

    def _decoded(self, decoder: nn.Module, args: Any, output: Any) -> None:
        self._mark("decoder forward")
        output.last_hidden_state.register_hook(lambda _: self._mark("head backward"))

    def _mark(self, part: str) -> None:
        """What was done since the last mark is ``part``'s."""
        synchronise(self._device)
        now = time.perf_counter()
        self.parts[-1][part] = self.parts[-1].get(part, 0.0) + now - self._last
        self._last = now


def _random_reward(model: LlamaForCausalLM) -> HybridReward:
    layers, width = model.config.num_hidden_layers, model.config.hidden_size
    generator = torch.Generator().manual_seed(0)
    probe, gate = (torch.randn(layers, width, generator=generator) / width for _ in range(2))
    return HybridReward(probe, torch.zeros(layers), gate, torch.zeros(layers))


def _trl_row(row: dict[str, Any]) -> dict[str, Any]:
    start = row["chosen_response_start"]
    return {
        "prompt_ids": row["chosen_input_ids"][:start],
        "chosen_ids": row["chosen_input_ids"][start:],
        "rejected_ids": row["rejected_input_ids"][start:],
    }


def _tokenizer() -> PreTrainedTokenizerFast:
    """TRL asks for one, whatever the data."""
    words = tokenizers.models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
