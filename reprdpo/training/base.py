"""What every trainer here adds to transformers' own: balanced batches, whole checkpoints, metrics.jsonl."""

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer import SCHEDULER_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.training_args import ParallelMode

from reprdpo import files, models
from reprdpo.errors import UserError
from reprdpo.training.adapters import check_trainable
from reprdpo.training.batches import (
    BalancedBatchSampler,
    BatchLoader,
    EvaluationLoader,
    EvaluationSampler,
    RowLengths,
    row_lengths,
)
from reprdpo.training.checkpoint import (
    ARGUMENTS_FILE,
    check_resumable,
    is_whole,
    kind_of,
    last_checkpoint,
    load_sharded_model,
    load_sharded_optimizer,
)
from reprdpo.training.config import BaseConfig
from reprdpo.training.metrics import LastStep, MetricsFile, MetricWindow, ProgressBar, StepCosts


class BaseTrainer(Trainer):
    """A :class:`transformers.Trainer` whose subclasses compute a mean loss per batch themselves.

    The loss of an optimizer step is the mean over all its items (pairs, here), whichever process, accumulated batch or
    forward they came in.

    Raises:
        UserError: several GPUs in one process, one process alone under FSDP, or what transformers refuses.
    """

    def __init__(
        self,
        model: nn.Module,
        args: BaseConfig,
        *,
        callbacks: Sequence[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        if args.n_gpu > 1:
            raise UserError(
                f"{args.n_gpu} GPUs in one process: start with torchrun, or set CUDA_VISIBLE_DEVICES to one"
            )
        if args.fsdp and args.parallel_mode != ParallelMode.DISTRIBUTED:
            raise UserError("fsdp: shards over processes, and this is one alone; start with torchrun, or leave it out")
        check_trainable(model)
        if args.disable_dropout:
            disable_dropout(model)
        self.costs = StepCosts(args.device)
        own = [self.costs, LastStep(), MetricsFile()]
        try:
            super().__init__(model=model, args=args, callbacks=[*own, *(callbacks or [])], **kwargs)
        except ValueError as error:  # how transformers refuses settings
            raise UserError(" ".join(str(error).split())) from error
        # accelerate drops FSDP without a word where it cannot serve it.
        asked = args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
        if asked and not self.is_fsdp_enabled:
            raise UserError("fsdp: needs a launcher and GPUs (accelerate shards over no CPUs); leave FSDP out here")
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.add_callback(ProgressBar())
        # The losses below are means of a batch, which training_step turns into shares of a mean over the step.
        self.model_accepts_loss_kwargs = False
        self._decoder_size, self._head_size = self._sizes()
        self._evaluated = MetricWindow()
        # Of a data set that is prepared here, not to be read again.
        self._known_lengths: tuple[Dataset | None, RowLengths | None] = (None, None)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; ``resume_from_checkpoint=True`` goes on from the newest whole checkpoint of the output folder."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise UserError(f"{self.args.output_dir}: no whole checkpoint to resume from; train without resuming")
        if resume_from_checkpoint and not is_whole(resume_from_checkpoint):
            raise UserError(f"{resume_from_checkpoint}: not a whole checkpoint; resume from an earlier one")
        if resume_from_checkpoint:
            check_resumable(
                str(resume_from_checkpoint),
                {name: value for name, value in self._arguments().items() if name in self.args.decisive_fields()},
                fsdp=self.is_fsdp_enabled,
                deepspeed=self.is_deepspeed_enabled,
            )
        output = super().train(resume_from_checkpoint or None, *args, **kwargs)
        self.costs.drain()
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what a step cost since the last log."""
        super().log({**logs, **self.costs.drain()} if "loss" in logs else logs, start_time)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches shared out evenly over the processes and split within ``max_tokens_per_device``."""
        known, lengths = self._known_lengths
        if known is not self.train_dataset:
            lengths = row_lengths(self.train_dataset)
        if lengths is None:
            return super().get_train_dataloader()
        return BatchLoader(self.train_dataset, self._sampler(lengths), self.data_collator, **self._loading())

    def _sampler(self, lengths: RowLengths) -> BalancedBatchSampler:
        """This process's batches of rows of these ``lengths``.

        Raises:
            UserError: a row over the token budget, or too few rows for the processes.
        """
        strategy = self.args.train_sampling_strategy
        return BalancedBatchSampler(
            lengths.tokens,
            self._train_batch_size,
            sequences=lengths.sequences,
            max_tokens=self.args.max_tokens_per_device,
            num_replicas=self.args.world_size,
            rank=self.args.process_index,
            seed=None if strategy == "sequential" else self.args.data_seed,
            drop_last=self.args.dataloader_drop_last,
            group_by_length=strategy == "group_by_length",
        )

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader[Any]:
        """Batches that bring every row to one process alone, whichever the number of processes."""
        found = self.eval_dataset if eval_dataset is None else eval_dataset
        data = self.eval_dataset[found] if isinstance(found, str) else found
        if row_lengths(data) is None:
            return super().get_eval_dataloader(eval_dataset)
        sampler = EvaluationSampler(
            len(data),
            self.args.eval_batch_size,
            num_replicas=self.args.world_size,
            rank=self.args.process_index,
        )
        return EvaluationLoader(data, sampler, self.data_collator, **self._loading())

    def _loading(self) -> dict[str, Any]:
        return {
            "num_workers": self.args.dataloader_num_workers,
            "pin_memory": self.args.dataloader_pin_memory,
            "persistent_workers": self.args.dataloader_persistent_workers,
            "prefetch_factor": self.args.dataloader_prefetch_factor,
        }

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As the base class; the loss is also kept, to be averaged over all items alike."""
        output = super().prediction_step(model, inputs, *args, **kwargs)
        counted = "repeated" not in inputs
        self._evaluated.add({"loss": output[0]}, max(self.num_items(inputs), 1), counted=counted)
        return output

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """As the base class, the loss a mean over the items of all processes, each once."""
        self._evaluated.drain(self.accelerator.gather)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self._evaluated.drain(self.accelerator.gather)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The batches of one optimizer step, and how many items they hold on all processes."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        return batches, self._items_everywhere(
            sum(self.num_items(one) for batch in batches for one in _forwards(batch))
        )

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Forward and backward over a batch, in one go or in several."""
        losses, forwards, last_batch = [], _forwards(inputs), self.accelerator.sync_gradients
        for number, batch in enumerate(forwards, start=1):
            last = number == len(forwards)
            self.accelerator.gradient_state._set_sync_gradients(last_batch and last)
            self.costs.count(self.floating_point_ops(batch), "policy")
            if num_items_in_batch is not None:
                # The base class divides the loss by this. Gradients are then averaged over processes.
                mine = self.num_items(batch) * self.args.world_size
                self.current_gradient_accumulation_steps = num_items_in_batch / max(mine, 1)
            # DeepSpeed is told by the flag above.
            at_once = last or self.accelerator.distributed_type == DistributedType.DEEPSPEED
            with contextlib.nullcontext() if at_once else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, batch, num_items_in_batch, *args, **kwargs))
        return torch.stack(losses).sum()

    def num_items(self, batch: dict[str, Any]) -> int:
        """What the loss is a mean over: the pairs of a forward."""
        return len(batch["pair_id"])

    def _items_everywhere(self, items: int) -> Any:
        """The sum of ``items`` over all processes, which hold equally many pairs."""
        return items * self.args.world_size

    def floating_point_ops(self, inputs: Any) -> int:
        """Of forward and backward over a batch: 6 FLOP a token and parameter, the head's on scored tokens only."""
        return sum(self._flop(batch) for batch in _forwards(inputs))

    def _flop(self, batch: dict[str, Any]) -> int:
        scored = batch["scored_index"].numel() if "scored_index" in batch else 0
        return 6 * (self._decoder_size * batch["input_ids"].numel() + self._head_size * scored)

    def _sizes(self) -> tuple[int, int]:
        """The parameters of decoder and head that multiply a token."""
        return models.matmul_parameters(models.decoder(self.model)), models.output_head(self.model).weight.numel()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # The trainer state marks a checkpoint as whole: an old one must not vouch for files being rewritten.
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            (folder / "trainer_state.json").unlink(missing_ok=True)
        with files.disk_errors(folder):
            super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the whole model; within a checkpoint that FSDP writes in shards, only what goes with it."""
        super().save_model(output_dir, _internal_call)
        if self.is_fsdp_enabled and "FULL" not in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            if not _internal_call:
                self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
            elif self.args.should_save:
                self._save_companions(Path(output_dir or self.args.output_dir))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        size = sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())
        with models.progress_bars(size):
            super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        self._save_companions(folder)

    def _save_companions(self, folder: Path) -> None:
        """What is written beside the weights, by the main process."""
        files.write_json(folder / ARGUMENTS_FILE, self._arguments())

    def _arguments(self) -> dict[str, Any]:
        """The settings as JSON has them, and how many rows an optimizer step takes on all processes."""
        rows = self._train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        return {**json.loads(self.args.to_json_string()), "global_batch_size": rows}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if kind_of(resume_from_checkpoint) == "sharded" and not self.is_fsdp_enabled:
            load_sharded_model(model or self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or kind_of(checkpoint) != "sharded" or self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_sharded_optimizer(self.model, self.optimizer.optimizer, checkpoint)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))


def _forwards(inputs: Any) -> list[dict[str, Any]]:
    """The forwards of a batch: what :class:`BatchLoader` gives, or the batch itself from any other loader."""
    return inputs if isinstance(inputs, list) else [inputs]


def disable_dropout(model: nn.Module) -> None:
    """Set the dropout probabilities of ``model`` to 0: of dropout modules and of layers that hold one as a number."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def padding_id(processing_class: Any, model: nn.Module) -> int:
    """The id that fills the end of shorter rows; which one it is changes nothing, masks decide."""
    candidates = [getattr(processing_class, "pad_token_id", None), getattr(processing_class, "eos_token_id", None)]
    return next((int(candidate) for candidate in candidates if candidate is not None), 0)


def autocast_dtype(args: BaseConfig) -> torch.dtype | None:
    """The dtype that training under ``args`` autocasts its forward to, if any."""
    if args.bf16:
        return torch.bfloat16
    return torch.float16 if args.fp16 else None
