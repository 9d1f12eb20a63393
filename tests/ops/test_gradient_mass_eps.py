"""gradient_mass_eps: its bound against the exact gradient on flat, peaked and real distributions, and its refusals."""

import json
import math

import pytest
import torch

from reprdpo.ops import linear_logprob, linear_preference_loss, native, use_backend
from reprdpo.ops.reference import mass_threshold

pytest.importorskip("triton")
from reprdpo_kernels.sparse_product import Config

BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(not native.loaded(), reason=native.status())),
    pytest.param("triton", marks=pytest.mark.interpreter),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _small_tiles(request, monkeypatch):
    """Several tiles of Triton's product in few rows, as the interpreter is slow."""
    if request.node.get_closest_marker("interpreter"):
        monkeypatch.setattr("reprdpo_kernels.sparse_product.TILE", 16)
        for name in ("CONFIG_FLOAT32", "CONFIG_UNALIGNED"):
            monkeypatch.setattr(f"reprdpo_kernels.sparse_product.{name}", Config(64, 128, 8, 3))


def rows_for(backend, rows):
    return rows // 5 if backend == "triton" else rows


def make(rows, width, vocabulary, sharpness, dtype=torch.float32):
    """Logits of standard deviation ``sharpness``; labels as such a model would draw them."""
    weight = torch.randn(vocabulary, width) / width**0.5
    hidden = sharpness * torch.randn(rows, width)
    labels = torch.multinomial((hidden @ weight.t()).softmax(1), 1)[:, 0]
    return hidden.to(dtype).requires_grad_(), weight.to(dtype), labels


def hidden_gradient(backend, hidden, weight, labels, upstream=None, **options):
    with use_backend(backend):
        logp = linear_logprob(hidden, weight, labels, **options)
        upstream = torch.ones_like(logp) if upstream is None else upstream
        return logp.detach(), torch.autograd.grad(logp, hidden, upstream)[0].double()


def assert_within_bound(backend, hidden, weight, labels, eps, **options):
    """Each row of the gradient within the bound, and the rounding of G and of the result, of the exact one."""
    upstream = torch.linspace(-2, 3, len(labels))
    logp, exact = hidden_gradient(backend, hidden, weight, labels, upstream, **options)
    sparse_logp, sparse = hidden_gradient(backend, hidden, weight, labels, upstream, gradient_mass_eps=eps, **options)
    assert torch.equal(sparse_logp, logp)
    scale = abs(options.get("logit_scale", 1.0)) / options.get("temperature", 1.0)
    longest = weight.double().norm(dim=1).max()
    per_mass = upstream.double().abs() * -torch.expm1(logp.double()) * scale * longest
    info = torch.finfo(hidden.dtype)
    rounding, subnormal = 4 * info.eps, info.smallest_normal * info.eps
    slack = rounding * (exact.norm(dim=1) + sparse.norm(dim=1) + eps * per_mass) + subnormal * hidden.shape[1] ** 0.5
    error = (sparse - exact).norm(dim=1)
    assert (error <= eps * per_mass + slack).all()
    return error, exact


def test_threshold_is_the_largest():
    residual = torch.tensor(
        [[1.0, -0.5, 0.25, 0.125, 0.125], [1.0, -0.25, -0.25, -0.25, -0.25], [1.0, -1.0, 0.0, 0.0, 0.0]]
    )
    assert mass_threshold(residual, 0.25).tolist() == [0.25, 0.25, 1.0]
    assert mass_threshold(residual, 0.2).tolist() == [0.125, 0.25, 1.0]  # ties stay together
    assert mass_threshold(residual, 0.6).tolist() == [0.5, 0.25, 1.0]
    assert mass_threshold(torch.tensor([[0.1, math.nan]]), 0.5).isinf().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sharpness", [0.5, 3.0, 6.0, 15.0])  # from flat to 0.3 nats
@pytest.mark.parametrize("eps", [2**-9, 0.1])
def test_bound(backend, dtype, sharpness, eps):
    sizes = (9, 48, 512) if backend == "triton" else (67, 96, 3000)
    hidden, weight, labels = make(*sizes, sharpness, dtype)
    error, exact = assert_within_bound(backend, hidden, weight, labels, eps)
    if sharpness >= 6 and eps == 0.1:
        assert error.median() > 1e-5 * exact.norm(dim=1).median()  # something was dropped


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bound_under_bias_scale_and_softcap(backend, dtype):
    hidden, weight, labels = make(rows_for(backend, 40), 64, 900, 6.0, dtype)
    bias = torch.randn(900).to(dtype)
    options = {"bias": bias, "logit_scale": 1.4, "softcap": 9.0, "temperature": 0.6}
    assert_within_bound(backend, hidden, weight, labels, 0.05, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bound_where_the_label_has_all_but_a_millionth(backend, dtype):
    hidden, weight, labels = make(24, 64, 2000, 6.0)
    hidden, weight = hidden.detach(), weight.detach()
    for _ in range(2000):  # hidden += k W[y], until the target has the mass wanted
        other = -torch.expm1((hidden @ weight.t()).double().log_softmax(1).gather(1, labels[:, None]))
        if other.max() < 1e-6:
            break
        hidden += torch.where(other > 1e-6, 0.5, 0.0) * weight[labels]
    assert other.max() < 1e-6
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype)
    _, exact = assert_within_bound(backend, hidden, weight, labels, 2**-9)
    assert (exact.norm(dim=1) > 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_bound_on_a_real_model_and_text(backend, real_dir):
    transformers = pytest.importorskip("transformers")
    folder = real_dir / "models" / "stories260K"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. " * 2
    with (real_dir / "pairs" / "hh_harmless.jsonl").open(encoding="utf-8") as lines:
        text += json.loads(next(lines))["chosen"][0:400]
    tokens = tokenizer(text, return_tensors="pt").input_ids[:, :256]
    with torch.no_grad():
        states = model.model(tokens).last_hidden_state[0, :-1]
    if backend == "triton":  # interpreted
        states, tokens = states[:12], tokens[:, :13]
    for eps in (2**-9, 2**-5):
        error, exact = assert_within_bound(
            backend, states.clone().requires_grad_(), model.lm_head.weight.detach(), tokens[0, 1:], eps
        )
        assert (error <= 2 * eps * exact.norm(dim=1).clamp(min=1e-3)).float().mean() > 0.9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tiny_eps_gives_the_exact_gradient(backend, dtype):
    hidden, weight, labels = make(rows_for(backend, 40), 64, 900, 6.0, dtype)
    _, exact = hidden_gradient(backend, hidden, weight, labels)
    _, sparse = hidden_gradient(backend, hidden, weight, labels, gradient_mass_eps=1e-7)
    orders = 2 if backend == "triton" else 1  # its sums are in another order than the exact product's
    assert (sparse - exact).norm() <= orders * 2 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.skipif(not native.loaded(), reason=native.status())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flat", [0, 5, 30, 40])
def test_flat_rows_are_multiplied_whole(dtype, flat):
    hidden, weight, labels = make(40, 64, 4000, 9.0, dtype)
    hidden = hidden.detach()
    hidden[:flat] /= 50
    hidden.requires_grad_()
    _, exact = hidden_gradient("native", hidden, weight, labels)
    _, sparse = hidden_gradient("native", hidden, weight, labels, gradient_mass_eps=0.3)
    # Other rows beside it, another order of its float32 sums; what is left out is a thousand times as much.
    rounding = (32 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps
    same = (sparse - exact).norm(dim=1) <= rounding * exact.norm(dim=1)
    assert same[:flat].all()
    assert not same[flat:].all() or flat == 40


@pytest.mark.parametrize("backend", BACKENDS[:2])  # Triton's rows share columns with those of their tile
def test_a_row_does_not_depend_on_the_tile_it_is_in(backend):
    hidden, weight, labels = make(150, 64, 3000, 6.0)
    _, whole = hidden_gradient(backend, hidden, weight, labels, gradient_mass_eps=0.01)
    _, tiled = hidden_gradient(backend, hidden, weight, labels, gradient_mass_eps=0.01, max_tile_bytes=10 * 3000 * 4)
    torch.testing.assert_close(tiled, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_numbers_run_to_run_and_the_bound_in_any_tile(backend):
    hidden, weight, labels = make(30, 16, 300, 6.0)
    again = [hidden_gradient(backend, hidden, weight, labels, gradient_mass_eps=0.01)[1] for _ in range(2)]
    assert torch.equal(again[0], again[1])
    assert_within_bound(backend, hidden, weight, labels, 0.01, max_tile_bytes=11 * 300 * 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_row_and_ignored_rows_get_nothing(backend):
    hidden, weight, labels = make(40, 64, 900, 6.0)
    hidden = hidden.detach()
    hidden[3, 1] = torch.nan
    hidden[7] = torch.inf
    labels[7], labels[9] = -100, 900
    _, grad = hidden_gradient(backend, hidden.requires_grad_(), weight, labels, gradient_mass_eps=0.01)
    bad = torch.zeros(40, dtype=torch.bool)
    bad[[3, 9]] = True
    assert torch.equal(grad.isnan().any(1), bad)
    assert (grad[7] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_row_and_a_vocabulary_of_one(backend):
    hidden, weight, labels = make(6, 4, 1, 1.0)
    _, grad = hidden_gradient(backend, hidden, weight, labels, gradient_mass_eps=0.01)
    assert (grad == 0).all()
    _, grad = hidden_gradient(backend, hidden, weight, torch.full((6,), -100), gradient_mass_eps=0.01)
    assert (grad == 0).all()


@pytest.mark.parametrize("backend", ["auto", BACKENDS[-1]])
def test_float32_weight_in_columns(backend):
    hidden, weight, labels = make(rows_for(backend, 40), 64, 900, 6.0)
    plain = "reference" if backend == "auto" else backend
    _, rows = hidden_gradient(plain, hidden, weight, labels, gradient_mass_eps=0.01)
    _, columns = hidden_gradient(backend, hidden, weight.t().contiguous().t(), labels, gradient_mass_eps=0.01)
    torch.testing.assert_close(columns, rows, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_preference_loss(backend, reduction):
    rows = rows_for(backend, 80) // 4 * 4
    hidden, weight, labels = make(rows, 64, 2000, 7.0)
    inputs = hidden.detach().view(4, -1, 64).requires_grad_(), weight, labels.view(4, -1)
    references = {"ref_chosen_logp": torch.tensor([-40.0, -3.0]), "ref_rejected_logp": torch.tensor([-30.0, -9.0])}

    def run(eps):
        with use_backend(backend):
            out = linear_preference_loss(
                *inputs, beta=0.1, reduction=reduction, return_stats=True, gradient_mass_eps=eps, **references
            )
            return out, torch.autograd.grad(out.loss.sum(), inputs[0])[0].view(rows, 64)

    (exact_out, exact), (out, sparse) = run(None), run(0.02)
    torch.testing.assert_close(out.loss, exact_out.loss, rtol=0, atol=0)
    slope = 0.1 / (2 if reduction == "mean" else 1)  # of a token's log-prob, at most
    bound = 0.02 * slope * weight.norm(dim=1).max()
    error = (sparse - exact).norm(dim=1)
    assert 0 < error.max() <= bound


def test_an_entropy_gradient_is_exact():
    hidden, weight, labels = make(20, 16, 300, 6.0)

    def gradient(eps):
        out = linear_logprob(hidden, weight, labels, return_entropy=True, gradient_mass_eps=eps)
        return torch.autograd.grad((out.logprob + out.entropy).sum(), hidden)[0]

    torch.testing.assert_close(gradient(0.5), gradient(None), rtol=1e-5, atol=1e-6)


def test_without_gradients_it_changes_nothing():
    hidden, weight, labels = make(20, 16, 300, 6.0)
    with torch.no_grad():  # a weight that would ask for a gradient does not, here
        logp = linear_logprob(hidden, weight.requires_grad_(), labels, gradient_mass_eps=0.1)
        assert torch.equal(logp, linear_logprob(hidden, weight, labels))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_compile(backend):
    hidden, weight, labels = make(9, 8, 200, 6.0)

    def step(hidden):
        return linear_logprob(hidden, weight, labels, gradient_mass_eps=0.05)

    with use_backend(backend):
        torch.library.opcheck(
            torch.ops.reprdpo.linear_logprob.default,
            (hidden, weight, None, labels, None, 1.0, None, 1.0, -100, False, False, None, True, False, False, 0.05),
        )
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        ours, plain = compiled(hidden), step(hidden)
        assert torch.equal(ours, plain)
        assert torch.equal(torch.autograd.grad(ours.sum(), hidden)[0], torch.autograd.grad(plain.sum(), hidden)[0])


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "must be a number or None, not str", {"gradient_mass_eps": "1e-3"}),
        (TypeError, "must be a number or None, not bool", {"gradient_mass_eps": True}),
        (ValueError, r"must be in \(0, 1\), or None", {"gradient_mass_eps": 0.0}),
        (ValueError, r"must be in \(0, 1\), or None", {"gradient_mass_eps": 1.0}),
        (ValueError, r"must be in \(0, 1\), or None", {"gradient_mass_eps": math.nan}),
        (ValueError, "bias requires one too: freeze it", {"bias": torch.zeros(300, requires_grad=True)}),
        (ValueError, "weight requires one too: freeze it", {"weight": torch.zeros(300, 16, requires_grad=True)}),
    ],
)
def test_refusals(error, message, change):
    hidden, weight, labels = make(20, 16, 300, 6.0)
    arguments = {"hidden": hidden, "weight": weight, "labels": labels, "gradient_mass_eps": 0.1, **change}
    with pytest.raises(error, match=message):
        linear_logprob(**arguments)
    packed = {"sequence_ids": torch.arange(20) // 10, "num_sequences": 2, "loss_type": "sft", "beta": 0.1}
    with pytest.raises(error, match=message):
        linear_preference_loss(**arguments, **packed)
