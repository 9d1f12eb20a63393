"""linear_preference_loss against the whole pipeline in eager PyTorch and float64."""

import math
import re

import pytest
import torch
import torch.nn.functional as F

from reprdpo.ops import linear_logprob, linear_preference_loss, native, preference_loss, use_backend
from reprdpo.ops.reference import PAIR_LOSSES

IGNORED = -100
needs_native = pytest.mark.skipif(not native.loaded("cpu"), reason="the native library is not built")


def padded(lengths, *, width=5, vocabulary=7, side="right", dtype=torch.float64):
    """Hidden states [S, T, D], head, labels [S, T] with ``lengths`` scored tokens after a prompt of three."""
    total = max(lengths, default=0) + 4
    labels = torch.full((len(lengths), total), IGNORED)
    for row, length in enumerate(lengths):
        start = 3 if side == "right" else total - length
        labels[row, start : start + length] = torch.randint(0, vocabulary, (length,))
    hidden = torch.randn(len(lengths), total, width, dtype=dtype, requires_grad=True)
    return hidden, (torch.randn(vocabulary, width, dtype=dtype) / width).requires_grad_(), labels


def references(pairs, dtype=torch.float64):
    return {name: -10 * torch.rand(pairs, dtype=dtype) for name in ("ref_chosen_logp", "ref_rejected_logp")}


def eager_sums(hidden, weight, labels):
    ignored = labels == IGNORED
    logp = (hidden @ weight.t()).log_softmax(-1).gather(-1, labels.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    return logp.masked_fill(ignored, 0).sum(-1)


def eager_loss(hidden, weight, labels, refs, beta, gamma):
    chosen, rejected = eager_sums(hidden, weight, labels).chunk(2)
    delta = beta * ((chosen - refs["ref_chosen_logp"]) - (rejected - refs["ref_rejected_logp"]))
    return -gamma * F.logsigmoid(delta) - (1 - gamma) * F.logsigmoid(-delta)


def assert_same_gradients(ours, wanted, *inputs):
    for mine, theirs in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(wanted, inputs, retain_graph=True), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("lengths", [[4, 1], [0, 300, 7, 1], [5, 0, 300, 17, 1, 64, 3, 2, 0, 299, 8, 1, 33, 120]])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_matches_eager(lengths, side, reduction):
    hidden, weight, labels = padded(lengths, side=side)
    pairs = len(lengths) // 2
    refs, gamma = references(pairs), torch.rand(pairs).double()
    per_pair = eager_loss(hidden, weight, labels, refs, 0.2, gamma)
    wanted = {"mean": per_pair.mean(), "sum": per_pair.sum(), "none": per_pair}[reduction]
    for budget in (None, 7 * 8 * 11):  # the second: tiles of 11 rows, which fall across pairs of unequal length
        ours = linear_preference_loss(
            hidden, weight, labels, beta=0.2, confidence=gamma, reduction=reduction, max_tile_bytes=budget, **refs
        )
        torch.testing.assert_close(ours.loss, wanted)
        torch.testing.assert_close(
            torch.cat([ours.chosen_logp, ours.rejected_logp]), eager_sums(hidden, weight, labels)
        )
        upstream = torch.linspace(-2, 3, pairs).double() if reduction == "none" else 0.37
        assert_same_gradients((ours.loss * upstream).sum(), (wanted * upstream).sum(), hidden, weight)


@pytest.mark.parametrize("kind", PAIR_LOSSES)
def test_every_loss_type_is_the_composition(kind):
    lengths = [5, 0, 3, 8, 2, 1]
    hidden, weight, labels = padded(lengths)
    refs = references(3) if PAIR_LOSSES[kind].needs_reference else {}
    gamma = 0.8 if kind == "robust" else torch.tensor([0.2, 0.7, 1.0])
    options = {"beta": 0.6, "loss_type": kind, "confidence": gamma, "simpo_gamma": 0.9, **refs}
    ours = linear_preference_loss(hidden, weight, labels, **options)
    chosen, rejected = linear_logprob(hidden, weight, labels).sum(1).chunk(2)
    counts = torch.tensor(lengths)
    parts = preference_loss(chosen, rejected, chosen_length=counts[:3], rejected_length=counts[3:], **options)
    torch.testing.assert_close(ours.loss, parts.loss.mean())
    torch.testing.assert_close(ours.chosen_reward, parts.chosen_reward)
    torch.testing.assert_close(ours.rejected_reward, parts.rejected_reward)
    assert_same_gradients(ours.loss, parts.loss.mean(), hidden, weight)
    (dhidden,) = torch.autograd.grad(linear_preference_loss(hidden, weight, labels, **options).loss, hidden)
    assert (dhidden[1] == 0).all()  # an empty response
    assert (dhidden[labels == IGNORED] == 0).all()


def test_gradcheck_with_everything():
    hidden, weight, labels = padded([3, 0, 2, 4], width=3)
    bias = torch.randn(7).double().requires_grad_()
    refs = references(2)

    def loss(hidden, weight, bias):
        return linear_preference_loss(
            *(hidden, weight, labels),
            bias=bias,
            beta=0.3,
            confidence=0.8,
            loss_type=["sigmoid", "ipo"],
            loss_weights=[1.0, 0.1],
            softcap=2.0,
            logit_scale=1.3,
            temperature=0.7,
            reduction="none",
            **refs,
        ).loss

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_policy_equal_to_reference_costs_log_2(gamma, dtype):
    hidden, weight, labels = padded([300, 40, 0, 5, 120, 299], width=64, vocabulary=300, dtype=dtype)
    first = linear_preference_loss(
        hidden, weight, labels, beta=0.1, ref_chosen_logp=torch.zeros(3), ref_rejected_logp=torch.zeros(3)
    )
    again = linear_preference_loss(
        *(hidden, weight, labels),
        beta=0.1,
        confidence=gamma,
        ref_chosen_logp=first.chosen_logp,
        ref_rejected_logp=first.rejected_logp,
        max_tile_bytes=300 * 4 * 50,
    )
    assert abs(again.loss.item() - math.log(2)) <= 0.1 * 1e-4


def test_packed_equals_padded_in_any_order():
    lengths = [4, 0, 7, 2, 5, 3]
    hidden, weight, labels = padded(lengths)
    refs = references(3)
    whole = linear_preference_loss(hidden, weight, labels, beta=0.2, return_stats=True, **refs)
    ids = torch.arange(6).repeat_interleave(hidden.shape[1])
    order = torch.randperm(len(ids))
    packed = linear_preference_loss(
        *(hidden.reshape(len(ids), -1)[order], weight, labels.reshape(-1)[order]),
        beta=0.2,
        sequence_ids=ids[order],
        num_sequences=6,
        return_stats=True,
        **refs,
    )
    torch.testing.assert_close(packed, whole)
    assert_same_gradients(packed.loss, whole.loss, hidden, weight)


@pytest.mark.parametrize("rows", [None, 4])
def test_tokens_of_no_sequence_have_no_part(backend, rows):
    hidden, weight, _ = padded([3, 3], dtype=torch.float32)
    hidden, labels = hidden.detach().reshape(-1, 5).requires_grad_(), torch.randint(0, 7, (14,))
    ids = torch.tensor([0, -1, 1, 2, 0, 1, 3, 0, 1, 1, 0, -9, 7, 0])
    inside = ((ids >= 0) & (ids < 2)).nonzero()[:, 0]
    options = {"beta": 0.2, "num_sequences": 2, **references(1, torch.float32)}
    wanted = linear_preference_loss(hidden[inside], weight, labels[inside], sequence_ids=ids[inside], **options)
    budget = None if rows is None else rows * 2 * 7 * 4 + 2 * 32 * 7 * 4
    ours = linear_preference_loss(hidden, weight, labels, sequence_ids=ids, max_tile_bytes=budget, **options)
    torch.testing.assert_close(ours.loss, wanted.loss)
    for mine, theirs in zip(
        torch.autograd.grad(ours.loss, (hidden, weight)),
        torch.autograd.grad(wanted.loss, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("budget", [None, 800])
def test_tensors_that_are_not_dense(backend, budget):
    tokens, options = 12, {"beta": 0.3, "num_sequences": 4, "max_tile_bytes": budget}
    hidden, weight = torch.randn(tokens, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    labels, ids = torch.randint(0, 7, (tokens, 2)), torch.randint(0, 4, (tokens, 2))
    numbers = torch.rand(2, 3)

    def run(hidden, *rest):
        labels, ids, *pairs = rest
        names = ("ref_chosen_logp", "ref_rejected_logp", "confidence")
        given = dict(zip(names, pairs, strict=True))
        out = linear_preference_loss(hidden, weight, labels, sequence_ids=ids, **given, **options)
        return [out.loss.detach(), out.chosen_logp, *torch.autograd.grad(out.loss, (hidden_leaf, weight))]

    hidden_leaf = hidden
    strided = (labels[:, 0], ids[:, 0], *numbers.unbind(1))
    wanted = run(hidden, *(x.contiguous() for x in strided))
    for mine, theirs in zip(run(hidden.t().contiguous().t(), *strided), wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_shift():
    hidden, weight, tokens = padded([4, 6, 5, 3])
    refs = references(2)
    aligned = F.pad(tokens[:, 1:], (0, 1), value=IGNORED)
    wanted = linear_preference_loss(hidden, weight, aligned, beta=0.2, **refs)
    shifted = linear_preference_loss(hidden, weight, tokens, beta=0.2, shift=True, **refs)
    torch.testing.assert_close(shifted, wanted)
    assert_same_gradients(shifted.loss, wanted.loss, hidden, weight)
    # Packed: nothing crosses from the last token of a sequence to the first label of the next.
    tokens[:, 0] = 3
    ids = torch.arange(4).repeat_interleave(hidden.shape[1])
    packed = linear_preference_loss(
        *(hidden.reshape(len(ids), -1), weight, tokens.reshape(-1)),
        beta=0.2,
        shift=True,
        sequence_ids=ids,
        num_sequences=4,
        **refs,
    )
    torch.testing.assert_close(packed, wanted)


def test_scored_index_and_stats():
    lengths = [4, 0, 7, 2]
    hidden, weight, labels = padded(lengths)
    refs = references(2)
    scored = (labels.reshape(-1) != IGNORED).nonzero()[:, 0]
    out = linear_preference_loss(hidden, weight, labels, beta=0.2, scored_index=scored, return_stats=True, **refs)
    torch.testing.assert_close(out, linear_preference_loss(hidden, weight, labels, beta=0.2, return_stats=True, **refs))
    tokens = linear_logprob(hidden, weight, labels, return_entropy=True, return_stats=True)
    counts = torch.tensor(lengths).clamp(min=1)
    torch.testing.assert_close(out.stats.entropy, tokens.entropy.sum(1) / counts)
    torch.testing.assert_close(out.stats.top1_accuracy, tokens.top1.sum(1) / counts)
    torch.testing.assert_close(out.stats.mean_logit, tokens.mean_logit.sum(1) / counts)
    detached = (out.chosen_logp, out.rejected_logp, out.chosen_reward, out.rejected_reward, *out.stats)
    assert not any(value.requires_grad for value in detached)


def test_nan_under_ignored_labels_and_in_one_pair():
    hidden, weight, labels = padded([4, 2, 3, 5])
    refs = references(2)
    clean = linear_preference_loss(hidden, weight, labels, beta=0.2, **refs)
    with torch.no_grad():
        hidden[labels == IGNORED] = torch.nan
    dirty = linear_preference_loss(hidden, weight, labels, beta=0.2, **refs)
    assert torch.equal(dirty.loss, clean.loss)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(dirty.loss, (hidden, weight)))
    labels[1, 3] = 7  # outside the vocabulary: pair 1 is spoilt
    spoilt = linear_preference_loss(hidden, weight, labels, beta=0.2, reduction="none", **refs)
    assert spoilt.loss.isnan().tolist() == [False, True]
    (dhidden,) = torch.autograd.grad(spoilt.loss.sum(), hidden)
    assert dhidden.isnan().any(-1).any(-1).tolist() == [False, True, False, True]


@pytest.mark.parametrize("lengths", [[], [0, 0], [0, 0, 0, 0]])
def test_nothing_to_learn_from(lengths):
    hidden, weight, labels = padded(lengths)
    pairs = len(lengths) // 2
    zero = torch.zeros(pairs)
    out = linear_preference_loss(
        hidden, weight, labels, beta=0.2, ref_chosen_logp=zero, ref_rejected_logp=zero, return_stats=True
    )
    assert out.loss.item() == pytest.approx(math.log(2) if pairs else 0.0)
    out.loss.backward()
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()


def test_peaked_pairs_do_not_cancel():
    hidden, weight, labels = padded([20, 30, 25, 10], width=64, vocabulary=200, dtype=torch.float32)
    weight = (8 * weight.detach()).requires_grad_()
    hidden = (0.3 * hidden.detach() + 20 * weight.detach()[labels.clamp(min=0)]).requires_grad_()
    refs = references(2, torch.float32)
    exact_in = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    assert -1e-3 < eager_sums(*exact_in, labels)[0] / 20 < -1e-6
    exact = eager_loss(*exact_in, labels, refs, 0.1, 0.9).mean()
    ours = linear_preference_loss(hidden, weight, labels, beta=0.1, confidence=0.9, **refs).loss
    for mine, truth in zip(
        torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(exact, exact_in), strict=True
    ):
        assert (mine - truth).norm() <= 1e-4 * truth.norm()


def test_autocast_leaves_references_alone():
    hidden, weight, labels = padded([40, 30], dtype=torch.float32)
    ref = torch.tensor([-1003.7])
    options = {"beta": 0.1, "ref_chosen_logp": ref, "ref_rejected_logp": ref}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_preference_loss(hidden, weight, labels, **options)
        out.loss.backward()
    by_hand = linear_preference_loss(hidden.bfloat16(), weight.bfloat16(), labels, **options)
    assert torch.equal(out.loss, by_hand.loss)
    torch.testing.assert_close(out.chosen_reward, 0.1 * (out.chosen_logp + 1003.7))
    assert weight.grad.dtype == torch.float32


def test_no_grad_and_frozen_weight():
    hidden, weight, labels = padded([4, 2])
    refs = references(1)
    with torch.no_grad():
        assert not linear_preference_loss(hidden, weight, labels, beta=0.2, **refs).loss.requires_grad
    weight.requires_grad_(False)
    linear_preference_loss(hidden, weight, labels, beta=0.2, **refs).loss.backward()
    assert weight.grad is None
    assert hidden.grad.abs().sum() > 0


@pytest.mark.parametrize("budget", [None, 7 * 8 * 5])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(reduction, budget):
    hidden, weight, labels = padded([4, 0, 3, 2])
    ids = torch.arange(4).repeat_interleave(labels.shape[1])
    flat = hidden.detach().reshape(-1, 5).requires_grad_()
    inputs = (
        *(flat, weight, None, labels.reshape(-1), ids, (labels.reshape(-1) != IGNORED).nonzero()[:, 0]),
        *(*references(2).values(), torch.rand(2).double(), 4, 0.3),
        *(["sigmoid", "sft"], [1.0, 0.5], 0.5, reduction, 1.0, None, 1.0, IGNORED),
    )
    needs = (True, True, False)
    torch.library.opcheck(
        torch.ops.reprdpo.linear_preference_loss.default, (*inputs, reduction == "mean", budget, *needs)
    )
    loss, _, _, slope, _, *kept = (
        value.detach() for value in torch.ops.reprdpo.linear_preference_loss(*inputs, True, budget, *needs)
    )
    detached = [value.detach() if isinstance(value, torch.Tensor) else value for value in inputs]
    torch.library.opcheck(
        torch.ops.reprdpo.linear_preference_loss_backward.default,
        (torch.ones_like(loss), slope, *kept[:3], *detached[:6], *detached[14:19], budget, *needs),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compiles_whole():
    hidden, weight, labels = padded([4, 0, 3, 2])
    refs, gamma = references(2), torch.rand(2).double()

    def step(hidden, weight):
        return linear_preference_loss(hidden, weight, labels, beta=0.2, confidence=gamma, shift=True, **refs).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden, weight), step(hidden, weight))
    assert_same_gradients(compiled(hidden, weight), step(hidden, weight), hidden, weight)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (
            ValueError,
            "number of sequences must be even",
            {"hidden": torch.zeros(3, 5, 4), "labels": torch.zeros(3, 5).long()},
        ),
        (
            ValueError,
            "needs sequence_ids and num_sequences",
            {"hidden": torch.zeros(5, 4), "labels": torch.zeros(5).long()},
        ),
        (ValueError, "go with packed hidden", {"num_sequences": 2}),
        (ValueError, r"\[S, T, D\] or \[N, D\]", {"hidden": torch.zeros(4), "labels": torch.tensor(0)}),
        (ValueError, "labels must be of shape", {"labels": torch.zeros(2, 4).long()}),
        (ValueError, "ref_chosen_logp is missing", {"ref_chosen_logp": None}),
        (ValueError, "reference-free", {"loss_type": "orpo"}),
        (ValueError, "ref_rejected_logp is a constant", {"ref_rejected_logp": torch.zeros(1, requires_grad=True)}),
        (ValueError, "confidence is a constant", {"confidence": torch.ones(1, requires_grad=True)}),
        (ValueError, "confidence must be in", {"confidence": -0.1}),
        (ValueError, "confidence must be of shape", {"confidence": torch.ones(2)}),
        (ValueError, "reduction must be one of", {"reduction": "batchmean"}),
        (ValueError, "beta", {"beta": float("nan")}),
    ],
)
def test_refusals(error, message, change):
    arguments = {
        "hidden": torch.zeros(2, 5, 4),
        "weight": torch.zeros(7, 4),
        "labels": torch.zeros(2, 5, dtype=torch.long),
        "ref_chosen_logp": torch.zeros(1),
        "ref_rejected_logp": torch.zeros(1),
        "beta": 0.1,
    }
    with pytest.raises(error, match=message):
        linear_preference_loss(**{**arguments, **change})


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [True, False])
def test_the_budget_that_a_refusal_names_is_the_least_that_does(backend, dtype, grad):
    hidden, weight, labels = padded([4, 1], dtype=dtype)
    inputs = [hidden.detach().requires_grad_(grad), weight.detach().requires_grad_(grad), labels]

    def run(budget):
        with use_backend(backend):
            return linear_preference_loss(*inputs, beta=0.1, max_tile_bytes=budget, **references(1, torch.float32))

    with pytest.raises(ValueError, match="max_tile_bytes = 1 is too small for one row") as refused:
        run(1)
    least = int(re.search(r"give at least (\d+)", str(refused.value)).group(1))
    assert run(least).loss.isfinite()
    with pytest.raises(ValueError, match=f"max_tile_bytes = {least - 1} is too small .* give at least {least}$"):
        run(least - 1)
