"""KTO on pairs (arXiv 2402.01306): each response is weighed against a baseline z, not against the other one.

``loss = sigma(-beta (a - z)) + sigma(beta (b - z))`` with a, b the log-ratios of chosen and rejected, which is APO-zero
with reference log-probs moved by z. z stands for KL(policy, reference), is not below 0 and takes no gradient.

Here z is the mean log-ratio of all responses of the optimizer step before, which costs nothing. TRL's KTOTrainer, like
the paper, takes it from the batch at hand, each response put to another's prompt: a further forward of the policy and
of the reference, which would have to stay loaded, as those pairs are others in every epoch; and its loss hangs on how a
step is split into batches. The two estimates differ: of a pair's own responses the loss pushes one down.
"""

from typing import Any

import torch
from torch import Tensor

LOSS_TYPE, SERVED_BY = "kto", "apo_zero"


class KTOBaseline:
    """z, from the step before; 0 for the first.

    Args:
        device: of the batches.
        average: takes the mean of a scalar over all processes.
    """

    def __init__(self, device: torch.device, average: Any) -> None:
        self.z = torch.zeros((), device=device)
        self._average = average
        self._log_ratios: list[Tensor] = []

    def add(self, log_ratios: Tensor, *, last: bool) -> None:
        """Keep the log-ratios [S] of a forward; after a step's ``last`` one z is taken anew. The host does not wait."""
        self._log_ratios.append(log_ratios.detach().float())
        if last:
            self.z = self._average(torch.cat(self._log_ratios).mean()).clamp(min=0.0)
            self._log_ratios = []
