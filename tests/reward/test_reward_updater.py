"""The online update against Adam written out, its isolation from the policy, its resumption."""

import copy
from typing import Any

import pytest
import torch
from reward_cases import GATES, by_formula, make_reward

from reprdpo.reward import HybridReward, RewardUpdater


def batch(seed: int = 0) -> torch.Tensor:
    return torch.randn(8, 3, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("gate", GATES)
def test_one_step_is_adams(gate: str) -> None:
    """Adam's first step is lr times the gradient over its size plus eps."""
    reward = make_reward(gate)
    before = {name: p.detach().clone() for name, p in reward.named_parameters()}
    twin = copy.deepcopy(reward)
    rewards = by_formula(twin, batch())
    expected = torch.nn.functional.softplus(0.5 - rewards[:4] + rewards[4:]).mean()
    expected.backward()
    loss = RewardUpdater(reward, lr=1e-2, margin=0.5).step(batch())
    torch.testing.assert_close(loss.double(), expected.detach())
    assert not loss.requires_grad
    for name, p in reward.named_parameters():
        grad = dict(twin.named_parameters())[name].grad
        assert grad is not None
        torch.testing.assert_close(p.detach() - before[name], -1e-2 * grad / (grad.abs() + 1e-8), rtol=1e-3, atol=1e-5)


def test_steps_lower_the_loss() -> None:
    updater = RewardUpdater(make_reward(), lr=0.05)
    losses = [updater.step(batch()).item() for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]


def test_the_policy_gets_no_gradient() -> None:
    policy = torch.randn(8, 5, 16, requires_grad=True)
    hidden = [policy * (layer + 1) for layer in range(3)]
    index = torch.full((8,), 4)
    reward = make_reward()
    RewardUpdater(reward).step(hidden, index)
    assert policy.grad is None
    assert all(p.grad is None for p in reward.parameters())
    hidden[0].sum().backward()
    assert policy.grad is not None


@pytest.mark.parametrize("gate", GATES)
def test_the_step_is_that_of_autograd(gate: str) -> None:
    """Autograd's gradients and the closed form's; a large eps, as Adam's first step is otherwise their sign alone."""
    one, other = make_reward(gate), make_reward(gate)
    updater, adam = RewardUpdater(one), torch.optim.Adam(other.parameters(), lr=1e-3, eps=1.0)
    updater._optimizer.param_groups[0]["eps"] = 1.0
    a = updater.step(batch())
    b = other.nll(*other(batch()).reward.chunk(2), margin=1.0)
    b.backward()
    adam.step()
    torch.testing.assert_close(a, b)
    for p, q, start in zip(one.parameters(), other.parameters(), make_reward(gate).parameters(), strict=True):
        torch.testing.assert_close(p - start, q - start, rtol=1e-3, atol=1e-7)
    assert not torch.equal(one.gate_bias, make_reward(gate).gate_bias)


def test_batches_of_unequal_size_accumulate_to_the_whole() -> None:
    whole, parts = make_reward(), make_reward()
    states = torch.randn(12, 3, 16)
    updaters = [RewardUpdater(whole), RewardUpdater(parts)]
    for updater in updaters:
        updater._optimizer.param_groups[0]["eps"] = 1.0
    updaters[0].step(states)
    chosen, rejected = states.chunk(2)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        updaters[1].accumulate(torch.cat([chosen[rows], rejected[rows]]))
    assert all(torch.equal(p, q) for p, q in zip(parts.parameters(), make_reward().parameters(), strict=True))
    updaters[1].apply()
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_scored_is_gamma_and_the_loss_of_the_reward_as_it_stood() -> None:
    reward = make_reward()
    before = reward.score(batch(), None, margin=0.5, alpha=3.0, floor=0.2)
    scored = RewardUpdater(reward, margin=0.5).accumulate(batch(), alpha=3.0, floor=0.2)
    for got, expected in zip(scored, before, strict=True):
        torch.testing.assert_close(got, expected)
    chosen, rejected = by_formula(reward, batch()).detach().chunk(2)
    torch.testing.assert_close(scored.confidence.double(), torch.sigmoid(3 * (chosen - rejected)).clamp(min=0.2))
    with pytest.raises(ValueError, match="floor"):
        RewardUpdater(reward).accumulate(batch(), floor=2.0)


def test_works_under_no_grad_and_autocast() -> None:
    reward, twin = make_reward(), make_reward()
    with torch.no_grad():
        RewardUpdater(reward).step(batch())
    with torch.autocast("cpu", torch.bfloat16):
        RewardUpdater(twin).step(batch())
    for p, q in zip(reward.parameters(), twin.parameters(), strict=True):
        assert p.dtype == q.dtype == torch.float32
        torch.testing.assert_close(p, q)


def run(reward: HybridReward, steps: range, state: dict[str, Any] | None = None) -> RewardUpdater:
    updater = RewardUpdater(reward, lr=0.01)
    if state is not None:
        updater.load_state_dict(state)
    for step in steps:
        updater.step(batch(step))
    return updater


def test_resumed_run_is_the_same() -> None:
    whole, halves = make_reward(), make_reward()
    run(whole, range(6))
    state = copy.deepcopy(run(halves, range(3)).state_dict())
    run(halves, range(3, 6), state)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), halves.parameters(), strict=True))
