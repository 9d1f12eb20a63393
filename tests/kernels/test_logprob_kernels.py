"""The Triton pass over logits, and gradients of logits, against the formulas in float64 under the interpreter."""

import pytest
import torch

pytest.importorskip("triton")

from reprdpo_kernels import logprob as kernels
from reprdpo_kernels.logprob import Config, logits_gradient, logprob_backward, logprob_forward, token_residual

# Lanes that are selected away may overflow, which NumPy remarks on.
pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.3, "temperature": 1.7},
    "softcap": {"softcap": 5.0, "logit_scale": 1.4, "temperature": 0.6, "bias": True},
}
# The interpreter cuts bfloat16 off where a GPU rounds it.
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-11}
# Rows held in registers, and rows looped over in blocks of 128: exact multiples, tails, and less than a block.
PLANS = {"held": Config(32768, 32768, 128, 1), "looped": Config(0, 0, 128, 1)}


@pytest.fixture(params=PLANS)
def _plan(request, monkeypatch):
    monkeypatch.setattr(kernels, "CONFIGS", {80: PLANS[request.param]})


@pytest.fixture(autouse=True)
def _poison():
    """What torch.empty returns is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def head(bias=False, logit_scale=1.0, softcap=None, temperature=1.0, *, vocabulary):
    return torch.randn(vocabulary) if bias else None, logit_scale, softcap, temperature


def scores(logits, bias, logit_scale, softcap, temperature):
    """z in float64."""
    z = (logits.double() if bias is None else logits.double() + bias.double()) * logit_scale
    return (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature


def exact_residual(logits, labels, bias, logit_scale, softcap, temperature):
    """G and a of an upstream 1, in float64."""
    z = scores(logits, bias, logit_scale, softcap, temperature)
    others = z.scatter(1, labels[:, None], -torch.inf)
    residual = -others.softmax(1) if z.shape[1] > 1 else torch.zeros_like(z)
    residual = residual.scatter(1, labels[:, None], 1.0)
    if softcap is not None:
        residual *= 1 - (z * temperature / softcap) ** 2
    mass = (others.logsumexp(1) - z.logsumexp(1)).exp()
    return residual, mass * logit_scale / temperature


def assert_as_good_as_eager(ours, eager, exact, spread=1.0):
    """Within twice the error of eager float32, never asked to be under 4 ulp of the largest number on the way."""
    floor = 4 * torch.finfo(torch.float32).eps * max(exact.abs().max().item(), spread)
    assert (ours.double() - exact).abs().max() <= max(2 * (eager.double() - exact).abs().max().item(), floor)


@pytest.mark.usefixtures("_plan")
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize(("rows", "vocabulary"), [(3, 1), (5, 7), (2, 31), (40, 33), (3, 384), (4, 1000), (2, 4097)])
def test_pass_matches_float64(options, rows, vocabulary):
    arguments = head(**options, vocabulary=vocabulary)
    logits, labels = 4 * torch.randn(rows, vocabulary), torch.randint(0, vocabulary, (rows,))
    z = scores(logits, *arguments)
    logp, eager = z.log_softmax(1), z.float().log_softmax(1)
    out = token_residual(logits.clone(), labels, *arguments, residual_dtype=torch.float32, entropy=True, stats=True)
    size = z.abs().max().item()
    at = labels[:, None]
    assert_as_good_as_eager(out.logp, eager.gather(1, at)[:, 0], logp.gather(1, at)[:, 0], size)
    assert_as_good_as_eager(out.entropy, -(eager.exp() * eager).sum(1), -(logp.exp() * logp).sum(1), size)
    assert_as_good_as_eager(out.mean_logit, z.float().mean(1), z.mean(1))
    assert out.top1.tolist() == (z.argmax(1) == labels).tolist()
    residual, scale = exact_residual(logits, labels, *arguments)
    torch.testing.assert_close(out.residual.double(), residual, rtol=1e-5, atol=1e-7)
    top, sum_other, sum_all = out.row_stats.double()
    torch.testing.assert_close(top, z.amax(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        sum_other / sum_all * arguments[1] / arguments[3], scale, rtol=2e-6 * max(1, size), atol=1e-30
    )


@pytest.mark.usefixtures("_plan")
@pytest.mark.parametrize(("dtype", "smallest"), [(torch.bfloat16, 0), (torch.float16, 2**-25)])
def test_half_precision_residual_is_rounded_once(dtype, smallest):
    logits, labels = 5 * torch.randn(6, 1000), torch.randint(0, 1000, (6,))
    arguments = (None, 1.0, None, 1.0)
    out = token_residual(logits, labels, *arguments, residual_dtype=dtype, entropy=False, stats=False)
    assert out.residual.dtype == dtype
    assert out.entropy.numel() == out.top1.numel() == out.mean_logit.numel() == 0
    factor = kernels.HALF_RESIDUAL_SCALE if dtype == torch.float16 else 1.0
    exact = exact_residual(logits, labels, *arguments)[0] * factor
    assert (out.residual[range(6), labels] == factor).all()
    error = (out.residual.double() - exact).abs()
    assert (error <= 1.01 * ROUNDING[dtype] * exact.abs() + smallest).all()


@pytest.mark.usefixtures("_plan")
@pytest.mark.parametrize("gap", [4.0, 7.0, 14.0, 40.0, 300.0])
def test_peaked_softmax_keeps_its_relative_precision(gap):
    # p_y from .98 over 1 - 1e-6 to where the rest underflows beside it.
    logits, labels = torch.randn(5, 500), torch.randint(0, 500, (5,))
    others = logits.double().scatter(1, labels[:, None], -torch.inf)
    logits[range(5), labels] = (others.logsumexp(1) + gap).float()
    out = token_residual(logits.clone(), labels, None, 1.0, None, 1.0, residual_dtype=None, entropy=True, stats=False)
    assert out.residual.numel() == 0
    log_odds = others.logsumexp(1) - logits[range(5), labels].double()
    torch.testing.assert_close(out.logp.double(), -torch.log1p(log_odds.exp()), rtol=1e-5, atol=1e-40)
    torch.testing.assert_close(
        (out.row_stats[1] / out.row_stats[2]).double(), torch.sigmoid(log_odds), rtol=1e-5, atol=1e-40
    )
    logp = logits.double().log_softmax(1)
    entropy = -(logp.exp() * logp).sum(1)
    torch.testing.assert_close(out.entropy.double(), entropy, rtol=1e-4, atol=1e-15)
    out = token_residual(logits.clone(), labels, None, 1.0, None, 1.0, residual_dtype=torch.float32, entropy=False,
                         stats=False)  # fmt: skip
    torch.testing.assert_close(
        out.residual.double(), exact_residual(logits, labels, None, 1.0, None, 1.0)[0], rtol=1e-5, atol=1e-12
    )


@pytest.mark.usefixtures("_plan")
def test_label_far_below_the_maximum():
    logits, labels = torch.randn(4, 300), torch.tensor([0, 7, 150, 299])
    logits[range(4), labels] = torch.tensor([-50.0, -120.0, -1e5, -torch.inf])
    out = token_residual(logits, labels, None, 1.0, None, 1.0, residual_dtype=None, entropy=True, stats=True)
    exact = logits.double().log_softmax(1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(out.logp.double(), exact, rtol=1e-6, atol=0)
    assert out.entropy.isfinite().all()
    assert out.top1.sum() == 0


@pytest.mark.usefixtures("_plan")
def test_what_is_beside_the_columns_and_below_ignored_labels_never_leaks():
    rows, vocabulary = 5, 200
    buffer = torch.full((rows, 256), torch.nan)
    logits = buffer[:, :vocabulary]
    logits.copy_(torch.randn(rows, vocabulary))
    labels = torch.tensor([3, -100, 199, -100, 0])
    wanted = logits.double().log_softmax(1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    buffer[labels == -100] = torch.nan
    poisoned = torch.full((rows, 300), torch.nan, dtype=torch.bfloat16)
    out = token_residual(
        logits, labels, None, 1.0, None, 1.0,
        residual_dtype=torch.bfloat16, entropy=True, stats=True, ignore_index=-100, out=poisoned[:, :vocabulary],
    )  # fmt: skip
    torch.testing.assert_close(out.logp.double(), torch.where(labels < 0, 0.0, wanted), rtol=1e-6, atol=1e-6)
    assert all(values.isfinite().all() for values in out)
    assert (out.residual[labels < 0] == 0).all()
    assert poisoned[:, vocabulary:].isnan().all()
    assert buffer[:, vocabulary:].isnan().all()
    assert (out.row_stats[1][labels < 0] / out.row_stats[2][labels < 0] == 0).all()


@pytest.mark.usefixtures("_plan")
@pytest.mark.parametrize("where", ["label", "elsewhere"])
def test_nan_stays_in_its_row(where):
    logits, labels = torch.randn(4, 260), torch.tensor([5, 6, 7, 259])
    clean = token_residual(logits.clone(), labels, None, 1.0, None, 1.0, residual_dtype=torch.bfloat16, entropy=True,
                           stats=True)  # fmt: skip
    logits[2, 7 if where == "label" else 250] = torch.nan
    out = token_residual(logits, labels, None, 1.0, None, 1.0, residual_dtype=torch.bfloat16, entropy=True, stats=True)
    assert out.logp[2].isnan()
    assert (out.row_stats[1, 2] / out.row_stats[2, 2]).isnan()
    kept = [0, 1, 3]
    for mine, wanted in zip(out, clean, strict=True):
        by_row = (lambda x: x[:, kept]) if mine.dim() == 2 and mine.shape[0] == 3 else (lambda x: x[kept])
        assert torch.equal(by_row(mine), by_row(wanted))


@pytest.mark.usefixtures("_plan")
def test_label_out_of_range_is_nan_in_its_row_and_never_a_wild_read():
    logits = torch.randn(5, 130)
    labels = torch.tensor([-1, 130, 2**62, -(2**62), 4])
    out = token_residual(logits, labels, torch.randn(130), 1.0, None, 1.0, residual_dtype=torch.bfloat16, entropy=True,
                         stats=True)  # fmt: skip
    assert out.logp.isnan().tolist() == [True] * 4 + [False]
    assert (out.row_stats[1] / out.row_stats[2]).isnan().tolist() == [True] * 4 + [False]
    assert out.entropy.isfinite().all()


@pytest.mark.usefixtures("_plan")
def test_infinite_logits():
    logits, labels = torch.randn(4, 300), torch.tensor([299, 299, 1, 0])
    logits[0, :299] = -torch.inf  # the label alone has mass
    logits[1, :140] = -torch.inf  # whole blocks without any
    logits[2] = -torch.inf
    logits[3, 50] = torch.inf
    out = token_residual(logits.clone(), labels, None, 1.0, None, 1.0, residual_dtype=torch.float32, entropy=True,
                         stats=True)  # fmt: skip
    assert out.logp[0] == 0
    assert out.entropy[0] == 0
    assert torch.equal(out.residual[0], torch.eye(300)[299])
    torch.testing.assert_close(out.logp[1], logits[1].log_softmax(0)[299])
    torch.testing.assert_close(
        out.residual[1].double(), exact_residual(logits[1:2], labels[1:2], None, 1, None, 1)[0][0]
    )
    assert out.logp[2].isnan()


@pytest.mark.usefixtures("_plan")
def test_of_equal_maxima_the_first_is_the_argmax():
    logits = torch.zeros(3, 200)
    logits[:, [10, 150]] = 1.0
    out = token_residual(logits, torch.tensor([10, 150, 0]), None, 1.0, None, 1.0, residual_dtype=None, entropy=False,
                         stats=True)  # fmt: skip
    assert out.top1.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.usefixtures("_plan")
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS.keys())
def test_scaled_residual_and_gradient_are_autograds(options):
    rows, vocabulary = 6, 300
    arguments = head(**options, vocabulary=vocabulary)
    logits, labels = 3 * torch.randn(rows, vocabulary), torch.randint(0, vocabulary, (rows,))
    upstream, grad_entropy = torch.randn(rows), torch.randn(rows)
    leaf = logits.double().requires_grad_()
    logp = scores(leaf, *arguments).log_softmax(1)
    token, entropy = logp.gather(1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(1)
    (wanted,) = torch.autograd.grad(token, leaf, upstream.double(), retain_graph=True)
    (with_entropy,) = torch.autograd.grad([token, entropy], leaf, [upstream.double(), grad_entropy.double()])
    out = token_residual(logits.clone(), labels, *arguments, residual_dtype=torch.float32, entropy=True, stats=False)
    scale = upstream * out.row_stats[1] / out.row_stats[2] * arguments[1] / arguments[3]
    close = {"rtol": 2e-5, "atol": 1e-6}
    torch.testing.assert_close((scale[:, None] * out.residual).double(), wanted, **close)
    common = (labels, *arguments, out.row_stats)
    torch.testing.assert_close(logits_gradient(logits, *common, upstream).double(), wanted, **close)
    torch.testing.assert_close(
        logits_gradient(logits, *common, upstream, entropy_n=out.entropy, grad_entropy_n=grad_entropy).double(),
        with_entropy, **close,
    )  # fmt: skip
    rounded = logits_gradient(
        logits, *common, None, entropy_n=out.entropy, grad_entropy_n=grad_entropy,
        out=torch.empty(rows, vocabulary, dtype=torch.bfloat16),
    )  # fmt: skip
    torch.testing.assert_close(rounded.double(), with_entropy - wanted, rtol=ROUNDING[torch.bfloat16], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "vocabulary"), [(0, 9), (1, 7), (9, 1000), (2, 4500)])
@pytest.mark.parametrize("inplace", [False, True])
def test_logprob_forward_and_backward(dtype, rows, vocabulary, inplace):
    logits, labels = (3 * torch.randn(rows, vocabulary)).to(dtype), torch.randint(0, vocabulary, (rows,))
    labels[1::3] = -100
    temperature, upstream = 1.3, torch.randn(rows)
    leaf = logits.double().requires_grad_()
    exact = (leaf / temperature).log_softmax(1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    exact = exact.masked_fill(labels == -100, 0)
    logits[labels == -100] = torch.nan
    logp, row_stats = logprob_forward(logits, labels, temperature, -100)
    torch.testing.assert_close(logp.double(), exact, rtol=1e-6, atol=1e-5)
    (wanted,) = torch.autograd.grad(exact, leaf, upstream.double())
    before = logits.clone()
    grad = logprob_backward(upstream, logits, labels, row_stats, temperature, -100, out=logits if inplace else None)
    assert grad.dtype == dtype
    assert inplace == (grad is logits) or rows == 0
    if not inplace:
        assert torch.equal(logits.nan_to_num(7), before.nan_to_num(7))
    torch.testing.assert_close(grad.double(), wanted, rtol=1.01 * ROUNDING[dtype], atol=1e-7)


def test_no_rows_launch_nothing():
    out = token_residual(torch.empty(0, 9), torch.empty(0, dtype=torch.int64), None, 1.0, None, 1.0,
                         residual_dtype=torch.bfloat16, entropy=True, stats=True)  # fmt: skip
    assert [tuple(x.shape) for x in out] == [(0,), (3, 0), (0,), (0,), (0,), (0, 9)]


def test_columns_must_lie_side_by_side():
    with pytest.raises(ValueError, match="columns side by side"):
        token_residual(torch.randn(9, 4).t(), torch.zeros(4, dtype=torch.int64), None, 1.0, None, 1.0,
                       residual_dtype=None, entropy=False, stats=False)  # fmt: skip
