"""linear_logprob through Triton on the device against float64 on the CPU, and what only a device has."""

import pytest
import torch

from reprdpo.ops import linear_logprob

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

HEADS = {
    "plain": {},
    "bias": {"bias": True, "logit_scale": 0.3, "temperature": 1.7},
    "softcap": {"softcap": 2.0, "logit_scale": 1.4, "temperature": 0.6},
}


def eager(hidden, weight, labels, *, bias=None, logit_scale=1.0, softcap=None, temperature=1.0):
    logits = hidden @ weight.t()
    logits = (logits if bias is None else logits + bias) * logit_scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    ignored = labels == -100
    logp = (logits / temperature).log_softmax(-1)
    return logp.gather(-1, labels.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1).masked_fill(ignored, 0)


def make(rows, width, vocabulary, dtype, device, *, bias=False):
    hidden = torch.randn(rows, width).to(dtype)
    weight = (2 / width**0.5 * torch.randn(vocabulary, width)).to(dtype)
    labels = torch.randint(0, vocabulary, (rows,))
    labels[::4] = -100
    tensors = [hidden, weight] + ([torch.randn(vocabulary).to(dtype)] if bias else [])
    return [x.to(device).requires_grad_() for x in tensors], labels.to(device)


def both(function, tensors, labels, upstream, options):
    """Value and gradients."""
    names = ("hidden", "weight", "bias")[: len(tensors)]
    value = function(labels=labels, **dict(zip(names, tensors, strict=True)), **options)
    return [value, *torch.autograd.grad(value, tensors, upstream.to(value))]


def assert_as_good_as_eager(tensors, labels, options, **ours):
    upstream = torch.randn(labels.shape)
    exact_in = [x.detach().double().cpu().requires_grad_() for x in tensors]
    exact = both(eager, exact_in, labels.cpu(), upstream, options)
    peers = both(eager, tensors, labels, upstream, options)
    mine = both(linear_logprob, tensors, labels, upstream, options | ours)
    for my, their, truth in zip(mine, peers, exact, strict=True):
        error, peer = ((x.double().cpu() - truth).abs().max() for x in (my, their))
        assert error <= max(2 * peer, 4 * torch.finfo(my.dtype).eps * truth.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("rows", "width", "vocabulary"), [(9, 16, 7), (13, 24, 1000)])
def test_as_good_as_eager_in_the_same_dtype(rows, width, vocabulary, head, dtype, triton_device):
    options = dict(HEADS[head])
    tensors, labels = make(rows, width, vocabulary, dtype, triton_device, bias=options.pop("bias", False))
    assert_as_good_as_eager(tensors, labels, options)
    assert_as_good_as_eager(tensors, labels, options, max_tile_bytes=2**18)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_nothing_for_what_is_frozen(frozen, triton_device):
    (hidden, weight), labels = make(8, 16, 300, torch.float32, triton_device)
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    left = weight if frozen == "hidden" else hidden
    (grad,) = torch.autograd.grad(linear_logprob(hidden, weight, labels).sum(), left)
    (wanted,) = torch.autograd.grad(eager(hidden, weight, labels).sum(), left)
    torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gap", [4.0, 14.0])
def test_peaked_softmax_does_not_cancel(gap, triton_device):
    weight = torch.randn(200, 64)
    labels = torch.randint(0, 200, (24,))
    hidden = 0.1 * torch.randn(24, 64)
    direction = weight[labels] / weight[labels].square().sum(1, keepdim=True)
    for _ in range(60):
        logits = hidden @ weight.t()
        others = logits.scatter(1, labels[:, None], -torch.inf).logsumexp(1)
        short = gap - (logits.gather(1, labels[:, None])[:, 0] - others)
        hidden += 0.5 * short[:, None] * direction
    exact_in = hidden.double().requires_grad_(), weight.double().requires_grad_()
    exact = eager(*exact_in, labels)
    wanted = torch.autograd.grad(exact.sum(), exact_in)
    mine = hidden.to(triton_device).requires_grad_(), weight.to(triton_device).requires_grad_()
    ours = linear_logprob(*mine, labels.to(triton_device))
    torch.testing.assert_close(ours.double().cpu(), exact.detach(), rtol=1e-4, atol=0)
    for grad, truth in zip(torch.autograd.grad(ours.sum(), mine), wanted, strict=True):
        assert (grad.double().cpu() - truth).norm() <= 1e-4 * truth.norm()


def test_nan_in_a_row_and_labels_out_of_range_stay_there(triton_device):
    (hidden, weight), _ = make(5, 16, 50, torch.float32, triton_device)
    labels = torch.tensor([0, 1, 50, -100, 4], device=triton_device)
    with torch.no_grad():
        hidden[1] = torch.nan
        hidden[3] = torch.nan
    ours = linear_logprob(hidden, weight, labels)
    assert ours.isnan().tolist() == [False, True, True, False, False]
    (grad,) = torch.autograd.grad(ours.sum(), hidden)
    assert grad.isnan().any(1).tolist() == [False, True, True, False, False]
    assert grad[3].count_nonzero() == 0


def test_same_numbers_run_to_run(triton_device):
    tensors, labels = make(40, 32, 500, torch.bfloat16, triton_device)
    upstream = torch.randn(labels.shape)
    first = both(linear_logprob, tensors, labels, upstream, {})
    for again in range(2):
        second = both(linear_logprob, tensors, labels, upstream, {})
        assert all(map(torch.equal, first, second)), again


def sharp(rows, width, vocabulary, dtype, device, sharpness=6.0):
    """Logits of that standard deviation, a frozen head, labels as such a model would draw them."""
    weight = torch.randn(vocabulary, width) / width**0.5
    hidden = sharpness * torch.randn(rows, width)
    labels = torch.multinomial((hidden @ weight.t()).softmax(1), 1)[:, 0]
    return hidden.to(device, dtype).requires_grad_(), weight.to(device, dtype), labels.to(device)


def hidden_gradient(hidden, weight, labels, eps):
    return torch.autograd.grad(linear_logprob(hidden, weight, labels, gradient_mass_eps=eps).sum(), hidden)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width", "vocabulary"), [(20, 16, 704), (9, 13, 501)])
def test_mass_eps_is_within_its_bound(rows, width, vocabulary, dtype, triton_device):
    hidden, weight, labels = sharp(rows, width, vocabulary, dtype, triton_device)
    exact, sparse = (hidden_gradient(hidden, weight, labels, eps).double() for eps in (None, 0.05))
    bound = 0.05 * weight.double().norm(dim=1).max() + 8 * torch.finfo(dtype).eps * exact.norm(dim=1)
    assert ((sparse - exact).norm(dim=1) <= bound).all()
    assert torch.equal(hidden_gradient(hidden, weight, labels, 0.05).double(), sparse)


@pytest.mark.parametrize("sharpness", [0.5, 7.75, 17.7])
@pytest.mark.parametrize("vocabulary", [32000, 50257])
def test_mass_eps_at_model_size(vocabulary, sharpness, triton_device, cuda_only):
    hidden, weight, labels = sharp(300, 1024, vocabulary, torch.bfloat16, triton_device, sharpness)
    exact, sparse = (hidden_gradient(hidden, weight, labels, eps).double() for eps in (None, 2**-9))
    bound = 2**-9 * weight.double().norm(dim=1).max() + 2**-6 * exact.norm(dim=1)
    assert ((sparse - exact).norm(dim=1) <= bound).all()


def test_mass_eps_captured_and_compiled(triton_device, cuda_only):
    hidden, weight, labels = sharp(300, 64, 2000, torch.bfloat16, triton_device)
    wanted = hidden_gradient(hidden, weight, labels, 0.01)
    assert torch.equal(torch.compile(hidden_gradient, backend="aot_eager")(hidden, weight, labels, 0.01), wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = hidden_gradient(hidden, weight, labels, 0.01)
    with torch.no_grad():
        hidden.copy_(hidden.roll(1, 0))
        labels.copy_(labels.roll(1))
    graph.replay()
    torch.testing.assert_close(captured, hidden_gradient(hidden, weight, labels, 0.01))


def test_model_size_is_within_a_tenth_of_a_millinat(triton_device, cuda_only):
    (hidden, weight), labels = make(64, 4096, 32000, torch.bfloat16, triton_device)
    exact = eager(hidden.detach().double(), weight.detach().double(), labels)
    error = linear_logprob(hidden, weight, labels).double() - exact
    assert error.square().mean().sqrt() <= 1e-4


def test_graph_capture(triton_device, cuda_only):
    (hidden, weight), labels = make(32, 64, 1000, torch.bfloat16, triton_device)

    def step():
        value = linear_logprob(hidden, weight, labels)
        return value, *torch.autograd.grad(value.sum(), (hidden, weight))

    wanted = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for mine, theirs in zip(captured, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2**-7, atol=1e-3)
    with torch.no_grad():
        hidden.neg_()
        labels.copy_(labels.roll(1))
    graph.replay()
    wanted = step()
    for mine, theirs in zip(captured, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2**-7, atol=1e-3)


def test_compiled(triton_device, cuda_only):
    tensors, labels = make(32, 64, 1000, torch.float32, triton_device)
    upstream = torch.randn(labels.shape)
    compiled = torch.compile(linear_logprob, fullgraph=True)
    for mine, theirs in zip(
        both(compiled, tensors, labels, upstream, {}), both(linear_logprob, tensors, labels, upstream, {}), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_side_stream(triton_device, cuda_only):
    tensors, labels = make(64, 64, 32000, torch.bfloat16, triton_device)
    upstream = torch.randn(labels.shape, device=triton_device)
    wanted = both(linear_logprob, tensors, labels, upstream, {})
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # What the default stream does meanwhile must not be waited for, nor read too early.
        late = [(x.detach() * 1).requires_grad_() for x in tensors]
        mine = both(linear_logprob, late, labels, upstream, {})
    torch.cuda.current_stream().wait_stream(stream)
    assert all(map(torch.equal, mine, wanted))


def test_out_of_memory_leaves_the_process_usable(triton_device, cuda_only):
    (hidden, weight), labels = make(64, 64, 1000, torch.bfloat16, triton_device)
    wanted = linear_logprob(hidden, weight, labels)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    held = torch.empty(torch.cuda.mem_get_info()[0] - 2**29, dtype=torch.uint8, device=triton_device)
    many = hidden.repeat(64, 1), weight.repeat(128, 1), labels.repeat(64)  # 2 GB of logits, 500 MB free
    with pytest.raises(torch.cuda.OutOfMemoryError):
        linear_logprob(*many, max_tile_bytes=2**40)
    del held
    torch.cuda.empty_cache()
    assert torch.equal(linear_logprob(hidden, weight, labels), wanted)


def test_residual_past_two_to_the_31_elements(triton_device, cuda_only):
    rows, vocabulary = 8500, 256000  # 4.4 GB of bfloat16 residual, twice that of logits
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free memory")
    (hidden, weight), labels = make(rows, 8, vocabulary, torch.bfloat16, triton_device)
    last = slice(rows - 8, rows)
    ours = linear_logprob(hidden, weight, labels, max_tile_bytes=20 * 2**30)
    exact_in = hidden.detach()[last].double().requires_grad_()
    exact = eager(exact_in, weight.detach().double(), labels[last])
    torch.testing.assert_close(ours[last].double(), exact.detach(), rtol=1e-5, atol=1e-4)
    (grad,) = torch.autograd.grad(ours.sum(), hidden)
    (wanted,) = torch.autograd.grad(exact.sum(), exact_in)
    assert (grad[last].double() - wanted).norm() <= 0.01 * wanted.norm()
