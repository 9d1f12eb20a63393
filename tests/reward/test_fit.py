"""The two-stage fit: on real states, on made ones, what it must not see, what it refuses."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from reprdpo import ops
from reprdpo.errors import UserError
from reprdpo.reward import HybridReward, RewardFitConfig, fit, fit_from_states, fit_parameters
from reprdpo.reward.calibration import calibrated_alpha, calibration
from reprdpo.reward.features import Span, Standardizer
from reprdpo.reward.fit import RewardParameters, _nll, fit_probes, fit_stages, stage1_labels


def make_states(P: int = 60, L: int = 3, D: int = 12, signal: float = 1.0) -> tuple[Tensor, Tensor]:
    """Pairs whose middle layer knows most, of unequal scales and offsets."""
    generator = torch.Generator().manual_seed(5)
    direction = torch.randn(L, D, generator=generator)
    strength = torch.tensor([0.1, 1.0, 0.4]).repeat(L)[:L, None] * signal / D**0.5
    scale = torch.logspace(-1, 1.5, L)[:, None]
    noise = torch.randn(2, P, L, D, generator=generator)
    chosen, rejected = (scale * (noise[i] + sign * strength * direction + 3) for i, sign in ((0, 1), (1, -1)))
    return chosen, rejected


@pytest.fixture(scope="module")
def real_report(real_dir: Path) -> dict:
    return fit_from_states(real_dir / "states" / "llama2_7b_last_token.safetensors").to_json()


def test_real_states_layer_accuracy(real_report: dict) -> None:
    """About .77 at layer 1, .88 at 8, .90 in the middle on the larger set; 80 pairs have a standard error of .035."""
    accuracy = real_report["layer_accuracy"]
    assert (real_report["num_pairs"], real_report["num_layers"], real_report["hidden_size"]) == (80, 32, 4096)
    assert accuracy[0] == pytest.approx(0.77, abs=0.1)
    assert accuracy[7] == pytest.approx(0.88, abs=0.1)
    assert sum(accuracy[12:20]) / 8 == pytest.approx(0.9, abs=0.08)
    assert accuracy[31] == pytest.approx(0.9, abs=0.08)
    assert sum(accuracy[12:20]) / 8 > accuracy[0]


def test_real_states_gated_reward_and_calibration(real_report: dict) -> None:
    """The gate keeps up with the middle layers; the alpha found is better calibrated than 7.5, which saturates."""
    assert real_report["gated_accuracy"] > 0.8
    ours, papers = real_report["calibration"], real_report["paper_calibration"]
    assert ours["alpha"] == real_report["alpha"] < 7.5 == papers["alpha"]
    assert ours["nll"] < papers["nll"]
    assert ours["saturated"] < 0.5 < papers["saturated"]
    assert sum(real_report["confidence_histogram"]["counts"]) == 80


def test_parameters_read_raw_states() -> None:
    """The scaling is folded in: ops.probe_reward on raw states ranks as the report says, for every gate."""
    chosen, rejected = make_states()
    for gate in ("softmax", "static", "vote"):
        parameters, report = fit_parameters(chosen, rejected, RewardFitConfig(gate=gate))
        scored = [ops.probe_reward(states, None, *parameters, gate=gate).reward for states in (chosen, rejected)]
        assert ((scored[0] > scored[1]).double().mean().item()) == pytest.approx(report.train_accuracy)
        assert report.gate == gate


@pytest.mark.parametrize("gate", ["softmax", "static", "vote"])
@pytest.mark.parametrize(("P", "L", "D"), [(20, 3, 12), (20, 6, 6), (8, 16, 40)], ids=["", "D=L", "S=L"])
def test_folding_knows_the_gates_weights_from_the_probes(P: int, L: int, D: int, gate: str) -> None:
    """A vote's V [L, L] is over scores, not features, also where it has the shape of weights on features."""
    chosen, rejected = make_states(P, L, D)
    config, states = RewardFitConfig(gate=gate, max_iter=10), torch.cat([chosen, rejected])
    fitted, _ = fit_stages(states, stage1_labels(P, None, None), list(range(P)), config)
    found = ops.probe_reward(states, None, *fitted.parameters(), gate=gate).reward
    torch.testing.assert_close(found, fitted.reward(fitted.features(states)).float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("D", [12, 300])
def test_more_signal_is_found(D: int) -> None:
    """Both with fewer and with more rows than features."""
    weak, strong = (fit_parameters(*make_states(D=D, signal=signal))[1] for signal in (0.0, 6.0))
    assert 0.25 < weak.gated_accuracy < 0.75
    assert strong.gated_accuracy > 0.9
    assert strong.layer_accuracy[1] > strong.layer_accuracy[0]


def test_reduced_coordinates_change_nothing() -> None:
    """Rows fewer than features are fitted in their span; padding the features to stay outside it gives the same."""
    chosen, rejected = make_states(P=20, D=48)
    wide, _ = fit_parameters(chosen, rejected, RewardFitConfig(folds=2))
    standardizer = Standardizer.of(torch.cat([chosen, rejected]))
    rows = standardizer(torch.cat([chosen, rejected]))
    span = Span(rows)
    weight = torch.randn(3, span.coordinates(rows).shape[2], dtype=torch.float64)
    held = torch.randn(5, 3, 48)
    direct = torch.einsum("nld,ld->ln", held.double(), span.expand(weight))
    torch.testing.assert_close(torch.einsum("lnr,lr->ln", span.coordinates(held), weight), direct, rtol=1e-4, atol=1e-4)
    gram = rows.transpose(0, 1) @ rows.transpose(0, 1).mT
    coordinates = span.coordinates(rows)
    torch.testing.assert_close((coordinates @ coordinates.mT).float(), gram, rtol=1e-4, atol=1e-5)
    assert wide.probe_weight.shape == (3, 48)


def test_constant_and_degenerate_features() -> None:
    chosen, rejected = make_states()
    for states in (chosen, rejected):
        states[:, :, 3] = 7.0
        states[:, 0] = -2.0
    parameters, report = fit_parameters(chosen, rejected)
    assert (parameters.probe_weight[:, 3] == 0).all()
    assert (parameters.probe_weight[0] == 0).all()
    assert report.layer_accuracy[0] == 0.5
    assert all(p.isfinite().all() for p in parameters if p is not None)


@pytest.mark.filterwarnings("ignore:the reward ranks")
def test_held_out_pairs_are_not_seen() -> None:
    """Labels of no meaning, features enough to memorise them: held out they rank at chance, in training perfectly."""
    generator = torch.Generator().manual_seed(2)
    chosen, rejected = torch.randn(2, 80, 2, 400, generator=generator)
    _, report = fit_parameters(chosen, rejected)
    assert report.train_accuracy == 1.0
    assert 0.3 < report.gated_accuracy < 0.7


@pytest.mark.filterwarnings("ignore:the reward ranks")
def test_groups_keep_copies_together() -> None:
    """Every pair four times under noise: by pair a fold sees its copies, by group it does not."""
    generator = torch.Generator().manual_seed(2)
    base = torch.randn(2, 20, 2, 300, generator=generator).repeat(1, 4, 1, 1)
    chosen, rejected = base + 0.01 * torch.randn(base.shape, generator=generator)
    leaking = fit_parameters(chosen, rejected)[1]
    grouped = fit_parameters(chosen, rejected, groups=list(range(20)) * 4)[1]
    assert leaking.gated_accuracy > 0.9
    assert grouped.gated_accuracy < 0.8
    assert (leaking.num_groups, grouped.num_groups) == (80, 20)


def test_c_is_chosen_with_the_sides_of_a_pair_in_one_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict = {}
    monkeypatch.setattr(fit, "fit_linear_svm", lambda features, labels, **options: given.update(options))
    labels = torch.tensor([1.0, 1.0, 0.0, -1.0, 0.0, -1.0])  # two sequences without a label
    fit_probes(torch.randn(2, 6, 4), labels, ["a", "b", "b"], RewardFitConfig(C=[0.1, 1.0], folds=2, seed=3))
    assert given == {"C": [0.1, 1.0], "groups": ["a", "b", "a", "b"], "folds": 2, "seed": 3}


@pytest.mark.parametrize("squash", [False, True])
def test_alpha_and_the_calibration_are_of_the_held_out_gaps_in_use(
    monkeypatch: pytest.MonkeyPatch, squash: bool
) -> None:
    gap = torch.randn(12, 2, dtype=torch.float64) + 0.9
    monkeypatch.setattr(fit, "_cross_validate", lambda *_: (torch.zeros(12, 3, dtype=torch.float64), gap))
    _, report = fit_parameters(*make_states(P=12), RewardFitConfig(squash=squash))
    used = gap[:, int(squash)]
    assert report.alpha == calibrated_alpha(used)
    assert report.calibration == calibration(used, report.alpha)
    assert report.gated_accuracy == (gap[:, 0] > 0).double().mean().item()
    assert report.held_out_nll == pytest.approx(torch.nn.functional.softplus(1 - gap[:, 0]).mean().item())


@pytest.mark.parametrize("gate", ["softmax", "static", "vote"])
@pytest.mark.parametrize("D", [12, 150])
def test_folded_parameters_score_raw_states_as_the_fit_did(gate: str, D: int) -> None:
    states = torch.cat(make_states(D=D))
    labels = torch.cat([torch.ones(60), -torch.ones(60)])
    fitted, _ = fit_stages(states, labels, list(range(60)), RewardFitConfig(gate=gate))  # type: ignore[arg-type]
    found = ops.probe_reward(states, None, *fitted.parameters(), gate=gate).reward  # type: ignore[arg-type]
    torch.testing.assert_close(found.double(), fitted.reward(fitted.features(states)), rtol=1e-3, atol=1e-3)


def test_stage_two_is_pulled_toward_stage_one() -> None:
    states, labels = torch.cat(make_states()), torch.cat([torch.ones(60), -torch.ones(60)])
    fitted, _ = fit_stages(states, labels, list(range(60)), RewardFitConfig(regularisation=1e6))
    assert fitted.probes.probe_weight.abs().max() > 1
    torch.testing.assert_close(fitted.reduced, fitted.probes, rtol=0, atol=1e-4)


def test_deterministic_and_seeded() -> None:
    states = make_states()
    (first, a), (again, b), (_, c) = (fit_parameters(*states, RewardFitConfig(seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(p, q) for p, q in zip(first, again, strict=True))  # type: ignore[arg-type]
    assert {**a.to_json(), "seconds": 0} == {**b.to_json(), "seconds": 0}
    assert a.held_out_nll != c.held_out_nll


def test_stage_two_lowers_the_loss_and_regularisation_holds_it_back() -> None:
    chosen, rejected = make_states(signal=3.0)
    losses = []
    for strength in (1e-4, 1e-2, 1e4):
        parameters, _ = fit_parameters(chosen, rejected, RewardFitConfig(regularisation=strength))
        reward = HybridReward(*parameters)
        losses.append(reward.nll(reward(chosen).reward, reward(rejected).reward).item())
    assert losses[0] < losses[1] < losses[2]


@pytest.mark.parametrize("gate", ["softmax", "static", "vote"])
def test_stage_two_gradient_is_autograds(gate: str) -> None:
    features = torch.randn(3, 12, 5, dtype=torch.float64)
    shapes = [(3, 5), (3,), {"softmax": (3, 5), "static": None, "vote": (3, 3)}[gate], (3,)]
    parameters = [None if s is None else torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    pooled = features.transpose(0, 1)
    chosen, rejected = ops.probe_reward(pooled, None, *parameters, gate=gate).reward.chunk(2)
    expected = HybridReward.nll(chosen, rejected, 0.7)
    expected.backward()
    given = RewardParameters(*(None if p is None else p.detach() for p in parameters))
    loss, grads = _nll(features, given, RewardFitConfig(gate=gate, margin=0.7))
    torch.testing.assert_close(loss, expected.detach())
    for grad, p in zip(grads, (p for p in parameters if p is not None), strict=True):
        torch.testing.assert_close(grad, p.grad)


def test_stage_two_says_whether_it_came_to_rest() -> None:
    chosen, rejected = make_states()
    assert fit_parameters(chosen, rejected, RewardFitConfig(max_iter=500, regularisation=0.1))[1].converged
    assert not fit_parameters(chosen, rejected, RewardFitConfig(max_iter=1))[1].converged


def test_safety_labels_steer_stage_one() -> None:
    """With every label turned around, the probes of stage 1 rank backwards."""
    chosen, rejected = make_states(signal=6.0)
    _, plain = fit_parameters(chosen, rejected)
    _, turned = fit_parameters(chosen, rejected, chosen_is_safe=[False] * 60, rejected_is_safe=[True] * 60)
    assert plain.layer_accuracy[1] > 0.9
    assert turned.layer_accuracy[1] < 0.1
    assert stage1_labels(2, [True, None], [None, False]).tolist() == [1, 0, 0, -1]
    assert stage1_labels(2, None, None).tolist() == [1, 1, -1, -1]
    some = [None if i % 2 else True for i in range(60)]
    assert fit_parameters(chosen, rejected, chosen_is_safe=some)[1].layer_accuracy[1] > 0.8


def test_settings_reach_the_report() -> None:
    states = make_states()
    _, report = fit_parameters(*states, RewardFitConfig(alpha=7.5, margin=2.0, squash=True, C=[0.1, 10.0], folds=3))
    assert (report.alpha, report.alpha_is_auto, report.margin, report.folds) == (7.5, False, 2.0, 3)
    assert set(report.C) <= {0.1, 10.0}
    assert report.calibration == report.paper_calibration
    json.dumps(report.to_json(), allow_nan=False)


def test_chance_is_said_aloud() -> None:
    chosen, _ = make_states(P=40)
    with pytest.warns(RuntimeWarning, match="no better than chance"):
        fit_parameters(chosen, chosen.clone(), RewardFitConfig(folds=2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gate": "sigmoid"}, "gate must be"),
        ({"pool": "first"}, "pool must be"),
        ({"alpha": 0.0}, "alpha must be positive"),
        ({"alpha": "best"}, "alpha must be positive"),
        ({"regularisation": -1.0}, "regularisation must not be negative"),
    ],
)
def test_settings_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        RewardFitConfig(**settings)


def test_states_refused() -> None:
    chosen, rejected = make_states(P=8)
    broken = rejected.clone()
    broken[5, 2, 0] = torch.inf
    with pytest.raises(UserError, match="rejected states: not finite at row 5, layer 2"):
        fit_parameters(chosen, broken)
    with pytest.raises(UserError, match=r"must both be \[P, L, D\]"):
        fit_parameters(chosen, rejected[:, :2])
    with pytest.raises(UserError, match="2 groups, not 1 and 1"):
        fit_parameters(chosen, rejected, groups=["x"] * 8)
    with pytest.raises(UserError, match="groups: 7 labels for 8 pairs"):
        fit_parameters(chosen, rejected, groups=range(7))
    with pytest.raises(UserError, match="chosen_is_safe: 1 labels for 8 pairs"):
        fit_parameters(chosen, rejected, chosen_is_safe=[True])
    with pytest.raises(UserError, match="every label is"):
        fit_parameters(chosen, rejected, rejected_is_safe=[True] * 8)


def test_states_file_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        fit_from_states(tmp_path / "absent.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\x00\x00")
    with pytest.raises(UserError, match="is not a safetensors file"):
        fit_from_states(tmp_path / "torn.safetensors")
    save_file({"chosen": torch.zeros(2, 3, 4)}, tmp_path / "half.safetensors")
    with pytest.raises(UserError, match="no tensor rejected; it has chosen"):
        fit_from_states(tmp_path / "half.safetensors")
    save_file({"chosen": torch.zeros(2), "rejected": torch.zeros(2)}, tmp_path / "flat.safetensors")
    with pytest.raises(UserError, match=r"flat.safetensors: .*\[P, L, D\]|flat.safetensors: too many"):
        fit_from_states(tmp_path / "flat.safetensors")


def test_states_file_may_lack_the_embedding_row(tmp_path: Path) -> None:
    chosen, rejected = make_states()
    save_file({"chosen": chosen, "rejected": rejected}, tmp_path / "states.safetensors")
    assert fit_from_states(tmp_path / "states.safetensors", drop_embedding=False).num_layers == 3
    assert fit_from_states(tmp_path / "states.safetensors").num_layers == 2
    assert load_file(tmp_path / "states.safetensors")["chosen"].shape == (60, 3, 12)
