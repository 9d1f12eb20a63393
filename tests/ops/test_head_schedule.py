"""Every path of the schedule: how many matmuls it takes, and that all give the same numbers, to rounding."""

import collections
import importlib

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from reprdpo.ops import linear_logprob, linear_preference_loss, use_backend
from reprdpo.ops.head_schedule import plan_head
from reprdpo.ops.head_tiles import Needs, tile_cost
from reprdpo.ops.pair_schedule import pair_groups
from reprdpo.ops.reference import Head

D, V = 48, 640
IGNORED = -100


def batch(lengths, dtype=torch.float32, **head):
    """Hidden states [S, T, D], weight, labels and scored positions; a prompt of two tokens before each response."""
    total = max(lengths) + 2
    labels = torch.full((len(lengths), total), IGNORED)
    for row, length in enumerate(lengths):
        labels[row, 2 : 2 + length] = torch.randint(0, V, (length,))
    hidden = torch.randn(len(lengths), total, D).to(dtype).requires_grad_()
    weight = (torch.randn(V, D) / D**0.5).to(dtype).requires_grad_()
    return hidden, weight, labels, (labels.reshape(-1) != IGNORED).nonzero()[:, 0]


def sized(lengths, backend):
    """Fewer tokens for the interpreter, which takes tens of milliseconds for a row."""
    return [min(length, 2) for length in lengths[:4]] if backend == "triton" else lengths


def matmuls(run, rows):
    """Matmul FLOP of ``run`` in units of one product of the scored rows with the weight."""
    with profile(activities=[ProfilerActivity.CPU], with_flops=True, record_shapes=True) as trace:
        run()
    products = [event.flops for event in trace.events() if event.name in ("aten::mm", "aten::addmm")]
    return sum(products) / (2 * rows * D * V)


def row_bytes(dtype):
    return V * 4 + (0 if dtype == torch.float32 else V * dtype.itemsize)


@pytest.mark.parametrize(
    ("budget_rows", "frozen", "no_grad", "count"),
    [
        *((None, False, False, 3), (None, True, False, 2), (None, False, True, 1)),
        *((40, False, False, 4), (40, True, False, 2), (40, False, True, 1), (40, True, True, 1)),
    ],
)
def test_matmuls_of_linear_logprob(budget_rows, frozen, no_grad, count):
    hidden, weight, labels, scored = batch([60, 70])
    weight.requires_grad_(not frozen)
    budget = None if budget_rows is None else budget_rows * row_bytes(torch.float32)

    def run():
        with torch.set_grad_enabled(not no_grad):
            logp = linear_logprob(hidden, weight, labels, scored_index=scored, max_tile_bytes=budget)
        if not no_grad:
            logp.backward(torch.randn(logp.shape))

    with use_backend("reference"):
        assert matmuls(run, 130) == pytest.approx(count)


@pytest.mark.parametrize(
    ("budget_rows", "reduction", "frozen", "count"),
    [
        *((None, "mean", False, 3), (None, "none", False, 3), (None, "mean", True, 2)),
        *((70, "mean", False, 3), (70, "sum", False, 3), (70, "none", False, 4), (70, "mean", True, 2)),
        (50, "mean", False, 3 + 60 / 130),  # the pair of 60 tokens, alone over the budget, is made twice
    ],
)
def test_matmuls_of_a_pair_loss(budget_rows, reduction, frozen, count):
    hidden, weight, labels, scored = batch([30, 20, 10, 30, 25, 15])
    weight.requires_grad_(not frozen)
    budget = None if budget_rows is None else budget_rows * row_bytes(torch.float32)

    def run():
        out = linear_preference_loss(
            *(hidden, weight, labels),
            beta=0.1,
            loss_type="simpo",
            reduction=reduction,
            scored_index=scored,
            max_tile_bytes=budget,
        )
        out.loss.backward(torch.full(out.loss.shape, 0.7))

    with use_backend("reference"):
        assert matmuls(run, 130) == pytest.approx(count)


def exact_gradients(hidden, weight, labels, options, upstream, *bias):
    """Log-probs' and gradients' exact values, by autograd in float64."""
    inputs = [value.detach().double().requires_grad_() for value in (hidden, weight, *bias)]
    logits = (inputs[0] @ inputs[1].t() + sum(inputs[2:])) * options.get("logit_scale", 1.0)
    if (cap := options.get("softcap")) is not None:
        logits = cap * torch.tanh(logits / cap)
    ignored = labels == IGNORED
    logp = logits.log_softmax(-1).gather(-1, labels.masked_fill(ignored, 0)[..., None])[..., 0].masked_fill(ignored, 0)
    return logp, torch.autograd.grad(logp, inputs, upstream.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "logit_scale": 1.5}], ids=["plain", "softcap"])
def test_paths_of_linear_logprob_agree(backend, dtype, options):
    hidden, weight, labels, scored = batch(sized([170, 0, 130, 21], backend), dtype)
    upstream = torch.randn(labels.shape)
    exact, wanted = exact_gradients(hidden, weight, labels, options, upstream)
    n = len(scored)
    # All at once; in half precision the residual whole and its logits in parts; tiles made again in the backward.
    budgets = [None, n * V * 2 + 180 * 4 * V * 4, 100 * 4 * V * 4]
    eps = torch.finfo(dtype).eps
    for budget in budgets:
        for trained in ((True, True), (True, False), (False, True)):
            inputs = [x.detach().requires_grad_(needed) for x, needed in zip((hidden, weight), trained, strict=True)]
            logp = linear_logprob(*inputs, labels, scored_index=scored, max_tile_bytes=budget, **options)
            assert (logp - exact).abs().max() < 1e-5
            asked = [x for x in inputs if x.requires_grad]
            truths = [truth for truth, needed in zip(wanted, trained, strict=True) if needed]
            for mine, truth in zip(torch.autograd.grad(logp, asked, upstream), truths, strict=True):
                assert mine.dtype == dtype
                assert (mine - truth).norm() <= max(1e-6, 1.5 * eps) * truth.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", ["recompute", "pairs"])
def test_many_tiles_are_rounded_once(backend, path, dtype):
    """As exact in 30 tiles as in one, the bias's gradient too."""
    hidden, weight, labels, scored = batch(sized([60, 40, 50, 30, 60, 50], backend), dtype)
    bias = torch.randn(V).to(dtype).requires_grad_()
    pairs = len(labels) // 2
    upstream = torch.tensor([1.0, -1.0]).repeat_interleave(pairs)[:, None].expand(labels.shape)
    _, wanted = exact_gradients(hidden, weight, labels, {}, upstream, bias)
    for rows in (1,) if backend == "triton" else (10, 1000):
        head = {"bias": bias, "scored_index": scored, "max_tile_bytes": rows * 2 * row_bytes(dtype)}
        if path == "pairs":  # a hinge of confidence 0 that is far on the wrong side
            refs = {"ref_chosen_logp": torch.full((pairs,), -1e4), "ref_rejected_logp": torch.full((pairs,), 1e4)}
            hinge = {"beta": 1.0, "loss_type": "hinge", "confidence": 0.0, "reduction": "sum"}
            loss = linear_preference_loss(hidden, weight, labels, **hinge, **refs, **head).loss
        else:
            loss = (linear_logprob(hidden, weight, labels, **head) * upstream).sum()
        for mine, truth in zip(torch.autograd.grad(loss, (hidden, weight, bias)), wanted, strict=True):
            assert mine.dtype == dtype
            # The interpreter cuts bfloat16 off where it should round.
            within = 16 if dtype == torch.float32 or backend == "triton" else 0.35
            assert (mine - truth).norm() <= within * torch.finfo(dtype).eps * truth.norm()


LENGTHS = [120, 0, 7, 61, 300, 1, 33, 90, 0, 2, 80, 64, 299, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("upstream", [1.0, -0.37])
def test_paths_of_a_pair_loss_agree(backend, dtype, upstream):
    if backend == "triton" and (dtype != torch.bfloat16 or upstream == 1.0):
        pytest.skip("one case is enough for the interpreter")
    hidden, weight, labels, scored = batch(sized(LENGTHS, backend), dtype)
    refs = {name: -5 * torch.rand(len(labels) // 2) for name in ("ref_chosen_logp", "ref_rejected_logp")}
    options = {"beta": 0.02, "confidence": 0.8, "loss_type": ["sigmoid", "sft"], "scored_index": scored, **refs}
    whole = None
    # Composed; whole pairs in several tiles; every larger pair made twice; a row or two at a time.
    for rows in (None, 2) if backend == "triton" else (None, 700, 150, 3):
        for frozen in (False, True):
            inputs = hidden.detach().requires_grad_(), weight.detach().requires_grad_(not frozen)
            budget = None if rows is None else rows * 2 * row_bytes(dtype)
            out = linear_preference_loss(*inputs, labels, max_tile_bytes=budget, **options)
            (out.loss * upstream).backward()
            grads = [x.grad for x in inputs if x.grad is not None]
            whole = whole or (out, grads)
            torch.testing.assert_close(out.loss, whole[0].loss, rtol=1e-5, atol=0)
            torch.testing.assert_close(out.chosen_logp, whole[0].chosen_logp, rtol=1e-5, atol=1e-4)
            for mine, theirs in zip(grads, whole[1], strict=False):
                assert mine.dtype == dtype
                assert (mine - theirs).float().norm() <= max(2e-6, 1.5 * torch.finfo(dtype).eps) * theirs.norm()


def test_finished_gradients_can_be_asked_for_again():
    hidden, weight, labels, scored = batch([30, 20, 10, 30])
    options = {"beta": 0.5, "loss_type": "simpo", "scored_index": scored}
    small = {**options, "max_tile_bytes": 60 * row_bytes(torch.float32)}
    wanted = torch.autograd.grad(linear_preference_loss(hidden, weight, labels, **options).loss, (hidden, weight))
    loss = linear_preference_loss(hidden, weight, labels, **small).loss
    # One input after another, twice, with upstream gradients of several kinds: each time the gradient of that call.
    for factor in (1.0, -2.5, 1.0):
        for position, value in ((1, weight), (0, hidden)):
            (grad,) = torch.autograd.grad(loss * factor, value, retain_graph=True)
            torch.testing.assert_close(grad, factor * wanted[position], rtol=1e-4, atol=1e-7)
    for _ in range(2):
        linear_preference_loss(hidden, weight, labels, **small).loss.backward()
    torch.testing.assert_close(weight.grad, 2 * wanted[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("rows", [None, 60])
def test_a_second_derivative_is_refused(rows):
    """Where gradients were finished in the forward too: as a constant they would be left out of a penalty."""
    hidden, weight, labels, _ = batch([30, 20, 10, 30])
    budget = None if rows is None else rows * row_bytes(torch.float32)
    loss = linear_preference_loss(hidden, weight, labels, beta=0.5, loss_type="simpo", max_tile_bytes=budget).loss
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="linear_preference_loss has no second derivative"):
        grad.square().sum().backward()


@pytest.mark.parametrize("kind", ["reference", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trained", [True, False])
def test_a_plan_keeps_to_its_budget(kind, dtype, trained):
    """From the smallest one, which is told, on; what is alive at once is counted as TileCost says."""
    rows, hidden = 300, torch.empty(300, D, dtype=dtype)
    head = Head(torch.empty(V, D, dtype=dtype), None, 1.0, None, 1.0)
    needs, cost = Needs(trained, trained, False), tile_cost(kind, hidden, head, entropy=True)

    def plan(budget):
        return plan_head(kind, hidden, head, rows, needs, entropy=True, max_tile_bytes=budget)

    with pytest.raises(ValueError, match="give at least") as told:
        plan(1)
    least = int(str(told.value).rsplit(" ", 1)[1])
    with pytest.raises(ValueError, match=f"give at least {least}"):
        plan(least - 1)
    kept = set()
    for budget in [least, least + 1, *(round(least * 1.2**power) for power in range(50))]:
        found = plan(budget)
        whole = rows * cost.residual if found.keep == "residual" else 0
        n = found.residual_rows if trained and found.keep == "nothing" else min(found.rows, rows)
        own = cost.residual if trained and not whole else 0
        alive = whole + found.upcast_bytes + n * (cost.logits + own) + min(n, cost.work_rows) * cost.work
        assert n >= 1
        assert alive <= budget
        kept.add(found.keep)
    assert kept == ({"nothing", "residual"} if trained else {"nothing"})


def test_pairs_share_tiles_as_far_as_they_fit():
    ids = torch.tensor([0] * 30 + [1] * 20 + [2] * 5 + [3] * 10 + [4] * 25 + [5] * 5 + [-1, 6])
    groups = pair_groups(torch.arange(len(ids)), ids, 6, 75)
    assert [(group.pairs.start, group.pairs.stop) for group in groups] == [(0, 1), (1, 3)]
    assert [group.rows.shape[0] for group in groups] == [40, 55]
    assert groups[1].sequence_ids.bincount().tolist() == [20, 5, 25, 5]


def test_a_loss_scale_lifts_float16_gradients():
    """Gradients far below float16's range survive from forward to backward, where the scale brings them back."""
    hidden, weight, labels, scored = batch([30, 20, 10, 30], torch.float16)
    options = {"beta": 1e-5, "loss_type": "simpo", "scored_index": scored}
    wanted = torch.autograd.grad(
        linear_preference_loss(hidden.float(), weight.float(), labels, **options).loss * 65536.0, (hidden, weight)
    )
    for budget in (None, 60 * 2 * row_bytes(torch.float16)):
        loss = linear_preference_loss(hidden, weight, labels, max_tile_bytes=budget, **options).loss * 65536.0
        for mine, truth in zip(torch.autograd.grad(loss, (hidden, weight)), wanted, strict=True):
            assert (mine - truth).float().norm() <= 4e-3 * truth.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_addresses_past_two_to_the_31(backend, dtype):
    """A weight and logits whose rows lie 2^27 elements apart: memory is reserved, hardly any is touched."""
    if backend == "triton":
        pytest.skip("the interpreter copies whole storages")
    stride = 2**27
    rows = 20
    try:
        storage = torch.empty((rows - 1) * stride + D, dtype=dtype)
    except RuntimeError:
        pytest.skip("this machine does not reserve 10 GB")
    assert storage.numel() > 2**31
    weight = storage.as_strided((rows, D), (stride, 1)).copy_(torch.randn(rows, D)).requires_grad_()
    hidden, labels = torch.randn(9, D).to(dtype).requires_grad_(), torch.randint(0, rows, (9,))
    far = linear_logprob(hidden, weight, labels)
    near = linear_logprob(hidden, weight.detach().contiguous().requires_grad_(), labels)
    torch.testing.assert_close(far, near)
    (grad,) = torch.autograd.grad(far.sum(), hidden)
    torch.testing.assert_close(grad, torch.autograd.grad(near.sum(), hidden)[0])


def test_training_a_small_llama_gives_the_losses_of_eager_float32():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    tokens = torch.randint(0, 96, (8, 14))
    labels = torch.full_like(tokens, IGNORED)
    for row, length in enumerate((7, 3, 10, 5, 9, 0, 4, 10)):
        labels[row, 3 : 3 + length] = tokens[row, 4 : 4 + length] if length else IGNORED
    refs = {"ref_chosen_logp": torch.full((4,), -20.0), "ref_rejected_logp": torch.full((4,), -22.0)}

    def losses(loss_of):
        torch.manual_seed(1)
        model = transformers.LlamaForCausalLM(config)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        curve = []
        for _ in range(200):
            optimizer.zero_grad()
            loss = loss_of(model.model(tokens).last_hidden_state, model.lm_head.weight)
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        return torch.tensor(curve)

    def eager(hidden, weight):
        ignored = labels == IGNORED
        logp = (hidden @ weight.t()).log_softmax(-1).gather(-1, labels.masked_fill(ignored, 0)[..., None])[..., 0]
        chosen, rejected = logp.masked_fill(ignored, 0).sum(1).chunk(2)
        delta = 0.1 * ((chosen - refs["ref_chosen_logp"]) - (rejected - refs["ref_rejected_logp"]))
        return -(0.9 * torch.nn.functional.logsigmoid(delta) + 0.1 * torch.nn.functional.logsigmoid(-delta)).mean()

    wanted = losses(eager)
    assert wanted[-20:].mean() < 0.7 * wanted[0]
    for budget in (None, 20 * 96 * 4):
        fused = losses(
            lambda hidden, weight, budget=budget: (
                linear_preference_loss(
                    hidden, weight, labels, beta=0.1, confidence=0.9, max_tile_bytes=budget, **refs
                ).loss
            )
        )
        torch.testing.assert_close(fused, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("probability", [0.98, 0.999, 1 - 1e-6])
@pytest.mark.parametrize("path", ["recompute", "frozen", "pairs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peaked_softmax_does_not_cancel_on_any_path(backend, path, probability, dtype):
    if backend == "triton":
        pytest.skip("too many rows for the interpreter; tests/kernels has them")
    hidden, weight, labels, scored = batch([60, 0, 50, 40])
    at = labels.clamp(min=0)
    with torch.no_grad():
        for _ in range(400):  # hidden += k W[y], until the target has the mass wanted
            p = (hidden.double() @ weight.double().t()).softmax(-1).gather(-1, at[..., None])
            hidden += torch.where(p < probability, 0.1, 0.0) * weight[at]
    hidden, weight = hidden.detach().to(dtype).requires_grad_(), weight.detach().to(dtype).requires_grad_()
    # What a hinge of confidence 0 sends each log-prob here, where its margin is far on the wrong side.
    upstream = torch.tensor([1.0, 1.0, -1.0, -1.0]).unsqueeze(1).expand(labels.shape)
    _, wanted = exact_gradients(hidden, weight, labels, {}, upstream)
    weight.requires_grad_(path != "frozen")
    asked = [x for x in (hidden, weight) if x.requires_grad]
    options = {"scored_index": scored, "max_tile_bytes": 70 * 2 * row_bytes(dtype)}
    if path == "pairs":
        refs = {"ref_chosen_logp": torch.full((2,), -100.0), "ref_rejected_logp": torch.zeros(2)}
        hinge = {"beta": 1.0, "loss_type": "hinge", "confidence": 0.0, "reduction": "sum"}
        grads = torch.autograd.grad(
            linear_preference_loss(hidden, weight, labels, **hinge, **refs, **options).loss, asked
        )
    else:
        grads = torch.autograd.grad(linear_logprob(hidden, weight, labels, **options), asked, upstream)
    for mine, truth in zip(grads, wanted, strict=False):
        assert (mine - truth).norm() <= max(1e-4, 2 * torch.finfo(dtype).eps) * truth.norm()


def test_tiles_of_pairs_compile_whole():
    hidden, weight, labels, scored = batch([30, 20, 10, 30])
    budget = 60 * row_bytes(torch.float32)

    def step(hidden, weight):
        return linear_preference_loss(
            hidden, weight, labels, beta=0.5, loss_type="simpo", scored_index=scored, max_tile_bytes=budget
        ).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden, weight), step(hidden, weight))
    torch.testing.assert_close(
        torch.autograd.grad(0.7 * compiled(hidden, weight), (hidden, weight)),
        torch.autograd.grad(0.7 * step(hidden, weight), (hidden, weight)),
    )


class Launches(TorchDispatchMode):
    """Operations that would each launch a kernel: all but views and allocations, and Triton's own."""

    FREE = ("empty", "view", "expand", "slice", "select", "unsqueeze", "squeeze", "t", "transpose", "detach", "alias")

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()
        self.inside = 0
        self.patch = pytest.MonkeyPatch()

    def __enter__(self):
        interpreter = importlib.import_module("triton.runtime.interpreter")
        original = interpreter.GridExecutor.__call__

        def launch(executor, *args, **kwargs):
            self.counts[executor.fn.__name__] += 1
            self.inside += 1
            try:
                return original(executor, *args, **kwargs)
            finally:
                self.inside -= 1

        self.patch.setattr(interpreter.GridExecutor, "__call__", launch)
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        out = func(*args, **(kwargs or {}))
        free = name in self.FREE or name.startswith(("new_empty", "empty_", "_unsafe_view", "as_strided", "unbind"))
        free = free or (isinstance(out, torch.Tensor) and out.numel() == 0)
        if not self.inside and func.namespace == "aten" and not free:
            self.counts[name] += 1
        return out


@pytest.mark.interpreter
def test_launches_on_triton():
    """Two matmuls and six launches take the gradients from the residual; all else of a step is numbers a token."""
    hidden, weight, labels, scored = batch([2, 2])
    hidden, weight = hidden.detach().reshape(-1, D), weight.detach()
    ids = torch.arange(2).repeat_interleave(labels.shape[1])
    head = (hidden, weight, None, labels.reshape(-1))
    # The bodies of the ops: a dispatch mode does not look into them.
    linear_preference = importlib.import_module("reprdpo.ops.linear_preference")
    loss = (None, None, torch.ones(1), 2, 0.5, ["simpo"], [1.0], 0.5, "mean", 1.0, None, 1.0, IGNORED, False, None)
    with use_backend("triton"):
        with Launches() as forward:
            out = linear_preference._linear_preference_loss._init_fn(*head, ids, scored, *loss, True, True, False)
        _, _, _, slope, _, *kept = out
        rest = (ids, scored, "mean", 1.0, None, 1.0, IGNORED, None, True, True, False)
        one = torch.ones(())
        with Launches() as backward:
            linear_preference._linear_preference_loss_backward._init_fn(one, slope, *kept[:3], *head, *rest)
    assert not {"_local_scalar_dense", "nonzero"} & (forward.counts.keys() | backward.counts.keys())  # they synchronise
    assert forward.counts["mm"] == 1
    assert forward.counts["_token_residual_kernel"] == forward.counts["_sequence_preference_kernel"] == 1
    assert forward.counts.total() <= 9
    assert backward.counts["mm"] == 2
    assert backward.counts["_row_scales_kernel"] == 1
    assert backward.counts["_scale_rows_kernel"] == 2
    assert backward.counts.total() <= 8


def test_no_value_is_looked_at_on_the_host():
    """Meta tensors have none; labels are looked up where no index of the scored ones is given."""
    hidden = torch.empty(4, 6, D, device="meta", requires_grad=True)
    weight, bias = (torch.empty(*shape, device="meta", requires_grad=True) for shape in ((V, D), (V,)))
    labels, scored = (torch.empty(shape, dtype=torch.int64, device="meta") for shape in ((4, 6), (20,)))
    ref = torch.empty(2, device="meta")
    head = {"bias": bias, "scored_index": scored, "return_stats": True}
    logp = linear_logprob(hidden, weight, labels, return_entropy=True, **head)
    refs = {"ref_chosen_logp": ref, "ref_rejected_logp": ref, "confidence": ref}
    for budget in (None, 10 * row_bytes(torch.float32)):
        loss = linear_preference_loss(
            hidden, weight, labels, beta=0.1, shift=True, max_tile_bytes=budget, **refs, **head
        ).loss
        grads = torch.autograd.grad(loss + logp.logprob.sum(), (hidden, weight, bias), retain_graph=True)
        assert [grad.shape for grad in grads] == [hidden.shape, weight.shape, bias.shape]
    with pytest.raises((RuntimeError, NotImplementedError), match="nonzero"):
        linear_logprob(hidden, weight, labels)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_entropy_upstream_and_ignored_rows_on_triton(dtype):
    """Rows named by the index but ignored (as under graph capture) may hold anything, whatever is sent upstream."""
    hidden, weight, labels, _ = batch([2, 1], dtype)
    with torch.no_grad():
        hidden[labels == IGNORED] = torch.nan
    everything, upstream = torch.arange(labels.numel()), torch.randn(2, *labels.shape)
    results = []
    for kind, scored in (("triton", everything), ("reference", None)):
        with use_backend(kind):
            out = linear_logprob(hidden, weight, labels, scored_index=scored, softcap=3.0, return_entropy=True)
            both = torch.stack([out.logprob, out.entropy])
            log_probs = torch.autograd.grad(out.logprob, (hidden, weight), upstream[0], retain_graph=True)
            results.append([both.detach(), *log_probs, *torch.autograd.grad(both, (hidden, weight), upstream)])
    for mine, theirs in zip(*results, strict=True):
        assert (mine - theirs).norm() <= max(2e-6, 2 * torch.finfo(dtype).eps) * theirs.norm()
