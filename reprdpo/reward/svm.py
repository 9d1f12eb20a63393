"""Linear support vector machines, one a layer, all layers solved together.

Shapes: n rows, L layers, D features, U unknowns of a problem, F folds, k problems a layer at once.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from reprdpo.errors import UserError
from reprdpo.reward.folds import grouped_folds
from reprdpo.reward.svm_forms import Form, Plan, make_form, plan
from reprdpo.reward.svm_interior import interior_point
from reprdpo.reward.svm_newton import Solution, losses, newton, shortfall

Loss = Literal["squared_hinge", "hinge"]

# What the first of two methods may take before the other has its turn.
_NEWTON_STEPS, _INTERIOR_STEPS = 16, 32
# Of a fit in float32, which needs fewer or does not get there.
_SINGLE_STEPS, _SINGLE_REACH = 24, 100.0
# How much longer than the solver's the weights may be made.
_LONGER = (0.0, *(10.0**power for power in range(-15, -5)))
# Of the tolerance, as the certified gap differs from the solver's by rounding.
_INNER_TOL = 0.9
_CPU_WORKING_BYTES = 1 << 28
_CUDA_MEMORY_SHARE = 8
_CHECKED_BYTES = 1 << 26


class LinearSVM(NamedTuple):
    """What :func:`fit_linear_svm` found; scores are ``features[:, l] @ coef[l] + intercept[l]``."""

    coef: Tensor  # [L, D], float64 for float64 features, else float32
    intercept: Tensor  # [L], likewise
    objective: Tensor  # [L] float64, of the weights before they are rounded to the dtype returned
    n_iter: int  # steps of the slowest layer
    converged: Tensor  # [L] bool
    C: Tensor  # [L] float64, the one used
    gap: Tensor  # [L] float64, duality gap over objective


class _Options(NamedTuple):
    hinge: bool
    tol: float
    max_iter: int


def fit_linear_svm(
    features: Tensor,
    labels: Tensor,
    *,
    C: float | Sequence[float] = 1.0,
    loss: Loss = "squared_hinge",
    fit_intercept: bool = True,
    intercept_scaling: float = 1.0,
    tol: float = 1e-4,
    max_iter: int = 200,
    sample_weight: Tensor | None = None,
    groups: Sequence[object] | None = None,
    folds: int = 5,
    seed: int = 0,
    device: torch.device | str | None = None,
    working_bytes: int | None = None,
) -> LinearSVM:
    """Fit a linear SVM to each layer.

    Minimises liblinear's L2-regularised objective, the intercept being the weight of a constant feature
    ``intercept_scaling``, regularised with the rest (as scikit-learn's ``LinearSVC`` does):
    ``(|w_l|^2 + (b_l / intercept_scaling)^2) / 2 + C sum_i weight_i loss(1 - y_i (w_l . x_il + b_l))`` with
    ``loss(s) = max(0, s)`` or its square (Fan et al. 2008). The squared hinge is solved by Newton's method (Keerthi
    and DeCoste 2005; Chapelle 2007), the hinge by an interior point on its dual: n x n systems through the Gram matrix
    where rows are fewer than features, D x D ones where not, conjugate gradients where neither fits the budget.

    Args:
        features: [n, L, D], any floating dtype; may be mapped from a file, and is read block by block into float64.
        labels: [n], -1 or +1.
        C: weight of the loss; of several, each layer takes that of best held-out accuracy, the smallest in a tie. They
            are solved in ascending order, each from the solution of the one before.
        loss: "squared_hinge" or "hinge".
        fit_intercept: whether b is there at all.
        intercept_scaling: the constant feature; the larger, the less b is regularised.
        tol: a layer has converged when its duality gap is at most ``tol`` times its objective.
        max_iter: steps at most, for each C.
        sample_weight: [n], not negative; default 1.
        groups: with several C, rows of one group (the sides of a pair, the answers to a prompt) stay in one fold;
            default each row its own.
        folds: number of folds, with several C.
        seed: which rows share a fold, with several C.
        device: where to solve and to leave the result; default the features'.
        working_bytes: most memory allocated beside the result, default 256 MiB on a CPU and an eighth of a GPU; one
            problem's vectors and one row are held in any case.

    Raises:
        UserError: shapes that do not fit, a feature that is not finite (its row and layer are named), labels other
            than -1 and +1 or of one class only, ``C``, ``tol`` or ``intercept_scaling`` not positive, another loss,
            negative weights.

    Warns:
        RuntimeWarning: layers have not converged after ``max_iter`` steps; how far is said.
    """
    grid = _check(features, labels, C, loss, tol, intercept_scaling, sample_weight)
    device = torch.device(device) if device is not None else features.device
    y_N = labels.to(device, torch.float64)
    weight_N = torch.ones_like(y_N) if sample_weight is None else sample_weight.to(y_N)
    weight_PN = weight_N[None]
    if len(grid) > 1:
        weight_PN = _leave_folds_out(y_N, weight_N, grouped_folds(groups or range(len(y_N)), folds, seed))
    n, L, D = features.shape
    cut = plan(n, L, D + fit_intercept, len(weight_PN), working_bytes or _default_bytes(device))
    bias = intercept_scaling if fit_intercept else 0.0
    options = _Options(loss == "hinge", tol, max_iter)
    parts = [
        _fit_layers(features[:, a : a + cut.layers], y_N, weight_PN, grid, bias, cut, options)
        for a in range(0, L, cut.layers)
    ]
    coef, intercept, objective, gap, C_L, fold_gap_L = (
        torch.cat(part) for part in zip(*(part[:6] for part in parts), strict=True)
    )
    dtype = torch.promote_types(features.dtype, torch.float32)
    steps = max(part[6] for part in parts)
    fitted = LinearSVM(coef.to(dtype), intercept.to(dtype), objective, steps, gap <= tol, C_L, gap)
    _warn_unless_converged(fitted, fold_gap_L, options)
    return fitted


def _fit_layers(
    features: Tensor, y_N: Tensor, weight_PN: Tensor, grid: list[float], bias: float, cut: Plan, options: _Options
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int]:
    """Of each layer coefficients, intercept, objective, relative gap, C, folds' gap; steps of the slowest problem.

    A single fit of a Gram form is tried on matrices in float32 first, whose product is most of the time on a CPU; that
    only guides the search, as the gap is of the features themselves in float64.
    """
    if cut.form == "gram" and len(grid) == 1 and y_N.device.type == "cpu" and _bears_single(features, grid[0], bias):
        form = make_form(features, bias, y_N.device, cut, single=True)
        few = options._replace(max_iter=min(options.max_iter, _SINGLE_STEPS))
        found = _fit_form(form, y_N, weight_PN, grid, cut, few)
        if bool((found[3] <= options.tol).all()):
            return found
        del form, found
    return _fit_form(make_form(features, bias, y_N.device, cut), y_N, weight_PN, grid, cut, options)


def _bears_single(features: Tensor, cost: float, bias: float) -> bool:
    """Whether the products in float32 are likely to do, judged by what some rows' duals may add to their own scores."""
    some = features[:: 1 + len(features) // 8].float()
    return features.dtype != torch.float64 and cost * (float(some.square().sum(2).max()) + bias**2) <= _SINGLE_REACH


def _fit_form(
    form: Form, y_N: Tensor, weight_PN: Tensor, grid: list[float], cut: Plan, options: _Options
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int]:
    """As :func:`_fit_layers`.

    The first row of weights is the fit itself, each other leaves a fold out by weight 0; all share their layer's
    matrix and are solved side by side.
    """
    n, layers = len(y_N), form.layers
    hits_GL = y_N.new_zeros(len(grid), layers)
    fold_gap_L, fits, steps = y_N.new_zeros(layers), [], 0
    for first in range(0, len(weight_PN), cut.problems):
        weight_KN = weight_PN[first : first + cut.problems]
        k = len(weight_KN)
        layer_B = torch.arange(layers, device=y_N.device).repeat_interleave(k)
        solution = Solution.zero(form, layers * k, y_N)
        for g, cost in enumerate(grid):
            steps = max(steps, _solve(form, y_N, cost * weight_KN.repeat(layers, 1), layer_B, solution, options))
            if not first:
                fits.append((solution.z[::k].clone(), solution.dual[::k].clone()))
            held_KN = weight_PN[:1] - weight_KN
            right_LKN = solution.scores.view(layers, k, n) * y_N > 0
            hits_GL[g] += (right_LKN * held_KN).sum((1, 2))
            if len(grid) > 1:
                fold_gap_L = fold_gap_L.maximum((solution.gap / solution.objective).view(layers, k).amax(1))
    best_L = hits_GL.argmax(0)
    every_L = torch.arange(layers, device=best_L.device)
    z, dual_LN = (torch.stack(part)[best_L, every_L] for part in zip(*fits, strict=True))
    C_L = torch.tensor(grid, dtype=torch.float64, device=y_N.device)[best_L]
    return *_certify(form, z, dual_LN, y_N, C_L[:, None] * weight_PN[:1], options.hinge), C_L, fold_gap_L, steps


def _certify(
    form: Form, z: Tensor, dual_LN: Tensor, y_N: Tensor, cost_LN: Tensor, hinge: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Coefficients, intercept, objective and relative gap of each layer, from the features and not from the solver.

    Where costs are huge, the rounding of the solver's scores alone may cost more than all the rest: of slightly longer
    weights those of the least objective are taken. With ``w'`` the dual's weights, the gap is
    ``|w - w'|^2 / 2 + sum_i cost_i loss(slack_i) + conjugate(dual_i) - dual_i slack_i``, no term negative.
    """
    w = form.weights(z, y_N * dual_LN)
    margin_LN = y_N * w.scores
    apart_L = w.norm2 - (dual_LN * margin_LN).sum(1)  # w . (w - w')
    best: tuple[Tensor, ...] | None = None
    for longer in _LONGER:
        slack_LN = 1 - margin_LN - longer * margin_LN
        distance2_L = (w.distance2 + longer * (2 * apart_L + longer * w.norm2)).clamp(min=0)
        objective_L = (1 + longer) ** 2 * w.norm2 / 2 + losses(slack_LN, cost_LN, hinge)
        gap_L = distance2_L / 2 + shortfall(slack_LN, dual_LN, cost_LN, hinge)
        found: tuple[Tensor, ...] = (torch.full_like(objective_L, 1 + longer), objective_L, gap_L)
        if best is not None:
            found = tuple(torch.where(objective_L < best[1], new, old) for new, old in zip(found, best, strict=True))
        best = found
    assert best is not None
    length_L, objective_L, gap_L = best
    return w.coef * length_L[:, None], w.intercept * length_L, objective_L, gap_L / objective_L


def _solve(form: Form, y_N: Tensor, cost_BN: Tensor, layer_B: Tensor, solution: Solution, options: _Options) -> int:
    """Solve every problem from where ``solution`` stands, those that one method leaves open by another.

    Newton's method is the fastest on the squared hinge until costs are so large that every step meets a bend; the
    interior point does not mind, but forms its systems from numbers of ever wider range, which few rows' features bear
    badly.

    Returns:
        The steps of the slowest problem.
    """
    hinge, tol, max_iter = options
    tol *= _INNER_TOL
    methods: list[tuple[Callable[..., int], int]] = [(newton, max_iter)]
    if form.direct:
        methods = [(newton, _NEWTON_STEPS), (interior_point, max_iter)]
        if hinge:
            methods = [(interior_point, _INTERIOR_STEPS), (newton, max_iter)]
    at, steps = torch.arange(len(cost_BN), device=cost_BN.device), 0
    for method, limit in methods:
        most = min(limit, max_iter - steps)
        steps += method(form, y_N, cost_BN, layer_B, solution, at, hinge=hinge, tol=tol, max_iter=most)
        at = at[~(solution.gap <= tol * solution.objective)[at]]
        if steps == max_iter or not len(at):
            break
        solution.restart(at)
    return steps


def _leave_folds_out(y_N: Tensor, weight_N: Tensor, split: list[Tensor]) -> Tensor:
    """The weights, then for each fold the weights without it, [1 + F, n]."""
    weight_PN = weight_N.repeat(1 + len(split), 1)
    for kept_N, fold in zip(weight_PN[1:], split, strict=True):
        kept_N[fold.to(y_N.device)] = 0
        if y_N[kept_N > 0].unique().numel() < 2:
            raise UserError("linear SVM: a fold's other rows hold one class only; use fewer folds or one C")
    return weight_PN


def _warn_unless_converged(fitted: LinearSVM, fold_gap_L: Tensor, options: _Options) -> None:
    """Say how far layers are from the tolerance: those fitted, and those met on the way to their C."""
    chosen = fitted.gap.max().item()
    if not chosen <= options.tol:
        late = (~fitted.converged).nonzero().flatten().tolist()
        what = f"layers {late}"
    elif not (chosen := fold_gap_L.max().item()) <= options.tol:
        what = f"cross-validation fits of layers {(~(fold_gap_L <= options.tol)).nonzero().flatten().tolist()}"
    else:
        return
    warnings.warn(
        f"linear SVM: {what} have not converged after {options.max_iter} steps: the duality gap is up to {chosen:.1e} "
        f"of the objective, tol is {options.tol:.1e}; scale the features, lower C or raise max_iter",
        RuntimeWarning,
        stacklevel=3,
    )


def _default_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return _CPU_WORKING_BYTES
    return torch.cuda.get_device_properties(device).total_memory // _CUDA_MEMORY_SHARE


def _check(
    features: Tensor,
    labels: Tensor,
    C: float | Sequence[float],
    loss: str,
    tol: float,
    intercept_scaling: float,
    sample_weight: Tensor | None,
) -> list[float]:
    """Refuse what cannot be solved; the grid of C, ascending."""
    if features.dim() != 3 or 0 in features.shape or not features.is_floating_point():
        raise UserError(f"linear SVM: features must be floating [n, L, D], not {features.dtype} {list(features.shape)}")
    if labels.shape != features.shape[:1]:
        raise UserError(f"linear SVM: {features.shape[0]} rows of features, labels of shape {list(labels.shape)}")
    grid = sorted({float(c) for c in (C if isinstance(C, Sequence) else [C])})
    if not grid or not all(c > 0 and math.isfinite(c) for c in grid):
        raise UserError(f"linear SVM: C must be positive and finite, not {C}")
    if loss not in ("squared_hinge", "hinge"):
        raise UserError(f"linear SVM: loss must be squared_hinge or hinge, not {loss!r}")
    for name, value in (("tol", tol), ("intercept_scaling", intercept_scaling)):
        if not (value > 0 and math.isfinite(value)):
            raise UserError(f"linear SVM: {name} must be positive and finite, not {value}")
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
    height = max(1, _CHECKED_BYTES // max(1, states[:1].numel()))
    bad: list[list[int]] = []
    for first in range(0, len(states), height):
        rows = states[first : first + height]
        if rows.numel() and not all(end.isfinite() for end in rows.aminmax()):
            bad += [[first + row, layer] for row, layer in (~rows.isfinite()).any(-1).nonzero().tolist()]
    if bad:
        row, layer = bad[0]
        raise UserError(f"{what}: not finite at row {row}, layer {layer} ({len(bad)} such rows and layers in all)")
