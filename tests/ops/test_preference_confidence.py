"""preference_confidence against the formula in float64."""

import pytest
import torch
from torch.library import opcheck

from reprdpo import ops

CHOSEN = torch.tensor([0.3, -2.0, 5.0, 0.1])
REJECTED = torch.tensor([-0.3, 1.0, 5.0, 0.0])


def gamma_of(chosen, rejected, alpha=7.5):
    return 1 / (1 + torch.exp(-alpha * (chosen.double() - rejected.double())))


@pytest.mark.parametrize("alpha", [0.0, 1.0, 7.5, 1])
def test_formula(alpha):
    gamma = ops.preference_confidence(CHOSEN, REJECTED, alpha=alpha)
    assert gamma.dtype == torch.float32
    torch.testing.assert_close(gamma.double(), gamma_of(CHOSEN, REJECTED, alpha), rtol=1e-6, atol=0)
    assert gamma[2] == 0.5


def test_options_follow_one_another():
    squashed = ops.preference_confidence(CHOSEN, REJECTED, squash=True)
    wanted = gamma_of(1 / (1 + torch.exp(-CHOSEN.double())), 1 / (1 + torch.exp(-REJECTED.double())))
    torch.testing.assert_close(squashed.double(), wanted, rtol=1e-6, atol=0)
    floored = gamma_of(CHOSEN, REJECTED).clamp(min=0.4)
    torch.testing.assert_close(ops.preference_confidence(CHOSEN, REJECTED, floor=0.4).double(), floored)
    batch = ops.preference_confidence(CHOSEN, REJECTED, floor=0.4, reduce="batch")
    torch.testing.assert_close(batch.double(), floored.mean().expand(4))


def test_huge_rewards_saturate_and_nan_stays_in_its_pair():
    chosen = torch.tensor([1e30, -1e30, float("nan"), 1.0])
    gamma = ops.preference_confidence(chosen, torch.zeros(4), floor=0.25)
    assert gamma[:2].tolist() == [1.0, 0.25]
    assert gamma.isnan().tolist() == [False, False, True, False]


def test_is_a_constant_of_the_loss():
    gamma = ops.preference_confidence(CHOSEN.clone().requires_grad_(), REJECTED)
    assert not gamma.requires_grad
    direct = torch.ops.reprdpo.preference_confidence(CHOSEN.clone().requires_grad_(), REJECTED, 7.5, False, None, None)
    assert not direct.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_under_autocast(dtype):
    chosen, rejected = CHOSEN.to(dtype), REJECTED.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        gamma = ops.preference_confidence(chosen, rejected)
    assert gamma.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(gamma.double(), gamma_of(chosen, rejected), rtol=1e-6, atol=0)


def test_no_pairs():
    for reduce in (None, "batch"):
        assert ops.preference_confidence(torch.zeros(0), torch.zeros(0), reduce=reduce).shape == (0,)


@pytest.mark.parametrize("floor", [None, 0.5])
@pytest.mark.parametrize("reduce", [None, "batch"])
def test_opcheck_and_compile(floor, reduce):
    arguments = (CHOSEN.clone().requires_grad_(), REJECTED, 7.5, True, floor, reduce)
    opcheck(torch.ops.reprdpo.preference_confidence.default, arguments)
    compiled = torch.compile(ops.preference_confidence, fullgraph=True, backend="aot_eager")
    gamma = compiled(CHOSEN, REJECTED, squash=True, floor=floor, reduce=reduce)
    assert torch.equal(gamma, ops.preference_confidence(CHOSEN, REJECTED, squash=True, floor=floor, reduce=reduce))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((CHOSEN[:, None], REJECTED), {}, ValueError, r"chosen_reward must be \[P\]"),
        ((CHOSEN, REJECTED[:, None]), {}, ValueError, r"rejected_reward must be of shape \[P\] = \[4\], not \[4, 1\]"),
        ((CHOSEN, REJECTED[:1]), {}, ValueError, "rejected_reward must be of shape"),
        ((CHOSEN.int(), REJECTED), {}, TypeError, "chosen_reward must be float32"),
        ((CHOSEN, REJECTED.to("meta")), {}, ValueError, "rejected_reward must have the device of chosen_reward"),
        ((CHOSEN, REJECTED), {"alpha": float("inf")}, ValueError, "alpha must be finite"),
        ((CHOSEN, REJECTED), {"alpha": -1.0}, ValueError, "alpha must be in"),
        ((CHOSEN, REJECTED), {"alpha": "auto"}, TypeError, "alpha must be a number, not str"),
        ((CHOSEN, REJECTED), {"floor": 1.5}, ValueError, r"floor must be in \[0, 1\], not 1.5"),
        ((CHOSEN, REJECTED), {"reduce": "mean"}, ValueError, "reduce must be one of None, 'batch', not 'mean'"),
    ],
)
def test_refuses(arguments, options, error, words):
    with pytest.raises(error, match=words):
        ops.preference_confidence(*arguments, **options)
