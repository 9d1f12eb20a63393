"""linear_logprob against eager PyTorch in float64: values, gradients, memory, and the defects peers had."""

import importlib
import threading
import weakref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from reprdpo.ops import head_tiles, linear_logprob, use_backend
from reprdpo.ops.head_schedule import head_backward, head_forward
from reprdpo.ops.head_tiles import Needs, default_tile_bytes, exact_matmuls
from reprdpo.ops.reference import Head

HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.3, "temperature": 1.7},
    "softcap": {"softcap": 2.0, "logit_scale": 1.4, "temperature": 0.6, "bias": True},
}


def eager(hidden, weight, labels, *, bias=None, logit_scale=1.0, softcap=None, temperature=1.0, ignore_index=-100):
    """Log-prob and entropy through autograd's own log_softmax, in the dtype given."""
    logits = hidden @ weight.t()
    logits = (logits if bias is None else logits + bias) * logit_scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logp = (logits / temperature).log_softmax(-1)
    ignored = labels == ignore_index
    token = logp.gather(-1, labels.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1).masked_fill(ignored, 0)
    return token, -(logp.exp() * logp).sum(-1).masked_fill(ignored, 0)


def make(rows=13, width=9, vocabulary=7, dtype=torch.float64, bias=False):
    hidden = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, vocabulary, (rows,))
    labels[torch.rand(rows) < 0.3] = -100
    return hidden, weight, labels, torch.randn(vocabulary, dtype=dtype, requires_grad=True) if bias else None


def gradients(value: Tensor, *inputs: Tensor | None) -> list[Tensor]:
    upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return list(torch.autograd.grad(value, [x for x in inputs if x is not None], upstream.to(value.dtype)))


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize(("rows", "width", "vocabulary"), [(13, 9, 7), (1, 1, 1), (5, 17, 33), (40, 8, 64), (4, 0, 5)])
def test_matches_eager_in_float64(head, rows, width, vocabulary):
    hidden, weight, labels, bias = make(rows, width, vocabulary, bias=head.get("bias", False))
    options = {**head, "bias": bias}
    ours = linear_logprob(hidden, weight, labels, return_entropy=True, **options)
    wanted = eager(hidden, weight, labels, **options)
    torch.testing.assert_close(ours.logprob, wanted[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.entropy, wanted[1], rtol=1e-12, atol=1e-12)
    # The bias gradient also tells a bias added once a tile: it is summed over rows, not tiles.
    for mine, theirs in zip(
        gradients(ours.logprob - 0.7 * ours.entropy, hidden, weight, bias),
        gradients(wanted[0] - 0.7 * wanted[1], hidden, weight, bias),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_gradcheck():
    hidden, weight, labels, bias = make(5, 4, 6, bias=True)

    def both(*inputs):
        out = linear_logprob(inputs[0], inputs[1], labels, bias=inputs[2], softcap=3.0, return_entropy=True)
        return out.logprob, out.entropy

    assert torch.autograd.gradcheck(both, (hidden, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_within_twice_eager_in_the_same_dtype(dtype):
    hidden, weight, labels, _ = make(96, 64, 501, torch.float32)
    hidden, weight = hidden.detach().to(dtype).requires_grad_(), (weight.detach() / 8).to(dtype).requires_grad_()
    exact_in = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact_out = eager(*exact_in, labels)[0]
    ours, peers = linear_logprob(hidden, weight, labels), eager(hidden, weight, labels)[0]
    assert ours.dtype == torch.float32
    exact = [exact_out, *gradients(exact_out, *exact_in)]
    for mine, theirs, truth in zip(
        [ours, *gradients(ours, hidden, weight)], [peers, *gradients(peers, hidden, weight)], exact, strict=True
    ):
        floor = 4 * torch.finfo(mine.dtype).eps * truth.abs().max()
        assert (mine - truth).abs().max() <= max(2 * (theirs - truth).abs().max(), floor)


def test_bf16_at_model_size_is_within_a_tenth_of_a_millinat():
    rows, width, vocabulary = 16, 4096, 32000
    hidden = torch.randn(rows, width).bfloat16()
    weight = torch.empty(vocabulary, width, dtype=torch.bfloat16).normal_(0, 2 / width**0.5)
    labels = torch.randint(0, vocabulary, (rows,))
    logits = torch.cat([hidden.double() @ block.double().t() for block in weight.split(4000)], dim=1)
    exact = logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
    error = linear_logprob(hidden, weight, labels).double() - exact
    assert error.square().mean().sqrt() <= 1e-4


def test_bf16_gradients_at_model_size_are_within_twice_eager():
    rows, width, vocabulary = 6, 4096, 32000
    hidden = torch.randn(rows, width).bfloat16().requires_grad_()
    weight = torch.empty(vocabulary, width, dtype=torch.bfloat16).normal_(0, 2 / width**0.5).requires_grad_()
    labels, upstream = torch.randint(0, vocabulary, (rows,)), torch.randn(rows)
    ours = torch.autograd.grad(linear_logprob(hidden, weight, labels), (hidden, weight), upstream)
    peers = torch.autograd.grad(eager(hidden, weight, labels)[0], (hidden, weight), upstream.bfloat16())
    with torch.no_grad():
        exact_in = hidden.double()
        logits = torch.cat([exact_in @ block.double().t() for block in weight.split(4000)], dim=1)
        grad = -logits.softmax(1)
        grad[torch.arange(rows), labels] += 1
        grad *= upstream.double().unsqueeze(1)
        blocks = list(zip(grad.split(4000, 1), *(x.split(4000) for x in (weight, ours[1], peers[1])), strict=True))
        truth = sum(part @ block.double() for part, block, _, _ in blocks)
        assert (ours[0] - truth).norm() <= 2 * (peers[0] - truth).norm()
        errors = torch.tensor(
            [[(x - part.t() @ exact_in).square().sum() for x in (mine, theirs)] for part, _, mine, theirs in blocks]
        )
    assert errors.sum(0)[0] <= 4 * errors.sum(0)[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("probability", [0.98, 0.999, 1 - 1e-6])
def test_peaked_softmax_does_not_cancel(backend, dtype, probability):
    if backend == "triton":
        pytest.skip("too many rows for the interpreter; tests/kernels has them")
    width, vocabulary = 64, 200
    weight = torch.randn(vocabulary, width)
    labels = torch.randint(0, vocabulary, (24,))
    hidden = 0.3 * torch.randn(24, width)
    for _ in range(40):  # hidden += k W[y], until the target has the mass wanted
        p = (hidden @ weight.t()).softmax(1).gather(1, labels[:, None])
        hidden += torch.where(p < probability, 0.02, 0.0) * weight[labels]
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    exact_in = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = eager(*exact_in, labels)[0]
    if probability < 0.9999:
        assert exact.exp().median() > probability - 0.01
    ours = linear_logprob(hidden, weight, labels)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=0)
    rounding = torch.finfo(dtype).eps
    for mine, truth in zip(gradients(ours, hidden, weight), gradients(exact, *exact_in), strict=True):
        assert (mine - truth).norm() <= max(1e-4, rounding) * truth.norm()
        row_error = (mine - truth).norm(dim=1) / truth.norm(dim=1)
        assert row_error.max() <= max(1e-3, 2 * rounding)


class LiveBytes(TorchDispatchMode):
    """The most bytes alive at once in tensors made under the mode."""

    def __init__(self, *outside: Tensor) -> None:
        super().__init__()
        self.outside = {tensor.untyped_storage().data_ptr() for tensor in outside}
        self.made: list[weakref.ref] = []
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.made += [weakref.ref(leaf) for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.made = [ref for ref in self.made if ref() is not None]
        storages = [tensor.untyped_storage() for ref in self.made if (tensor := ref()) is not None]
        sizes = {s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in self.outside}
        self.peak = max(self.peak, sum(sizes.values()))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("needs", [Needs(True, True, True), Needs(True, False, False), Needs(False, False, False)])
# Tiles; the residual of all rows with a tile beside it; with an entropy's tiles in the backward too.
@pytest.mark.parametrize("budget", [500_000, 1_600_000, 2_600_000])
def test_logits_alive_stay_within_the_budget(dtype, entropy, softcap, needs, budget):
    rows, width, vocabulary = 160, 4, 2000
    hidden, weight, labels, bias = make(rows, width, vocabulary, dtype, bias=True)
    hidden, weight, bias = hidden.detach(), weight.detach(), bias.detach()
    head, kind = Head(weight, bias, softcap=softcap), "reference"
    options = {"ignore_index": -100, "max_tile_bytes": budget}
    # Beside the budget: gradients, numbers a token, and a product of a tile on its way.
    small = 16 * rows * (width + 12) + (8 + weight.itemsize) * (weight.numel() + vocabulary)
    with LiveBytes(hidden, weight) as live:
        out = head_forward(kind, hidden, head, labels, None, needs, entropy=entropy, stats=True, **options)
    assert min(budget, 1_600_000) / 3 < live.peak <= budget + small
    if not any(needs):
        return
    grad = torch.ones(rows)
    kept = out.residual.nbytes + out.hidden_rows.nbytes
    assert kept <= budget
    arguments = (hidden, head, labels, None, out.entropy, out.row_stats, out.residual, out.hidden_rows, needs)
    with LiveBytes(hidden, weight, out.residual, out.hidden_rows) as live:
        head_backward(kind, grad, grad if entropy else None, *arguments, **options)
    assert kept + live.peak <= budget + small


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_of_pairs_stay_within_the_budget(dtype):
    width, vocabulary, lengths = 4, 2000, [30, 10, 25, 40, 20, 15]
    hidden, weight, _, _ = make(sum(lengths), width, vocabulary, dtype)
    hidden, weight, labels = hidden.detach(), weight.detach(), torch.randint(0, vocabulary, (sum(lengths),))
    ids, options = torch.arange(6).repeat_interleave(torch.tensor(lengths)), (0.5, ["simpo"], [1.0], 0.5, "mean")
    head, loss = (1.0, None, 1.0, -100, False), (None, None, torch.ones(3), 6, *options)
    budget = 80 * vocabulary * (4 if dtype == torch.float32 else 8)
    small = 16 * sum(lengths) * (width + 12) + (8 + weight.itemsize) * (weight.numel() + vocabulary)
    with use_backend("reference"), LiveBytes(hidden, weight) as live:
        # Its body: a dispatch mode does not look into an op.
        op = importlib.import_module("reprdpo.ops.linear_preference")._linear_preference_loss._init_fn
        out = op(
            *(hidden, weight, None, labels, ids, torch.arange(len(labels)), *loss, *head, budget, True, True, False)
        )
    assert out[6].numel() == 0  # no residual is kept: the gradients are finished
    assert out[9].shape == weight.shape
    assert budget / 3 < live.peak <= budget + small


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_budget_gives_the_same_gradients(dtype):
    hidden, weight, labels, _ = make(29, 16, 11, dtype)
    with pytest.raises(ValueError, match="give at least") as refused:
        linear_logprob(hidden, weight, labels, max_tile_bytes=1)
    least = int(str(refused.value).split()[-1])
    results = []
    for budget in (least, 3 * least, 1000 * least):
        logp = linear_logprob(hidden, weight, labels, max_tile_bytes=budget)
        results.append([logp, *gradients(logp, hidden, weight)])
    tolerance = 1e-12 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps
    for result in results[:-1]:
        for mine, whole in zip(result, results[-1], strict=True):
            assert (mine - whole).abs().max() <= tolerance * whole.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_entropys_gradient_in_every_tile_and_none_of_ignored_rows(dtype):
    """An upstream gradient is sent to every row, and ignored rows hold NaN, named by the index or not."""
    hidden, weight, labels, _ = make(29, 16, 11, dtype)
    ignored = labels == -100
    exact = [value.detach().double().requires_grad_() for value in (hidden, weight)]
    logp, entropy = eager(exact[0].masked_fill(ignored.unsqueeze(1), 0), exact[1], labels)
    wanted = gradients(logp - 0.7 * entropy, *exact)
    with torch.no_grad():
        hidden[ignored] = torch.nan
    with pytest.raises(ValueError, match="give at least") as refused:
        linear_logprob(hidden, weight, labels, return_entropy=True, max_tile_bytes=1)
    least = int(str(refused.value).split()[-1])
    tolerance = 1e-12 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps
    for budget in (least, 3 * least, 1000 * least):
        for scored in (None, torch.arange(len(labels))):
            options = {"return_entropy": True, "max_tile_bytes": budget, "scored_index": scored}
            out = linear_logprob(hidden, weight, labels, **options)
            assert torch.equal(out.entropy == 0, ignored)
            for mine, truth in zip(gradients(out.logprob - 0.7 * out.entropy, hidden, weight), wanted, strict=True):
                assert (mine - truth).norm() <= tolerance * truth.norm()


def test_float16_holds_a_gradient_of_one_large_negative_entry():
    """Of 300 even choices: its entry is 300 times the others."""
    hidden, weight, labels, _ = make(5, 16, 300, torch.float16)
    with torch.no_grad():
        hidden *= 0.01
    exact = [value.detach().double().requires_grad_() for value in (hidden, weight)]
    logp, entropy = eager(*exact, labels)
    wanted = torch.autograd.grad((0.1 * entropy - logp).sum(), exact)
    out = linear_logprob(hidden, weight, labels, return_entropy=True)
    for mine, truth in zip(
        torch.autograd.grad((0.1 * out.entropy - out.logprob).sum(), (hidden, weight)), wanted, strict=True
    ):
        assert (mine - truth).norm() <= 2 * torch.finfo(torch.float16).eps * truth.norm()


def test_default_budget_on_the_cpu():
    assert default_tile_bytes(torch.device("cpu")) == 256 * 2**20


def test_nothing_under_an_ignored_label_leaks():
    hidden, weight, labels, _ = make()
    labels[::2] = -100
    with torch.no_grad():
        hidden[labels == -100] = torch.nan
        hidden[0] = torch.inf
    everything = torch.arange(len(labels))  # names ignored rows too, as a graph capture does
    for scored in (None, everything):
        logp = linear_logprob(hidden, weight, labels, scored_index=scored)
        upstream = torch.where(labels == -100, torch.nan, 1.0).double()
        dhidden, dweight = torch.autograd.grad(logp, (hidden, weight), upstream)
        assert torch.equal(logp == 0, labels == -100)
        assert torch.equal(dhidden.abs().sum(1) == 0, labels == -100)
        assert dweight.isfinite().all()


def test_nan_stays_in_its_row():
    hidden, weight, labels, _ = make()
    labels.fill_(2)
    with torch.no_grad():
        hidden[3, 1] = torch.nan
    labels[5], labels[6] = 7, -1  # both outside [0, 7)
    logp = linear_logprob(hidden, weight, labels)
    (dhidden,) = torch.autograd.grad(logp.sum(), hidden)
    bad = torch.zeros(len(labels), dtype=torch.bool)
    bad[[3, 5, 6]] = True
    assert torch.equal(logp.isnan(), bad)
    assert torch.equal(dhidden.isnan().any(1), bad)


@pytest.mark.parametrize("rows", [0, 4])
def test_no_row_scored(rows):
    hidden, weight, _, bias = make(rows, bias=True)
    out = linear_logprob(hidden, weight, torch.full((rows,), -100), bias=bias, return_entropy=True, return_stats=True)
    assert all(torch.equal(value, torch.zeros(rows).double()) for value in out)
    assert all((grad == 0).all() for grad in gradients(out.logprob, hidden, weight, bias))


def test_infinite_logits_make_no_nan():
    hidden, weight, labels, _ = make(6, vocabulary=7)
    labels[:] = torch.tensor([0, 1, 2, 3, 4, 5])
    bias = torch.zeros(7).double()
    bias[6] = -torch.inf  # a column masked out of the vocabulary
    out = linear_logprob(hidden, weight, labels, bias=bias, return_entropy=True)
    cut = linear_logprob(hidden, weight[:6], labels, return_entropy=True)
    torch.testing.assert_close(out, cut)
    value = out.logprob + out.entropy
    for mine, theirs in zip(
        gradients(value, hidden, weight), gradients(cut.logprob + cut.entropy, hidden, weight), strict=True
    ):
        torch.testing.assert_close(mine, theirs)
    masked_target = linear_logprob(hidden, weight, torch.full((6,), 6), bias=bias)
    assert (masked_target == -torch.inf).all()


def test_target_far_below_the_maximum(backend):
    hidden = torch.tensor([[1000.0], [45.0], [-1000.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]])
    logp = linear_logprob(hidden, weight, torch.tensor([1, 1, 1]))
    torch.testing.assert_close(logp, torch.tensor([-1000.0, -45.0, 0.0]))
    assert torch.equal(torch.autograd.grad(logp.sum(), hidden)[0], torch.tensor([[-1.0], [-1.0], [0.0]]))


def test_a_frozen_weight_gets_no_gradient_and_costs_none(monkeypatch):
    hidden, weight, labels, _ = make()
    weight.requires_grad_(False)
    asked = []
    original = torch.Tensor.addmm_
    monkeypatch.setattr(
        torch.Tensor, "addmm_", lambda self, *a, **k: (asked.append(self.shape), original(self, *a, **k))[1]
    )
    linear_logprob(hidden, weight, labels).sum().backward()
    assert weight.shape not in asked
    assert weight.grad is None
    assert hidden.grad is not None


def test_autocast_casts_hidden_and_weight_alone():
    hidden, weight, labels, bias = make(dtype=torch.float32, bias=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp = linear_logprob(hidden, weight, labels, bias=bias)
        grads = gradients(logp, hidden, weight, bias)
    by_hand = linear_logprob(hidden.bfloat16(), weight.bfloat16(), labels, bias=bias)
    assert logp.dtype == torch.float32
    assert torch.equal(logp, by_hand)
    for mine, theirs in zip(grads, gradients(by_hand, hidden, weight, bias), strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, theirs)
    # Logits stay float32: the op is far closer to exact products of the rounded operands than bf16 logits are.
    exact = eager(hidden.bfloat16().double(), weight.bfloat16().double(), labels, bias=bias)[0]
    assert (logp - exact).abs().max() < 1e-5


def test_float64_stays_under_autocast():
    hidden, weight, labels, _ = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for inputs in ((hidden, weight), (hidden.float(), weight), (hidden, weight.float())):
            logp = linear_logprob(*inputs, labels)
            assert logp.dtype == torch.float64
            assert torch.equal(logp, linear_logprob(*(value.double() for value in inputs), labels))


def test_a_backward_inside_autocast_is_that_of_the_forward_outside():
    hidden, weight, labels, _ = make(dtype=torch.float32)
    logp = linear_logprob(hidden, weight, labels)
    outside = torch.autograd.grad(logp.sum(), (hidden, weight), retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.autograd.grad(logp.sum(), (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_float32_means_float32_whatever_the_global_precision(backend):
    rows = 3 if backend == "triton" else 40
    hidden, weight, labels, _ = make(rows, 512, 256, torch.float32)

    def run():
        logp = linear_logprob(hidden, weight, labels)
        return [logp.detach(), *gradients(logp, hidden, weight)]

    before = run()
    torch.set_float32_matmul_precision("medium")
    try:
        after = run()
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.fixture
def matmul_settings():
    """As a process starts; whatever a test sets is undone."""
    backends = torch.backends
    for test in (True, False):
        torch.set_float32_matmul_precision("highest")
        for settings in (backends, backends.cuda.matmul, backends.mkldnn.matmul):
            settings.fp32_precision = "none"
        backends.cuda.matmul.allow_fp16_accumulation = False
        if test:
            yield backends


def matmul_precisions():
    cuda = torch.backends.cuda.matmul
    return cuda.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision, cuda.allow_fp16_accumulation


def test_exact_matmuls_put_back_what_they_change(matmul_settings):
    cpu = torch.device("cpu")
    matmul_settings.fp32_precision = "tf32"  # inherited by both
    with exact_matmuls(cpu):
        assert matmul_precisions() == ("ieee", "ieee", False)
    assert matmul_precisions() == ("tf32", "tf32", False)
    matmul_settings.fp32_precision = "ieee"
    assert matmul_precisions() == ("ieee", "ieee", False)
    torch.set_float32_matmul_precision("medium")
    matmul_settings.cuda.matmul.allow_fp16_accumulation = True

    def fail():
        with exact_matmuls(cpu):
            assert matmul_precisions() == ("ieee", "ieee", False)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert matmul_precisions() == ("tf32", "bf16", True)


def test_exact_matmuls_of_two_threads(matmul_settings):
    torch.set_float32_matmul_precision("high")
    entered, left = threading.Event(), threading.Event()

    def other():
        with exact_matmuls(torch.device("cpu")):
            entered.set()
            left.wait(10)

    thread = threading.Thread(target=other)
    with exact_matmuls(torch.device("cpu")):
        thread.start()
        entered.wait()
    assert matmul_precisions() == ("ieee", "ieee", False)  # the other is still inside
    left.set()
    thread.join()
    assert matmul_precisions() == ("tf32", "tf32", False)


@pytest.mark.parametrize("largest", [0.0, 1e-45, 1e-42, 3e-39, 0.7, 5.0, 3e38])
def test_the_power_of_two_that_lifts_float16_rows_is_finite(largest):
    power, undo = head_tiles._power_in_reach(torch.tensor([-largest, largest / 2]))
    assert (power * undo).item() == 1.0
    assert power.isfinite().all()
    assert largest * power.item() <= 2.0


def test_nothing_is_multiplied_where_nothing_is_scored():
    hidden, weight, labels, _ = make(dtype=torch.float32)
    options = (1.0, None, 1.0, -100, False, False, None, True, True, False)  # as under torch.compile: no index
    logp, *_ = torch.ops.reprdpo.linear_logprob(hidden, weight, None, torch.full_like(labels, -100), None, *options)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        grads = torch.autograd.grad(logp.sum(), (hidden, weight))
    assert not [event.name for event in trace.events() if event.name in ("aten::mm", "aten::addmm")]
    assert not any(grad.any() for grad in grads)


def test_mixed_dtypes_take_the_half_precision_one():
    hidden, weight, labels, _ = make(dtype=torch.float32)
    mixed = linear_logprob(hidden.bfloat16(), weight, labels)
    assert torch.equal(mixed, linear_logprob(hidden.bfloat16(), weight.bfloat16(), labels))
    assert gradients(mixed, weight)[0].dtype == torch.float32
    assert torch.equal(linear_logprob(hidden.bfloat16().float(), weight.bfloat16(), labels), mixed)
    assert torch.equal(
        linear_logprob(hidden, weight.bfloat16(), labels),
        linear_logprob(hidden.bfloat16(), weight.bfloat16(), labels),
    )
    both_half = linear_logprob(hidden.bfloat16(), weight.half(), labels)
    assert torch.equal(both_half, linear_logprob(hidden.bfloat16().float(), weight.half().float(), labels))


def test_scored_index_and_shapes():
    hidden, weight, labels, _ = make(12)
    scored = (labels != -100).nonzero()[:, 0]
    flat = linear_logprob(hidden, weight, labels)
    assert torch.equal(linear_logprob(hidden, weight, labels, scored_index=scored), flat)
    folded = linear_logprob(hidden.view(3, 4, -1), weight, labels.view(3, 4).int())
    assert torch.equal(folded, flat.view(3, 4))
    strided_hidden, strided_weight = hidden.t().contiguous().t(), weight.t().contiguous().t()
    strided = linear_logprob(strided_hidden, strided_weight, labels)
    torch.testing.assert_close(strided, flat)
    for mine, theirs in zip(gradients(strided, hidden, weight), gradients(flat, hidden, weight), strict=True):
        torch.testing.assert_close(mine, theirs)


def spread(tensor):
    """The same numbers with others between them."""
    return torch.stack([tensor, torch.full_like(tensor, 1)], -1)[..., 0]


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("head_grad", [False, True])
def test_tensors_that_are_not_dense(head_grad, entropy, backend):
    hidden, weight, labels, bias = make(12, 9, 20, torch.float32, bias=True)
    weight.requires_grad_(head_grad)
    bias.requires_grad_(head_grad)
    leaves = [x for x in (hidden, weight, bias) if x.requires_grad]
    scored = (labels != -100).nonzero()[:, 0]

    def run(hidden, weight, bias, labels, scored):
        out = linear_logprob(hidden, weight, labels, bias=bias, scored_index=scored, return_entropy=entropy)
        out = out.logprob + out.entropy if entropy else out
        return [out.detach(), *gradients(out, *leaves)]

    wanted = run(hidden, weight, bias, labels, scored)
    for other in (spread, lambda x: x.t().contiguous().t() if x.dim() == 2 else spread(x)):
        found = run(*(other(x) for x in (hidden, weight, bias, labels, scored)))
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_stats():
    hidden, weight, labels, _ = make()
    out = linear_logprob(hidden, weight, labels, temperature=0.5, return_stats=True)
    logits = (hidden @ weight.t()) / 0.5
    scored = labels != -100
    assert out.entropy is None
    assert torch.equal(out.top1, ((logits.argmax(1) == labels) & scored).double())
    torch.testing.assert_close(out.mean_logit, logits.mean(1) * scored)
    assert not out.mean_logit.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equal_logits_the_first_is_the_top(dtype):
    hidden, weight, _, _ = (None if each is None else each.detach() for each in make(4, 64, 300, dtype))
    weight[[10, 250]] = weight[3].clone()  # in the first block of the vocabulary, and in another
    hidden[:] = weight[3]
    out = linear_logprob(hidden, weight, torch.tensor([3, 10, 250, 4]), return_stats=True)
    assert out.top1.tolist() == [1, 0, 0, 0]


def test_backward_twice_and_run_to_run():
    hidden, weight, labels, _ = make(dtype=torch.float32)
    before = hidden.detach().clone(), weight.detach().clone()
    logp = linear_logprob(hidden, weight, labels)
    runs = [torch.autograd.grad(logp.sum(), (hidden, weight), retain_graph=True) for _ in range(2)]
    runs.append(torch.autograd.grad(linear_logprob(hidden, weight, labels).sum(), (hidden, weight)))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
    assert torch.equal(hidden, before[0])
    assert torch.equal(weight, before[1])


def test_second_derivatives_and_forward_mode_are_refused():
    hidden, weight, labels, _ = make()
    (once,) = torch.autograd.grad(linear_logprob(hidden, weight, labels).sum(), hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="linear_logprob has no second derivative"):
        once.square().sum().backward()
    value = hidden.detach()
    with pytest.raises(TypeError, match="hidden has a forward-mode tangent, which would be dropped"):
        torch.func.jvp(lambda value: linear_logprob(value, weight.detach(), labels), (value,), (value,))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    hidden, weight, labels, _ = make()
    direct = linear_logprob(hidden, weight, labels)
    again = checkpoint(linear_logprob, hidden, weight, labels, use_reentrant=reentrant)
    again.sum().backward()
    assert torch.equal(again, direct)
    torch.testing.assert_close(hidden.grad, torch.autograd.grad(direct.sum(), hidden)[0])


@pytest.mark.parametrize("budget", [None, 200])
@pytest.mark.parametrize("extras", [False, True])
def test_opcheck(extras, budget):
    hidden, weight, labels, bias = make(5, bias=extras)
    scored = (labels != -100).nonzero()[:, 0] if extras else None
    softcap = 2.0 if extras else None
    torch.library.opcheck(
        torch.ops.reprdpo.linear_logprob.default,
        (*(hidden, weight, bias, labels, scored, 0.7, softcap, 1.3, -100, extras, extras, budget), True, True, extras),
    )
    torch.library.opcheck(  # the head frozen
        torch.ops.reprdpo.linear_logprob.default,
        (
            hidden,
            weight.detach(),
            None,
            labels,
            scored,
            0.7,
            softcap,
            1.3,
            -100,
            extras,
            extras,
            None,
            True,
            False,
            False,
        ),
    )
    out = torch.ops.reprdpo.linear_logprob(
        *(hidden, weight, bias, labels, scored, 1.0, None, 1.0, -100, True, False, budget, True, True, extras)
    )
    torch.library.opcheck(
        torch.ops.reprdpo.linear_logprob_backward.default,
        (
            *(out[0].detach(), out[1].detach(), hidden.detach(), weight.detach(), bias, labels, scored),
            *(out[1].detach(), *out[4:], 1.0, None, 1.0, -100, budget, True, not extras, extras),
        ),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compiles_whole_with_dynamic_shapes_and_numbers():
    def step(hidden, weight, labels, temperature):
        return linear_logprob(hidden, weight, labels, temperature=temperature).sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, temperature in ((5, 0.7), (9, 1.3)):
        hidden, weight, labels, _ = make(rows)
        ours, plain = compiled(hidden, weight, labels, temperature), step(hidden, weight, labels, temperature)
        torch.testing.assert_close(ours, plain)
        torch.testing.assert_close(gradients(ours, hidden, weight), gradients(plain, hidden, weight))


def test_compiles_whole():
    hidden, weight, labels, bias = make(bias=True)

    def step(hidden, weight, bias):
        out = linear_logprob(hidden, weight, labels, bias=bias, softcap=4.0, return_entropy=True, return_stats=True)
        return out.logprob.sum() + out.entropy.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    ours, plain = compiled(hidden, weight, bias), step(hidden, weight, bias)
    torch.testing.assert_close(ours, plain)
    for mine, theirs in zip(gradients(ours, hidden, weight, bias), gradients(plain, hidden, weight, bias), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "hidden must be", {"hidden": torch.zeros(3, 5)}),
        (ValueError, "labels must be of shape", {"labels": torch.zeros(4, dtype=torch.long)}),
        (TypeError, "labels must be an integer", {"labels": torch.zeros(3)}),
        (ValueError, r"weight must be \[V, D\]", {"weight": torch.zeros(4)}),
        (ValueError, "at least one row", {"weight": torch.zeros(0, 4)}),
        (TypeError, "hidden must be float32", {"hidden": torch.zeros(3, 4, dtype=torch.long)}),
        (ValueError, "bias must be of shape", {"bias": torch.zeros(6)}),
        (ValueError, "temperature", {"temperature": 0.0}),
        (ValueError, "softcap", {"softcap": -1.0}),
        (ValueError, "logit_scale must be finite", {"logit_scale": float("nan")}),
        (TypeError, "ignore_index must be an integer", {"ignore_index": 1.5}),
        (ValueError, "max_tile_bytes", {"max_tile_bytes": 0}),
        (ValueError, "scored_index must be in", {"scored_index": torch.tensor([3])}),
        (TypeError, "scored_index must be int64", {"scored_index": torch.tensor([1], dtype=torch.int32)}),
        (ValueError, "device", {"weight": torch.zeros(7, 4, device="meta")}),
    ],
)
def test_refusals(error, message, change):
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(7, 4), "labels": torch.zeros(3, dtype=torch.long)}
    with pytest.raises(error, match=message):
        linear_logprob(**{**arguments, **change})


def test_a_distributed_weight_is_refused_with_the_cure():
    weight = torch.zeros(7, 4)
    weight.full_tensor = lambda: weight
    with pytest.raises(TypeError, match="weight is a DTensor; gather it first"):
        linear_logprob(torch.zeros(3, 4), weight, torch.zeros(3, dtype=torch.long))


def test_reference_can_be_asked_for():
    hidden, weight, labels, _ = make()
    with use_backend("reference"):
        linear_logprob(hidden, weight, labels)
