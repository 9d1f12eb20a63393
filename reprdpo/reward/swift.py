"""A SWIFT-style reward head: one linear map of all layers' states at once (Guo et al. 2025, arXiv 2505.12225).

The published head reads every token of the response: with the states of all layers, the embedding output among them,
concatenated to x_t, it takes ``sum_t sigma(v . x_t) (w . x_t) / sum_t sigma(v . x_t)``, fitted by cross-entropy on
correct and wrong answers with AdamW and early stopping. Here the states come pooled, one vector a response. Of one
token, the last, that gate cancels and ``w . x_T`` is left; of the response's mean it is their variant without the gate.
The fit is the same convex loss brought to its minimum, under a penalty where theirs stops early, and the embedding
output is left out.

Shapes: S sequences, L layers, D hidden size, r coordinates of the fit.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from reprdpo.reward.features import Span, Standardizer

_STEPS, _GRADIENT = 200, 1e-7


class SwiftHead(NamedTuple):
    """A linear head on the concatenated layers, in the coordinates it was fitted in."""

    standardizer: Standardizer
    span: Span
    weight: Tensor
    bias: Tensor

    def __call__(self, states: Tensor) -> Tensor:
        """The reward [S] float64 of raw states [S, L, D]."""
        return (self.span.coordinates(_joined(self.standardizer, states)) @ self.weight)[0] + self.bias


def fit_swift_head(states: Tensor, label_S: Tensor) -> SwiftHead:
    """Fit the head to pooled states [S, L, D], labelled +1 or -1; those labelled 0 are left out.

    Minimises ``sum_i softplus(-y_i R_i) + |w|^2 / 2`` on features of mean squared norm 1, as the probes' are.
    """
    standardizer = Standardizer.of(states)
    rows = _joined(standardizer, states)
    span = Span(rows)
    features_SR = span.coordinates(rows)[0]
    sign_S = label_S.double()  # a label of 0 adds a constant to the misfit
    weight_R = features_SR.new_zeros(features_SR.shape[1], requires_grad=True)
    bias = features_SR.new_zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight_R, bias], max_iter=_STEPS, tolerance_grad=_GRADIENT, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        misfit = F.softplus(-sign_S * (features_SR @ weight_R + bias)).sum()
        total = misfit + weight_R.square().sum() / 2
        total.backward()
        return total

    optimizer.step(closure)
    return SwiftHead(standardizer, span, weight_R.detach(), bias.detach())


def _joined(standardizer: Standardizer, states: Tensor) -> Tensor:
    """Standardised states, all layers in one: [S, 1, L D]."""
    rows = standardizer(states.float())
    return (rows / rows.shape[1] ** 0.5).flatten(1)[:, None]
