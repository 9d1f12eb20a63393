"""The trainer of the method: one policy forward a batch gives log-probs, hidden states and confidence.

Order of a step: forward; R of the batch's detached states; gamma from R; the cDPO loss under gamma; then R itself takes
one step of Eq. 7 from the same R, so gamma of a batch never comes from a reward that has seen it. With gradient
accumulation a "batch" is what one optimizer step sees: R is updated once, at its last micro-batch, from the rewards of
all of them, so that accumulating and a larger batch are the same training.

Shape suffixes: P pairs, S = 2P sequences (all chosen, then all rejected), B rows of T tokens, L layers, D hidden size.
"""

import contextlib
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from reprdpo import costs, ops
from reprdpo.data import PackingCollator, PreferenceCollator, tokenize_preferences
from reprdpo.errors import UserError
from reprdpo.heads import HeadSpec, check_head, run_at_head
from reprdpo.models import base_fingerprint, unwrap
from reprdpo.ops import LinearPreferenceLoss
from reprdpo.ops.reference import PAIR_LOSSES
from reprdpo.reward import HiddenStateTap, HybridReward
from reprdpo.training.adapters import with_adapters
from reprdpo.training.base import BaseTrainer, autocast_dtype, padding_id
from reprdpo.training.batches import RowLengths, row_lengths
from reprdpo.training.checkpoint import load_state, save_state
from reprdpo.training.confidence import REWARD_FOLDER, RewardConfidence, ScoredBatch, check_replicas
from reprdpo.training.config import ReprDPOConfig
from reprdpo.training.kto import LOSS_TYPE as KTO
from reprdpo.training.kto import SERVED_BY, KTOBaseline
from reprdpo.training.layout import (
    check_pair_lengths,
    indexed_states,
    loss_inputs,
    mean_over_tokens,
    model_inputs,
    packing_collator,
    set_attention,
)
from reprdpo.training.metrics import MetricWindow
from reprdpo.training.reference import reference_logps

STATE_FILE = "preference_state.safetensors"
_COLUMNS = (
    "chosen_input_ids",
    "chosen_response_start",
    "rejected_input_ids",
    "rejected_response_start",
    "pair_id",
    "ref_chosen_logps",
    "ref_rejected_logps",
)


class ReprDPOTrainer(BaseTrainer):
    """DPO whose labels carry a confidence: fixed (DPO, cDPO) or read from the policy's hidden states (the method).

    Args:
        model: the policy. It is its own reference, as it is handed over, unless ``ref_model`` is given.
        train_dataset, eval_dataset: preference data, raw (prompt, chosen, rejected) or already tokenised; reference
            log-probs are added here, before any training, unless their columns are there.
        processing_class: the tokenizer; may be None for tokenised data.
        reward: the fitted reward. It is trained in place with ``update_reward``, and saved with every checkpoint.

    Raises:
        UserError: ``confidence_source="reward"`` without a reward; a reward fitted on another base model; several GPUs
            in one process.
    """

    args: ReprDPOConfig

    def __init__(
        self,
        model: PreTrainedModel,
        args: ReprDPOConfig,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward: HybridReward | None = None,
        ref_model: PreTrainedModel | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        if args.confidence_source == "reward" and reward is None:
            raise UserError('confidence_source: "reward" needs a fitted reward; pass reward=, or set it to "fixed"')
        # It reads all weights: of each model once, as neither the reward's base nor the reference changes here.
        self._fingerprint = functools.cache(base_fingerprint)
        if reward is not None:
            allowed = args.allow_reward_descendant
            reward.check_base(model, allow_descendant=allowed, fingerprint=self._fingerprint)
        model = with_adapters(model, args)
        check_head(model)
        padded = PreferenceCollator(padding_id(processing_class, model))
        super().__init__(
            model=model,
            args=args,
            data_collator=padded,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            **kwargs,
        )
        if args.attn_implementation is not None:
            for each in (self.model, ref_model):
                if each is not None:
                    set_attention(each, args.attn_implementation)
        self.data_collator: PackingCollator = packing_collator(
            self.model, padded, packing=args.packing, max_row_tokens=args.max_row_tokens
        )
        self._reference = ref_model
        self._loss_type = SERVED_BY if args.loss_type == KTO else args.loss_type
        self._kto = KTOBaseline(args.device, self._mean_over_processes) if args.loss_type == KTO else None
        self._needs_reference = PAIR_LOSSES[self._loss_type].needs_reference
        self.reward = reward.to(args.device) if reward is not None else None
        if self.reward is not None:
            check_replicas(self.reward, self.accelerator)
        self.train_dataset = self._prepare(train_dataset, "the training data", batched=True)
        self.eval_dataset = self._prepare(eval_dataset, "the evaluation data")
        self._confidence = None if self.reward is None else RewardConfidence(self.reward, args)
        spread = "confidence/mean" if args.confidence_source == "reward" else None
        self._windows = {True: MetricWindow(spread), False: MetricWindow(spread)}

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The mean loss over the batch's pairs, Eq. 5 with gamma from Eq. 8 or fixed."""
        scored: list[ScoredBatch] = []

        def loss_at_head(hidden_BTD: Tensor, head: HeadSpec) -> LinearPreferenceLoss:
            confidence: float | Tensor = self.args.fixed_confidence
            if self._confidence is not None:
                with self.costs.reward if model.training else contextlib.nullcontext():
                    scored.append(self._score(self._confidence, tap.states, inputs))
                if self.args.confidence_source == "reward":
                    confidence = scored[0].confidence
            return ops.linear_preference_loss(
                **loss_inputs(hidden_BTD, inputs),
                ref_chosen_logp=self._reference_logp(inputs, "chosen"),
                ref_rejected_logp=self._reference_logp(inputs, "rejected"),
                beta=self.args.beta,
                confidence=confidence,
                loss_type=self._loss_type,
                **head._asdict(),
            )

        with HiddenStateTap(model) as tap:
            result = run_at_head(model, loss_at_head, **model_inputs(model, inputs))
        hybrid = scored[0] if scored else None
        if self._kto is not None:
            result = self._unmoved(self._kto, result, training=model.training)
        self._record(result, hybrid, training=model.training, counted="repeated" not in inputs)
        return (result.loss, {"loss": result.loss}) if return_outputs else result.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means since the last log; ``loss`` becomes the mean over pairs, exact across a resume."""
        if "loss" in logs:
            logs = {**logs, **self._windows[True].drain(self.accelerator.gather)}
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """As the base class; the metrics of training are there too, with the prefix."""
        window = self._windows[False]
        window.drain(self.accelerator.gather)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = window.drain(self.accelerator.gather)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class; the distribution of gamma is written at the end too."""
        output = super().train(*args, **kwargs)
        self._write_histogram()
        return output

    def _prepare(self, dataset: Dataset | None, what: str, *, batched: bool = False) -> Dataset | None:
        """``dataset`` tokenised, with reference log-probs, and without the columns the collator has no use for.

        Raises:
            UserError: with ``batched``, rows that training's batches cannot be made of; said before any forward.
        """
        if dataset is None:
            return None
        if "chosen_input_ids" not in dataset.column_names:
            if self.processing_class is None:
                raise UserError(f"processing_class: {what} is text; pass the tokenizer")
            dataset = tokenize_preferences(dataset, self.processing_class, self.args.tokenize_config(), where=what)
        check_pair_lengths(self.data_collator, dataset, what)
        lengths = row_lengths(dataset)
        if batched and lengths is not None:
            self._sampler(lengths)
        if not self._needs_reference:
            dataset = dataset.select_columns([name for name in dataset.column_names if not name.startswith("ref_")])
        elif "ref_chosen_logps" not in dataset.column_names:
            dataset = self._add_reference(dataset, lengths)
        dataset = dataset.select_columns([name for name in _COLUMNS if name in dataset.column_names])
        if batched:
            self._known_lengths = dataset, lengths
        return dataset

    def _add_reference(self, dataset: Dataset, lengths: RowLengths | None) -> Dataset:
        cache_dir = self.args.reference_cache_dir or str(Path(self.args.output_dir) / "reference")
        reference, collator = self.model, self.data_collator
        if self._reference is not None:
            reference = self._reference
            padded = PreferenceCollator(padding_id(self.processing_class, reference))
            collator = packing_collator(
                reference, padded, packing=self.args.packing, max_row_tokens=self.args.max_row_tokens
            )
        with costs.part("reference"):
            return reference_logps(
                reference,
                dataset,
                pad_token_id=padding_id(self.processing_class, reference),
                batch_size=self.args.precompute_ref_batch_size,
                cache_dir=cache_dir,
                autocast_dtype=autocast_dtype(self.args),
                device=self.args.device,
                collator=collator,
                fingerprint=self._fingerprint(unwrap(reference)),
                lengths=lengths,
                progress=not self.args.disable_tqdm and self.args.process_index == 0,
            )

    def _score(self, confidence: RewardConfidence, states: list[Tensor], inputs: dict[str, Tensor]) -> ScoredBatch:
        """Gamma from R as it stands, then, in training, R's own step."""
        training, last, index_S = self.model.training, self.accelerator.sync_gradients, inputs["last_token_index"]
        if training:
            size = confidence.reward.probe_weight.shape
            flop = costs.reward_flop(*size, sequences=len(index_S), gradients=confidence.updates)
            self.costs.count(flop + (costs.reward_step_flop(*size) if confidence.updates and last else 0), "reward")
        read = indexed_states(states, inputs)
        pooled = (mean_over_tokens(read, inputs), None) if confidence.reads_means else (read, index_S)
        return confidence.score(*pooled, training=training, last=last)

    def _reference_logp(self, inputs: dict[str, Tensor], side: str) -> Tensor | None:
        found = inputs.get(f"ref_{side}_logps")
        return found if found is None or self._kto is None else found + self._kto.z

    def _unmoved(self, kto: KTOBaseline, result: LinearPreferenceLoss, *, training: bool) -> LinearPreferenceLoss:
        """The rewards as they are without the baseline, which in training is then taken from them."""
        moved = self.args.beta * kto.z
        chosen_P, rejected_P = result.chosen_reward + moved, result.rejected_reward + moved
        if training:
            ratios_S = torch.cat([chosen_P, rejected_P]) / self.args.beta
            kto.add(ratios_S, last=self.accelerator.sync_gradients)
        return result._replace(chosen_reward=chosen_P, rejected_reward=rejected_P)

    def _mean_over_processes(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value, reduction="mean")

    def _record(self, result: Any, hybrid: ScoredBatch | None, *, training: bool, counted: bool) -> None:
        values = {
            "loss": result.loss,
            "rewards/chosen": result.chosen_reward,
            "rewards/rejected": result.rejected_reward,
            "rewards/accuracies": result.chosen_reward > result.rejected_reward,
            "rewards/margins": result.chosen_reward - result.rejected_reward,
            "logps/chosen": result.chosen_logp,
            "logps/rejected": result.rejected_logp,
        }
        if hybrid is not None:
            values |= hybrid.metrics()
            if self.args.confidence_source == "fixed":
                del values["confidence/mean"]
        self._windows[training].add(values, num_pairs=len(result.chosen_logp), counted=counted)

    def _save_companions(self, folder: Path) -> None:
        super()._save_companions(folder)
        if self.reward is not None:
            self.reward.save_pretrained(folder / REWARD_FOLDER)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        window = self._windows[True].state_dict(self.accelerator.gather)
        if self.args.should_save:
            confidence = None if self._confidence is None else self._confidence.state_dict()
            kto = None if self._kto is None else self._kto.z
            save_state(Path(output_dir) / STATE_FILE, {"window": window, "confidence": confidence, "kto": kto})
            self._write_histogram()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        state = load_state(Path(checkpoint) / STATE_FILE)
        if self._confidence is not None:
            self._confidence.load_reward(Path(checkpoint) / REWARD_FOLDER)
            self._confidence.load_state_dict(state["confidence"])
        if self._kto is not None and state.get("kto") is not None:
            self._kto.z = state["kto"].to(self.args.device)
        if self.args.process_index == 0:  # the sums of all processes; the others' start anew
            self._windows[True].load_state_dict(state["window"], self.args.device)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self._confidence is not None:
            self._confidence.load_reward(Path(self.state.best_model_checkpoint) / REWARD_FOLDER)

    def _write_histogram(self) -> None:
        by_reward = self.args.confidence_source == "reward"
        if self._confidence is not None and by_reward and self.args.should_save:
            self._confidence.write_histogram(self.args.output_dir)
