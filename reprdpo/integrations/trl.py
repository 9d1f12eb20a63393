"""The method in a TRL script: ``RepresentationDPOTrainer`` in place of ``trl.DPOTrainer``, and ``reward=``.

Data, collator, reference model, schedule, checkpoints and the names of metrics stay TRL's. What is computed from a
batch is ours: one policy forward gives the log-probs, fused at the head, and the hidden states that gamma is read from.

Shape suffixes: P pairs, S = 2P sequences (all chosen, then all rejected), T padded length, D hidden size.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from accelerate.utils.operations import recursively_apply
from torch import Tensor, nn
from transformers import ProcessorMixin

from reprdpo import ops
from reprdpo.errors import UserError
from reprdpo.heads import HeadSpec, check_head, run_at_head
from reprdpo.models import unwrap
from reprdpo.ops import LinearPreferenceLoss
from reprdpo.reward import HiddenStateTap, HybridReward
from reprdpo.training.checkpoint import load_state, save_state
from reprdpo.training.confidence import REWARD_FOLDER, RewardConfidence, ScoredBatch, check_replicas
from reprdpo.training.config import ConfidenceConfig
from reprdpo.training.layout import mean_over_tokens
from reprdpo.training.metrics import MetricWindow

try:
    from trl import DPOConfig, DPOTrainer
except ModuleNotFoundError as error:
    if error.name != "trl":
        raise
    raise ModuleNotFoundError(
        "reprdpo.integrations.trl needs TRL, which is not installed: pip install 'reprdpo[trl]'", name="trl"
    ) from None

STATE_FILE = "representation_state.safetensors"
# TRL's names whose losses are the same here; the others have no flipped form, or are not made of pairs.
LOSS_TYPES = ("sigmoid", "ipo", "hinge", "robust", "apo_zero", "apo_down")
_NOT_THE_MODELS = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")


@dataclass
class RepresentationDPOConfig(ConfidenceConfig, DPOConfig):
    """``trl.DPOConfig`` with the settings of the reward and of gamma; with a plain ``DPOConfig`` they have defaults."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_confidence()


class RepresentationDPOTrainer(DPOTrainer):
    """``trl.DPOTrainer`` whose labels carry a confidence: ``1 - label_smoothing``, or with ``reward`` its gamma.

    Without a reward the losses are TRL's own at ``label_smoothing=0``; above 0 it is conservative DPO, which TRL's
    sigmoid, hinge, ipo and apo losses leave out. With one, each pair's gamma is read from the hidden states of the
    policy's own forward, at the response's last EOS or, where there is none, its last token. In evaluation each pair
    counts once, whatever the number of processes; of a stream, whose length nobody knows, some of the last batch twice.

    Args:
        args, kwargs: as ``trl.DPOTrainer`` takes them. ``args=`` may be a :class:`RepresentationDPOConfig`.
        reward: a fitted :class:`~reprdpo.reward.HybridReward`, or the folder of a saved one. It is trained in place
            unless ``update_reward`` is off, saved with the model and every checkpoint, and restored on resuming.

    Raises:
        UserError: settings of TRL's that have no meaning under a confidence or that this loss does not compute, a
            reward fitted on another base model, a model whose head the ops cannot serve, a vision-language model.
    """

    _precompute_model_hash: Any
    _tag_names: ClassVar = ["trl", "dpo", "reprdpo"]
    _name = "Representation DPO"
    _paper: ClassVar = {
        "title": "Representation-based Reward Modeling for Efficient Safety Alignment of Large Language Model",
        "id": "2503.10093",
    }

    def __init__(self, *args: Any, reward: HybridReward | str | Path | None = None, **kwargs: Any) -> None:
        given = dict(zip(("model", "ref_model", "args"), args, strict=False)) | kwargs
        _check_config(given.get("args"), with_reward=reward is not None)
        _check_processor(given.get("processing_class"))
        self.reward = HybridReward.from_pretrained(reward) if isinstance(reward, (str, Path)) else reward
        self._checked = False
        if isinstance(given.get("model"), nn.Module):
            self._check_model(given["model"], given.get("args"))
        super().__init__(*args, **kwargs)
        self._check_model(self.model, self.args)
        spread = None
        self._confidence: RewardConfidence | None = None
        if self.reward is not None:
            check_replicas(self.reward.to(self.args.device), self.accelerator)
            self._confidence = RewardConfidence(self.reward, _confidence_config(self.args))
            spread = "confidence/mean"
        self._windows = {"train": MetricWindow(spread), "eval": MetricWindow(spread)}
        self._tokens = torch.zeros((), dtype=torch.int64, device=self.args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The mean loss over the batch's pairs, each under its confidence, plus TRL's auxiliary loss for mixtures."""
        everything, counted = inputs, True
        if not self.model.training:
            inputs, counted = self._not_yet_seen(inputs)
        batch = _for_the_model(inputs)
        forward = {**batch, "use_cache": False} | ({"output_router_logits": True} if self.aux_loss_enabled else {})
        labels_ST = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        ref_chosen_P, ref_rejected_P = self._reference(inputs)
        scored: list[ScoredBatch] = []

        def loss_at_head(hidden_STD: Tensor, head: HeadSpec) -> LinearPreferenceLoss:
            confidence: float | Tensor = 1.0 - self.args.label_smoothing
            if tap is not None:
                scored.append(self._score(tap.states, inputs))
                confidence = scored[0].confidence
            return ops.linear_preference_loss(
                hidden_STD[:, -labels_ST.shape[1] :],  # prompt-learning adapters put virtual tokens before
                labels=labels_ST,
                shift=True,
                ref_chosen_logp=ref_chosen_P,
                ref_rejected_logp=ref_rejected_P,
                beta=self.beta,
                confidence=confidence,
                loss_type=self.loss_types,
                loss_weights=self.loss_weights,
                return_stats=True,
                **head._asdict(),
            )

        with _tapped(model, self._confidence) as tap, _outputs(model) as outputs:
            result = run_at_head(model, loss_at_head, **forward)
        loss, aux_loss = result.loss, None
        if self.aux_loss_enabled:
            aux_loss = outputs[0].aux_loss
            loss = loss + self.router_aux_loss_coef * aux_loss
        result = result._replace(loss=loss)
        self._record(result, (ref_chosen_P, ref_rejected_P), inputs, scored, aux_loss, counted=counted)
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**_for_the_model(everything), use_cache=False)

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """As TRL, by the ops that the policy's own come from, so that equal models have equal log-probs."""

        def fused(*, labels: Tensor, fused_lm_head: bool, **batch: Any) -> SimpleNamespace:
            def use(hidden_STD: Tensor, head: HeadSpec) -> Tensor:
                hidden_STD = hidden_STD[:, -labels.shape[1] : -1]
                logps = ops.linear_logprob(hidden_STD, labels=labels[:, 1:], **head._asdict())
                assert isinstance(logps, Tensor)
                return logps

            return SimpleNamespace(log_probs=run_at_head(model, use, **batch))

        chosen_P, rejected_P = super().compute_ref_log_probs(fused, inputs)
        return chosen_P, rejected_P

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As TRL, from means over all pairs, kept on the device until now; ``loss`` too is exact across a resume."""
        mode = "train" if self.model.training else "eval"
        means = self._windows[mode].drain(self.accelerator.gather)
        if means:
            means["num_tokens"] = self._count_tokens()
            loss = means.pop("loss")
            if "loss" in logs:
                logs["loss"] = loss
        self._metrics[mode].update({name: [value] for name, value in means.items()})
        super().log(logs, start_time)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class; the distribution of gamma is written at the end too."""
        output = super().train(*args, **kwargs)
        if self._confidence is not None and self.args.should_save:
            self._confidence.write_histogram(self.args.output_dir)
        return output

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """As TRL; what ``compute_metrics`` gets is then gathered by sequences, each once."""
        output = super().prediction_step(*args, **kwargs)
        self.gather_function: Callable[[Any], Any] = self._gather_losses
        return output

    def _gather_losses(self, losses: Tensor) -> Any:
        """What the evaluation's loop gathers first; inputs, logits and labels follow."""
        self.gather_function = self._gather_sequences
        return self.accelerator.gather_for_metrics(losses)

    def _gather_sequences(self, data: Any) -> Any:
        """Tensors of S rows from all processes, without the pairs that accelerate repeats to fill up the last batch.

        Its own ``gather_for_metrics`` counts pairs and cuts rows, and so would drop responses, on one process too.
        """
        state, processes = self.accelerator.gradient_state, self.accelerator.num_processes

        def each_once(rows: Tensor) -> Tensor:
            if not state.end_of_dataloader or state.remainder <= 0:
                return rows
            pairs = len(rows) // (2 * processes)
            counted = torch.arange(processes * pairs, device=rows.device).view(processes, 1, pairs) < state.remainder
            return rows[counted.expand(-1, 2, -1).flatten()]

        return recursively_apply(each_once, self.accelerator.gather(data))

    def _not_yet_seen(self, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
        """The pairs of a batch of an evaluation without those that accelerate repeats to fill up the last one.

        Where there are no others it is the first, since collectives in a forward must meet; it is not to be counted.
        """
        state, pairs = self.accelerator.gradient_state, len(inputs["input_ids"]) // 2
        if not state.end_of_dataloader or state.remainder <= 0:
            return inputs, True
        own = state.remainder - pairs * self.accelerator.process_index
        if own >= pairs:
            return inputs, True
        return _first_pairs(inputs, pairs, max(own, 1)), own > 0

    def _reference(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        if self.precompute_ref_logps:
            return inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        return self.compute_ref_log_probs(self.ref_model or self.model, inputs)

    def _score(self, states: list[Tensor], inputs: Mapping[str, Tensor]) -> ScoredBatch:
        assert self._confidence is not None
        mask_ST = inputs["attention_mask"]
        position_T = torch.arange(mask_ST.shape[1], device=mask_ST.device)
        index_S = self._last_read(inputs, position_T)
        read = [state[:, -mask_ST.shape[1] :] for state in states]
        pooled: tuple[list[Tensor] | Tensor, Tensor | None] = read, index_S
        if self._confidence.reads_means:
            pooled = mean_over_tokens(read, {"attention_mask": mask_ST.bool() & (position_T <= index_S[:, None])}), None
        return self._confidence.score(*pooled, training=self.model.training, last=self.accelerator.sync_gradients)

    def _last_read(self, inputs: Mapping[str, Tensor], position_T: Tensor) -> Tensor:
        """The last EOS of each response, where rewards are fitted (chat templates may go on), or the last token."""
        last_S = ops.last_token_index(inputs["attention_mask"])
        eos = getattr(self.processing_class, "eos_token_id", None)
        if eos is None:
            return last_S
        is_eos_ST = (inputs["input_ids"] == eos) & inputs["completion_mask"].bool()
        last_eos_S = torch.where(is_eos_ST, position_T, -1).amax(1)
        return torch.where(last_eos_S >= 0, last_eos_S, last_S)

    def _record(
        self,
        result: LinearPreferenceLoss,
        reference: tuple[Tensor, Tensor],
        inputs: Mapping[str, Tensor],
        scored: list[ScoredBatch],
        aux_loss: Tensor | None,
        *,
        counted: bool,
    ) -> None:
        assert result.stats is not None
        tokens_S = inputs["completion_mask"][:, 1:].sum(1)
        chosen_tokens_P, rejected_tokens_P = tokens_S.chunk(2)
        chosen_logit_P, rejected_logit_P = result.stats.mean_logit.chunk(2)
        chosen_reward_P = self.beta * (result.chosen_logp - reference[0])
        rejected_reward_P = self.beta * (result.rejected_logp - reference[1])
        values = {
            "loss": result.loss,
            "entropy": _token_mean(result.stats.entropy, tokens_S),
            "logits/chosen": _token_mean(chosen_logit_P, chosen_tokens_P),
            "logits/rejected": _token_mean(rejected_logit_P, rejected_tokens_P),
            "mean_token_accuracy": _token_mean(result.stats.top1_accuracy.chunk(2)[0], chosen_tokens_P),
            "rewards/chosen": chosen_reward_P,
            "rewards/rejected": rejected_reward_P,
            "rewards/accuracies": chosen_reward_P > rejected_reward_P,
            "rewards/margins": chosen_reward_P - rejected_reward_P,
            "logps/chosen": result.chosen_logp,
            "logps/rejected": result.rejected_logp,
        }
        if aux_loss is not None:
            values["aux_loss"] = aux_loss
        for batch in scored:
            values |= batch.metrics()
        if self.model.training:
            self._tokens += inputs["attention_mask"].sum()
        mode = "train" if self.model.training else "eval"
        self._windows[mode].add(values, num_pairs=len(result.chosen_logp), counted=counted)

    def _count_tokens(self) -> int:
        """Tokens trained on so far, over all processes."""
        self._total_train_tokens += int(self.accelerator.gather(self._tokens[None]).sum())
        self._tokens.zero_()
        total: int = self._total_train_tokens
        return total

    def _check_model(self, model: nn.Module, args: Any) -> None:
        """Refuse a model that the reward or the ops cannot serve, once, before anything is computed with it."""
        if self._checked:
            return
        if self.reward is not None:
            allowed = _confidence_config(args).allow_reward_descendant
            self.reward.check_base(model, allow_descendant=allowed)
        _check_processor(getattr(self, "processing_class", None))
        check_head(model)
        self._checked = True

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        # A model given by name is loaded by now, and nothing has been computed yet.
        self._check_model(self.model, self.args)
        if not isinstance(self._precompute_model_hash, tuple):  # TRL's cache knows weights and data alone
            precision = (self.args.bf16, self.args.fp16, self.args.max_length, self.args.truncation_mode)
            self._precompute_model_hash = (self._precompute_model_hash, "reprdpo", *precision)
        return super()._precompute_ref_logps(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and self.reward is not None:
            self.reward.save_pretrained(Path(output_dir or self.args.output_dir) / REWARD_FOLDER)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        tokens = self._count_tokens()
        window = self._windows["train"].state_dict(self.accelerator.gather)
        if not self.args.should_save:
            return
        state: dict[str, Any] = {"window": window, "tokens": tokens}
        if self._confidence is not None:
            state["confidence"] = self._confidence.state_dict()
            self._confidence.write_histogram(self.args.output_dir)
        save_state(Path(output_dir) / STATE_FILE, state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        has_reward = (Path(checkpoint) / REWARD_FOLDER).is_dir()
        if has_reward != (self._confidence is not None):
            cure = "pass reward=" if has_reward else "resume it without a reward, or start afresh with one"
            raise UserError(f"{checkpoint}: was trained {'with' if has_reward else 'without'} a reward; {cure}")
        if not (has_reward or (Path(checkpoint) / STATE_FILE).is_file()):  # a checkpoint of TRL's own trainer
            return
        state = load_state(Path(checkpoint) / STATE_FILE)
        if self.accelerator.is_main_process:  # it holds the sums of all
            self._windows["train"].load_state_dict(state["window"], self.args.device)
        self._total_train_tokens = state["tokens"]
        if self._confidence is not None:
            self._confidence.load_reward(Path(checkpoint) / REWARD_FOLDER)
            self._confidence.load_state_dict(state["confidence"])

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self._confidence is not None:
            self._confidence.load_reward(Path(self.state.best_model_checkpoint) / REWARD_FOLDER)


def _check_config(args: Any, *, with_reward: bool) -> None:
    """Refuse what TRL's trainer would do and this one cannot, each with its cure."""
    if args is None:
        return
    for loss_type in args.loss_type:
        if loss_type not in LOSS_TYPES:
            raise UserError(
                f"loss_type: {loss_type!r} has no form under a confidence here; choose from {', '.join(LOSS_TYPES)}, "
                "or train it with trl.DPOTrainer"
            )
    smoothing = args.label_smoothing
    if with_reward and smoothing != 0:
        raise UserError(f"label_smoothing: {smoothing}, but the reward says how sure each label is; set it to 0")
    if with_reward and "robust" in args.loss_type:
        raise UserError("loss_type: 'robust' needs one known label noise; take 'sigmoid' with a reward")
    allowed = smoothing < 0.5 if "robust" in args.loss_type else smoothing <= 1
    if not (allowed and smoothing >= 0):
        limits = "from 0 to below 0.5 with 'robust'" if "robust" in args.loss_type else "from 0 to 1"
        raise UserError(f"label_smoothing: got {smoothing!r}, expected a number {limits}")
    unset = {"ld_alpha": None, "f_divergence_type": "reverse_kl", "use_weighting": False}
    for name, default in unset.items():
        if getattr(args, name) != default:
            raise UserError(
                f"{name}: {getattr(args, name)!r} is not computed by the fused loss; leave it at {default!r}, or train "
                "with trl.DPOTrainer"
            )
    parallel = getattr(args, "parallelism_config", None)
    sharded = [name for name in ("tp_size", "cp_size", "sp_size") if (getattr(parallel, name, None) or 1) > 1]
    if sharded:
        raise UserError(
            f"parallelism_config: {', '.join(sharded)} above 1 splits the head or the sequences, which the loss needs "
            "whole; shard the model by FSDP2 or DeepSpeed instead"
        )


def _confidence_config(args: Any) -> ConfidenceConfig:
    if isinstance(args, ConfidenceConfig):
        return args
    config = ConfidenceConfig()
    config.check_confidence()
    return config


def _check_processor(processing_class: Any) -> None:
    if isinstance(processing_class, ProcessorMixin):
        raise UserError(
            f"processing_class: {type(processing_class).__name__} is of a vision-language model; pass a tokenizer and "
            "a text model, or train with trl.DPOTrainer"
        )


def _tapped(model: nn.Module, confidence: RewardConfidence | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if confidence is None else HiddenStateTap(model)


@contextlib.contextmanager
def _outputs(model: nn.Module) -> Iterator[list[Any]]:
    """What the model's forwards inside the block return, such as a mixture's auxiliary loss."""
    found: list[Any] = []
    handle = unwrap(model).register_forward_hook(lambda module, inputs, output: found.append(output))
    try:
        yield found
    finally:
        handle.remove()


def _for_the_model(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if name not in _NOT_THE_MODELS}


def _first_pairs(inputs: Mapping[str, Tensor], pairs: int, kept: int) -> dict[str, Tensor]:
    """The first ``kept`` of a batch's ``pairs``, of tensors with a row a pair as of those with one a sequence."""
    return {
        name: value[:kept] if len(value) == pairs else torch.cat([half[:kept] for half in value.chunk(2)])
        for name, value in inputs.items()
    }


def _token_mean(mean_S: Tensor, tokens_S: Tensor) -> Tensor:
    """The mean over all tokens from those of each sequence; 0 where there are none."""
    return (mean_S * tokens_S).sum() / tokens_S.sum().clamp(min=1)
