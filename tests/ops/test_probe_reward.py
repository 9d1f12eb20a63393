"""probe_reward, on every backend built here, against the oracle in float64 and its autograd."""

import itertools

import pytest
import torch
from safetensors.torch import load_file
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from reprdpo import ops
from reprdpo.ops import native, reference

GATES = ("softmax", "static", "vote")
BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(not native.loaded(), reason=f"native: {native.status()}")),
    pytest.param("triton", marks=pytest.mark.interpreter),
]
OP = torch.ops.reprdpo.probe_reward.default
NONE = (None, False, None, False)  # no confidence asked


@pytest.fixture(params=BACKENDS)
def backend(request):
    with ops.use_backend(request.param):
        yield request.param


def make_parameters(gate, L, D, dtype=torch.float32, requires_grad=False):
    """probe_weight, probe_bias, gate_weight, gate_bias with scores and logits of order one."""
    gate_weight = {"softmax": torch.randn(L, D) / max(D, 1) ** 0.5, "vote": torch.randn(L, L), "static": None}[gate]
    parameters = [torch.randn(L, D) / max(D, 1) ** 0.5, torch.randn(L), gate_weight, torch.randn(L)]
    return [None if p is None else p.to(dtype).requires_grad_(requires_grad) for p in parameters]


def make_hidden(L=3, B=4, T=5, D=6, dtype=torch.float32, requires_grad=False):
    return [torch.randn(B, T, D).to(dtype).requires_grad_(requires_grad) for _ in range(L)]


def forms(hidden, index):
    B, T, D = hidden[0].shape
    return {
        "list": (hidden, index),
        "packed": ([h.reshape(B * T, D) for h in hidden], index + T * torch.arange(B)),
        "stacked": (torch.stack(hidden), index),
        "pooled": (torch.stack([h[torch.arange(B), index] for h in hidden], dim=1), None),
        "every other feature": ([h.repeat_interleave(2, dim=-1)[..., ::2] for h in hidden], index),
        "transposed": ([h.transpose(0, 2).contiguous().transpose(0, 2) for h in hidden], index),
        "stacked, features first": (torch.stack(hidden).permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0), index),
    }


def double(values):
    return [None if x is None else x.double() for x in values]


def oracle(hidden, index, parameters, gate):
    """The oracle in float64 on the same inputs."""
    pooled = reference.pool_last_token(double(hidden), index)
    return reference.probe_reward(pooled, *double(parameters), gate)


def eager(hidden, index, parameters, gate):
    """As one would write it, in the dtype the op computes in."""
    pooled = torch.stack([h[torch.arange(len(index)), index] for h in hidden], dim=1).float()
    return reference.probe_reward(pooled, *parameters, gate)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    # One of each; not multiples of a vector; more rows than a block; real depth and width; 80 layers.
    ("L", "B", "T", "D"),
    [(1, 1, 1, 1), (3, 4, 5, 7), (5, 9, 2, 77), (32, 8, 3, 4096), (80, 3, 2, 300)],
)
def test_error_is_no_worse_than_twice_eager(backend, gate, dtype, L, B, T, D):
    hidden, index, parameters = make_hidden(L, B, T, D, dtype), torch.randint(T, (B,)), make_parameters(gate, L, D)
    got = ops.probe_reward(hidden, index, *parameters, gate=gate)
    for result, plain, exact in zip(
        got, eager(hidden, index, parameters, gate), oracle(hidden, index, parameters, gate), strict=True
    ):
        assert result.dtype == torch.float32
        allowed = 2 * (plain - exact).abs().max() + 4 * torch.finfo(torch.float32).eps * exact.abs().max()
        assert (result - exact).abs().max() <= allowed


@pytest.mark.parametrize("form", forms(make_hidden(), torch.zeros(4, dtype=torch.int64)))
@pytest.mark.parametrize("gate", GATES)
def test_every_form_is_the_same_reward(backend, gate, form):
    hidden, index = make_hidden(dtype=torch.bfloat16), torch.tensor([4, 0, 2, 1])
    parameters = make_parameters(gate, 3, 6)
    states, at = forms(hidden, index)[form]
    got = ops.probe_reward(states, at, *parameters, gate=gate)
    for result, exact in zip(got, oracle(hidden, index, parameters, gate), strict=True):
        torch.testing.assert_close(result.double(), exact, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("form", ["list", "packed", "stacked", "pooled"])
def test_gradcheck(gate, form):
    states, index = forms(make_hidden(L=3, B=3, T=3, D=4, dtype=torch.float64), torch.tensor([2, 0, 1]))[form]
    tensors = [states] if isinstance(states, torch.Tensor) else list(states)
    parameters = [p for p in make_parameters(gate, 3, 4, torch.float64) if p is not None]

    def reward(*inputs):
        given = inputs[0] if isinstance(states, torch.Tensor) else inputs[: len(tensors)]
        probe, bias, *gate_weight, gate_bias = inputs[len(tensors) :]
        return tuple(ops.probe_reward(given, index, probe, bias, *(gate_weight or [None]), gate_bias, gate=gate))

    inputs = [x.detach().requires_grad_() for x in (*tensors, *parameters)]
    assert torch.autograd.gradcheck(reward, inputs)


@pytest.mark.parametrize("gate", GATES)
def test_gradients_are_those_of_the_oracle_for_whatever_asks(backend, gate):
    hidden, index = make_hidden(), torch.tensor([4, 0, 2, 1])
    parameters = make_parameters(gate, 3, 6)
    upstream = (torch.randn(4), torch.randn(4, 3), torch.randn(4, 3))
    # Each of: hidden states, probe_weight, probe_bias, gate_weight, gate_bias.
    for asks in itertools.product([False, True], repeat=5):
        if not any(asks) or (asks[3] and gate == "static"):
            continue
        layers = [h.clone().requires_grad_(asks[0]) for h in hidden]
        given = [None if p is None else p.clone().requires_grad_(a) for p, a in zip(parameters, asks[1:], strict=True)]
        leaves = [x for x in (*layers, *given) if x is not None and x.requires_grad]
        got, wanted = ops.probe_reward(layers, index, *given, gate=gate), oracle(layers, index, given, gate)
        chosen = [i for i, result in enumerate(wanted) if result.requires_grad]
        assert [result.requires_grad for result in got] == [True] * 3
        grads = torch.autograd.grad([got[i] for i in chosen], leaves, [upstream[i] for i in chosen])
        exact = torch.autograd.grad([wanted[i] for i in chosen], leaves, [upstream[i].double() for i in chosen])
        for grad, right in zip(grads, exact, strict=True):
            assert grad.dtype == torch.float32
            torch.testing.assert_close(grad, right, rtol=1e-5, atol=1e-5)


def test_gradients_of_low_precision_states_come_in_their_dtype(backend):
    hidden, index = make_hidden(dtype=torch.bfloat16, requires_grad=True), torch.tensor([4, 0, 2, 1])
    parameters = make_parameters("softmax", 3, 6, torch.bfloat16, requires_grad=True)
    ops.probe_reward(hidden, index, *parameters).reward.sum().backward()
    oracle_leaves = [x.detach().double().requires_grad_() for x in (*hidden, *parameters)]
    oracle(oracle_leaves[:3], index, oracle_leaves[3:], "softmax")[0].sum().backward()
    for leaf, right in zip((*hidden, *parameters), oracle_leaves, strict=True):
        assert leaf.grad.dtype == torch.bfloat16
        rtol = 2**-7 if backend == "triton" else 2**-8  # Triton's interpreter cuts where a GPU rounds
        torch.testing.assert_close(leaf.grad.double(), right.grad, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("gate", GATES)
def test_no_work_for_an_input_that_asks_no_gradient(backend, gate):
    hidden, index = make_hidden(), torch.tensor([4, 0, 2, 1])
    parameters = make_parameters(gate, 3, 6)
    assert OP(hidden, index, *parameters, gate, False, *NONE)[3].numel() == 0
    assert OP(hidden, index, *parameters, gate, True, *NONE)[3].shape == (4, 3, 6)
    scores, layer_gate = torch.randn(4, 3), torch.rand(4, 3)
    for asks in itertools.product([False, True], repeat=5):
        pooled = torch.randn(4, 3, 6)
        if asks[3] and gate == "static":
            continue
        grads = torch.ops.reprdpo.probe_reward_backward(
            torch.randn(4), None, None, pooled, index, parameters[0], parameters[2], scores, layer_gate, gate,
            hidden[0].shape, 3, torch.float32, asks,
        )  # fmt: skip
        assert [len(grads[0]), *(grad.numel() > 0 for grad in grads[1:])] == [3 * asks[0], *asks[1:]]


@pytest.mark.parametrize(
    ("gate", "form"),
    [("softmax", "list"), ("softmax", "packed"), ("softmax", "stacked"), ("static", "pooled"), ("vote", "list")],
)
def test_opcheck(backend, gate, form):
    states, index = forms(make_hidden(L=2), torch.tensor([4, 0, 2, 1]))[form]
    layers = [states] if isinstance(states, torch.Tensor) else states
    layers = [h.detach().requires_grad_() for h in layers]
    parameters = make_parameters(gate, 2, 6, requires_grad=True)
    opcheck(OP, (layers, index, *parameters, gate, index is not None, *NONE))


@pytest.mark.parametrize("gate", GATES)
def test_opcheck_backward(gate):
    probe, _, gate_weight, _ = make_parameters(gate, 3, 6)
    pooled, scores, layer_gate = torch.randn(4, 3, 6), torch.randn(4, 3), torch.rand(4, 3)
    for needs in ([True] * 3 + [gate != "static", True], [False, True, False, False, True]):
        opcheck(
            torch.ops.reprdpo.probe_reward_backward.default,
            (
                torch.randn(4), None, torch.randn(4, 3), pooled, torch.tensor([4, 0, 2, 1]), probe, gate_weight,
                scores, layer_gate, gate, [4, 5, 6], 3, torch.bfloat16, needs,
            ),
        )  # fmt: skip


@pytest.mark.parametrize("gate", GATES)
def test_compile_in_one_graph(backend, gate):
    hidden, mask = make_hidden(requires_grad=True), torch.tensor([[1] * 5, [1, 0, 0, 0, 0]] * 2)
    parameters = make_parameters(gate, 3, 6, requires_grad=True)
    leaves = [x for x in (*hidden, *parameters) if x is not None]

    def loss(hidden, mask, *parameters):
        result = ops.probe_reward(hidden, ops.last_token_index(mask), *parameters, gate=gate)
        return result.reward.square().sum() + result.layer_scores.sum()

    plain = torch.autograd.grad(loss(hidden, mask, *parameters), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for grad, wanted in zip(torch.autograd.grad(compiled(hidden, mask, *parameters), leaves), plain, strict=True):
        torch.testing.assert_close(grad, wanted)


def test_autocast_changes_nothing(backend):
    hidden, index = make_hidden(), torch.tensor([4, 0, 2, 1])
    parameters = make_parameters("vote", 3, 6, requires_grad=True)
    plain = ops.probe_reward(hidden, index, *parameters, gate="vote")
    with torch.autocast("cpu", torch.bfloat16):
        cast = ops.probe_reward(hidden, index, *parameters, gate="vote")
    for result, wanted in zip(cast, plain, strict=True):
        assert result.dtype == torch.float32
        assert torch.equal(result, wanted)


def test_no_grad_and_checkpointing(backend):
    hidden, index = make_hidden(requires_grad=True), torch.tensor([4, 0, 2, 1])
    parameters = make_parameters("softmax", 3, 6, requires_grad=True)
    with torch.no_grad():
        assert not ops.probe_reward(hidden, index, *parameters).reward.requires_grad

    def reward(*inputs):
        return ops.probe_reward(inputs[:3], index, *inputs[3:]).reward.sum()

    leaves = [*hidden, *parameters]
    again = torch.autograd.grad(checkpoint(reward, *leaves, use_reentrant=False), leaves)
    for grad, wanted in zip(again, torch.autograd.grad(reward(*leaves), leaves), strict=True):
        assert torch.equal(grad, wanted)


@pytest.mark.parametrize("gate", GATES)
def test_nan_beside_the_pooled_position_never_leaks(backend, gate):
    index = torch.tensor([4, 0, 2, 1])
    parameters = make_parameters(gate, 3, 6, requires_grad=True)
    clean = make_hidden()
    rows = [h[torch.arange(4), index] for h in clean]
    hidden = [torch.full_like(h, float("nan")) for h in clean]
    for layer, row in zip(hidden, rows, strict=True):
        layer[torch.arange(4), index] = row
        layer.requires_grad_()
    got = ops.probe_reward(hidden, index, *parameters, gate=gate)
    for result, wanted in zip(got, oracle(clean, index, parameters, gate), strict=True):
        torch.testing.assert_close(result.double(), wanted, rtol=2e-6, atol=2e-6)
    got.reward.sum().backward()
    assert all(x.grad.isfinite().all() for x in (*hidden, *parameters) if x is not None)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("form", ["list", "packed", "stacked"])
def test_row_without_a_token_is_nan_and_gives_no_gradient(backend, gate, form):
    parameters = make_parameters(gate, 3, 6, requires_grad=True)
    hidden = make_hidden()
    good, bad = torch.tensor([4, 0, 2, 1]), torch.tensor([0, 2])
    states, index = forms(hidden, good)[form]
    index[bad] = torch.tensor([-1, 10**9])
    tensors = [states.requires_grad_()] if isinstance(states, torch.Tensor) else [h.requires_grad_() for h in states]
    result = ops.probe_reward(states, index, *parameters, gate=gate)
    assert result.reward.isnan().tolist() == [True, False, True, False]
    assert result.layer_scores[bad].isnan().all()
    exact = oracle(hidden, good, parameters, gate)[0]
    torch.testing.assert_close(result.reward[[1, 3]].double(), exact[[1, 3]], rtol=2e-6, atol=2e-6)
    leaves = [x for x in (*tensors, *parameters) if x is not None]
    whole = torch.autograd.grad(result.reward, leaves, torch.full((4,), 2.0))
    kept = ops.probe_reward([h[[1, 3]] for h in hidden], good[[1, 3]], *parameters, gate=gate).reward
    wanted = torch.autograd.grad(kept, leaves[len(tensors) :], torch.full((2,), 2.0))
    for grad, right in zip(whole[len(tensors) :], wanted, strict=True):
        torch.testing.assert_close(grad, right)
    assert all(grad.isfinite().all() for grad in whole)


@pytest.mark.parametrize(("B", "T", "D"), [(0, 3, 4), (2, 0, 4), (0, 0, 4), (2, 3, 0)])
@pytest.mark.parametrize("gate", GATES)
def test_nothing_to_read(backend, gate, B, T, D):
    hidden = make_hidden(2, B, T, D, requires_grad=True)
    parameters = make_parameters(gate, 2, D, requires_grad=True)
    result = ops.probe_reward(hidden, torch.full((B,), T - 1), *parameters, gate=gate)
    assert (result.reward.shape, result.layer_scores.shape, result.layer_gate.shape) == ((B,), (B, 2), (B, 2))
    assert result.reward.isnan().all() == (B == 0 or T == 0)
    result.reward.nansum().backward()
    assert all(x.grad.isfinite().all() for x in (*hidden, *parameters) if x is not None)


def test_one_layer_is_its_probe(backend):
    hidden, index = make_hidden(L=1), torch.tensor([4, 0, 2, 1])
    for gate in ("softmax", "static"):
        parameters = make_parameters(gate, 1, 6, requires_grad=True)
        result = ops.probe_reward(hidden, index, *parameters, gate=gate)
        assert torch.equal(result.reward, result.layer_scores[:, 0])
        assert torch.equal(result.layer_gate, torch.ones(4, 1))
        (gate_grad,) = torch.autograd.grad(result.reward.sum(), parameters[3])
        assert gate_grad.eq(0).all()


def test_huge_logits_choose_one_layer(backend):
    hidden, index = make_hidden(), torch.tensor([4, 0, 2, 1])
    probe, bias, gate_weight, gate_bias = make_parameters("softmax", 3, 6)
    gate_bias = torch.tensor([-3e38, 3e38, 0.0])
    result = ops.probe_reward(hidden, index, probe, bias, gate_weight, gate_bias)
    assert torch.equal(result.layer_gate, torch.tensor([0.0, 1.0, 0.0]).expand(4, 3))
    assert torch.equal(result.reward, result.layer_scores[:, 1])
    votes = ops.probe_reward(hidden, index, probe, bias, torch.zeros(3, 3), gate_bias, gate="vote")
    assert torch.equal(votes.layer_gate, torch.tensor([0.0, 1.0, 0.5]).expand(4, 3))


def test_nan_state_stays_in_its_sequence(backend):
    hidden, index = make_hidden(), torch.tensor([4, 0, 2, 1])
    hidden[1][2, 2, 3] = float("nan")
    result = ops.probe_reward(hidden, index, *make_parameters("softmax", 3, 6))
    assert result.reward.isnan().tolist() == [False, False, True, False]
    assert result.layer_gate.isnan().any(1).tolist() == [False, False, True, False]


def test_same_bits_every_run(backend):
    hidden, index = make_hidden(32, 8, 3, 1024, requires_grad=True), torch.randint(3, (8,))
    parameters = make_parameters("softmax", 32, 1024, requires_grad=True)

    def run():
        reward = ops.probe_reward(hidden, index, *parameters).reward
        return reward, *torch.autograd.grad(reward.square().sum(), [*hidden, *parameters])

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_float64_throughout():
    hidden, index = make_hidden(dtype=torch.float64), torch.tensor([4, 0, 2, 1])
    for dtype in (torch.float32, torch.float64):
        parameters = make_parameters("softmax", 3, 6, dtype)
        got = ops.probe_reward(hidden, index, *parameters)
        for result, wanted in zip(got, oracle(hidden, index, parameters, "softmax"), strict=True):
            assert result.dtype == torch.float64
            assert torch.equal(result, wanted)


def test_real_states_score_as_the_oracle_says(backend, real_dir):
    states = load_file(real_dir / "states" / "llama2_7b_last_token.safetensors")["chosen"][:, 1:]
    states = states[:8] if backend == "triton" else states  # a program a row and layer takes the interpreter long
    probe, bias, gate_weight, gate_bias = make_parameters("softmax", 32, 4096)
    scale = states.float().std((0, 2))[:, None]
    parameters = (probe / scale, bias, gate_weight / scale, gate_bias)
    got = ops.probe_reward(states, None, *parameters)
    exact = reference.probe_reward(states.double(), *double(parameters), "softmax")
    plain = reference.probe_reward(states.float(), *parameters, "softmax")
    for result, eager_result, right in zip(got, plain, exact, strict=True):
        allowed = 2 * (eager_result - right).abs().max() + 4 * torch.finfo(torch.float32).eps * right.abs().max()
        assert (result - right).abs().max() <= allowed


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("form", ["list", "packed", "stacked", "pooled"])
@pytest.mark.parametrize(
    "options", [{}, {"alpha": 2, "squash": True}, {"floor": 0.4}, {"alpha": 1.0, "floor": 0.3, "reduce": "batch"}]
)
def test_confidence_is_that_of_the_rewards(backend, gate, form, options):
    hidden, index = make_hidden(B=6, dtype=torch.bfloat16), torch.tensor([4, 0, 2, 1, 3, 3])
    states, at = {
        "list": (hidden, index),
        "packed": ([h.reshape(30, 6) for h in hidden], index + 5 * torch.arange(6)),
        "stacked": (torch.stack(hidden), index),
        "pooled": (torch.stack([h[torch.arange(6), index] for h in hidden], dim=1), None),
    }[form]
    parameters = make_parameters(gate, 3, 6, requires_grad=True)
    got = ops.probe_confidence(states, at, *parameters, gate=gate, **options)
    exact = oracle(hidden, index, parameters, gate)
    for result, right in zip(got[1:], exact, strict=True):
        torch.testing.assert_close(result.double(), right, rtol=2e-6, atol=2e-6)
    given = {"alpha": 7.5, "squash": False, "floor": None, "reduce": None} | options
    wanted = reference.preference_confidence(*exact[0].detach().chunk(2), *given.values())
    assert (got.confidence.dtype, got.confidence.requires_grad) == (torch.float32, False)
    torch.testing.assert_close(got.confidence.double(), wanted, rtol=1e-5, atol=1e-6)
    leaves = [p for p in parameters if p is not None]
    plain = ops.probe_reward(states, at, *parameters, gate=gate).reward
    for grad, right in zip(
        torch.autograd.grad(got.reward.square().sum(), leaves),
        torch.autograd.grad(plain.square().sum(), leaves),
        strict=True,
    ):
        assert torch.equal(grad, right)


def test_confidence_of_a_sequence_without_a_token_is_nan_in_its_pair_alone(backend):
    parameters = make_parameters("softmax", 3, 6)
    got = ops.probe_confidence(make_hidden(), torch.tensor([4, -1, 2, 1]), *parameters, floor=0.2)
    assert got.confidence.isnan().tolist() == [False, True]
    batch = ops.probe_confidence(make_hidden(), torch.tensor([4, -1, 2, 1]), *parameters, reduce="batch")
    assert batch.confidence.isnan().all()


def test_confidence_of_no_pairs(backend):
    for reduce in (None, "batch"):
        got = ops.probe_confidence(
            make_hidden(B=0), torch.zeros(0).long(), *make_parameters("softmax", 3, 6), reduce=reduce
        )
        assert [x.shape for x in got] == [(0,), (0,), (0, 3), (0, 3)]


def test_confidence_refuses():
    hidden, index, parameters = make_hidden(), torch.tensor([4, 0, 2, 1]), make_parameters("softmax", 3, 6)
    with pytest.raises(ValueError, match="all chosen, then as many rejected sequences, not 3 of them"):
        ops.probe_confidence([h[:3] for h in hidden], index[:3], *parameters)
    for changes, error, words in (
        ({"alpha": -1.0}, ValueError, "alpha must be in"),
        ({"alpha": True}, TypeError, "alpha must be a number"),
        ({"floor": 1.5}, ValueError, "floor must be in"),
        ({"reduce": "mean"}, ValueError, "reduce must be one of"),
    ):
        with pytest.raises(error, match=words):
            ops.probe_confidence(hidden, index, *parameters, **changes)


def test_confidence_compiles_in_one_graph(backend):
    hidden, index = make_hidden(), torch.tensor([4, 0, 2, 1])
    parameters = make_parameters("softmax", 3, 6, requires_grad=True)

    def loss(hidden, index, *parameters):
        result = ops.probe_confidence(hidden, index, *parameters, floor=0.1)
        return (result.confidence * result.reward.chunk(2)[0]).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    plain = torch.autograd.grad(loss(hidden, index, *parameters), parameters)
    for grad, wanted in zip(torch.autograd.grad(compiled(hidden, index, *parameters), parameters), plain, strict=True):
        torch.testing.assert_close(grad, wanted)


class Watch(TorchDispatchMode):
    """Sees every op; while it does, the public function goes through the registered one."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("form", ["list", "packed", "stacked", "pooled"])
def test_registered_op_and_the_way_around_it_agree_to_the_bit(backend, gate, form):
    states, index = forms(make_hidden(dtype=torch.bfloat16), torch.tensor([4, 0, 2, 1]))[form]
    upstream = torch.randn(4)
    for hidden_asks, parameters_ask in ((False, True), (True, False), (True, True)):
        layers = [states] if isinstance(states, torch.Tensor) else states
        layers = [h.detach().requires_grad_(hidden_asks) for h in layers]
        given = layers[0] if isinstance(states, torch.Tensor) else layers
        parameters = make_parameters(gate, 3, 6, requires_grad=parameters_ask)
        leaves = [x for x in (*layers, *parameters) if x is not None and x.requires_grad]

        def run(given=given, parameters=parameters, leaves=leaves):
            result = ops.probe_confidence(given, index, *parameters, gate=gate)
            return *result, *torch.autograd.grad(result.reward, leaves, upstream)

        around = run()
        with Watch() as watch:
            through = run()
        assert OP in watch.seen
        for one, other in zip(around, through, strict=True):
            assert torch.equal(one, other)


def test_second_derivative_is_refused(backend):
    parameters = make_parameters("softmax", 3, 6, requires_grad=True)
    reward = ops.probe_reward(make_hidden(), torch.tensor([4, 0, 2, 1]), *parameters).reward
    (grad,) = torch.autograd.grad(reward.square().sum(), parameters[:1], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), parameters[:1])


class Sharded(torch.Tensor):
    """Has what tells a DTensor apart."""

    def full_tensor(self):
        return self


def changed(**changes):
    hidden, index = make_hidden(), torch.tensor([4, 0, 2, 1])
    names = ("probe_weight", "probe_bias", "gate_weight", "gate_bias")
    arguments = dict(
        hidden_states=hidden, index=index, **dict(zip(names, make_parameters("softmax", 3, 6), strict=True))
    )
    return arguments | changes


UNLIKE = [torch.zeros(4, 5, 6), torch.zeros(4, 5, 6), torch.zeros(4, 4, 6)]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"gate": "mean"}, ValueError, "gate must be one of 'softmax', 'static', 'vote', not 'mean'"),
        ({"gate": "static"}, ValueError, 'gate_weight must be None for gate="static"'),
        ({"gate_weight": None}, ValueError, "gate_weight must be None for .* and only for it, not None"),
        ({"gate": "vote"}, ValueError, r"gate_weight must be of shape \[L, L\] = \[3, 3\], not \[3, 6\]"),
        ({"probe_weight": torch.zeros(3, 7)}, ValueError, r"probe_weight must be of shape \[L, D\] = \[3, 6\]"),
        ({"probe_weight": torch.zeros(2, 6)}, ValueError, r"leave the embedding output out .*hidden_states\[1:\]"),
        ({"probe_bias": torch.zeros(1)}, ValueError, r"probe_bias must be of shape \[L\] = \[3\], not \[1\]"),
        ({"gate_bias": torch.zeros(3).half()}, TypeError, "gate_bias must have the dtype of probe_weight, float32"),
        ({"gate_bias": torch.zeros(3, device="meta")}, ValueError, "gate_bias must have the device of hidden_states"),
        ({"gate_bias": None}, TypeError, "gate_bias must be a tensor, not NoneType"),
        ({"probe_weight": None}, TypeError, "probe_weight must be a tensor, not NoneType"),
        ({"probe_weight": torch.zeros(3, 6).as_subclass(Sharded)}, TypeError, "probe_weight is a DTensor; gather it"),
        ({"index": None}, ValueError, "index may be None only where hidden_states is one pooled tensor"),
        ({"index": None, "hidden_states": torch.zeros(3, 4, 5, 6)}, ValueError, r"pooled \[B, L, D\]"),
        ({"index": torch.zeros(3, dtype=torch.int64)}, ValueError, r"index must be of shape \[B\] = \[4\]"),
        ({"hidden_states": []}, ValueError, "hidden_states must hold at least one layer"),
        ({"hidden_states": UNLIKE}, ValueError, r"hidden_states\[2\] must be of shape \[4, 5, 6\]"),
        (
            {"hidden_states": [*make_hidden(2), make_hidden(1)[0].half()]},
            TypeError,
            r"hidden_states\[2\] must have the dt",
        ),
        ({"hidden_states": [*make_hidden(2), torch.zeros(4, 5, 6, device="meta")]}, ValueError, "must have the device"),
        ({"hidden_states": [*make_hidden(2), None]}, TypeError, r"hidden_states\[2\] must be a tensor"),
        ({"hidden_states": [torch.zeros(3, 4, 5, 6)]}, ValueError, r"must be \[B, T, D\] or packed"),
        ({"index": torch.zeros(4)}, TypeError, "index must be an integer tensor"),
        ({"hidden_states": [h.long() for h in make_hidden()]}, TypeError, r"hidden_states\[0\] must be float32"),
    ],
)
def test_refuses(backend, changes, error, words):
    # The second time some of it looks like arguments that were accepted.
    for _ in range(2):
        with pytest.raises(error, match=words):
            ops.probe_reward(**changed(**changes))
        ops.probe_reward(**changed())
