"""Linear SVMs of both losses against scikit-learn's LinearSVC, in every form and within a budget; refusals."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.svm import LinearSVC
from torch import Tensor

from benchmarks.harness import peak_bytes
from reprdpo.errors import UserError
from reprdpo.reward import LinearSVM, fit_linear_svm
from reprdpo.reward.folds import grouped_folds
from reprdpo.reward.svm_forms import plan

LOSSES = ["squared_hinge", "hinge"]


def make(n: int, L: int, D: int) -> tuple[Tensor, Tensor]:
    features = torch.randn(n, L, D, dtype=torch.float64) * torch.linspace(0.3, 3, L)[:, None]
    labels = torch.where(features[:, :, 0].sum(1) + torch.randn(n) > 0.2, 1.0, -1.0)
    return features, labels


def objective(
    x: Tensor, y: Tensor, w: Tensor, b: Tensor, C: float, weight: Tensor | float = 1.0, loss: str = "squared_hinge"
) -> float:
    slack = (1 - y.double() * (x.double() @ w.double() + b.double())).clamp(min=0)
    losses = slack if loss == "hinge" else slack**2
    return (0.5 * (w.double().square().sum() + b.double() ** 2) + C * (weight * losses).sum()).item()


def oracle(
    x: Tensor,
    y: Tensor,
    C: float,
    weight: Tensor | None = None,
    *,
    loss: str = "squared_hinge",
    fit_intercept: bool = True,
    intercept_scaling: float = 1.0,
) -> tuple[float, Tensor]:
    """LinearSVC's objective and its decision on every row."""
    svc = LinearSVC(
        C=C,
        tol=1e-8,
        loss=loss,
        dual=True,
        max_iter=300_000,
        fit_intercept=fit_intercept,
        intercept_scaling=intercept_scaling,
    )
    svc.fit(x.double().numpy(), y.numpy(), None if weight is None else weight.numpy())
    w, b = (
        torch.from_numpy(svc.coef_[0]),
        torch.as_tensor(svc.intercept_).double().reshape(-1)[0],
    )  # 0.0 without intercept
    scale = b / intercept_scaling  # the objective of features with the constant among them
    rows = torch.cat([x.double(), torch.full((len(x), 1), intercept_scaling)], 1)
    full = torch.cat([w, scale[None]])
    value = objective(rows, y, full, torch.tensor(0.0), C, 1.0 if weight is None else weight, loss)
    return value, x.double() @ w + b


def check(
    svm: LinearSVM, features: Tensor, labels: Tensor, C: float, weight: Tensor | None = None, **options: Any
) -> None:
    """Every layer converged, at LinearSVC's objective, with its decisions wherever they are not close to call."""
    assert svm.converged.all()
    assert (svm.gap <= 1e-4).all()
    for layer in range(features.shape[1]):
        theirs, decision = oracle(features[:, layer], labels, C, weight, **options)
        assert svm.objective[layer].item() == pytest.approx(theirs, rel=1e-4)
        ours = features[:, layer].double() @ svm.coef[layer].double() + svm.intercept[layer].double()
        clear = decision.abs() > 0.1
        assert torch.equal(ours[clear] > 0, decision[clear] > 0)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("n", "D"),
    [
        (40, 100),  # the Gram form, separable
        (200, 7),  # the primal form, not separable
        (31, 31),  # where they meet
        (2, 3),  # one row of each class
        (2, 1),
    ],
)
@pytest.mark.parametrize("C", [0.01, 1.0, 30.0])
def test_objective_is_liblinears(n: int, D: int, C: float, loss: str) -> None:
    features, labels = make(n, 2, D)
    labels[:2] = torch.tensor([1.0, -1.0])
    svm = fit_linear_svm(features, labels, C=C, loss=loss)
    check(svm, features, labels, C, loss=loss)
    for layer in range(2):
        ours = objective(features[:, layer], labels, svm.coef[layer], svm.intercept[layer], C, loss=loss)
        assert ours == pytest.approx(svm.objective[layer].item(), rel=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("D", [5, 120])
def test_weights_and_no_intercept(D: int, loss: str) -> None:
    features, labels = make(60, 2, D)
    weight = torch.rand(60, dtype=torch.float64) * 2
    weight[:10] = 0
    svm = fit_linear_svm(features, labels, sample_weight=weight, fit_intercept=False, loss=loss)
    assert (svm.intercept == 0).all()
    check(svm, features, labels, 1.0, weight, fit_intercept=False, loss=loss)
    options = {"fit_intercept": False, "loss": loss, "tol": 1e-10}
    without = fit_linear_svm(features[10:], labels[10:], sample_weight=weight[10:], **options)
    with_zeros = fit_linear_svm(features, labels, sample_weight=weight, **options)
    torch.testing.assert_close(with_zeros.coef, without.coef, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("D", [5, 90])
def test_intercept_scaling_is_liblinears(D: int, loss: str) -> None:
    features, labels = make(60, 2, D)
    svm = fit_linear_svm(features + 0.5, labels, intercept_scaling=7.0, loss=loss)
    check(svm, features + 0.5, labels, 1.0, loss=loss, intercept_scaling=7.0)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("D", [6, 90])
def test_duplicate_rows_and_constant_features(D: int, loss: str) -> None:
    """A row given twice weighs twice; rows that contradict each other, and features that say nothing, do no harm."""
    features, labels = make(40, 3, D)
    features[:, 0, 1] = 5.0
    features[:, 1] = -2.0
    twice = fit_linear_svm(features.repeat(2, 1, 1), labels.repeat(2), loss=loss, tol=1e-9)
    doubled = fit_linear_svm(features, labels, sample_weight=torch.full((40,), 2.0), loss=loss, tol=1e-9)
    torch.testing.assert_close(twice.objective, doubled.objective, rtol=1e-7, atol=0)
    torch.testing.assert_close(twice.coef, doubled.coef, rtol=1e-3, atol=1e-3)
    rows, both = torch.cat([features, features[:20]]), torch.cat([labels, -labels[:20]])
    check(fit_linear_svm(rows, both, loss=loss), rows, both, 1.0, loss=loss)


@pytest.mark.parametrize("loss", LOSSES)
def test_both_forms_agree(loss: str) -> None:
    features, labels = make(24, 2, 23)
    wide = torch.cat([features, torch.zeros(24, 2, 2, dtype=torch.float64)], dim=2)
    tol = 1e-8 if loss == "hinge" else 1e-14
    primal, gram = (fit_linear_svm(x, labels, tol=tol, loss=loss) for x in (features, wide))
    torch.testing.assert_close(primal.coef, gram.coef[:, :-2], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(primal.objective, gram.objective, rtol=1e-7, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_layer_of_real_states_matches_liblinear(real_dir: Path, loss: str) -> None:
    states = load_file(real_dir / "states" / "llama2_7b_last_token.safetensors")
    features = torch.cat([states["chosen"], states["rejected"]])
    labels = torch.cat([torch.ones(80), -torch.ones(80)])
    svm = fit_linear_svm(features, labels, C=3e-4, loss=loss)
    assert svm.coef.dtype == torch.float32
    some = slice(1, 33, 4)
    check(
        LinearSVM(*(v[some] if isinstance(v, Tensor) else v for v in svm)), features[:, some], labels, 3e-4, loss=loss
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_bad_scaling_still_converges(loss: str) -> None:
    """Newton's method stalls on some of these, the interior point on others."""
    features, labels = make(50, 2, 80)
    assert fit_linear_svm(features * 100, labels, C=1e3, loss=loss).converged.all()
    assert fit_linear_svm(features, labels, C=1e6, loss=loss).converged.all()
    assert fit_linear_svm(features.repeat(2, 1, 1), torch.cat([labels, -labels]), C=1e6, loss=loss).converged.all()
    tall, labels = make(90, 2, 30)
    assert fit_linear_svm(tall + 100, labels, C=1e3, loss=loss).converged.all()
    assert fit_linear_svm(tall * torch.logspace(-3, 3, 30), labels, C=1e3, loss=loss).converged.all()


def budget(form: str, n: int, D: int, problems: int = 1) -> int:
    """The budget, a power of two, that plans ``form``: the least for a direct form in memory, else the largest."""
    fitting = [size for i in range(12, 30) if plan(n, 4, D + 1, problems, size := 1 << i).form == form]
    return fitting[0] if form in ("gram", "primal") else fitting[-1]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("form", "n", "D"), [("gram", 60, 200), ("primal", 150, 12), ("streamed", 400, 9), ("cg", 60, 200), ("cg", 150, 12)]
)
def test_streaming_equals_in_memory(tmp_path: Path, form: str, n: int, D: int, loss: str) -> None:
    """Half-precision features mapped from a file, layers and blocks one after another."""
    features, labels = make(n, 4, D)
    save_file({"x": features.bfloat16()}, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        mapped = file.get_tensor("x")
        size = budget(form, n, D)
        small = fit_linear_svm(mapped, labels, C=0.1, loss=loss, working_bytes=size, tol=1e-6)
    whole = fit_linear_svm(features.bfloat16().double(), labels, C=0.1, loss=loss, tol=1e-6)
    assert plan(n, 4, D + 1, 1, size).layers < 4 or form != "gram"
    assert small.coef.dtype == torch.float32
    assert small.converged.all()
    torch.testing.assert_close(small.objective, whole.objective, rtol=3e-6, atol=0)
    torch.testing.assert_close(small.coef, whole.coef.float(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("form", "n", "D"), [("gram", 100, 900), ("primal", 300, 40), ("streamed", 900, 40), ("cg", 60, 200)]
)
@pytest.mark.parametrize("C", [1.0, [0.01, 0.1]])
def test_memory_stays_within_the_budget(form: str, n: int, D: int, loss: str, C: Any) -> None:
    features, labels = make(n, 4, D)
    size = budget(form, n, D, 1 if C == 1.0 else 6)
    result_bytes = 2 * 4 * (D + 8) * 8

    def run() -> None:
        with warnings.catch_warnings(action="ignore"):
            fit_linear_svm(features.half(), labels, C=C, loss=loss, working_bytes=size, max_iter=3)

    assert peak_bytes(run, "cpu") - features.numel() * 2 <= size + result_bytes


def test_stopping_early_warns() -> None:
    features, labels = make(200, 2, 7)
    with pytest.warns(
        RuntimeWarning, match=r"layers \[1\] have not converged after 1 steps: the duality gap is up to .*e-"
    ):
        svm = fit_linear_svm(features, labels, max_iter=1, C=100.0, tol=1e-10)
    assert svm.converged.tolist() == [True, False]
    assert svm.gap[1] > 1e-10 >= svm.gap[0]
    with pytest.warns(RuntimeWarning, match=r"layers \[0, 1\] have not converged after 1 steps"):
        fit_linear_svm(features, labels, max_iter=1, loss="hinge")


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


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("D", [8, 90])
def test_warm_path_is_each_fit_alone(D: int, loss: str) -> None:
    """Along the grid every C is met, and the one chosen is solved as if it were the only one."""
    features, labels = make(60, 3, D)
    path = fit_linear_svm(features, labels, C=[10.0, 0.001, 0.1, 1.0], loss=loss, tol=1e-7)
    for layer, C in enumerate(path.C.tolist()):
        alone = fit_linear_svm(features[:, layer : layer + 1], labels, C=C, loss=loss, tol=1e-7)
        torch.testing.assert_close(path.objective[layer], alone.objective[0], rtol=3e-7, atol=0)
        torch.testing.assert_close(path.coef[layer], alone.coef[0], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("working_bytes", [None, 1 << 18])
def test_choice_of_cost_is_by_held_out_accuracy_of_groups(working_bytes: int | None) -> None:
    """The folds fitted one by one, over the same groups, choose the same C."""
    labels = torch.where(torch.arange(60) % 2 == 0, 1.0, -1.0)
    features = torch.randn(60, 3, 40) * 0.1 + torch.tensor([0.0, 0.03, 0.0])[:, None] * labels[:, None, None]
    features[:, 2, 0] = 1e-3 * labels * (1 + torch.rand(60))
    groups, grid = [i // 2 for i in range(60)], [1e-4, 1e-2, 1.0, 1e6]
    svm = fit_linear_svm(
        features, labels, C=grid, groups=groups, folds=4, seed=3, working_bytes=working_bytes, tol=1e-9
    )
    hits = torch.zeros(4, 3)
    for held in grouped_folds(groups, 4, 3):
        kept = torch.tensor([i for i in range(60) if i not in held])
        for g, C in enumerate(grid):
            fold = fit_linear_svm(features[kept], labels[kept], C=C, tol=1e-9)
            score = torch.einsum("nld,ld->nl", features[held], fold.coef) + fold.intercept
            hits[g] += (score * labels[held, None] > 0).sum(0)
    assert svm.C.tolist() == [grid[i] for i in hits.argmax(0).tolist()]
    assert len(set(svm.C.tolist())) > 1


def test_folds_need_both_classes() -> None:
    features, labels = make(20, 1, 4)
    with pytest.raises(UserError, match="one class only"):
        fit_linear_svm(features, labels, C=[0.1, 1.0], groups=[int(y) for y in labels.tolist()])


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
        (lambda x, y: (x, y, {"loss": "logistic"}), "loss must be squared_hinge or hinge"),
        (lambda x, y: (x, y, {"intercept_scaling": 0.0}), "intercept_scaling must be positive"),
        (lambda x, y: (x, y, {"C": float("nan")}), "C must be positive"),
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
