"""The scalar stage of every loss in one launch against the oracle in float64, under the interpreter."""

import pytest
import torch

pytest.importorskip("triton")

from reprdpo_kernels.preference_loss import LOSS_TYPES, preference_loss_forward, sequence_preference_loss_forward

from reprdpo.ops import reference
from reprdpo.ops.reference import PAIR_LOSSES, PairBatch

pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

MIXTURES = [[name] for name in LOSS_TYPES] + [["apo_down", "sft", "sft"], list(LOSS_TYPES)]
OPTIONS = {"beta": 0.25, "simpo_gamma": 0.5}


def ids(names):
    return "+".join(names) if len(names) < 4 else "all"


def make(pairs, loss_types, *, spread=3.0):
    batch = [-spread * torch.rand(pairs) - 0.1 for _ in range(4)]
    if not any(PAIR_LOSSES[name].needs_reference for name in loss_types):
        batch[2:] = [None, None]
    confidence = 0.55 + 0.45 * torch.rand(pairs)
    if "robust" in loss_types:
        confidence[:] = 0.8
    lengths = [torch.randint(1, 9, (pairs,)) for _ in range(2)]
    return PairBatch(*batch, confidence, *lengths)


def exact(batch, **options):
    return reference.preference_terms(
        PairBatch(*(None if x is None else x.double() for x in batch)), **OPTIONS, **options
    )


def assert_terms(ours, wanted, rtol=2e-6):
    for name, mine, theirs in zip(wanted._fields, ours, wanted, strict=True):
        assert mine.dtype == torch.float32, name
        torch.testing.assert_close(
            mine.double(), theirs, rtol=rtol, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_knows_the_losses_of_the_op():
    assert tuple(PAIR_LOSSES) == LOSS_TYPES


@pytest.mark.parametrize("loss_types", MIXTURES, ids=ids)
@pytest.mark.parametrize("pairs", [0, 1, 7, 70])
def test_every_loss_matches_the_oracle(loss_types, pairs):
    batch = make(pairs, loss_types)
    options = {"loss_types": loss_types, "loss_weights": [1.0, -0.5, 2.0, 0.25, *[1.0] * 6][: len(loss_types)]}
    assert_terms(preference_loss_forward(*batch, **OPTIONS, **options), exact(batch, **options))


@pytest.mark.parametrize("loss_types", MIXTURES, ids=ids)
def test_slopes_are_the_finite_differences_of_the_loss(loss_types):
    batch = make(9, loss_types)
    options = {**OPTIONS, "loss_types": loss_types, "loss_weights": [1.0] * len(loss_types)}
    terms = preference_loss_forward(*batch, **options)
    for at, slope in ((0, terms.chosen_slope), (1, terms.rejected_slope)):
        step = torch.zeros(2, 1)
        step[at] = 2**-8
        up, down = (
            preference_loss_forward(batch[0] + sign * step[0], batch[1] + sign * step[1], *batch[2:], **options).loss
            for sign in (1, -1)
        )
        torch.testing.assert_close((up - down) / 2**-7, slope, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("loss_types", [["sigmoid"], ["gdpo"], ["apo_zero"], ["simpo"], ["hinge"]], ids=ids)
def test_log_ratios_of_hundreds_keep_finite_losses_and_slopes(loss_types):
    batch = make(6, loss_types)
    batch.chosen_logp.copy_(torch.tensor([-3000.0, -1.0, -900.0, -100.0, -1e-3, -50.0]))
    batch.rejected_logp.copy_(torch.tensor([-1.0, -3000.0, -100.0, -900.0, -50.0, -1e-3]))
    options = {"loss_types": loss_types, "loss_weights": [1.0]}
    wanted = exact(batch, **options)
    assert_terms(preference_loss_forward(*batch, **OPTIONS, **options), wanted, rtol=1e-5)


def test_bad_values_stay_in_their_pair():
    batch = make(6, ["sigmoid"])
    batch.confidence[:3] = torch.tensor([1.5, -0.1, torch.nan])
    batch.chosen_logp[3] = torch.nan
    options = {"loss_types": ["sigmoid"], "loss_weights": [1.0]}
    ours, wanted = preference_loss_forward(*batch, **OPTIONS, **options), exact(batch, **options)
    for mine, theirs in zip(ours, wanted, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-6, atol=1e-7, equal_nan=True)
    assert ours.loss.isnan().tolist() == [True] * 4 + [False] * 2


@pytest.mark.parametrize("loss_types", [["sigmoid"], ["ipo"], ["simpo"], ["sft"], ["hinge", "orpo"]], ids=ids)
def test_empty_responses_have_score_zero_and_finite_slopes(loss_types):
    batch = make(3, loss_types)
    batch.chosen_logp[0] = batch.rejected_logp[1] = 0.0
    batch.chosen_length[0] = batch.rejected_length[1] = 0
    options = {"loss_types": loss_types, "loss_weights": [1.0] * len(loss_types)}
    ours = preference_loss_forward(*batch, **OPTIONS, **options)
    in_float32 = reference.preference_terms(batch, **OPTIONS, **options)
    for mine, theirs in zip(ours, in_float32, strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_flipped_form_without_weight_is_not_seen():
    # orpo of the flipped pair is infinite here; confidence 1 gives it no weight.
    batch = make(1, ["orpo"])._replace(confidence=torch.ones(1))
    batch.rejected_logp[:] = -torch.inf
    terms = preference_loss_forward(*batch, **OPTIONS, loss_types=["orpo"], loss_weights=[1.0])
    assert terms.loss.isfinite().all()


@pytest.mark.parametrize("loss_types", [["sigmoid"], ["simpo"], ["ipo", "sft"]], ids=ids)
@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize(("pairs", "tokens"), [(0, 4), (1, 0), (1, 3), (3, 1200), (7, 300)])
def test_from_tokens_in_any_order(pairs, tokens, loss_types, stats):
    sequence_ids = torch.randint(-1, 2 * pairs + 1, (tokens,))  # some are in no sequence
    labels = torch.where(torch.rand(tokens) < 0.3, -100, 1)
    logp, token_stats = -torch.rand(tokens), torch.rand(3, tokens)
    logp[labels == -100] = token_stats[:, labels == -100] = torch.nan
    batch = make(pairs, loss_types)
    options = {"loss_types": loss_types, "loss_weights": [1.0] * len(loss_types)}
    ours = sequence_preference_loss_forward(
        logp, sequence_ids, labels, *batch[2:5], **OPTIONS, **options, token_stats_3N=token_stats if stats else None
    )
    scored_ids = torch.where(labels == -100, -1, sequence_ids)
    layout = reference.segments(tokens, 2 * pairs, scored_ids, None)
    sums, lengths = reference.sequence_sum(logp.double(), layout), layout.offsets.diff()
    wanted = exact(PairBatch(sums[:pairs], sums[pairs:], *batch[2:5], lengths[:pairs], lengths[pairs:]), **options)
    close = {"rtol": 2e-6, "atol": 1e-6}
    torch.testing.assert_close(ours.logp.double(), sums, **close)
    assert ours.length.tolist() == lengths.tolist()
    torch.testing.assert_close(ours.loss.double(), wanted.loss, **close)
    torch.testing.assert_close(ours.reward.double(), torch.cat(wanted[1:3]), **close)
    torch.testing.assert_close(ours.slope.double(), torch.cat(wanted[3:]), **close)
    if stats:
        means = torch.stack([reference.sequence_sum(x.double(), layout, average=True) for x in token_stats])
        torch.testing.assert_close(ours.means.double(), means, **close)
    else:
        assert ours.means.numel() == 0
