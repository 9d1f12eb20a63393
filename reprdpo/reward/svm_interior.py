"""A primal-dual interior point on many linear SVMs at once, stopped by each one's duality gap.

Shapes: n rows, B problems, b of them still at work.
"""

import torch
from torch import Tensor

from reprdpo.reward.svm_forms import Form
from reprdpo.reward.svm_newton import Solution, losses, shortfall

_WALL_SHARE = 0.99  # of the way to the nearest wall
_START_SHARE = 0.1  # of the width of the box, that a warm start keeps off the walls


def interior_point(
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

    Through their duals, ``min_a |sum_i a_i y_i x_i|^2 / 2 + sum_i ridge_i a_i^2 / 2 - a_i``, with ``0 <= a <= cost``
    and ridge 0 for the hinge, ``0 <= a`` and ridge 1 / (2 cost) for its square, by Mehrotra's predictor and corrector
    (1992) on systems of the form's size (Fine and Scheinberg 2001). The number of steps hardly grows with the costs.
    ``form`` is direct.

    Returns:
        The steps of the slowest problem; the device is asked for one number in each.
    """
    layer_b, cost_bN = layer_B[at], cost_BN[at]
    state = _State(y_N, cost_bN, solution.dual[at], hinge)
    for step in range(max_iter + 1):
        z = form.pull(y_N * state.a, layer_b)
        f_bN = form.scores(z, layer_b)
        slack_bN = 1 - y_N * f_bN
        objective_b = form.norm2(z, f_bN) / 2 + losses(slack_bN, state.cost, hinge)
        gap_b = shortfall(slack_bN, state.a, state.cost, hinge)
        open_b = ~(gap_b <= tol * objective_b)
        left = 0 if step == max_iter else int(open_b.sum())
        if left < len(at):
            solution.put(at, z, f_bN, state.a, objective_b, gap_b)
            if not left:
                break
            at, layer_b, slack_bN = at[open_b], layer_b[open_b], slack_bN[open_b]
            state.keep(open_b)
        state.advance(form, y_N, slack_bN, layer_b)
    return step


class _State:
    """Dual variables a [b, n] strictly between their walls, and the walls' multipliers, ``low`` and ``high``.

    Rows of cost 0 are no part of a problem: all of theirs stays 0.
    """

    def __init__(self, y_N: Tensor, cost_bN: Tensor, start_bN: Tensor, hinge: bool) -> None:
        self.cost, self.hinge, self.real = cost_bN, hinge, cost_bN > 0
        off = _START_SHARE * cost_bN
        cold = ~(start_bN > 0).any(1, keepdim=True)
        warm_bN = start_bN.maximum(off)
        warm_bN = warm_bN.minimum(cost_bN - off) if hinge else warm_bN
        self.a = torch.where(cold, cost_bN / 2, warm_bN)
        self.ridge = torch.zeros_like(cost_bN) if hinge else torch.where(self.real, 0.5 / cost_bN, 0)
        self.low: Tensor | None = None
        self.high = torch.zeros_like(cost_bN)

    def keep(self, which_b: Tensor) -> None:
        for name in ("cost", "real", "a", "ridge", "low", "high"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value[which_b])

    def advance(self, form: Form, y_N: Tensor, slack_bN: Tensor, layer_b: Tensor) -> None:
        """One step of predictor and corrector."""
        slope_bN = torch.where(self.real, self.ridge * self.a - slack_bN, 0)
        if self.low is None:
            margin_b1 = slope_bN.abs().sum(1, keepdim=True) / self.real.sum(1, keepdim=True) + 1e-3
            self.low = torch.where(self.real, slope_bN.clamp(min=0) + margin_b1, 0)
            if self.hinge:
                self.high = torch.where(self.real, (-slope_bN).clamp(min=0) + margin_b1, 0)
        a, low, high = self.a, self.low, self.high
        safe_bN = torch.where(self.real, a, 1)
        room_bN = torch.where(self.real, self.cost - a, 1) if self.hinge else torch.ones_like(a)
        inverse_bN = torch.where(self.real, 1 / (low / safe_bN + high / room_bN + self.ridge), 0)
        solve = form.row_solver(inverse_bN, layer_b)

        def moves(low_goal: Tensor, high_goal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            right_bN = low_goal / safe_bN - high_goal / room_bN - slope_bN
            move_bN = y_N * solve(y_N * torch.where(self.real, right_bN, 0))
            low_move = (low_goal - low * move_bN) / safe_bN - low
            high_move = (high_goal + high * move_bN) / room_bN - high
            return move_bN, torch.where(self.real, low_move, 0), torch.where(self.real, high_move, 0)

        def length(move_bN: Tensor, low_move: Tensor, high_move: Tensor) -> Tensor:
            reach = _reach(a, move_bN).minimum(_reach(low, low_move))
            if self.hinge:
                reach = reach.minimum(_reach(room_bN, -move_bN)).minimum(_reach(high, high_move))
            return reach.amin(1, keepdim=True)

        nowhere = torch.zeros_like(a)
        move_bN, low_move, high_move = moves(nowhere, nowhere)
        size_b1 = length(move_bN, low_move, high_move).clamp(max=1)
        walls_b1 = self.real.sum(1, keepdim=True) * (2 if self.hinge else 1)
        now_b1 = (a * low + room_bN * high).sum(1, keepdim=True) / walls_b1
        then_bN = (a + size_b1 * move_bN) * (low + size_b1 * low_move)
        then_bN += (room_bN - size_b1 * move_bN) * (high + size_b1 * high_move)
        goal_b1 = (then_bN.sum(1, keepdim=True) / walls_b1) ** 3 / now_b1**2
        move_bN, low_move, high_move = moves(goal_b1 - move_bN * low_move, self._top(goal_b1 + move_bN * high_move))
        size_b1 = (_WALL_SHARE * length(move_bN, low_move, high_move)).clamp(max=1)
        self.a, self.low, self.high = a + size_b1 * move_bN, low + size_b1 * low_move, high + size_b1 * high_move

    def _top(self, goal_bN: Tensor) -> Tensor:
        return goal_bN if self.hinge else torch.zeros_like(goal_bN)


def _reach(value_bN: Tensor, move_bN: Tensor) -> Tensor:
    return torch.where(move_bN < 0, -value_bN / move_bN, torch.inf)
