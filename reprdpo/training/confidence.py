"""Gamma of each batch from a reward, and the reward's own step, beside any training loop with hidden states.

Shape suffixes: P pairs, S = 2P sequences (all chosen, then all rejected), L layers, D hidden size.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from reprdpo import files
from reprdpo.errors import UserError
from reprdpo.models import model_fingerprint
from reprdpo.reward import HybridReward, RewardUpdater
from reprdpo.training.config import ConfidenceConfig
from reprdpo.training.metrics import HISTOGRAM_FILE, ConfidenceHistogram

REWARD_FOLDER = "reward"  # beside a model that was trained with one, and in each of its checkpoints


class ScoredBatch(NamedTuple):
    """R of a batch: rewards [P], the confidence taken from them [P], and Eq. 7 on them (a scalar), all detached."""

    chosen: Tensor
    rejected: Tensor
    confidence: Tensor
    nll: Tensor

    def metrics(self) -> dict[str, Tensor]:
        """One value a pair, or one for all, by the names under which they are logged."""
        return {
            "hybrid/chosen": self.chosen,
            "hybrid/rejected": self.rejected,
            "hybrid/accuracies": self.chosen > self.rejected,
            "hybrid/margins": self.chosen - self.rejected,
            "hybrid/nll": self.nll,
            "confidence/mean": self.confidence,
        }


def check_replicas(reward: HybridReward, accelerator: Accelerator) -> None:
    """Refuse a reward that is not the same, bit for bit, on every process: its replicas would stay apart."""
    fingerprint = torch.tensor([int(model_fingerprint(reward)[:15], 16)], device=accelerator.device)
    found = accelerator.gather(fingerprint).tolist()
    if len(set(found)) > 1:
        odd = next(process for process, value in enumerate(found) if value != found[0])
        raise UserError(f"reward: is another one on process {odd} than on process 0; load the same on each")


class RewardConfidence:
    """A reward that gives each batch its confidence and is updated once per optimizer step, on all its micro-batches.

    Args:
        reward: on its final device; trained in place with ``config.update_reward``.
        config: how; its :meth:`~ConfidenceConfig.check_confidence` has been called.
    """

    def __init__(self, reward: HybridReward, config: ConfidenceConfig) -> None:
        self.reward, self.updates = reward, config.update_reward
        self._config = config
        self._updater = None
        if config.update_reward:
            self._updater = RewardUpdater(reward, lr=config.reward_learning_rate, margin=config.reward_margin)
        self._histogram = ConfidenceHistogram()

    @property
    def reads_means(self) -> bool:
        """Whether the reward reads the mean over a sequence's tokens, which the caller then takes."""
        return self.reward.metadata.pool == "mean"

    def score(
        self, states: Sequence[Tensor] | Tensor, index_S: Tensor | None, *, training: bool, last: bool
    ) -> ScoredBatch:
        """Gamma from R as it stands, then, in training, R's own step if this is the ``last`` micro-batch.

        Args:
            states, index_S: of the forward that the loss is taken from, as :func:`reprdpo.ops.probe_confidence` takes
                them; pooled [S, L, D] without index.
        """
        config, reward = self._config, self.reward
        options: dict[str, Any] = {
            "alpha": config.alpha_or(reward.alpha),
            "squash": reward.squash if config.squash is None else config.squash,
            "floor": config.confidence_floor,
            "reduce": config.confidence_reduce,
        }
        with torch.autocast(reward.probe_weight.device.type, enabled=False):
            if training and self._updater is not None:
                scored = self._updater.accumulate(states, index_S, **options)
                if last:
                    self._updater.apply()
            else:
                scored = reward.score(states, index_S, margin=config.reward_margin, **options)
        chosen_P, rejected_P = scored.reward.chunk(2)
        if training:
            self._histogram.add(scored.confidence)
        return ScoredBatch(chosen_P, rejected_P, scored.confidence, scored.nll)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the reward itself: the state of its optimizer, and gamma's histogram."""
        updater = None if self._updater is None else self._updater.state_dict()
        return {"updater": updater, "histogram": self._histogram.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`, exactly."""
        if self._updater is not None and state["updater"] is not None:
            self._updater.load_state_dict(state["updater"])
        self._histogram.load_state_dict(state["histogram"], self.reward.probe_weight.device)

    def load_reward(self, folder: str | Path) -> None:
        """Take the parameters of the reward saved in ``folder``.

        Raises:
            UserError: no such reward there, or a torn one.
        """
        self.reward.load_state_dict(HybridReward.from_pretrained(folder).state_dict())

    def write_histogram(self, output_dir: str | Path) -> None:
        """Write the distribution of gamma at the start and now as ``OUTPUT_DIR/confidence_histogram.json``."""
        files.write_json(Path(output_dir) / HISTOGRAM_FILE, self._histogram.to_json())
