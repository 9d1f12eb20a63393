"""The reward's own optimizer: one step a batch on the policy's detached states (arXiv 2503.10093, section 3.4)."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from reprdpo.ops.probe_reward import probe_gradients, probe_rows
from reprdpo.reward.hybrid import HybridReward, Scored


class RewardUpdater:
    """Adam on a reward's parameters with -log sigma(R_c - R_r - margin) (Eq. 7); never waits for the device.

    Nothing goes through autograd: the loss's slope is closed-form, ``dloss/dR_c = -sigma(margin - R_c + R_r) / P``, and
    the op's backward is called with it. Across processes the gradients are averaged, in one reduction, so that every
    replica of the reward stays the same.

    Args:
        reward: on its final device.
        lr: Adam's learning rate.
        margin: mu.
    """

    def __init__(self, reward: HybridReward, lr: float = 1e-3, margin: float = 1.0) -> None:
        self.reward = reward
        self.margin = margin
        self._parameters = list(reward.parameters())
        device = self._parameters[0].device
        fused = device.type in ("cpu", "cuda")
        self._optimizer = torch.optim.Adam(self._parameters, lr=lr, fused=fused, foreach=None if fused else True)
        self._sides_2 = torch.tensor([-1.0, 1.0], device=device)  # of the slope: chosen, rejected
        self._grads: list[Tensor] = []
        self._first_pairs = self._pairs = 0

    def accumulate(
        self,
        hidden_states: Sequence[Tensor] | Tensor,
        index: Tensor | None = None,
        *,
        alpha: float | None = None,
        squash: bool | None = None,
        floor: float | None = None,
        reduce: Literal["batch"] | None = None,
    ) -> Scored:
        """Score 2P sequences, all chosen then all rejected, and add their pairs to those of the coming :meth:`apply`.

        Args:
            hidden_states, index: as :func:`reprdpo.ops.probe_reward` takes them; pooled [2P, L, D] without index.
            alpha, squash, floor, reduce: of the confidence (:func:`reprdpo.ops.preference_confidence`); alpha and
                squash are the reward's own by default.

        Raises:
            TypeError, ValueError: as :func:`reprdpo.ops.probe_confidence`.
        """
        reward = self.reward
        scored = probe_rows(
            hidden_states,
            index,
            reward.op_parameters,
            gate=reward.gate,
            alpha=reward.alpha if alpha is None else alpha,
            squash=reward.squash if squash is None else squash,
            floor=floor,
            reduce=reduce,
        )
        pairs = len(scored.confidence)
        with torch.no_grad():
            short_P = scored.reward.view(2, pairs).diff(dim=0)[0] + self.margin
            nll = F.softplus(short_P).mean()
            if pairs:
                self._first_pairs = self._first_pairs or pairs
                slope_2P = torch.outer(self._sides_2, short_P.sigmoid() / self._first_pairs)
                self._add(probe_gradients(slope_2P.flatten(), scored, reward.op_parameters, gate=reward.gate), pairs)
        return Scored(scored.reward, scored.confidence, nll)

    def _add(self, grads: list[Tensor], pairs: int) -> None:
        """Gradients of a sum over ``pairs``, divided by the number of the first such batch's pairs."""
        self._pairs += pairs
        if self._grads:
            torch._foreach_add_(self._grads, grads)
        else:
            self._grads = grads

    def apply(self) -> None:
        """One step of Adam on the mean over every pair accumulated since the last."""
        if not self._grads:
            return
        with torch.no_grad():
            if self._pairs != self._first_pairs:
                torch._foreach_mul_(self._grads, self._first_pairs / self._pairs)
            for parameter, grad in zip(self._parameters, _averaged(self._grads), strict=True):
                parameter.grad = grad
            self._optimizer.step()
            self._optimizer.zero_grad()
        self._grads, self._first_pairs, self._pairs = [], 0, 0

    def step(self, hidden_states: Sequence[Tensor] | Tensor, index: Tensor | None = None) -> Tensor:
        """:meth:`accumulate` and :meth:`apply`.

        Returns:
            The loss before the step, a detached scalar.
        """
        nll = self.accumulate(hidden_states, index).nll
        self.apply()
        return nll

    def state_dict(self) -> dict[str, Any]:
        """Adam's state; the parameters are the reward's own to save."""
        return self._optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`, exactly."""
        self._optimizer.load_state_dict(state)


def _averaged(grads: Sequence[Tensor]) -> Sequence[Tensor]:
    """The mean over the processes, by one reduction of all."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return grads
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = flat.split([grad.numel() for grad in grads])
    return [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)]
