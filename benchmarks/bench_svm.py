"""How long L linear SVMs take: all layers together, beside scikit-learn's LinearSVC one layer after another."""

import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.harness import Work, measure
from reprdpo.reward import fit_linear_svm

# Rows (80 pairs), layers, features: last-token states of a 7B model, its embedding output among them.
n, L, D = 160, 33, 4096
TOL = 1e-4
REAL = Path(os.environ.get("REPRDPO_REAL", Path(__file__).parents[2] / "shared" / "real"))
STATES = REAL / "states" / "llama2_7b_last_token.safetensors"
SOURCE = "real states" if STATES.is_file() else "made rows"


def make_inputs(seed: int, device: str = "cpu") -> list[Tensor]:
    """Real states of a 7B model where they lie beside the project, else made ones; every layer's variance is 1 / D."""
    labels = torch.cat([torch.ones(n // 2), -torch.ones(n // 2)])
    features = real_rows() if STATES.is_file() else made_rows(seed, labels)
    features -= features.mean(0)
    features /= features.square().sum(2).mean(0).sqrt().clamp(min=1e-6)[:, None]
    return [features.to(device), labels.to(device)]


def real_rows() -> Tensor:
    states = load_file(STATES)
    return torch.cat([states["chosen"], states["rejected"]]).float()


def made_rows(seed: int, labels: Tensor) -> Tensor:
    """Rows of fast-decaying spectrum and a weak signal, as real states are."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, n + 1) ** -0.5
    features = torch.empty(n, L, D)
    for layer in range(L):
        features[:, layer] = (torch.randn(n, n, generator=generator) * spectrum) @ torch.randn(
            n, D, generator=generator
        )
        features[:, layer] += labels[:, None] * torch.randn(D, generator=generator)
    return features


def ours(features: Tensor, labels: Tensor, *, loss: Any) -> Tensor:
    return fit_linear_svm(features, labels, loss=loss, tol=TOL).objective


def linear_svc(features: Tensor, labels: Tensor, *, loss: str, jobs: int = 1) -> Tensor:
    joblib, svm = pytest.importorskip("joblib"), pytest.importorskip("sklearn.svm")
    y = labels.cpu().numpy()

    def fit(layer: int) -> Tensor:
        model = svm.LinearSVC(loss=loss, tol=1e-8, max_iter=100_000, dual=True)
        model.fit(features[:, layer].double().cpu().numpy(), y)
        return objective(features[:, layer], labels, model, loss)

    return torch.stack(joblib.Parallel(n_jobs=jobs)(joblib.delayed(fit)(layer) for layer in range(features.shape[1])))


def objective(x: Tensor, y: Tensor, model: Any, loss: str) -> Tensor:
    w, b = torch.from_numpy(model.coef_[0]), float(model.intercept_[0])
    slack = (1 - y.double().cpu() * (x.double().cpu() @ w + b)).clamp(min=0)
    return (w.square().sum() + b * b) / 2 + (slack if loss == "hinge" else slack.square()).sum()


def oracle(features: Tensor, labels: Tensor, *, loss: Any) -> Tensor:
    """The objectives to ten digits, by this library's own solver, whose duality gap proves them."""
    found = fit_linear_svm(features.double(), labels, loss=loss, tol=1e-9)
    if not found.converged.all():
        pytest.fail("the oracle has not converged")
    return found.objective


IMPLEMENTATIONS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "ours": (ours, "cpu"),
    "linear_svc": (linear_svc, "cpu"),
    "linear_svc_joblib": (partial(linear_svc, jobs=-1), "cpu"),
    "ours_cuda": (ours, "cuda"),
}


# On made rows the hinge takes liblinear a quarter of a minute a call.
@pytest.mark.parametrize("loss", ["squared_hinge", pytest.param("hinge", marks=pytest.mark.secondary)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_fit_linear_svm(benchmark: BenchmarkFixture, implementation: str, loss: str) -> None:
    run, device = IMPLEMENTATIONS[implementation]
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    benchmark.group = f"fit_linear_svm {loss}, {SOURCE}, {n} x {L} x {D}, C = 1"
    with warnings.catch_warnings(action="ignore"):
        measure(
            benchmark,
            partial(run, loss=loss),
            partial(make_inputs, device=device),
            oracle=partial(oracle, loss=loss),
            oracle_key=("fit_linear_svm", loss, device),
            max_error=TOL,
            work=Work(bytes=n * L * D * 4, gemms=((n, n, D),) * L),
            dtype=torch.float64,
            device=device,
            peer=not implementation.startswith("ours"),
            shape={"n": n, "L": L, "D": D},
            headline="kernel",
        )
