"""The reward's own optimizer: one step a batch on the policy's detached states (arXiv 2503.10093, section 3.4)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from reprdpo.reward.hybrid import HybridReward


class RewardUpdater:
    """Adam on a reward's parameters with -log sigma(R_c - R_r - margin) (Eq. 7); never waits for the device.

    Across processes the gradients are averaged, so that every replica of the reward stays the same.

    Args:
        reward: on its final device.
        lr: Adam's learning rate.
        margin: mu.
    """

    def __init__(self, reward: HybridReward, lr: float = 1e-3, margin: float = 1.0) -> None:
        self.reward = reward
        self.margin = margin
        self._parameters = list(reward.parameters())
        fused = self._parameters[0].device.type in ("cpu", "cuda")
        self._optimizer = torch.optim.Adam(self._parameters, lr=lr, fused=fused, foreach=None if fused else True)

    def step(self, hidden_states: Sequence[Tensor] | Tensor, index: Tensor | None = None) -> Tensor:
        """Score a batch of 2P sequences, all chosen then all rejected, and take one step.

        Args:
            hidden_states, index: as :func:`reprdpo.ops.probe_reward` takes them; pooled [2P, L, D] without index.

        Returns:
            The loss before the step, a detached scalar.
        """
        if isinstance(hidden_states, Tensor):
            hidden_states = hidden_states.detach()
        else:
            hidden_states = [states.detach() for states in hidden_states]
        with torch.enable_grad():
            chosen_reward, rejected_reward = self.reward(hidden_states, index).reward.chunk(2)
        return self.step_on_rewards(chosen_reward, rejected_reward)

    def step_on_rewards(self, chosen_reward: Tensor, rejected_reward: Tensor) -> Tensor:
        """One step from rewards [P] whose graph leads to the reward's parameters; no other gradient is touched.

        Returns:
            The loss before the step, a detached scalar.
        """
        with torch.enable_grad():
            loss = self.reward.nll(chosen_reward, rejected_reward, self.margin)
        for parameter, grad in zip(self._parameters, torch.autograd.grad(loss, self._parameters), strict=True):
            parameter.grad = _averaged(grad)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        """Adam's state; the parameters are the reward's own to save."""
        return self._optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`, exactly."""
        self._optimizer.load_state_dict(state)


def _averaged(grad: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(grad)
        grad /= dist.get_world_size()
    return grad
