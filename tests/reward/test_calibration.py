"""Alpha against a grid search, calibration error against hand-made tables."""

import math

import pytest
import torch
import torch.nn.functional as F

from reprdpo.reward.calibration import calibrated_alpha, calibration, confidence_gap, pair_accuracy


def test_alpha_recovers_the_slope_labels_were_drawn_with() -> None:
    gap = torch.randn(20_000, dtype=torch.float64)
    right = torch.rand(20_000) < torch.sigmoid(2.5 * gap)
    alpha = calibrated_alpha(torch.where(right, gap, -gap))
    assert alpha == pytest.approx(2.5, rel=0.05)
    assert calibration(torch.where(right, gap, -gap), alpha).ece < 0.02


def test_alpha_is_the_minimum_of_the_nll() -> None:
    gap = torch.randn(200, dtype=torch.float64) + 0.5
    grid = torch.linspace(0.05, 6, 2000, dtype=torch.float64)
    best = grid[F.softplus(-grid[:, None] * gap).mean(1).argmin()].item()
    assert calibrated_alpha(gap) == pytest.approx(best, abs=0.01)


def test_alpha_stays_finite_and_positive() -> None:
    separable = calibrated_alpha(torch.full((99,), 0.5))
    assert torch.sigmoid(torch.tensor(separable * 0.5)).item() == pytest.approx(100 / 101)
    backwards = calibrated_alpha(torch.full((99,), -0.5))
    assert 0 < backwards * 0.5 < 0.02
    assert calibrated_alpha(torch.zeros(5)) == 1.0


def test_calibration_table_by_hand() -> None:
    logit = math.log(0.92 / 0.08)
    gap = torch.tensor([logit] * 3 + [-logit], dtype=torch.float64)  # said .92, right three times of four
    found = calibration(gap, 1.0)
    assert found.ece == pytest.approx(0.17)
    assert found.nll == pytest.approx(-(3 * math.log(0.92) + math.log(0.08)) / 4)
    filled = [b for b in found.bins if b.count]
    assert [(b.count, b.accuracy) for b in filled] == [(4, 0.75)]
    assert filled[0].confidence == pytest.approx(0.92)
    assert filled[0].low < 0.92 <= filled[0].high
    assert calibration(gap * 10, 1.0).saturated == 1.0
    assert found.saturated == 0.0


def test_bins_hold_every_pair_at_both_ends() -> None:
    found = calibration(torch.tensor([0.0, 1e9, -1e9, 0.3]), 1.0)
    assert sum(b.count for b in found.bins) == 4
    assert found.bins[0].accuracy is not None
    assert found.bins[-1].count == 2


def test_ties_count_one_half() -> None:
    assert pair_accuracy(torch.tensor([1.0, 0.0, -1.0, 2.0])).item() == 0.625


def test_squashed_gap() -> None:
    chosen, rejected = torch.randn(2, 9).unbind()
    squashed = confidence_gap(chosen, rejected, squash=True)
    torch.testing.assert_close(squashed, chosen.sigmoid() - rejected.sigmoid())
