"""How well rewards read from hidden states rank pairs they have not seen: the gated one beside simpler readings.

Shapes: P pairs, S = 2P sequences (chosen first), L layers, D hidden size, n pairs of a fold, K methods.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from reprdpo.errors import UserError
from reprdpo.reward.calibration import Calibration, calibrated_alpha, calibration, ece_noise, right_rankings
from reprdpo.reward.fit import PAPER_ALPHA, RewardFitConfig, fit_probes, fit_stages, probe_scores, stage1_labels
from reprdpo.reward.folds import both_sides, grouped_folds, rows_but
from reprdpo.reward.states_file import check_states
from reprdpo.reward.swift import fit_swift_head
from reprdpo.statistics import ClusteredMean, clustered_mean, clustered_share

METHODS = {
    "gated": "Gated reward",
    "last_layer": "Last-layer probe",
    "mean_layers": "Mean of the probes",
    "best_layer": "Best layer, chosen within the training folds",
    "swift": "SWIFT head, last token",
    "swift_mean": "SWIFT head, mean of the response",
    "oracle_layer": "Oracle: the layer best on the test pairs",
    "oracle_pair": "Oracle: any layer right",
}
UPPER_BOUNDS = ("oracle_layer", "oracle_pair")


@dataclasses.dataclass(frozen=True)
class MethodScore:
    """What one method does on held-out pairs.

    ``accuracy`` counts a tie one half; ``auc`` is the chance that a chosen response scores above a rejected one of the
    same fold, whatever their prompts; ``calibration`` is that of sigma(alpha gap) with alpha from the other folds, and
    ``ece_noise`` the error it would show were it calibrated. The last three are None for "oracle_pair", which ranks
    nothing. ``right`` [P] is 1, 0 or one half for each pair.
    """

    name: str
    label: str
    upper_bound: bool
    accuracy: ClusteredMean
    auc: ClusteredMean | None
    calibration: Calibration | None
    ece_noise: float | None
    right: list[float]


@dataclasses.dataclass(frozen=True)
class RewardEvaluation:
    """Methods and single layers on held-out pairs, with 95 % intervals for other prompts.

    ``layer_accuracy`` and ``layer_auc`` [L] are the stage-1 probes', ``layer_right`` [P][L] pair by pair;
    ``best_layers`` the layers (from 1) that each fold chose; ``paper_calibration`` the gated reward's at alpha 7.5.
    """

    num_pairs: int
    num_groups: int
    num_layers: int
    hidden_size: int
    folds: int
    layer_accuracy: list[ClusteredMean]
    layer_auc: list[ClusteredMean]
    best_layers: list[int]
    methods: dict[str, MethodScore]
    paper_calibration: Calibration
    layer_right: list[list[float]] = dataclasses.field(repr=False)
    groups: list[object] = dataclasses.field(repr=False)

    def compare(self, first: str, second: str) -> ClusteredMean:
        """The first method's accuracy minus the second's on the same pairs."""
        ours, theirs = torch.tensor(self.methods[first].right), torch.tensor(self.methods[second].right)
        return clustered_mean((ours - theirs).double().numpy(), self.groups)


def evaluate_rewards(
    chosen: Tensor,
    rejected: Tensor,
    config: RewardFitConfig | None = None,
    *,
    groups: Iterable[object] | None = None,
    mean_states: tuple[Tensor, Tensor] | None = None,
    methods: Sequence[str] | None = None,
    chosen_is_safe: Sequence[bool | None] | None = None,
    rejected_is_safe: Sequence[bool | None] | None = None,
) -> RewardEvaluation:
    """Cross-validate, by prompt, every way to make a reward of a model's hidden states.

    A fold's scaling, probes, gate, heads and choice of layer see the other folds alone, so nothing is chosen on the
    pairs it is measured on, but for the two oracles, which are upper bounds: no method of one layer exceeds
    "oracle_layer" by more than chance, and none that follows one layer for each pair can exceed "oracle_pair".

    Args:
        chosen: [P, L, D] pooled states of the preferred responses, floating.
        rejected: [P, L, D] of the others.
        config: how probes and gate are fitted; a number as ``alpha`` is used as it stands.
        groups: one label a pair (its prompt); default each pair its own.
        mean_states: chosen and rejected states [P, L, D] averaged over the response, which "swift_mean" reads.
        methods: keys of METHODS to evaluate; default all there are states for. The gated reward always is.
        chosen_is_safe: labels of probes and SWIFT heads, None where unknown; default safe.
        rejected_is_safe: likewise; default unsafe.

    Raises:
        UserError: an unknown method, "swift_mean" without its states, or what
            :func:`~reprdpo.reward.fit_parameters` refuses.
    """
    config = config or RewardFitConfig()
    groups = list(groups) if groups is not None else list(range(len(chosen)))
    check_states(chosen, rejected, groups)
    asked = _asked(methods, mean_states)
    label_S = stage1_labels(len(chosen), chosen_is_safe, rejected_is_safe).to(chosen.device)
    states = torch.cat([chosen, rejected]).detach().float()
    means = None if mean_states is None or "swift_mean" not in asked else torch.cat(mean_states).detach().float()
    split = grouped_folds(groups, config.folds, config.seed)
    held = _cross_validate(states, means, label_S, groups, split, config, asked)

    layer_PL = right_rankings(held.layers[..., 0] - held.layers[..., 1])
    best = int(layer_PL.mean(0).argmax())
    scores = held.methods | ({"oracle_layer": held.layers[:, best]} if "oracle_layer" in asked else {})
    found = {
        name: _score(name, scores[name], groups, split, config)
        for name in METHODS
        if name in scores and name != "oracle_pair"
    }
    if "oracle_pair" in asked:
        right = layer_PL.amax(1)
        accuracy = clustered_share(right.numpy(), groups)
        found["oracle_pair"] = MethodScore(
            "oracle_pair", METHODS["oracle_pair"], True, accuracy, None, None, None, right.tolist()
        )
    gap = scores["gated"][:, 0] - scores["gated"][:, 1]
    layers = range(states.shape[1])
    return RewardEvaluation(
        num_pairs=len(chosen),
        num_groups=len(set(groups)),
        num_layers=states.shape[1],
        hidden_size=states.shape[2],
        folds=len(split),
        layer_accuracy=[clustered_share(layer_PL[:, layer].numpy(), groups) for layer in layers],
        layer_auc=[_auc(held.layers[:, layer], groups, split) for layer in layers],
        best_layers=held.best_layers,
        methods=found,
        paper_calibration=calibration(gap, PAPER_ALPHA),
        layer_right=layer_PL.tolist(),
        groups=groups,
    )


class _HeldOut(NamedTuple):
    """Scores of pairs by models that have not seen them, chosen and rejected: layers [P, L, 2], each method [P, 2]."""

    layers: Tensor
    methods: dict[str, Tensor]
    best_layers: list[int]


def _asked(methods: Sequence[str] | None, mean_states: tuple[Tensor, Tensor] | None) -> set[str]:
    if methods is None:
        return set(METHODS) - (set() if mean_states is not None else {"swift_mean"})
    for name in methods:
        if name not in METHODS:
            raise UserError(f"methods: {name!r} is unknown; known: {', '.join(METHODS)}")
    if "swift_mean" in methods and mean_states is None:
        raise UserError("methods: swift_mean needs states averaged over the response; give a model, or leave it out")
    return {"gated", *methods}


def _cross_validate(
    states: Tensor,
    means: Tensor | None,
    label_S: Tensor,
    groups: list[object],
    split: list[Tensor],
    config: RewardFitConfig,
    asked: set[str],
) -> _HeldOut:
    P, L = len(states) // 2, states.shape[1]
    layers_PL2 = torch.empty(P, L, 2, dtype=torch.float64)
    found = {name: torch.empty(P, 2, dtype=torch.float64) for name in asked if not name.startswith("oracle")}
    best_layers: list[int] = []
    for held in tqdm(split, desc="cross-validating rewards", unit="fold", leave=False, delay=2):
        kept = rows_but(held, P)
        rows, test = both_sides(kept, P), both_sides(held, P)
        own = [groups[i] for i in kept.tolist()]
        training, tested, label = states[rows], states[test], label_S[rows]
        fitted, _ = fit_stages(training, label, own, config)
        features = fitted.features(tested)
        score_LS = fitted.scores(features).cpu()
        layers_PL2[held] = torch.stack(score_LS.T.chunk(2), dim=2)
        reward = {"gated": fitted.reward(features), "last_layer": score_LS[-1], "mean_layers": score_LS.mean(0)}
        if "best_layer" in asked:
            layer = _best_layer(fitted.features(training), label, own, config)
            best_layers.append(layer + 1)
            reward["best_layer"] = score_LS[layer]
        if "swift" in asked:
            reward["swift"] = fit_swift_head(training, label)(tested)
        if means is not None:
            reward["swift_mean"] = fit_swift_head(means[rows], label)(means[test])
        for name, reward_S in reward.items():
            if name in found:
                found[name][held] = torch.stack(reward_S.cpu().chunk(2), dim=1)
    return _HeldOut(layers_PL2, found, best_layers)


def _best_layer(features_LSR: Tensor, label_S: Tensor, groups: list[object], config: RewardFitConfig) -> int:
    """The layer whose probe is best on pairs held out of these; of equals the one of the highest AUC."""
    L, P = len(features_LSR), features_LSR.shape[1] // 2
    split = grouped_folds(groups, config.folds, config.seed + 1)
    scores_PL2 = torch.empty(P, L, 2, dtype=torch.float64)
    for held in split:
        kept = rows_but(held, P)
        rows, test = both_sides(kept, P), both_sides(held, P)
        probes = fit_probes(features_LSR[:, rows], label_S[rows], [groups[i] for i in kept.tolist()], config)
        score_LS = probe_scores(features_LSR[:, test], probes.coef, probes.intercept)
        scores_PL2[held] = torch.stack(score_LS.cpu().T.chunk(2), dim=2)
    accuracy_L = right_rankings(scores_PL2[..., 0] - scores_PL2[..., 1]).mean(0)
    auc = [_auc(scores_PL2[:, layer], groups, split).value for layer in range(L)]
    return max(range(L), key=lambda layer: (float(accuracy_L[layer]), auc[layer]))


def _score(
    name: str, score_P2: Tensor, groups: list[object], split: list[Tensor], config: RewardFitConfig
) -> MethodScore:
    gap_P = score_P2[:, 0] - score_P2[:, 1]
    right_P = right_rankings(gap_P)
    scaled_P, alphas = torch.empty_like(gap_P), []
    for held in split:
        # A fold's alpha comes from gaps of the other folds' pairs, themselves held out.
        others = gap_P[rows_but(held, len(gap_P))]
        alphas.append(calibrated_alpha(others) if config.alpha == "auto" else float(config.alpha))
        scaled_P[held] = alphas[-1] * gap_P[held]
    return MethodScore(
        name=name,
        label=METHODS[name],
        upper_bound=name in UPPER_BOUNDS,
        accuracy=clustered_share(right_P.numpy(), groups),
        auc=_auc(score_P2, groups, split),
        calibration=dataclasses.replace(calibration(scaled_P, 1.0), alpha=sum(alphas) / len(alphas)),
        ece_noise=ece_noise(scaled_P, 1.0),
        right=right_P.tolist(),
    )


def _auc(score_P2: Tensor, groups: list[object], split: list[Tensor]) -> ClusteredMean:
    """The area under the ROC curve within folds, whose scores alone are on one scale, averaged over pairs.

    A pair's value is the sum of its two sides' placements less the fold's area: their mean is the area, and their
    clusters' spread gives its variance (Obuchowski 1997).
    """
    value_P = torch.empty(len(score_P2), dtype=torch.float64)
    for held in split:
        chosen_n, rejected_n = score_P2[held].T
        above_nn = right_rankings(chosen_n[:, None] - rejected_n)
        value_P[held] = above_nn.mean(1) + above_nn.mean(0) - above_nn.mean()
    return clustered_share(value_P.numpy(), groups)
