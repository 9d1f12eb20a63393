"""Semismooth Newton on many linear SVMs at once, stopped by each one's duality gap.

Shapes: n rows, U unknowns of a problem, B problems, b of them still at work.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from reprdpo.reward.svm_forms import Form

# The augmented Lagrangian moves on where at most this share of the gap is left to the inner problem.
_INNER_SHARE = 0.1
_STIFFER = 4.0


@dataclass
class Solution:
    """Where a batch of problems stands: the start of a solver, and what it leaves behind."""

    z: Tensor  # [B, U]
    scores: Tensor  # [B, n]
    dual: Tensor  # [B, n], not negative; at most the costs for the hinge
    objective: Tensor  # [B]
    gap: Tensor  # [B], between the objective and the dual's

    @classmethod
    def zero(cls, form: Form, B: int, y_N: Tensor) -> "Solution":
        """The weights 0."""
        rows, value = y_N.new_zeros(B, len(y_N)), y_N.new_zeros(B)
        return cls(y_N.new_zeros(B, form.unknowns), rows, rows.clone(), value, value + torch.inf)

    def restart(self, at: Tensor) -> None:
        """Some problems' weights 0 again."""
        self.z[at], self.scores[at], self.dual[at] = 0, 0, 0

    def put(
        self, at: Tensor, z: Tensor, scores_bN: Tensor, dual_bN: Tensor, objective_b: Tensor, gap_b: Tensor
    ) -> None:
        """Write some problems' values."""
        self.z[at], self.scores[at], self.dual[at] = z, scores_bN, dual_bN
        self.objective[at], self.gap[at] = objective_b, gap_b


def newton(
    form: Form,
    y_N: Tensor,
    cost_BN: Tensor,
    layer_B: Tensor,
    solution: Solution,
    at: Tensor,
    *,
    hinge: bool,
    tol: float,
    max_iter: int,
) -> int:
    """Minimise ``|w|^2 / 2 + sum_i cost_i loss(1 - y_i w . x_i)`` for the problems ``at``, from ``solution`` into it.

    A row's dual variable is ``clip(offset + stiffness slack, 0, cap)``. The squared hinge is offset 0, stiffness
    2 cost and no cap; Newton's method with an exact line search then ends after finitely many steps (Mangasarian
    2002; Keerthi and DeCoste 2005). The hinge is the augmented Lagrangian of its dual: cap cost, the offset moved to
    the dual variable and the stiffness raised wherever the inner problem is solved well enough (Li, Sun and Toh 2018).

    Returns:
        The steps of the slowest problem; the device is asked for one number in each.
    """
    layer_b, cost_bN, z, f_bN = layer_B[at], cost_BN[at], solution.z[at], solution.scores[at]
    offset_bN = solution.dual[at].minimum(cost_bN) if hinge else torch.zeros_like(cost_bN)
    stiffness_bN = cost_bN if hinge else 2 * cost_bN
    for step in range(max_iter + 1):
        slack_bN = 1 - y_N * f_bN
        dual_bN = _dual(slack_bN, offset_bN, stiffness_bN, cost_bN, hinge)
        residual = z - form.pull(y_N * dual_bN, layer_b)
        image = form.image(residual, layer_b)
        inner_b = (residual * image).sum(1) / 2
        objective_b = form.norm2(z, f_bN) / 2 + losses(slack_bN, cost_bN, hinge)
        gap_b = inner_b + shortfall(slack_bN, dual_bN, cost_bN, hinge) if hinge else inner_b
        open_b = ~(gap_b <= tol * objective_b)
        left = 0 if step == max_iter else int(open_b.sum())
        if left < len(at):
            solution.put(at, z, f_bN, dual_bN, objective_b, gap_b)
            if not left:
                break
            at, layer_b, cost_bN, z, f_bN, offset_bN, stiffness_bN, slack_bN, dual_bN, residual, image = (
                x[open_b]
                for x in (at, layer_b, cost_bN, z, f_bN, offset_bN, stiffness_bN, slack_bN, dual_bN, residual, image)
            )
            inner_b, gap_b = inner_b[open_b], gap_b[open_b]
        if hinge:
            solved_b1 = (inner_b <= _INNER_SHARE * gap_b)[:, None]
            offset_bN = torch.where(solved_b1, dual_bN, offset_bN)
            stiffness_bN = torch.where(solved_b1, _STIFFER * stiffness_bN, stiffness_bN)
            dual_bN = _dual(slack_bN, offset_bN, stiffness_bN, cost_bN, hinge)
            residual = z - form.pull(y_N * dual_bN, layer_b)
            image = form.image(residual, layer_b)
        bends_bN = (dual_bN > 0) & (dual_bN < cost_bN) if hinge else dual_bN > 0
        move = -form.solve(residual, image, torch.where(bends_bN, stiffness_bN, 0), layer_b)
        move_f_bN = form.scores(move, layer_b)
        size_b1 = _exact_step(
            (move * image).sum(1, keepdim=True),
            form.norm2(move, move_f_bN)[:, None],
            offset_bN + stiffness_bN * slack_bN,
            -stiffness_bN * y_N * move_f_bN,
            cost_bN if hinge else torch.full_like(cost_bN, torch.inf),
            stiffness_bN,
        )
        z, f_bN = z + size_b1 * move, f_bN + size_b1 * move_f_bN
    return step


def losses(slack_bN: Tensor, cost_bN: Tensor, hinge: bool) -> Tensor:
    """The loss of each problem, [b]."""
    positive_bN = slack_bN.clamp(min=0)
    return (cost_bN * (positive_bN if hinge else positive_bN.square())).sum(1)


def shortfall(slack_bN: Tensor, dual_bN: Tensor, cost_bN: Tensor, hinge: bool) -> Tensor:
    """What complementarity lacks, [b]: the gap, where the weights are those of the dual variables."""
    positive_bN = slack_bN.clamp(min=0)
    if hinge:
        return (cost_bN * positive_bN - dual_bN * slack_bN).sum(1)
    apart_bN = positive_bN - torch.where(cost_bN > 0, 0.5 * dual_bN / cost_bN, 0)
    return (cost_bN * apart_bN.square() + dual_bN * (positive_bN - slack_bN)).sum(1)


def _dual(slack_bN: Tensor, offset_bN: Tensor, stiffness_bN: Tensor, cost_bN: Tensor, hinge: bool) -> Tensor:
    dual_bN = (offset_bN + stiffness_bN * slack_bN).clamp(min=0)
    return torch.minimum(dual_bN, cost_bN) if hinge else dual_bN


def _exact_step(
    slope_b1: Tensor, norm2_b1: Tensor, dual_bN: Tensor, speed_bN: Tensor, cap_bN: Tensor, stiffness_bN: Tensor
) -> Tensor:
    """Where the objective is least along a line, [b, 1].

    Its slope there is piecewise linear: ``slope`` at 0, growing at ``norm2`` and, while a row's unclipped dual
    variable ``dual + t speed`` is between 0 and ``cap``, at ``speed^2 / stiffness`` more.
    """
    moves_bN = speed_bN != 0
    speed_bN = torch.where(moves_bN, speed_bN, 1)
    reach = [torch.where(moves_bN, to_wall / speed_bN, torch.inf) for to_wall in (-dual_bN, cap_bN - dual_bN)]
    bend_bN = torch.where(moves_bN, speed_bN.square() / stiffness_bN, 0)
    events = torch.cat([torch.minimum(*reach), torch.maximum(*reach)], 1).clamp(min=0)
    events, order = torch.cat([torch.zeros_like(slope_b1), events], 1).sort(1)
    bends = torch.cat([torch.zeros_like(slope_b1), bend_bN, -bend_bN], 1).gather(1, order)
    curvature = norm2_b1 + bends.cumsum(1).clamp(min=0)
    rise = (curvature[:, :-1] * events.diff(dim=1)).nan_to_num(nan=0, posinf=torch.inf)
    slopes = torch.cat([slope_b1, slope_b1 + rise.cumsum(1)], 1)
    last = ((slopes < 0).sum(1, keepdim=True) - 1).clamp(min=0)
    event, slope, curvature = (x.gather(1, last) for x in (events, slopes, curvature))
    return event - slope / curvature.clamp(min=torch.finfo(slope.dtype).tiny)
