"""Linear SVMs against scikit-learn's LinearSVC, in both forms; refusals."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.svm import LinearSVC
from torch import Tensor

from reprdpo.errors import UserError
from reprdpo.reward import fit_linear_svm


def make(n: int, L: int, D: int) -> tuple[Tensor, Tensor]:
    features = torch.randn(n, L, D, dtype=torch.float64) * torch.linspace(0.3, 3, L)[:, None]
    labels = torch.where(features[:, :, 0].sum(1) + torch.randn(n) > 0.2, 1.0, -1.0)
    return features, labels


def objective(x: Tensor, y: Tensor, w: Tensor, b: Tensor, C: float, weight: Tensor | float = 1.0) -> float:
    slack = (1 - y.double() * (x.double() @ w.double() + b)).clamp(min=0)
    return (0.5 * (w.double().square().sum() + b.double() ** 2) + C * (weight * slack**2).sum()).item()


def oracle(x: Tensor, y: Tensor, C: float, weight: Tensor | None = None, intercept: bool = True) -> float:
    svc = LinearSVC(C=C, tol=1e-8, dual="auto", max_iter=200_000, fit_intercept=intercept)
    svc.fit(x.double().numpy(), y.numpy(), None if weight is None else weight.numpy())
    b = torch.tensor(float(np.ravel(svc.intercept_)[0]) if intercept else 0.0)
    return objective(x, y, torch.from_numpy(svc.coef_[0]), b, C, 1.0 if weight is None else weight)


@pytest.mark.parametrize(
    ("n", "D"),
    [
        (40, 100),  # the Gram form
        (200, 7),  # the primal form, not separable
        (31, 31),  # where they meet
    ],
)
@pytest.mark.parametrize("C", [0.01, 1.0, 100.0])
def test_objective_is_liblinears(n: int, D: int, C: float) -> None:
    features, labels = make(n, 3, D)
    svm = fit_linear_svm(features, labels, C=C)
    assert svm.converged.all()
    for layer in range(3):
        ours = objective(features[:, layer], labels, svm.coef[layer], svm.intercept[layer], C)
        assert ours == pytest.approx(svm.objective[layer].item(), rel=1e-9)
        assert ours == pytest.approx(oracle(features[:, layer], labels, C), rel=1e-4)


@pytest.mark.parametrize("D", [5, 120])
def test_weights_and_no_intercept(D: int) -> None:
    features, labels = make(60, 2, D)
    weight = torch.rand(60, dtype=torch.float64) * 2
    weight[:10] = 0
    svm = fit_linear_svm(features, labels, sample_weight=weight, fit_intercept=False)
    assert (svm.intercept == 0).all()
    for layer in range(2):
        assert svm.objective[layer].item() == pytest.approx(
            oracle(features[:, layer], labels, 1.0, weight, intercept=False), rel=1e-4
        )
    without = fit_linear_svm(features[10:], labels[10:], sample_weight=weight[10:], fit_intercept=False, tol=1e-12)
    with_zeros = fit_linear_svm(features, labels, sample_weight=weight, fit_intercept=False, tol=1e-12)
    torch.testing.assert_close(with_zeros.coef, without.coef)


def test_both_forms_agree() -> None:
    features, labels = make(24, 2, 24)
    wide = torch.cat([features, torch.zeros(24, 2, 1, dtype=torch.float64)], dim=2)
    primal, gram = (fit_linear_svm(x, labels, tol=1e-14) for x in (features, wide))
    torch.testing.assert_close(primal.coef, gram.coef[:, :-1])
    torch.testing.assert_close(primal.intercept, gram.intercept)


def test_every_layer_of_real_states_matches_liblinear(real_dir: Path) -> None:
    states = load_file(real_dir / "states" / "llama2_7b_last_token.safetensors")
    features = torch.cat([states["chosen"], states["rejected"]])[:, 1:].float()
    labels = torch.cat([torch.ones(80), -torch.ones(80)])
    svm = fit_linear_svm(features, labels, C=3e-4)
    assert svm.converged.all()
    theirs = torch.tensor([oracle(features[:, layer], labels, 3e-4) for layer in range(32)])
    torch.testing.assert_close(svm.objective.float(), theirs, rtol=1e-4, atol=0)


def test_bad_scaling_still_converges() -> None:
    features, labels = make(50, 2, 80)
    svm = fit_linear_svm(features * 100, labels, C=1e3)
    assert svm.converged.all()
    duplicated = fit_linear_svm(torch.cat([features, features]), torch.cat([labels, -labels]), C=1e6)
    assert duplicated.converged.all()


def test_stopping_early_warns() -> None:
    features, labels = make(200, 2, 7)
    with pytest.warns(RuntimeWarning, match=r"layers \[1\] have not converged after 1 steps"):
        svm = fit_linear_svm(features, labels, max_iter=1, C=100.0, tol=1e-10)
    assert svm.converged.tolist() == [True, False]


def test_grid_takes_the_better_cost_layer_by_layer() -> None:
    """Layer 0: a few noisy rows of many features want a small C. Layer 1: a tiny signal wants a large one."""
    labels = torch.where(torch.arange(120) % 2 == 0, 1.0, -1.0)
    strong = torch.randn(120, 60) + 0.25 * labels[:, None]
    weak = torch.randn(120, 60) * torch.cat([torch.full((1,), 1e-3), torch.full((59,), 1e-1)])
    weak[:, 0] = 1e-3 * labels * (1 + torch.rand(120))
    svm = fit_linear_svm(torch.stack([strong, weak], dim=1), labels, C=[1e-4, 1e6])
    assert svm.C.tolist() == [1e-4, 1e6]
    alone = fit_linear_svm(weak[:, None], labels, C=1e6)
    torch.testing.assert_close(svm.coef[1:], alone.coef)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x, y: (x.index_put((torch.tensor(3), torch.tensor(1)), torch.tensor(torch.nan)), y, {}),
            "row 3, layer 1",
        ),
        (lambda x, y: (x, torch.where(y > 0, 1.0, 0.0), {}), "must be -1 or \\+1, not \\[0"),
        (lambda x, y: (x, y.abs(), {}), "every label is \\+1"),
        (lambda x, y: (x, y, {"C": 0.0}), "C must be positive"),
        (lambda x, y: (x, y, {"C": [1.0, -1.0]}), "C must be positive"),
        (lambda x, y: (x, y, {"tol": 0.0}), "tol must be positive"),
        (lambda x, y: (x[:, 0], y, {}), r"must be floating \[n, L, D\]"),
        (lambda x, y: (x, y[1:], {}), "labels of shape"),
        (lambda x, y: (x, y, {"sample_weight": -torch.ones(12)}), "none negative"),
        (lambda x, y: (x, y, {"sample_weight": torch.zeros(12)}), "every sample_weight is 0"),
        (lambda x, y: (x[:0], y[:0], {}), "must be floating"),
    ],
)
def test_refusals(change: Callable[..., tuple[Tensor, Tensor, dict]], message: str) -> None:
    features = torch.randn(12, 2, 5)
    labels = torch.where(torch.arange(12) % 2 == 0, 1.0, -1.0)
    features, labels, options = change(features, labels)
    with pytest.raises(UserError, match=message):
        fit_linear_svm(features, labels, **options)
