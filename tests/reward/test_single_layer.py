"""A reward of one layer: which one, and that it is fitted and calibrated on that layer alone."""

from typing import Any

import pytest
import torch
from reward_cases import GATES
from test_fit import make_states

from reprdpo.reward import RewardFitConfig, fit_parameters, fit_single_layer
from reprdpo.reward.single_layer import choose_layer


def test_of_equal_layers_the_first_is_chosen() -> None:
    accuracy = [0.5, 0.9, 0.9, 0.5]
    assert [choose_layer(accuracy, which, 0) for which in ("best", "worst", "last")] == [1, 0, 3]
    drawn = [choose_layer(accuracy, "random", seed) for seed in range(40)]
    assert drawn == [choose_layer(accuracy, "random", seed) for seed in range(40)]
    assert set(drawn) == {0, 1, 2, 3}


@pytest.mark.parametrize(("which", "layer"), [("best", 1), ("worst", 0), ("last", 2)])
def test_the_reward_is_that_of_its_layer_alone(which: Any, layer: int) -> None:
    chosen, rejected = make_states(signal=3.0)
    config = RewardFitConfig(gate=GATES[0])  # type: ignore[arg-type]
    reward, report = fit_single_layer(chosen, rejected, config, which)
    own, alone = fit_parameters(chosen[:, [layer]], rejected[:, [layer]], RewardFitConfig(gate="static"))
    assert (report.layer, report.num_layers, len(report.layer_accuracy)) == (layer + 1, 3, 3)
    assert reward.alpha == report.alpha == alone.alpha
    assert report.gated_accuracy == alone.gated_accuracy
    expected = chosen[:, layer] @ own.probe_weight[0] + own.probe_bias[0]
    torch.testing.assert_close(reward(chosen).reward, expected, rtol=1e-4, atol=1e-4)
