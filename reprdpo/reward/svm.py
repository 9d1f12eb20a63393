"""Linear support vector machines, one a layer, all layers solved together.

Shapes: n rows, L layers, D features, M unknowns of a layer (n in the Gram form, D + 1 in the primal).
"""

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from reprdpo.errors import UserError
from reprdpo.reward.folds import grouped_folds

_WORKING_BYTES = 1 << 29
_ARMIJO = 1e-4
_HALVINGS = 30


class LinearSVM(NamedTuple):
    """What :func:`fit_linear_svm` found; scores are ``features[:, l] @ coef[l] + intercept[l]``."""

    coef: Tensor  # [L, D], the features' dtype
    intercept: Tensor  # [L]
    objective: Tensor  # [L] float64
    n_iter: int
    converged: Tensor  # [L] bool
    C: Tensor  # [L] float64, the one used


def fit_linear_svm(
    features: Tensor,
    labels: Tensor,
    *,
    C: float | Sequence[float] = 1.0,
    fit_intercept: bool = True,
    tol: float = 1e-4,
    max_iter: int = 100,
    sample_weight: Tensor | None = None,
    groups: Sequence[object] | None = None,
    folds: int = 5,
    seed: int = 0,
) -> LinearSVM:
    """Fit a linear SVM with squared hinge loss to each layer.

    Minimises liblinear's L2-regularised L2-loss objective, the intercept being the weight of a constant feature 1
    and regularised with the rest (as scikit-learn's ``LinearSVC`` does):
    ``(|w_l|^2 + b_l^2) / 2 + C sum_i weight_i max(0, 1 - y_i (w_l . x_il + b_l))^2``
    (Fan et al. 2008; Newton's method on it: Keerthi and DeCoste 2005, through the Gram matrix: Chapelle 2007).

    Args:
        features: [n, L, D], any floating dtype; solved in float64 on its device.
        labels: [n], -1 or +1.
        C: weight of the loss; of several, each layer takes that of best held-out accuracy, the smallest in a tie.
        fit_intercept: whether b is there at all.
        tol: a layer has converged when its duality gap is at most ``tol`` times its objective.
        max_iter: Newton steps at most.
        sample_weight: [n], not negative; default 1.
        groups: with several C, rows of one group stay in one fold; default each row its own.
        folds: number of folds, with several C.
        seed: which rows share a fold, with several C.

    Raises:
        UserError: shapes that do not fit, a feature that is not finite (its row and layer are named), labels other
            than -1 and +1 or of one class only, ``C`` or ``tol`` not positive, negative weights.
    """
    grid = _check(features, labels, C, tol, sample_weight)
    y_N = labels.to(features.device, torch.float64)
    weight_N = torch.ones_like(y_N) if sample_weight is None else sample_weight.to(y_N)
    bias = 1.0 if fit_intercept else 0.0
    options = {"tol": tol, "max_iter": max_iter}
    bounds = _layer_chunks(features)
    if len(grid) == 1:
        C_L = torch.full((features.shape[1],), grid[0], dtype=torch.float64, device=features.device)
    else:
        split = grouped_folds(groups if groups is not None else range(len(y_N)), folds, seed)
        C_L = torch.cat([_choose_cost(features[:, a:b], y_N, weight_N, grid, split, bias, options) for a, b in bounds])
    solved = [_solve(features[:, a:b], y_N, weight_N, C_L[a:b], bias, options) for a, b in bounds]
    coef, intercept, objective, converged = (torch.cat(part) for part in zip(*(s[:4] for s in solved), strict=True))
    if not converged.all():
        late = (~converged).nonzero().flatten().tolist()
        warnings.warn(
            f"linear SVM: layers {late} have not converged after {max_iter} steps; scale the features or lower C",
            RuntimeWarning,
            stacklevel=2,
        )
    return LinearSVM(coef, intercept, objective, max(s[4] for s in solved), converged, C_L)


class _Problem(Protocol):
    """Where the weights of a batch of layers live: the unknowns z, their scores on the rows, their metric."""

    def start(self) -> Tensor: ...

    def scores(self, z: Tensor) -> Tensor: ...

    def norm2(self, z: Tensor, scores_LN: Tensor) -> Tensor: ...

    def gap(self, z: Tensor, pull_LN: Tensor) -> Tensor: ...

    def newton_point(self, root_LN: Tensor, y_N: Tensor) -> Tensor: ...


class _Gram:
    """``w = X^T z``: unknowns and systems of the size of the rows."""

    def __init__(self, features: Tensor, bias: float) -> None:
        self.K_LNN = torch.stack([(x := features[:, layer].double()) @ x.T for layer in range(features.shape[1])])
        self.K_LNN += bias

    def start(self) -> Tensor:
        return self.K_LNN.new_zeros(self.K_LNN.shape[:2])

    def scores(self, z: Tensor) -> Tensor:
        return torch.einsum("lnm,lm->ln", self.K_LNN, z)

    def norm2(self, z: Tensor, scores_LN: Tensor) -> Tensor:
        return (z * scores_LN).sum(1)

    def gap(self, z: Tensor, pull_LN: Tensor) -> Tensor:
        residual = z - pull_LN
        return self.norm2(residual, self.scores(residual)) / 2

    def newton_point(self, root_LN: Tensor, y_N: Tensor) -> Tensor:
        system = self.K_LNN * root_LN[:, :, None] * root_LN[:, None, :]
        system.diagonal(dim1=1, dim2=2).add_(1)
        return root_LN * _cholesky_solve(system, root_LN * y_N)


class _Primal:
    """``z = (w, b)``: unknowns and systems of the size of the features."""

    def __init__(self, features: Tensor, bias: float) -> None:
        x_LND = features.double().transpose(0, 1)
        self.x_LNM = torch.cat([x_LND, x_LND.new_full((*x_LND.shape[:2], 1), bias)], dim=2)

    def start(self) -> Tensor:
        return self.x_LNM.new_zeros(self.x_LNM.shape[0], self.x_LNM.shape[2])

    def scores(self, z: Tensor) -> Tensor:
        return torch.einsum("lnm,lm->ln", self.x_LNM, z)

    def norm2(self, z: Tensor, scores_LN: Tensor) -> Tensor:
        return z.square().sum(1)

    def gap(self, z: Tensor, pull_LN: Tensor) -> Tensor:
        return (z - torch.einsum("lnm,ln->lm", self.x_LNM, pull_LN)).square().sum(1) / 2

    def newton_point(self, root_LN: Tensor, y_N: Tensor) -> Tensor:
        scaled = self.x_LNM * root_LN[:, :, None]
        system = scaled.mT @ scaled
        system.diagonal(dim1=1, dim2=2).add_(1)
        return _cholesky_solve(system, torch.einsum("lnm,ln->lm", scaled, root_LN * y_N))


def _solve(
    features: Tensor, y_N: Tensor, weight_N: Tensor, C_L: Tensor, bias: float, options: dict
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Coefficients, intercepts, objectives, convergence flags and steps of a few layers."""
    n, _, D = features.shape
    problem: _Problem = _Gram(features, bias) if n < D else _Primal(features, bias)
    z, objective, converged, steps = _newton(problem, y_N, C_L[:, None] * weight_N, problem.start(), **options)
    if n < D:
        coef = torch.stack([features[:, i].double().T @ z_N for i, z_N in enumerate(z)])
        intercept = bias * z.sum(1)
    else:
        coef, intercept = z[:, :-1], bias * z[:, -1]
    return coef.to(features.dtype), intercept.to(features.dtype), objective, converged, steps


def _newton(
    problem: _Problem, y_N: Tensor, cost_LN: Tensor, z: Tensor, *, tol: float, max_iter: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Newton's method with backtracking: the objective is piecewise quadratic, so it ends after finitely many steps.

    With the dual point alpha = 2 cost slack read off the slacks, the duality gap is half the squared gradient.
    """
    f_LN = problem.scores(z)
    for step in range(max_iter + 1):
        slack_LN = (1 - y_N * f_LN).clamp(min=0)
        objective = problem.norm2(z, f_LN) / 2 + (cost_LN * slack_LN.square()).sum(1)
        converged = problem.gap(z, 2 * cost_LN * y_N * slack_LN) <= tol * objective
        if step == max_iter or converged.all():
            break
        root_LN = (2 * cost_LN * (slack_LN > 0)).sqrt()
        move = problem.newton_point(root_LN, y_N) - z
        move_f_LN = problem.scores(move)
        slope = -problem.norm2(move, move_f_LN) - (root_LN * move_f_LN).square().sum(1)
        size = torch.where(converged, 0.0, 1.0).to(y_N)
        for _ in range(_HALVINGS):
            trial_f_LN = f_LN + size[:, None] * move_f_LN
            trial_z = z + size[:, None] * move
            trial = problem.norm2(trial_z, trial_f_LN) / 2
            trial += (cost_LN * (1 - y_N * trial_f_LN).clamp(min=0).square()).sum(1)
            worse = trial > objective + _ARMIJO * size * slope
            if not worse.any():
                break
            size = torch.where(worse, size / 2, size)
        z, f_LN = trial_z, trial_f_LN
    return z, objective, converged, step


def _choose_cost(
    features: Tensor,
    y_N: Tensor,
    weight_N: Tensor,
    grid: list[float],
    split: list[Tensor],
    bias: float,
    options: dict,
) -> Tensor:
    """The C of the grid with the best held-out accuracy, layer by layer; the smallest in a tie."""
    hits = torch.zeros(len(grid), features.shape[1], dtype=torch.float64, device=features.device)
    rows = torch.arange(len(y_N))
    for fold in split:
        kept, held = rows[~torch.isin(rows, fold)].to(features.device), fold.to(features.device)
        if y_N[kept].unique().numel() < 2:
            raise UserError("linear SVM: a fold's other rows hold one class only; use fewer folds or one C")
        for i, c in enumerate(grid):
            C_L = torch.full((features.shape[1],), c, dtype=torch.float64, device=features.device)
            coef, intercept, *_ = _solve(features[kept], y_N[kept], weight_N[kept], C_L, bias, options)
            score = torch.einsum("nld,ld->nl", features[held].double(), coef.double()) + intercept
            hits[i] += (weight_N[held, None] * (score * y_N[held, None] > 0)).sum(0)
    return torch.tensor(grid, dtype=torch.float64, device=features.device)[hits.argmax(0)]


def _cholesky_solve(system: Tensor, right: Tensor) -> Tensor:
    factor, _ = torch.linalg.cholesky_ex(system)
    return torch.cholesky_solve(right[:, :, None], factor)[:, :, 0]


def _layer_chunks(features: Tensor) -> list[tuple[int, int]]:
    n, L, D = features.shape
    each = 8 * (n * D + 3 * min(n, D + 1) ** 2 + (n * D if n >= D else 0))
    size = max(1, min(L, _WORKING_BYTES // each))
    return [(a, min(a + size, L)) for a in range(0, L, size)]


def _check(
    features: Tensor, labels: Tensor, C: float | Sequence[float], tol: float, sample_weight: Tensor | None
) -> list[float]:
    """Refuse what cannot be solved; the grid of C, ascending."""
    if features.dim() != 3 or 0 in features.shape or not features.is_floating_point():
        raise UserError(f"linear SVM: features must be floating [n, L, D], not {features.dtype} {list(features.shape)}")
    if labels.shape != features.shape[:1]:
        raise UserError(f"linear SVM: {features.shape[0]} rows of features, labels of shape {list(labels.shape)}")
    grid = sorted({float(c) for c in (C if isinstance(C, Sequence) else [C])})
    if not grid or not all(c > 0 and math.isfinite(c) for c in grid):
        raise UserError(f"linear SVM: C must be positive and finite, not {C}")
    if not tol > 0:
        raise UserError(f"linear SVM: tol must be positive, not {tol}")
    check_finite(features, "linear SVM: features")
    classes = labels.unique().tolist()
    if not set(classes) <= {-1, 1}:
        raise UserError(f"linear SVM: labels must be -1 or +1, not {sorted(set(classes) - {-1, 1})[:5]}")
    if len(classes) < 2:
        raise UserError(f"linear SVM: every label is {classes[0]:+g}; give rows of both classes")
    if sample_weight is not None:
        if sample_weight.shape != labels.shape or not bool((sample_weight >= 0).all() & sample_weight.isfinite().all()):
            raise UserError("linear SVM: sample_weight must be one finite number a row, none negative")
        if not bool(sample_weight.any()):
            raise UserError("linear SVM: every sample_weight is 0")
    return grid


def check_finite(states: Tensor, what: str) -> None:
    """Refuse [n, L, D] values that are not finite, naming the first row and layer.

    Raises:
        UserError: a NaN or an infinity.
    """
    bad = (~states.isfinite()).any(-1).nonzero()
    if len(bad):
        row, layer = bad[0].tolist()
        raise UserError(f"{what}: not finite at row {row}, layer {layer} ({len(bad)} such rows and layers in all)")
