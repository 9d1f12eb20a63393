"""logprob of existing logits against eager PyTorch in float64, and its in-place backward."""

import pytest
import torch

from reprdpo.ops import logprob


def make(rows=11, vocabulary=7, dtype=torch.float64):
    labels = torch.randint(0, vocabulary, (rows,))
    labels[::4] = -100
    return torch.randn(rows, vocabulary, dtype=dtype, requires_grad=True), labels


def eager(logits, labels, temperature=1.0):
    ignored = labels == -100
    logp = (logits / temperature).log_softmax(-1).gather(-1, labels.masked_fill(ignored, 0).unsqueeze(-1))
    return logp.squeeze(-1).masked_fill(ignored, 0)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("rows", "vocabulary"), [(11, 7), (1, 1), (0, 5), (300, 65)])
def test_matches_eager(inplace, rows, vocabulary):
    base, labels = make(rows, vocabulary)
    upstream = torch.randn(rows).double()
    logits = base * 1.0
    ours = logprob(logits, labels, temperature=0.7, inplace_backward=inplace)
    torch.testing.assert_close(ours, eager(base, labels, 0.7))
    wanted = torch.autograd.grad(eager(base, labels, 0.7), base, upstream)
    got = torch.autograd.grad(ours, base, upstream)
    torch.testing.assert_close(got, wanted)


def test_gradcheck():
    logits, labels = make()
    assert torch.autograd.gradcheck(lambda z: logprob(z, labels, temperature=1.3), logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_within_twice_eager_in_the_same_dtype(dtype):
    logits, labels = make(64, 300)
    logits = (3 * logits.detach()).to(dtype).requires_grad_()
    exact_in = logits.detach().double().requires_grad_()
    ours, peers, exact = logprob(logits, labels), eager(logits, labels), eager(exact_in, labels)
    results = [
        [value, torch.autograd.grad(value.sum(), x)[0]]
        for value, x in ((ours, logits), (peers, logits), (exact, exact_in))
    ]
    for mine, theirs, truth in zip(*results, strict=True):
        floor = 4 * torch.finfo(mine.dtype).eps * truth.abs().max()
        assert (mine - truth).abs().max() <= max(2 * (theirs - truth).abs().max(), floor)


@pytest.mark.parametrize("gap", [4.0, 8.0, 14.0, 30.0])
def test_peaked_softmax_keeps_its_relative_precision(backend, gap):
    logits = torch.randn(5, 50)
    labels = torch.arange(5)
    logits[labels, labels] = logits.logsumexp(1) + gap
    logits.requires_grad_()
    exact_in = logits.detach().double().requires_grad_()
    ours = logprob(logits, labels)
    others = exact_in.scatter(1, labels[:, None], -torch.inf).logsumexp(1)
    exact = -torch.nn.functional.softplus(others - exact_in.gather(1, labels[:, None])[:, 0], threshold=1000)
    torch.testing.assert_close(ours.double(), exact, rtol=2e-5, atol=0)
    mine, truth = torch.autograd.grad(ours.sum(), logits)[0], torch.autograd.grad(exact.sum(), exact_in)[0]
    torch.testing.assert_close(mine.double(), truth, rtol=2e-5, atol=0)


@pytest.mark.parametrize("inplace", [False, True])
def test_rows_keep_to_themselves(inplace):
    logits, labels = make()
    labels[1], labels[2] = 7, -5
    with torch.no_grad():
        logits[labels == -100] = torch.nan
        logits[3, 0] = torch.nan
    bad = torch.zeros(11, dtype=torch.bool)
    bad[[1, 2, 3]] = True
    logp = logprob(logits, labels, inplace_backward=inplace)
    upstream = torch.where(labels == -100, torch.nan, 1.0).double()
    (grad,) = torch.autograd.grad(logp, logits, upstream)
    assert torch.equal(logp.isnan(), bad)
    assert torch.equal(grad.isnan().any(1), bad)
    assert (grad[labels == -100] == 0).all()


def test_inplace_backward_reuses_the_logits_and_refuses_a_second_pass():
    base, labels = make()
    logits = base * 1.0
    out = logprob(logits, labels, inplace_backward=True)
    (grad,) = torch.autograd.grad(out.sum(), logits, retain_graph=True)
    assert grad.data_ptr() == logits.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inplace", [False, True])
def test_every_backend_matches_eager(backend, dtype, inplace):
    logits, labels = make(9, 131)
    logits = (3 * logits.detach()).to(dtype).requires_grad_()
    exact_in = logits.detach().double().requires_grad_()
    exact, upstream = eager(exact_in, labels, 0.7), torch.randn(9)
    ours = logprob(logits * 1.0, labels, temperature=0.7, inplace_backward=inplace)
    (grad,) = torch.autograd.grad(ours, logits, upstream)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
    (truth,) = torch.autograd.grad(exact, exact_in, upstream.double())
    assert (grad - truth).norm() <= max(1e-6, torch.finfo(dtype).eps) * truth.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_addresses_past_two_to_the_31(backend, dtype):
    """Logits whose rows lie 2^27 elements apart: memory is reserved, hardly any is touched."""
    if backend == "triton":
        pytest.skip("the interpreter copies whole storages")
    stride, rows = 2**27, 20
    try:
        storage = torch.empty((rows - 1) * stride + 50, dtype=dtype)
    except RuntimeError:
        pytest.skip("this machine does not reserve 10 GB")
    near = torch.randn(rows, 50).to(dtype).requires_grad_()
    far = storage.as_strided((rows, 50), (stride, 1)).copy_(near.detach())
    labels = torch.randint(0, 50, (rows,))
    logp, row_stats = torch.ops.reprdpo.logprob(far, labels, 1.0, -100, False)
    torch.testing.assert_close(logp, logprob(near, labels))
    torch.ops.reprdpo.logprob_backward_(torch.ones(rows), far, labels, row_stats, 1.0, -100)
    torch.testing.assert_close(far, torch.autograd.grad(logprob(near, labels).sum(), near)[0])


def test_a_second_derivative_is_refused_in_place_too():
    for inplace in (False, True):
        base, labels = make()
        out = logprob(base * 1.0, labels, inplace_backward=inplace)
        (grad,) = torch.autograd.grad(out.sum(), base, create_graph=True)
        with pytest.raises(NotImplementedError, match="logprob has no second derivative"):
            grad.square().sum().backward()


def test_labels_and_upstream_that_are_not_dense(backend):
    logits = torch.randn(9, 20, requires_grad=True)
    labels, upstream = torch.randint(0, 20, (9, 2)), torch.randn(9, 2)
    dense = logprob(logits, labels[:, 0].contiguous())
    strided = logprob(logits, labels[:, 0])
    assert torch.equal(strided, dense)
    (mine,), (theirs,) = (
        torch.autograd.grad(value, logits, c)
        for value, c in ((strided, upstream[:, 0]), (dense, upstream[:, 0].contiguous()))
    )
    assert torch.equal(mine, theirs)


def test_shapes_and_strides():
    logits, labels = make(12)
    flat = logprob(logits, labels)
    assert torch.equal(logprob(logits.view(3, 4, 7), labels.view(3, 4)), flat.view(3, 4))
    strided = logits.t().contiguous().t()
    assert torch.equal(logprob(strided, labels, inplace_backward=True), flat)


def test_opcheck_and_compile():
    logits, labels = make()
    torch.library.opcheck(torch.ops.reprdpo.logprob.default, (logits, labels, 0.7, -100, False))
    compiled = torch.compile(
        lambda z: logprob(z, labels, inplace_backward=True).sum(), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(
        torch.autograd.grad(compiled(logits), logits), torch.autograd.grad(eager(logits, labels).sum(), logits)
    )


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "labels must be of shape", {"labels": torch.zeros(4, dtype=torch.long)}),
        (ValueError, "V > 0", {"logits": torch.zeros(3, 0)}),
        (TypeError, "logits must be float32", {"logits": torch.zeros(3, 5, dtype=torch.long)}),
        (ValueError, "temperature must be finite", {"temperature": float("inf")}),
    ],
)
def test_refusals(error, message, arguments):
    with pytest.raises(error, match=message):
        logprob(**{"logits": torch.zeros(3, 5), "labels": torch.zeros(3, dtype=torch.long), **arguments})
