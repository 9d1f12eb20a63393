"""The native log-prob passes against their formulas in float64, no further off than twice eager PyTorch."""

import math

import pytest
import torch
from torch import Tensor

from reprdpo.ops import native

pytestmark = pytest.mark.skipif(not native.loaded("cpu"), reason="the native library is not built")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF_RESIDUAL_SCALE = 4096.0
HEADS = {
    "plain": {},
    "scaled": {"logit_scale": 0.7, "temperature": 1.3, "bias": True},
    "softcap": {"logit_scale": 1.2, "softcap": 5.0, "temperature": 0.9, "bias": True},
}
# One token and one word, less than a vector, beyond a panel of tokens and a block of words, several blocks of D.
SHAPES = [(1, 1, 1), (3, 1, 7), (5, 33, 7), (65, 64, 97), (130, 17, 500), (9, 1100, 193)]


class Formulas:
    """log p, S_-y and the rest of one head in the dtype of its arguments."""

    def __init__(self, raw_nV: Tensor, labels_n: Tensor, bias_V: Tensor | None, logit_scale, softcap, temperature):
        dtype = raw_nV.dtype
        z_nV = (raw_nV if bias_V is None else raw_nV + bias_V.to(dtype)) * logit_scale
        slope_nV = torch.ones_like(z_nV)
        if softcap is not None:
            t_nV = torch.tanh(z_nV / softcap)
            z_nV, slope_nV = softcap * t_nV, 1 - t_nV**2
        z_nV = z_nV / temperature
        log_softmax_nV = torch.log_softmax(z_nV, 1)
        at_n1 = labels_n.unsqueeze(1)
        self.row_max = z_nV.amax(1)
        others_nV = torch.exp(z_nV - self.row_max[:, None]).scatter(1, at_n1, 0.0)
        self.sum_other = others_nV.sum(1)
        self.sum_all = self.sum_other + torch.exp(z_nV.gather(1, at_n1).squeeze(1) - self.row_max)
        self.eager_logp = log_softmax_nV.gather(1, at_n1).squeeze(1)
        gap_n = self.row_max - z_nV.gather(1, at_n1).squeeze(1)
        self.logp = -torch.log1p(self.sum_other * torch.exp(gap_n))
        self.entropy = -(log_softmax_nV.exp() * log_softmax_nV).sum(1)
        self.top1 = (z_nV.argmax(1) == labels_n).to(dtype)
        self.mean_logit = z_nV.mean(1)
        share_nV = others_nV / self.sum_other[:, None]
        self.residual = (-share_nV.nan_to_num()).scatter(1, at_n1, 1.0) * slope_nV


def make_head(shape, dtype, head):
    n, D, V = shape
    hidden_nD, weight_VD = torch.randn(n, D).to(dtype), (2 * torch.randn(V, D) / math.sqrt(D)).to(dtype)
    options = dict(HEADS[head])
    bias_V = torch.randn(V).to(dtype) if options.pop("bias", False) else None
    scalars = (options.get("logit_scale", 1.0), options.get("softcap"), options.get("temperature", 1.0))
    return hidden_nD, weight_VD, torch.randint(0, V, (n,)), bias_V, scalars


def linear_pass(hidden, weight, labels, bias=None, scalars=(1.0, None, 1.0), residual=True, entropy=True, stats=True):
    return torch.ops.reprdpo_native.linear_token_residual(
        hidden, weight, labels, bias, *scalars, residual, entropy, stats
    )


def unscaled(residual: Tensor) -> Tensor:
    return residual.double() / (HALF_RESIDUAL_SCALE if residual.dtype == torch.float16 else 1.0)


def error(got: Tensor, wanted: Tensor) -> float:
    return (got.double() - wanted).abs().max().item() if wanted.numel() else 0.0


def rms_error(got: Tensor, wanted: Tensor) -> float:
    return (got.double() - wanted).square().mean().sqrt().item()


def assert_as_good(got: Tensor, eager: Tensor, wanted: Tensor) -> None:
    """An rms error of at most twice eager's, and never asked to be under 4 ulp of float32."""
    floor = 4 * torch.finfo(torch.float32).eps * max(1.0, wanted.abs().max().item())
    assert rms_error(got, wanted) <= max(2 * rms_error(eager, wanted), floor)


def assert_pass(result, hidden, weight, labels, bias, scalars):
    raw = hidden.double() @ weight.double().t()
    exact = Formulas(raw, labels, bias, *scalars)
    eager = Formulas(hidden.float() @ weight.float().t(), labels, bias, *scalars)
    logp, row_stats, entropy, top1, mean_logit, residual = result
    assert_as_good(logp, eager.eager_logp, exact.logp)
    assert_as_good(row_stats[0], eager.row_max, exact.row_max)
    for got, name in ((row_stats[1], "sum_other"), (row_stats[2], "sum_all")):
        torch.testing.assert_close(got.double(), getattr(exact, name), rtol=1e-5, atol=0)
    assert_as_good(entropy, eager.entropy, exact.entropy)
    assert torch.equal(top1.double(), exact.top1)
    assert_as_good(mean_logit, eager.mean_logit, exact.mean_logit)
    assert residual.shape == exact.residual.shape
    rounding = torch.finfo(residual.dtype).eps / 2
    slack = 1e-5 + (scalars[1] or 0.0) * 1e-6
    tiny = torch.finfo(residual.dtype).smallest_normal
    assert (
        (unscaled(residual) - exact.residual).abs()
        <= exact.residual.abs() * (rounding + slack) + tiny + 1e-7 * (scalars[1] is not None)
    ).all()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_pass_is_the_formula(shape, dtype, head):
    arguments = make_head(shape, dtype, head)
    assert_pass(linear_pass(*arguments), *arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_error_at_a_real_head(dtype):
    """OPS.md asks for an rms error of at most 1e-4 nats from bf16 inputs at D = 4096; float32 sums reach 5e-6."""
    hidden, weight, labels, bias, scalars = make_head((16, 4096, 4000), dtype, "plain")
    for pull in (0.0, 4.0, 10.0):
        pulled = (hidden.float() + pull * weight[labels].float()).to(dtype)
        logp, _, _, _, _, residual = linear_pass(pulled, weight, labels, bias, scalars)
        exact = Formulas(pulled.double() @ weight.double().t(), labels, bias, *scalars)
        assert (logp.double() - exact.logp).square().mean().sqrt().item() <= 5e-6
        assert (residual.double() - exact.residual).norm() <= 2e-3 * exact.residual.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_prob_keeps_its_digits_as_the_label_takes_all(dtype):
    D, V = 64, 300
    hidden, weight, labels, _, _ = make_head((40, D, V), dtype, "plain")
    pull = torch.linspace(0, 24, 40).unsqueeze(1)
    hidden = (hidden.float() + pull * weight[labels].float()).to(dtype)
    exact = Formulas(hidden.double() @ weight.double().t(), labels, None, 1.0, None, 1.0)
    assert exact.logp.max() > -1e-9
    logp, row_stats, _, _, _, residual = linear_pass(hidden, weight, labels)
    assert ((logp.double() - exact.logp) / exact.logp).abs().max() < 1e-4
    assert (unscaled(residual).norm(dim=1) / exact.residual.norm(dim=1) - 1).abs().max() < 1e-2
    assert ((row_stats[1].double() - exact.sum_other) / exact.sum_other).abs().max() < 1e-4


def test_far_label_and_label_alone():
    weight = torch.tensor([[0.0], [100.0], [300.0]], dtype=torch.bfloat16)
    hidden = torch.ones(3, 1, dtype=torch.bfloat16)
    labels = torch.tensor([0, 1, 2])
    result = linear_pass(hidden, weight, labels)
    # exp(m - z_y) would overflow for the first two; nothing but the label has mass for the third.
    assert result[0].tolist() == [-300.0, -200.0, 0.0]
    assert result[1][1].tolist() == [1.0, 1.0, 0.0]
    assert result[5].tolist() == [[1, 0, -1], [0, 1, -1], [0, 0, 1]]


def test_a_label_outside_the_vocabulary_is_nan_in_its_row_alone():
    hidden, weight, labels, _, _ = make_head((5, 16, 120), torch.bfloat16, "plain")
    clean = linear_pass(hidden, weight, labels)
    labels[1], labels[3] = 120, -7
    result = linear_pass(hidden, weight, labels)
    assert result[0].isnan().tolist() == [False, True, False, True, False]
    assert (result[1][1] / result[1][2]).isnan().tolist() == [False, True, False, True, False]
    torch.testing.assert_close(result[0][::2], clean[0][::2], rtol=1e-5, atol=0)
    assert result[5][::2].isfinite().all()


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_number_that_is_none_stays_in_its_row(dtype, special):
    hidden, weight, labels, _, _ = make_head((70, 40, 150), dtype, "plain")
    clean = linear_pass(hidden, weight, labels)
    hidden[66, 3] = special
    result = linear_pass(hidden, weight, labels)
    assert result[0][66].isnan()
    assert result[5][66].isnan().any()
    rest = torch.arange(70) != 66
    assert torch.equal(result[0][rest], clean[0][rest])
    assert torch.equal(result[5][rest], clean[5][rest])


def test_masked_words_have_no_mass():
    """A bias of -inf, over more words than a block holds."""
    hidden, weight, _, _, _ = make_head((4, 8, 400), torch.bfloat16, "plain")
    bias, labels = torch.zeros(400), torch.tensor([390, 399, 390, 5])
    bias[:380] = -math.inf
    kept = hidden.double() @ weight[380:].double().t()
    exact = Formulas(kept[:3], labels[:3] - 380, None, 1.0, None, 1.0)
    result = linear_pass(hidden, weight, labels, bias)
    assert error(result[0][:3], exact.logp) < 1e-5
    assert error(result[2][:3], exact.entropy) < 1e-5
    assert result[0][3] == -math.inf
    assert (result[5][:, :5] == 0).all()


def test_first_of_equal_logits_is_the_argmax():
    weight = torch.ones(200, 4, dtype=torch.bfloat16)
    hidden = torch.ones(4, 4, dtype=torch.bfloat16)
    labels = torch.tensor([0, 1, 50, 199])
    result = linear_pass(hidden, weight, labels)
    assert result[3].tolist() == [1, 0, 0, 0]


def test_empty_and_strided_inputs():
    hidden, weight, labels, _, _ = make_head((6, 24, 50), torch.bfloat16, "plain")
    expected = linear_pass(hidden, weight, labels)
    wide_hidden, wide_weight = torch.full((6, 31), torch.nan).bfloat16(), torch.full((50, 27), torch.nan).bfloat16()
    wide_hidden[:, 3:27], wide_weight[:, 1:25] = hidden, weight
    result = linear_pass(wide_hidden[:, 3:27], wide_weight[:, 1:25], labels)
    for got, wanted in zip(result, expected, strict=True):
        assert torch.equal(got, wanted)
    empty = linear_pass(hidden[:0], weight, labels[:0])
    assert [tuple(part.shape) for part in empty] == [(0,), (3, 0), (0,), (0,), (0,), (0, 50)]
    nothing_more = linear_pass(hidden, weight, labels, residual=False, entropy=False, stats=False)
    assert torch.equal(nothing_more[0], expected[0])
    assert [part.numel() for part in nothing_more[2:]] == [0, 0, 0, 0]


def test_threads_change_nothing():
    hidden, weight, labels, _, _ = make_head((150, 32, 1000), torch.bfloat16, "plain")
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(linear_pass(hidden, weight, labels))
    finally:
        torch.set_num_threads(threads)
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 33, 7), (130, 70, 193)], ids=str)
def test_weight_gradient_is_the_product(shape, dtype):
    hidden, weight, labels, _, _ = make_head(shape, dtype, "plain")
    residual = linear_pass(hidden, weight, labels)[5]
    scale = torch.randn(shape[0])
    exact = residual.double().t() @ (scale.double().unsqueeze(1) * hidden.double())
    size = residual.double().abs().t() @ (scale.double().abs().unsqueeze(1) * hidden.double().abs())
    # a H is rounded to bf16 where bf16 is multiplied.
    tolerance = size * (2**-8 if dtype == torch.bfloat16 else 2**-20) + 1e-30
    out = torch.full(weight.shape, torch.nan)
    torch.ops.reprdpo_native.residual_weight_grad(residual, hidden, scale, out, False)
    assert ((out.double() - exact).abs() <= tolerance).all()
    torch.ops.reprdpo_native.residual_weight_grad(residual, hidden, scale, out, True)
    assert ((out.double() - 2 * exact).abs() <= 2 * tolerance).all()
    rounded = torch.empty_like(weight)
    torch.ops.reprdpo_native.residual_weight_grad(residual, hidden, scale, rounded, False)
    assert torch.equal(rounded, (out / 2).to(dtype)) or error(rounded, exact) <= 2e-2 * exact.abs().max()


def test_gradients_lie_past_two_to_the_31_elements():
    """Residual, weight and its gradient in several blocks of rows far apart: memory is reserved, hardly any touched."""
    stride, rows, width, vocabulary = 2**24, 9, 17, 200
    try:
        storage = torch.empty((vocabulary - 1) * stride + 100)
    except RuntimeError:
        pytest.skip("this machine does not reserve 13 GB")
    hidden, scale, weight = torch.randn(rows, width), torch.randn(rows), torch.randn(vocabulary, width)
    residual = torch.randn(vocabulary, rows).t()
    far_grad = storage.as_strided((vocabulary, width), (stride, 1))
    far_weight = storage.as_strided((vocabulary, width), (stride, 1), 30).copy_(weight)
    far_residual = storage.as_strided((vocabulary, rows), (stride, 1), 60).copy_(residual.t()).t()
    weight_grad, hidden_grad, far_hidden_grad = (
        torch.empty_like(weight),
        torch.empty_like(hidden),
        torch.empty_like(hidden),
    )
    torch.ops.reprdpo_native.residual_weight_grad(residual, hidden, scale, weight_grad, False)
    torch.ops.reprdpo_native.residual_weight_grad(far_residual, hidden, scale, far_grad, False)
    torch.ops.reprdpo_native.residual_hidden_grad(residual, weight, scale, hidden_grad)
    torch.ops.reprdpo_native.residual_hidden_grad(far_residual, far_weight, scale, far_hidden_grad)
    assert torch.equal(far_grad, weight_grad)
    assert torch.equal(far_hidden_grad, hidden_grad)


# Words in one part, in two, and in more than a slice of them, an odd number.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 33, 7), (97, 130, 1023), (13, 70, 4611)], ids=str)
def test_hidden_gradient_is_the_product(shape, dtype):
    _, weight, _, _, _ = make_head(shape, dtype, "plain")
    residual = torch.randn(shape[2], shape[0]).to(dtype).t()
    scale = torch.randn(shape[0])
    scale[0] = math.nan if shape[0] > 1 else 0.5
    exact = scale.double().unsqueeze(1) * (residual.double() @ weight.double())
    out = torch.full((shape[0], shape[1] + 3), math.inf)[:, : shape[1]]
    torch.ops.reprdpo_native.residual_hidden_grad(residual, weight, scale, out)
    rest = slice(1 if shape[0] > 1 else 0, None)
    assert (out[rest].double() - exact[rest]).norm() <= 1e-6 * exact[rest].norm()
    assert shape[0] == 1 or out[0].isnan().all()
    rounded = torch.empty(shape[:2], dtype=dtype)
    torch.ops.reprdpo_native.residual_hidden_grad(residual, weight, scale, rounded)
    assert torch.equal(rounded[rest], out[rest].to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [1, 7, 500])
def test_logprob_over_logits(V, dtype):
    logits, labels = (3 * torch.randn(6, V)).to(dtype), torch.randint(0, V, (6,))
    labels[2], labels[4] = -100, V
    scored = torch.tensor([0, 1, 3, 5])
    exact_logits = logits[scored].double().requires_grad_()
    exact = Formulas(exact_logits, labels[scored], None, 1.0, None, 0.8)
    grad = torch.randn(6)
    (exact_grad,) = torch.autograd.grad(exact.logp, exact_logits, grad[scored].double())
    logp, row_stats = torch.ops.reprdpo_native.logprob(logits, labels, 0.8, -100)
    assert error(logp[scored], exact.logp) < 4e-6
    assert logp[2] == 0
    assert logp[4].isnan()
    for out in (torch.full_like(logits, torch.nan), logits):
        torch.ops.reprdpo_native.logprob_backward(grad, logits, labels, row_stats, 0.8, -100, out)
        tolerance = exact_grad.abs() * (torch.finfo(dtype).eps / 2 + 1e-5) + torch.finfo(torch.float16).tiny * 1e-3
        assert ((out[scored].double() - exact_grad).abs() <= tolerance).all()
        assert (out[2] == 0).all()
        assert out[4].isnan().all()


@pytest.mark.parametrize(
    "change",
    [
        lambda h, w, y: (h, w.float(), y),
        lambda h, w, y: (h[:, 1:], w, y),
        lambda h, w, y: (h.t().contiguous().t(), w, y),
        lambda h, w, y: (h, w, y[1:]),
        lambda h, w, y: (h, w, y.int()),
        lambda h, w, y: (h, w[:0], y),
    ],
    ids=["dtypes", "widths", "columns", "labels", "label-dtype", "empty"],
)
def test_what_cannot_be_read_is_refused(change):
    hidden, weight, labels, _, _ = make_head((5, 8, 9), torch.bfloat16, "plain")
    with pytest.raises(RuntimeError):
        linear_pass(*change(hidden, weight, labels))
