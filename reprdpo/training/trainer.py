"""The trainer of the method: one policy forward a batch gives log-probs, hidden states and confidence.

Order of a step: forward; R of the batch's detached states; gamma from R; the cDPO loss under gamma; then R itself takes
one step of Eq. 7 from the same R, so gamma of a batch never comes from a reward that has seen it. With gradient
accumulation a "batch" is what one optimizer step sees: R is updated once, at its last micro-batch, from the rewards of
all of them, so that accumulating and a larger batch are the same training.

Shape suffixes: P pairs, S = 2P sequences (all chosen, then all rejected), T padded length, L layers, D hidden size.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from reprdpo import costs, files, ops
from reprdpo.data import PreferenceCollator, tokenize_preferences
from reprdpo.errors import UserError
from reprdpo.heads import HeadSpec, check_head, run_at_head
from reprdpo.ops import LinearPreferenceLoss
from reprdpo.ops.reference import PAIR_LOSSES
from reprdpo.reward import HiddenStateTap, HybridReward, RewardUpdater
from reprdpo.training.base import BaseTrainer, autocast_dtype, padding_id
from reprdpo.training.checkpoint import load_state, save_state
from reprdpo.training.config import ReprDPOConfig
from reprdpo.training.metrics import HISTOGRAM_FILE, ConfidenceHistogram, MetricWindow
from reprdpo.training.reference import reference_logps

STATE_FILE = "preference_state.safetensors"
REWARD_FOLDER = "reward"
_COLUMNS = (
    "chosen_input_ids",
    "chosen_response_start",
    "rejected_input_ids",
    "rejected_response_start",
    "pair_id",
    "ref_chosen_logps",
    "ref_rejected_logps",
)


class _Hybrid(NamedTuple):
    """R of a batch: rewards [P], the confidence taken from them [P], and Eq. 7 on them (a scalar)."""

    chosen: Tensor
    rejected: Tensor
    confidence: Tensor
    nll: Tensor


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
        if reward is not None:
            reward.check_base(model, allow_descendant=args.allow_reward_descendant)
        check_head(model)
        super().__init__(
            model=model,
            args=args,
            data_collator=PreferenceCollator(padding_id(processing_class, model)),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            **kwargs,
        )
        self._reference = ref_model
        self._needs_reference = PAIR_LOSSES[args.loss_type].needs_reference
        self.train_dataset = self._prepare(train_dataset, "the training data")
        self.eval_dataset = self._prepare(eval_dataset, "the evaluation data")
        self.reward = reward.to(args.device) if reward is not None else None
        self._updater = None
        if self.reward is not None and args.update_reward:
            self._updater = RewardUpdater(self.reward, lr=args.reward_learning_rate, margin=args.reward_margin)
        spread = "confidence/mean" if args.confidence_source == "reward" else None
        self._windows = {True: MetricWindow(spread), False: MetricWindow(spread)}
        self._histogram = ConfidenceHistogram()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The mean loss over the batch's pairs, Eq. 5 with gamma from Eq. 8 or fixed."""
        scored: list[_Hybrid] = []

        def loss_at_head(hidden_STD: Tensor, head: HeadSpec) -> LinearPreferenceLoss:
            confidence: float | Tensor = self.args.fixed_confidence
            if self.reward is not None:
                timed = self.costs.reward if model.training else contextlib.nullcontext()
                with timed, torch.autocast(hidden_STD.device.type, enabled=False):
                    scored.append(self._score(self.reward, tap.states, inputs))
                if self.args.confidence_source == "reward":
                    confidence = scored[0].confidence
            return ops.linear_preference_loss(
                hidden_STD,
                labels=inputs["labels"],
                ref_chosen_logp=inputs.get("ref_chosen_logps"),
                ref_rejected_logp=inputs.get("ref_rejected_logps"),
                beta=self.args.beta,
                confidence=confidence,
                loss_type=self.args.loss_type,
                scored_index=inputs["scored_index"],
                **head._asdict(),
            )

        with HiddenStateTap(model) as tap:
            result = run_at_head(
                model,
                loss_at_head,
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                use_cache=False,
            )
        hybrid = scored[0] if scored else None
        self._record(result, hybrid, training=model.training)
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

    def _prepare(self, dataset: Dataset | None, what: str) -> Dataset | None:
        """``dataset`` tokenised, with reference log-probs, and without the columns the collator has no use for."""
        if dataset is None:
            return None
        if "chosen_input_ids" not in dataset.column_names:
            if self.processing_class is None:
                raise UserError(f"processing_class: {what} is text; pass the tokenizer")
            dataset = tokenize_preferences(dataset, self.processing_class, self.args.tokenize_config(), where=what)
        if not self._needs_reference:
            dataset = dataset.select_columns([name for name in dataset.column_names if not name.startswith("ref_")])
        elif "ref_chosen_logps" not in dataset.column_names:
            dataset = self._add_reference(dataset)
        return dataset.select_columns([name for name in _COLUMNS if name in dataset.column_names])

    def _add_reference(self, dataset: Dataset) -> Dataset:
        cache_dir = self.args.reference_cache_dir or str(Path(self.args.output_dir) / "reference")
        reference = self.model if self._reference is None else self._reference.to(self.args.device)
        with costs.part("reference"), self.args.main_process_first(desc="reference log-probs"):
            return reference_logps(
                reference,
                dataset,
                pad_token_id=padding_id(self.processing_class, reference),
                batch_size=self.args.precompute_ref_batch_size,
                cache_dir=cache_dir,
                autocast_dtype=autocast_dtype(self.args),
                progress=not self.args.disable_tqdm,
            )

    def _score(self, reward: HybridReward, states: list[Tensor], inputs: dict[str, Tensor]) -> _Hybrid:
        """Gamma from R as it stands, then, in training, R's own step."""
        updater = self._updater if self.model.training else None
        if self.model.training:
            flop = costs.reward_flop(*reward.probe_weight.shape, sequences=len(states[0]), update=updater is not None)
            self.costs.count(flop, "reward")
        index_S: Tensor | None = inputs["last_token_index"]
        states = [state.detach() for state in states]
        read: list[Tensor] | Tensor = states
        if reward.metadata.pool == "mean":
            read, index_S = _mean_over_tokens(states, inputs["attention_mask"]), None
        options: dict[str, Any] = {
            "alpha": self.args.alpha_or(reward.alpha),
            "squash": reward.squash if self.args.squash is None else self.args.squash,
            "floor": self.args.confidence_floor,
            "reduce": self.args.confidence_reduce,
        }
        if updater is None:
            scored = reward.score(read, index_S, margin=self.args.reward_margin, **options)
        else:
            scored = updater.accumulate(read, index_S, **options)
            if self.accelerator.sync_gradients:
                updater.apply()
        chosen_P, rejected_P = scored.reward.chunk(2)
        return _Hybrid(chosen_P, rejected_P, scored.confidence, scored.nll)

    def _record(self, result: Any, hybrid: _Hybrid | None, *, training: bool) -> None:
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
            values |= {
                "hybrid/chosen": hybrid.chosen,
                "hybrid/rejected": hybrid.rejected,
                "hybrid/accuracies": hybrid.chosen > hybrid.rejected,
                "hybrid/margins": hybrid.chosen - hybrid.rejected,
                "hybrid/nll": hybrid.nll,
            }
            if self.args.confidence_source == "reward":
                values["confidence/mean"] = hybrid.confidence
                if training:
                    self._histogram.add(hybrid.confidence)
        self._windows[training].add(values, num_pairs=len(result.chosen_logp))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and self.reward is not None:
            self.reward.save_pretrained(Path(output_dir or self.args.output_dir) / REWARD_FOLDER)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            state = {
                "updater": None if self._updater is None else self._updater.state_dict(),
                "window": self._windows[True].state_dict(),
                "histogram": self._histogram.state_dict(),
            }
            save_state(Path(output_dir) / STATE_FILE, state)
            self._write_histogram()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        state = load_state(Path(checkpoint) / STATE_FILE)
        if self.reward is not None:
            saved = HybridReward.from_pretrained(Path(checkpoint) / REWARD_FOLDER)
            self.reward.load_state_dict(saved.state_dict())
        if self._updater is not None and state["updater"] is not None:
            self._updater.load_state_dict(state["updater"])
        self._windows[True].load_state_dict(state["window"], self.args.device)
        self._histogram.load_state_dict(state["histogram"], self.args.device)

    def _write_histogram(self) -> None:
        if self.args.should_save and self.args.confidence_source == "reward":
            files.write_json(Path(self.args.output_dir) / HISTOGRAM_FILE, self._histogram.to_json())


def _mean_over_tokens(states: list[Tensor], attention_mask_ST: Tensor) -> Tensor:
    """[S, L, D]: each layer's mean over the positions that are not padding, summed in float32."""
    real_ST1 = attention_mask_ST.bool()[:, :, None]
    sums = [torch.where(real_ST1, state, 0).sum(1, dtype=torch.float32) for state in states]
    return torch.stack([(sum_SD / real_ST1.sum(1)).to(states[0].dtype) for sum_SD in sums], dim=1)
