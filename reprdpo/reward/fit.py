"""Fits probes and gate to labelled hidden states, and says on held-out pairs how good they are.

Shapes: P pairs, S = 2P sequences (chosen first), L layers, D hidden size, r coordinates of the fit, F folds.
"""

import dataclasses
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from reprdpo.errors import UserError
from reprdpo.reward.calibration import Calibration, calibrated_alpha, calibration, confidence_gap, pair_accuracy
from reprdpo.reward.features import Span, Standardizer
from reprdpo.reward.folds import both_sides, grouped_folds, rows_but
from reprdpo.reward.states_file import check_states, read_states
from reprdpo.reward.svm import LinearSVM, fit_linear_svm

Gate = Literal["softmax", "static", "vote"]
PAPER_ALPHA = 7.5
_HISTOGRAM_BINS = 20
_STAGE2_GRADIENT = 1e-5


@dataclasses.dataclass(frozen=True)
class RewardFitConfig:
    """Settings of the fit; the paper's are ``alpha=7.5, margin=1.0``.

    Attributes:
        C: the SVM's loss weight on features of mean squared norm 1; of several, each layer takes the best by grouped
            cross-validation.
        gate: how the layers are mixed: "softmax", "static" or "vote" (reprdpo.ops.probe_reward).
        margin: mu of Eq. 7.
        alpha: Eq. 8's slope, or "auto": the one that minimises the held-out NLL of gamma.
        squash: gamma from sigma(R_c) - sigma(R_r) instead of R_c - R_r.
        pool: which state is read: the last non-padding token's or the mean over non-padding tokens.
        regularisation: half of it times the squared distance from the stage-1 probes and a flat gate is added to Eq. 7.
        max_iter: L-BFGS steps of stage 2 at most.
        folds: of the cross-validation.
        seed: which pairs share a fold.
    """

    C: float | Sequence[float] = 1.0
    gate: Gate = "softmax"
    margin: float = 1.0
    alpha: float | Literal["auto"] = "auto"
    squash: bool = False
    pool: Literal["last", "mean"] = "last"
    regularisation: float = 0.001
    max_iter: int = 100
    folds: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.gate not in ("softmax", "static", "vote"):
            raise UserError(f"gate must be softmax, static or vote, not {self.gate!r}")
        if self.pool not in ("last", "mean"):
            raise UserError(f"pool must be last or mean, not {self.pool!r}")
        if self.alpha != "auto" and not (isinstance(self.alpha, (int, float)) and self.alpha > 0):
            raise UserError(f"alpha must be positive or auto, not {self.alpha!r}")
        if not self.regularisation >= 0:
            raise UserError(f"regularisation must not be negative, not {self.regularisation}")


class RewardParameters(NamedTuple):
    """Probes and gate: w, b, v, c of METHOD section 3."""

    probe_weight: Tensor  # [L, D]
    probe_bias: Tensor  # [L]
    gate_weight: Tensor | None  # [L, D] softmax, None static, [L, L] vote
    gate_bias: Tensor  # [L]


@dataclasses.dataclass(frozen=True)
class FitReport:
    """What the fit found; all but ``train_accuracy`` is of pairs held out of the fit, by group.

    ``layer_accuracy`` [L] is the stage-1 probes' pair accuracy, ``gated_accuracy`` and ``train_accuracy`` are the
    reward's, ``held_out_nll`` is Eq. 7. ``calibration`` is gamma's at the alpha in use, ``paper_calibration`` at 7.5;
    ``confidence_histogram`` counts gamma over [0, 1]; ``converged`` says whether stage 2 came to rest; ``layer`` is the
    one layer (from 1) that the reward reads, None where it reads all.
    """

    num_pairs: int
    num_groups: int
    num_layers: int
    hidden_size: int
    folds: int
    gate: str
    margin: float
    C: list[float]
    layer_accuracy: list[float]
    gated_accuracy: float
    train_accuracy: float
    held_out_nll: float
    alpha: float
    alpha_is_auto: bool
    calibration: Calibration
    paper_calibration: Calibration
    confidence_histogram: dict[str, list[float]]
    converged: bool
    seconds: float
    layer: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-able values."""
        return dataclasses.asdict(self)


def fit_parameters(
    chosen: Tensor,
    rejected: Tensor,
    config: RewardFitConfig | None = None,
    *,
    groups: Iterable[object] | None = None,
    chosen_is_safe: Sequence[bool | None] | None = None,
    rejected_is_safe: Sequence[bool | None] | None = None,
) -> tuple[RewardParameters, FitReport]:
    """Fit probes and gate in two stages, for raw states, and cross-validate both.

    Stage 1 is a linear SVM a layer; stage 2 moves all of w, b, v, c by -log sigma(R_c - R_r - mu) (Eq. 7) with an L2
    pull toward stage 1. Features are standardised per layer, the scaling folded into the returned parameters; in the
    cross-validation, scaling, C and both stages see the training folds alone.

    Args:
        chosen: [P, L, D] pooled states of the preferred responses, floating.
        rejected: [P, L, D] of the others.
        config: settings.
        groups: one label a pair (its prompt): pairs of a group share a fold; default each pair its own.
        chosen_is_safe: labels of stage 1, None where unknown; default safe.
        rejected_is_safe: likewise; default unsafe.

    Returns:
        Float32 parameters on the states' device, and the report.

    Raises:
        UserError: shapes that do not fit, values that are not finite, fewer than two groups, labels of one class only.
    """
    config = config or RewardFitConfig()
    started = time.perf_counter()
    groups = list(groups) if groups is not None else list(range(len(chosen)))
    check_states(chosen, rejected, groups)
    P = len(chosen)
    states = torch.cat([chosen, rejected]).detach().float()
    label_S = stage1_labels(P, chosen_is_safe, rejected_is_safe).to(states.device)
    split = grouped_folds(groups, config.folds, config.seed)
    probe_gap_PL, gap_P2 = _cross_validate(states, label_S, groups, split, config)
    fitted, C_L = fit_stages(states, label_S, groups, config)
    used_gap_P = gap_P2[:, int(config.squash)]
    alpha = float(config.alpha) if config.alpha != "auto" else calibrated_alpha(used_gap_P)
    train_reward = fitted.reward(fitted.features(states))
    report = FitReport(
        num_pairs=P,
        num_groups=len(set(groups)),
        num_layers=states.shape[1],
        hidden_size=states.shape[2],
        folds=len(split),
        gate=config.gate,
        margin=config.margin,
        C=C_L.tolist(),
        layer_accuracy=pair_accuracy(probe_gap_PL).tolist(),
        gated_accuracy=pair_accuracy(gap_P2[:, 0]).item(),
        train_accuracy=pair_accuracy(train_reward[:P] - train_reward[P:]).item(),
        held_out_nll=F.softplus(config.margin - gap_P2[:, 0]).mean().item(),
        alpha=alpha,
        alpha_is_auto=config.alpha == "auto",
        calibration=calibration(used_gap_P, alpha),
        paper_calibration=calibration(used_gap_P, PAPER_ALPHA),
        confidence_histogram=_histogram(torch.sigmoid(alpha * used_gap_P)),
        converged=fitted.converged,
        seconds=time.perf_counter() - started,
    )
    if report.gated_accuracy <= 0.5:
        warnings.warn(
            f"the reward ranks {report.gated_accuracy:.0%} of {P} held-out pairs right, no better than chance",
            RuntimeWarning,
            stacklevel=2,
        )
    return fitted.parameters(), report


def fit_from_states(
    path: str | Path, config: RewardFitConfig | None = None, *, drop_embedding: bool = True
) -> FitReport:
    """Fit on pooled states from a safetensors file and report, keeping no reward.

    Args:
        path: a file with ``chosen`` and ``rejected``, each floating [P, L + 1, D] as transformers' ``hidden_states``
            are, the embedding output first.
        config: settings.
        drop_embedding: whether row 0 of a sequence is the embedding output, to be left out.

    Raises:
        UserError: no such file, not safetensors, a tensor missing, or what :func:`fit_parameters` refuses.
    """
    states = read_states(path, drop_embedding=drop_embedding)
    try:
        return fit_parameters(states.chosen, states.rejected, config, groups=states.groups)[1]
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


class Fitted(NamedTuple):
    """Both stages of a fit, in the coordinates they were made in: ``probes`` of stage 1, ``reduced`` of stage 2."""

    standardizer: Standardizer
    span: Span
    probes: RewardParameters
    reduced: RewardParameters
    converged: bool
    gate: Gate

    def features(self, states: Tensor) -> Tensor:
        """Raw states [S, L, D] in those coordinates, [L, S, r]."""
        return self.span.coordinates(self.standardizer(states))

    def scores(self, features_LSR: Tensor) -> Tensor:
        """The stage-1 probes' scores [L, S]."""
        return probe_scores(features_LSR, self.probes.probe_weight, self.probes.probe_bias)

    def reward(self, features_LSR: Tensor) -> Tensor:
        """The reward R [S] of stage 2."""
        score_LS, gate_LS = _mixture(features_LSR, self.reduced, self.gate)
        return (gate_LS * score_LS).sum(0)

    def parameters(self) -> RewardParameters:
        """Stage 2's, for raw states, float32."""
        probe = self.standardizer.fold(self.span.expand(self.reduced.probe_weight), self.reduced.probe_bias)
        weight, bias = self.reduced.gate_weight, self.reduced.gate_bias
        if weight is not None and self.gate == "softmax":
            weight, bias = self.standardizer.fold(self.span.expand(weight), bias)
        return RewardParameters(
            probe[0].float(), probe[1].float(), None if weight is None else weight.float(), bias.float()
        )


def _cross_validate(
    states: Tensor, label_S: Tensor, groups: list[Any], split: list[Tensor], config: RewardFitConfig
) -> tuple[Tensor, Tensor]:
    """Held-out gaps: of each probe [P, L], and of the reward, plain and squashed [P, 2]."""
    P = len(states) // 2
    probe_gap = states.new_zeros(P, states.shape[1], dtype=torch.float64)
    gap = states.new_zeros(P, 2, dtype=torch.float64)
    for held in tqdm(split, desc="cross-validating the reward", unit="fold", leave=False, delay=2):
        kept = rows_but(held, P)
        rows = both_sides(kept, P)
        fitted, _ = fit_stages(states[rows], label_S[rows], [groups[i] for i in kept.tolist()], config)
        features = fitted.features(states[both_sides(held, P)])
        score_LS = fitted.scores(features)
        probe_gap[held] = (score_LS[:, : len(held)] - score_LS[:, len(held) :]).T
        chosen, rejected = fitted.reward(features).split(len(held))
        gap[held] = torch.stack([confidence_gap(chosen, rejected, squash=squash) for squash in (False, True)], 1)
    return probe_gap, gap


def fit_stages(states: Tensor, label_S: Tensor, groups: list[Any], config: RewardFitConfig) -> tuple[Fitted, Tensor]:
    """Both stages on the states [S, L, D] given, and the C of each layer."""
    standardizer = Standardizer.of(states)
    rows = standardizer(states)
    span = Span(rows)
    features_LSR = span.coordinates(rows)
    svm = fit_probes(features_LSR, label_S, groups, config)
    probes = RewardParameters(svm.coef, svm.intercept, *_flat_gate(svm.coef, config.gate))
    reduced, converged = _stage2(features_LSR, probes, config)
    return Fitted(standardizer, span, probes, reduced, converged, config.gate), svm.C


def fit_probes(features_LSR: Tensor, label_S: Tensor, groups: list[Any], config: RewardFitConfig) -> LinearSVM:
    """Stage 1: a linear SVM on each layer's features, of the sequences that have a label; groups are of the pairs."""
    known = label_S != 0
    return fit_linear_svm(
        features_LSR.transpose(0, 1)[known],
        label_S[known],
        C=config.C,
        groups=[group for group, k in zip(groups * 2, known.tolist(), strict=True) if k],
        folds=config.folds,
        seed=config.seed,
    )


def _flat_gate(coef: Tensor, gate: Gate) -> tuple[Tensor | None, Tensor]:
    """The gate under which the reward is the mean of the probes."""
    L = len(coef)
    bias = coef.new_zeros(L)
    if gate == "softmax":
        return torch.zeros_like(coef), bias
    if gate == "static":
        return None, bias
    return coef.new_zeros(L, L), bias + torch.logit(torch.tensor(1 / max(L, 2))).item()


def _stage2(features_LSR: Tensor, start: RewardParameters, config: RewardFitConfig) -> tuple[RewardParameters, bool]:
    """Minimise Eq. 7 plus the pull toward ``start``, full batch, by L-BFGS; whether its gradient came down to 0."""
    origin = [p for p in start if p is not None]
    moved = [p.clone() for p in origin]
    optimizer = torch.optim.LBFGS(
        moved,
        max_iter=config.max_iter,
        tolerance_grad=_STAGE2_GRADIENT,
        tolerance_change=1e-7,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def unpack() -> RewardParameters:
        weight, bias, *gate_weight, gate_bias = moved
        return RewardParameters(weight, bias, gate_weight[0] if gate_weight else None, gate_bias)

    def closure() -> Tensor:
        loss, grads = _nll(features_LSR, unpack(), config)
        for p, q, grad in zip(moved, origin, grads, strict=True):
            distance = p - q
            loss = loss + config.regularisation / 2 * distance.square().sum()
            p.grad = grad.add_(distance, alpha=config.regularisation)
        return loss

    optimizer.step(closure)
    closure()
    steepest = max(float(p.grad.abs().max()) for p in moved if p.grad is not None)
    for p in moved:
        p.grad = None
    return unpack(), steepest <= 10 * _STAGE2_GRADIENT


def _nll(features_LSR: Tensor, parameters: RewardParameters, config: RewardFitConfig) -> tuple[Tensor, list[Tensor]]:
    """Eq. 7 and its gradients in closed form, as many as there are parameters.

    With u = dloss/dR: ds = g u where the gate knows nothing of s, plus V^T dlogit for "vote"; dlogit = g (s - R) u
    under a softmax, g (1 - g) s u under sigmoids; the weights' gradients are those times the features.
    """
    score_LS, gate_LS = _mixture(features_LSR, parameters, config.gate)
    reward_S = (gate_LS * score_LS).sum(0)
    chosen, rejected = reward_S.chunk(2)
    short_P = config.margin - chosen + rejected
    slope_P = torch.sigmoid(short_P) / len(short_P)
    pulled_LS = gate_LS * torch.cat([-slope_P, slope_P])
    if config.gate == "vote":
        assert parameters.gate_weight is not None
        logit_LS = pulled_LS * (1 - gate_LS) * score_LS
        pulled_LS = pulled_LS + parameters.gate_weight.T @ logit_LS
    else:
        logit_LS = pulled_LS * (score_LS - reward_S)
    on_features = [pulled_LS, logit_LS] if config.gate == "softmax" else [pulled_LS]
    grads_LKR = torch.stack(on_features, 1) @ features_LSR
    grads = [grads_LKR[:, 0].contiguous(), pulled_LS.sum(1)]
    if config.gate == "softmax":
        grads.append(grads_LKR[:, 1].contiguous())
    elif config.gate == "vote":
        grads.append(logit_LS @ score_LS.T)
    return F.softplus(short_P).mean(), [*grads, logit_LS.sum(1)]


def _mixture(features_LSR: Tensor, parameters: RewardParameters, gate: Gate) -> tuple[Tensor, Tensor]:
    """Scores and gate [L, S] as ``ops.probe_reward`` has them, of features kept layer first: three times faster."""
    weight, bias_L1 = parameters.gate_weight, parameters.gate_bias[:, None]
    weights = [w for w in (parameters.probe_weight, None if gate == "vote" else weight) if w is not None]
    product_LKS = torch.stack(weights, 1) @ features_LSR.mT
    score_LS = product_LKS[:, 0] + parameters.probe_bias[:, None]
    if gate == "vote":
        assert weight is not None
        return score_LS, torch.sigmoid(weight @ score_LS + bias_L1)
    return score_LS, (product_LKS[:, 1:].sum(1) + bias_L1).softmax(0)


def probe_scores(features_LSR: Tensor, weight_LR: Tensor, bias_L: Tensor) -> Tensor:
    """The probes' scores [L, S]."""
    return (weight_LR[:, None] @ features_LSR.mT)[:, 0] + bias_L[:, None]


def stage1_labels(
    P: int, chosen_is_safe: Sequence[bool | None] | None, rejected_is_safe: Sequence[bool | None] | None
) -> Tensor:
    """+1 safe, -1 unsafe, 0 unknown, chosen first."""
    labels: list[float] = []
    for given, default, name in ((chosen_is_safe, 1.0, "chosen"), (rejected_is_safe, -1.0, "rejected")):
        if given is not None and len(given) != P:
            raise UserError(f"{name}_is_safe: {len(given)} labels for {P} pairs")
        labels += [default] * P if given is None else [0.0 if safe is None else 2.0 * bool(safe) - 1 for safe in given]
    return torch.tensor(labels)


def _histogram(gamma: Tensor) -> dict[str, list[float]]:
    counts = torch.histc(gamma.double().cpu(), _HISTOGRAM_BINS, 0, 1)
    edges = [i / _HISTOGRAM_BINS for i in range(_HISTOGRAM_BINS + 1)]
    return {"edges": edges, "counts": [int(c) for c in counts]}
