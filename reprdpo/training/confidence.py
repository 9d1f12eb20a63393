"""Gamma of each batch from a reward, and the reward's own step, beside any training loop with hidden states.

Shape suffixes: P pairs, S = 2P sequences (all chosen, then all rejected), T padded length, L layers, D hidden size.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reprdpo import files, ops
from reprdpo.reward import HybridReward, RewardUpdater
from reprdpo.training.config import ConfidenceConfig
from reprdpo.training.metrics import HISTOGRAM_FILE, ConfidenceHistogram


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


class RewardConfidence:
    """A reward that gives each batch its confidence and is updated once per optimizer step, on all its micro-batches.

    Args:
        reward: on its final device; trained in place with ``config.update_reward``.
        config: how; its :meth:`~ConfidenceConfig.check_confidence` has been called.
    """

    def __init__(self, reward: HybridReward, config: ConfidenceConfig) -> None:
        self.reward = reward
        self._config = config
        self._updater = None
        if config.update_reward:
            self._updater = RewardUpdater(reward, lr=config.reward_learning_rate, margin=config.reward_margin)
        self._histogram = ConfidenceHistogram()
        self._pending: list[Tensor] = []

    def score(
        self, states: Sequence[Tensor], index_S: Tensor, read_ST: Tensor, *, training: bool, last: bool
    ) -> ScoredBatch:
        """Gamma from R as it stands, then, in training, R's own step if this is the ``last`` micro-batch.

        Args:
            states: L tensors [S, T, D], layer by layer, of the forward that the loss is taken from.
            index_S: the position read in each sequence.
            read_ST: true at the positions averaged, for a reward with ``pool="mean"``.
        """
        updater = self._updater if training else None
        states = [state.detach() for state in states]
        with torch.autocast(index_S.device.type, enabled=False), torch.set_grad_enabled(updater is not None):
            if self.reward.metadata.pool == "mean":
                rewards_S = self.reward(_means(states, read_ST)).reward
            else:
                rewards_S = self.reward(states, index_S).reward
        batch = self._confidence(rewards_S.detach())
        if training:
            self._histogram.add(batch.confidence)
        if updater is not None:
            self._pending.append(rewards_S)
            if last:
                halves = zip(*(rewards.chunk(2) for rewards in self._pending), strict=True)
                updater.step_on_rewards(*(torch.cat(half) for half in halves))
                self._pending.clear()
        return batch

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the reward itself: the state of its optimizer, and gamma's histogram."""
        updater = None if self._updater is None else self._updater.state_dict()
        return {"updater": updater, "histogram": self._histogram.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`, exactly."""
        if self._updater is not None and state["updater"] is not None:
            self._updater.load_state_dict(state["updater"])
        self._histogram.load_state_dict(state["histogram"], self.reward.probe_weight.device)
        self._pending.clear()

    def load_reward(self, folder: str | Path) -> None:
        """Take the parameters of the reward saved in ``folder``.

        Raises:
            UserError: no such reward there, or a torn one.
        """
        self.reward.load_state_dict(HybridReward.from_pretrained(folder).state_dict())

    def write_histogram(self, output_dir: str | Path) -> None:
        """Write the distribution of gamma at the start and now as ``OUTPUT_DIR/confidence_histogram.json``."""
        files.write_json(Path(output_dir) / HISTOGRAM_FILE, self._histogram.to_json())

    def _confidence(self, rewards_S: Tensor) -> ScoredBatch:
        chosen_P, rejected_P = rewards_S.chunk(2)
        config = self._config
        confidence_P = ops.preference_confidence(
            chosen_P,
            rejected_P,
            alpha=config.alpha_or(self.reward.alpha),
            squash=self.reward.squash if config.squash is None else config.squash,
            floor=config.confidence_floor,
            reduce=config.confidence_reduce,
        )
        nll = self.reward.nll(chosen_P, rejected_P, margin=config.reward_margin)
        return ScoredBatch(chosen_P, rejected_P, confidence_P, nll)


def _means(states: Sequence[Tensor], read_ST: Tensor) -> Tensor:
    """[S, L, D]: each layer's mean over the positions read, summed in float32."""
    read_ST1 = read_ST.bool()[:, :, None]
    sums = [torch.where(read_ST1, state, 0).sum(1, dtype=torch.float32) for state in states]
    return torch.stack([(sum_SD / read_ST1.sum(1)).to(states[0].dtype) for sum_SD in sums], dim=1)
