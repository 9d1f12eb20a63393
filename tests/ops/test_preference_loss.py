"""preference_loss: each formula written out again, finite differences, and the traps of the peers."""

import math

import pytest
import torch
import torch.nn.functional as F

from reprdpo.ops import preference_loss
from reprdpo.ops.reference import PAIR_LOSSES

PAIRS = 6
BETA = 0.3


def batch(kind, *, seed=0):
    """Log-probs (leaves), and the keyword arguments that ``kind`` takes."""
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected = ((-10 * torch.rand(PAIRS, generator=generator).double() - 1).requires_grad_() for _ in range(2))
    arguments = {
        "beta": BETA,
        "loss_type": kind,
        "chosen_length": torch.randint(1, 9, (PAIRS,), generator=generator),
        "rejected_length": torch.randint(1, 9, (PAIRS,), generator=generator),
    }
    if PAIR_LOSSES[kind].needs_reference:
        arguments["ref_chosen_logp"] = chosen.detach() + torch.randn(PAIRS, generator=generator)
        arguments["ref_rejected_logp"] = rejected.detach() + torch.randn(PAIRS, generator=generator)
    return chosen, rejected, arguments


def soft_confidence(kind):
    return 0.8 if kind == "robust" else torch.linspace(0.0, 1.0, PAIRS).double()


def written_out(kind, chosen, rejected, arguments, gamma):
    """The losses as the papers print them, without the flipped form's shared frame."""
    ref_c, ref_r = arguments.get("ref_chosen_logp", 0.0), arguments.get("ref_rejected_logp", 0.0)
    len_c, len_r = arguments["chosen_length"], arguments["rejected_length"]
    ratio_c, ratio_r = chosen - ref_c, rejected - ref_r
    delta = BETA * (ratio_c - ratio_r)
    mean_c, mean_r = chosen / len_c, rejected / len_r
    if kind == "sigmoid":
        return -gamma * F.logsigmoid(delta) - (1 - gamma) * F.logsigmoid(-delta)
    if kind == "ipo":
        gap = ratio_c / len_c - ratio_r / len_r
        return gamma * (gap - 1 / (2 * BETA)) ** 2 + (1 - gamma) * (gap + 1 / (2 * BETA)) ** 2
    if kind == "hinge":
        return gamma * (1 - delta).clamp(min=0) + (1 - gamma) * (1 + delta).clamp(min=0)
    if kind == "robust":
        return (-gamma * F.logsigmoid(delta) + (1 - gamma) * F.logsigmoid(-delta)) / (2 * gamma - 1)
    if kind == "simpo":
        gap = BETA * (mean_c - mean_r)
        return -gamma * F.logsigmoid(gap - 0.5) - (1 - gamma) * F.logsigmoid(-gap - 0.5)
    if kind == "orpo":
        odds = torch.log(mean_c.exp() / (1 - mean_c.exp())) - torch.log(mean_r.exp() / (1 - mean_r.exp()))
        agree, disagree = -mean_c - BETA * F.logsigmoid(odds), -mean_r - BETA * F.logsigmoid(-odds)
        return gamma * agree + (1 - gamma) * disagree
    if kind == "gdpo":
        return -F.logsigmoid((2 * gamma - 1) * delta)
    if kind == "apo_zero":
        keep = 1 - torch.sigmoid(BETA * ratio_c) + torch.sigmoid(BETA * ratio_r)
        return gamma * keep + (1 - gamma) * (2 - keep)
    if kind == "apo_down":
        keep = torch.sigmoid(BETA * ratio_c) + 1 - torch.sigmoid(delta)
        return gamma * keep + (1 - gamma) * (torch.sigmoid(BETA * ratio_r) + torch.sigmoid(delta))
    assert kind == "sft"
    return -gamma * mean_c - (1 - gamma) * mean_r


@pytest.mark.parametrize("kind", PAIR_LOSSES)
@pytest.mark.parametrize("certain", [True, False])
def test_formula_and_gradient(kind, certain):
    chosen, rejected, arguments = batch(kind)
    gamma = 1.0 if certain else soft_confidence(kind)
    ours = preference_loss(chosen, rejected, confidence=gamma, **arguments).loss
    wanted = written_out(kind, chosen, rejected, arguments, gamma)
    torch.testing.assert_close(ours, wanted)
    upstream = torch.randn(PAIRS).double()
    for mine, theirs in zip(
        torch.autograd.grad(ours, (chosen, rejected), upstream),
        torch.autograd.grad(wanted, (chosen, rejected), upstream, materialize_grads=True, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("kind", PAIR_LOSSES)
def test_finite_differences(kind):
    chosen, rejected, arguments = batch(kind, seed=1)

    def loss(chosen, rejected):
        return preference_loss(chosen, rejected, confidence=soft_confidence(kind), **arguments).loss

    assert torch.autograd.gradcheck(loss, (chosen, rejected))


@pytest.mark.parametrize("kind", PAIR_LOSSES)
def test_confidence_is_never_dropped(kind):
    chosen, rejected, arguments = batch(kind)
    certain = preference_loss(chosen, rejected, **arguments).loss
    smoothed = preference_loss(chosen, rejected, confidence=0.9, **arguments).loss
    assert ((certain - smoothed).abs() > 1e-4).all()
    with pytest.raises(TypeError, match="label_smoothing"):
        preference_loss(chosen, rejected, label_smoothing=0.1, **arguments)


@pytest.mark.parametrize("kind", sorted(set(PAIR_LOSSES) - {"robust"}))
def test_a_flipped_pair_at_one_minus_gamma_is_the_same_loss(kind):
    chosen, rejected, arguments = batch(kind)
    gamma = soft_confidence(kind)
    flipped = {
        **arguments,
        "chosen_length": arguments["rejected_length"],
        "rejected_length": arguments["chosen_length"],
    }
    if PAIR_LOSSES[kind].needs_reference:
        flipped["ref_chosen_logp"] = arguments["ref_rejected_logp"]
        flipped["ref_rejected_logp"] = arguments["ref_chosen_logp"]
    torch.testing.assert_close(
        preference_loss(chosen, rejected, confidence=gamma, **arguments).loss,
        preference_loss(rejected, chosen, confidence=1 - gamma, **flipped).loss,
    )


def test_equation_9_and_its_fixed_point():
    chosen, rejected, arguments = batch("sigmoid")
    gamma = torch.linspace(0.05, 0.95, PAIRS).double()
    out = preference_loss(chosen, rejected, confidence=gamma, **arguments)
    delta = (chosen - arguments["ref_chosen_logp"]) - (rejected - arguments["ref_rejected_logp"])
    by_chosen, by_rejected = torch.autograd.grad(out.loss.sum(), (chosen, rejected))
    torch.testing.assert_close(by_chosen, BETA * (torch.sigmoid(BETA * delta) - gamma))
    torch.testing.assert_close(by_rejected, -by_chosen)
    at_rest = rejected.detach() + torch.logit(gamma) / BETA
    zero = torch.zeros(PAIRS).double()
    rest = preference_loss(at_rest, rejected, zero, zero, beta=BETA, confidence=gamma)
    torch.testing.assert_close(rest.loss, torch.special.entr(gamma) + torch.special.entr(1 - gamma))


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("beta", [0.1, 1.5])
def test_policy_equal_to_reference_costs_log_2(gamma, beta):
    chosen, rejected = -1000 * torch.rand(PAIRS), -1000 * torch.rand(PAIRS)
    out = preference_loss(chosen, rejected, chosen.clone(), rejected.clone(), beta=beta, confidence=gamma)
    assert ((out.loss - math.log(2)).abs() <= beta * 1e-4).all()
    assert (out.chosen_reward == 0).all()


def test_large_references_stay_float32_under_autocast():
    ref = torch.full((2,), -1003.7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = preference_loss(ref + 0.5, ref, ref, ref, beta=1.0)
    torch.testing.assert_close(out.chosen_reward, torch.full((2,), 0.5), atol=1e-4, rtol=0)


def test_reference_sign_and_rewards():
    low, high = torch.tensor([-5.0]), torch.tensor([-3.0])
    out = preference_loss(high, low, low, high, beta=0.5)
    assert out.chosen_reward.item() == 1.0
    assert out.rejected_reward.item() == -1.0
    assert not out.chosen_reward.requires_grad
    torch.testing.assert_close(out.loss, F.softplus(torch.tensor([-2.0])))
    averaged = preference_loss(
        high, low, beta=0.5, loss_type="simpo", chosen_length=torch.tensor([2]), rejected_length=torch.tensor([5])
    )
    assert (averaged.chosen_reward.item(), averaged.rejected_reward.item()) == (-0.75, -0.5)


def test_a_list_of_losses_adds_them():
    chosen, rejected, arguments = batch("sigmoid")
    del arguments["loss_type"]
    gamma = soft_confidence("sigmoid")
    mixed = preference_loss(
        chosen, rejected, confidence=gamma, loss_type=["sigmoid", "ipo", "sft"], loss_weights=[0.8, 2, 0.5], **arguments
    )
    parts = [
        weight * written_out(kind, chosen, rejected, arguments if kind != "sft" else batch("sft")[2], gamma)
        for kind, weight in (("sigmoid", 0.8), ("ipo", 2.0), ("sft", 0.5))
    ]
    torch.testing.assert_close(mixed.loss, sum(parts))
    single = preference_loss(chosen, rejected, confidence=gamma, **arguments)
    torch.testing.assert_close(mixed.chosen_reward, single.chosen_reward)
    upstream = torch.randn(PAIRS).double()
    torch.testing.assert_close(
        torch.autograd.grad(mixed.loss, (chosen, rejected), upstream),
        torch.autograd.grad(sum(parts), (chosen, rejected), upstream),
    )


@pytest.mark.parametrize("kind", PAIR_LOSSES)
def test_empty_responses_make_no_nan(kind):
    chosen, rejected, arguments = batch(kind)
    zeros = torch.zeros(PAIRS)
    arguments |= {"chosen_length": zeros.long(), "rejected_length": zeros.long()}
    if PAIR_LOSSES[kind].needs_reference:
        arguments |= {"ref_chosen_logp": zeros, "ref_rejected_logp": zeros}
    chosen, rejected = zeros.clone().requires_grad_(), zeros.clone().requires_grad_()
    loss = preference_loss(chosen, rejected, confidence=0.7, **arguments).loss
    grads = torch.autograd.grad(loss.sum(), (chosen, rejected))
    assert loss.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)
    if PAIR_LOSSES[kind].averages:
        assert all((grad == 0).all() for grad in grads)


def test_an_impossible_rejected_response_is_not_nan():
    zero = torch.zeros(1)
    chosen, rejected = torch.tensor([-3.0], requires_grad=True), torch.tensor([-torch.inf], requires_grad=True)
    loss = preference_loss(chosen, rejected, zero, zero, beta=0.1).loss
    assert loss.item() == 0.0
    assert torch.autograd.grad(loss, chosen)[0].item() == 0.0


def test_a_bad_confidence_spoils_its_pair_alone():
    zero = torch.zeros(3)
    chosen = torch.zeros(3, requires_grad=True)
    loss = preference_loss(chosen, zero, zero, zero, beta=0.1, confidence=torch.tensor([0.5, 1.1, torch.nan])).loss
    assert loss.isnan().tolist() == [False, True, True]
    assert torch.autograd.grad(loss.sum(), chosen)[0].isnan().tolist() == [False, True, True]


def test_no_pairs_and_half_precision():
    none = torch.zeros(0)
    assert preference_loss(none, none, none, none, beta=0.1).loss.shape == (0,)
    half = torch.tensor([-2.0], dtype=torch.bfloat16, requires_grad=True)
    loss = preference_loss(half, half.detach(), torch.tensor([-1.9]), torch.tensor([-2.0]), beta=0.1).loss
    assert loss.dtype == torch.float32
    assert torch.autograd.grad(loss, half)[0].dtype == torch.bfloat16


def test_a_second_derivative_is_refused():
    chosen, rejected, arguments = batch("sigmoid")
    loss = preference_loss(chosen, rejected, **arguments).loss.sum()
    (grad,) = torch.autograd.grad(loss, chosen, create_graph=True)
    with pytest.raises(NotImplementedError, match="preference_loss has no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("kinds", [["sigmoid"], ["orpo"], ["robust", "sft"]])
def test_opcheck_and_compile(kinds):
    chosen, rejected, arguments = batch(kinds[0])
    tensors = (chosen, rejected, arguments.get("ref_chosen_logp"), arguments.get("ref_rejected_logp"))
    lengths = (arguments["chosen_length"], arguments["rejected_length"])
    gamma = torch.full((PAIRS,), 0.8).double()
    torch.library.opcheck(
        torch.ops.reprdpo.preference_loss.default, (*tensors, gamma, *lengths, BETA, kinds, [1.0] * len(kinds), 0.5)
    )
    arguments["loss_type"] = kinds

    def step(chosen, rejected):
        return preference_loss(chosen, rejected, confidence=0.8, **arguments).loss.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(chosen, rejected), (chosen, rejected)),
        torch.autograd.grad(step(chosen, rejected), (chosen, rejected)),
    )


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "ref_chosen_logp is missing", {"ref_chosen_logp": None}),
        (ValueError, "ref_rejected_logp is missing", {"ref_rejected_logp": None}),
        (ValueError, "is given, but loss_type 'simpo' is reference-free", {"loss_type": "simpo"}),
        (ValueError, "chosen_length is missing", {"loss_type": "ipo", "chosen_length": None}),
        (ValueError, "loss_type must be one of", {"loss_type": "dpo"}),
        (ValueError, "at least one loss", {"loss_type": []}),
        (ValueError, "one weight a loss type", {"loss_weights": [1.0, 2.0]}),
        (ValueError, "beta must be greater than 0", {"beta": 0.0}),
        (ValueError, r"confidence must be in \[0, 1\]", {"confidence": 1.2}),
        (ValueError, "confidence must be of shape", {"confidence": torch.ones(3, 1)}),
        (ValueError, "confidence is a constant", {"confidence": torch.ones(3, requires_grad=True)}),
        (ValueError, "ref_chosen_logp is a constant", {"ref_chosen_logp": torch.ones(3, requires_grad=True)}),
        (ValueError, "ref_chosen_logp must be of shape", {"ref_chosen_logp": torch.ones(3, 1)}),
        (ValueError, "rejected_logp must be of shape", {"rejected_logp": torch.ones(2)}),
        (ValueError, r"a number in \(0.5, 1\]", {"loss_type": "robust", "confidence": 0.5}),
        (ValueError, r"a number in \(0.5, 1\]", {"loss_type": "robust", "confidence": torch.ones(3)}),
        (ValueError, "simpo_gamma", {"simpo_gamma": -1.0}),
    ],
)
def test_refusals(error, message, change):
    lengths = torch.ones(3, dtype=torch.long)
    arguments = dict.fromkeys(("chosen_logp", "rejected_logp", "ref_chosen_logp", "ref_rejected_logp"), torch.zeros(3))
    with pytest.raises(error, match=message):
        preference_loss(**{"beta": 0.1, "chosen_length": lengths, "rejected_length": lengths, **arguments, **change})
