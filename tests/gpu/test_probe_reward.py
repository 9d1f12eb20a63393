"""probe_reward on CUDA, through Triton and native: the oracle's values, graphs, streams, compilation, one launch."""

import pytest
import torch

from benchmarks.device import device_events
from reprdpo import ops
from reprdpo.ops import native, reference

DEVICE = torch.device("cuda")
GATES = ("softmax", "static", "vote")
BACKENDS = [
    "triton",
    pytest.param("native", marks=pytest.mark.skipif(not native.loaded("cuda"), reason="the CUDA library is not there")),
]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with ops.use_backend(request.param):
        yield request.param


def make_parameters(gate, L, D, dtype=torch.float32, requires_grad=False, device=None):
    gate_weight = {"softmax": torch.randn(L, D) / D**0.5, "vote": torch.randn(L, L), "static": None}[gate]
    parameters = [torch.randn(L, D) / D**0.5, torch.randn(L), gate_weight, torch.randn(L)]
    return [None if p is None else p.to(device or DEVICE, dtype).requires_grad_(requires_grad) for p in parameters]


def make_hidden(L=32, B=8, T=16, D=4096, dtype=torch.bfloat16, requires_grad=False, device=None):
    """Layers whose tokens beside the index's are NaN, and the index."""
    device = device or DEVICE
    index = torch.randint(T, (B,))
    hidden = torch.full((L, B, T, D), float("nan")).to(dtype)
    hidden[:, torch.arange(B), index] = torch.randn(L, B, D).to(dtype)
    return [h.to(device).requires_grad_(requires_grad) for h in hidden], index.to(device)


def forms(hidden, index):
    B, T, D = hidden[0].shape
    rows = torch.arange(B, device=index.device)
    return {
        "list": (hidden, index),
        "packed": ([h.reshape(B * T, D) for h in hidden], index + T * rows),
        "stacked": (torch.stack(hidden), index),
        "pooled": (torch.stack([h[rows, index] for h in hidden], dim=1), None),
        "every other feature": ([h.repeat_interleave(2, dim=-1)[..., ::2] for h in hidden], index),
        "rows off 16 bytes": ([torch.cat([h[..., :1], h], dim=-1)[..., 1:] for h in hidden], index),
    }


def double(values):
    return [None if x is None else x.detach().double() for x in values]


def oracle(hidden, index, parameters, gate):
    return reference.probe_reward(reference.pool_last_token(double(hidden), index), *double(parameters), gate)


def assert_right(got, hidden, index, parameters, gate):
    exact = oracle(hidden, index, parameters, gate)
    plain = reference.probe_reward(
        reference.pool_last_token(hidden, index).float(), *[p if p is None else p.float() for p in parameters], gate
    )
    for result, eager, right in zip(got, plain, exact, strict=True):
        assert torch.equal(result.isnan(), right.isnan())
        allowed = 2 * (eager - right).abs().nan_to_num().max() + 4 * 2**-23 * right.abs().nan_to_num().max()
        assert (result - right).abs().nan_to_num().max() <= allowed


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    # One of each; odd; the real size; 80 layers; features beyond a block; programs of several sequences.
    ("L", "B", "T", "D"),
    [(1, 1, 1, 1), (3, 5, 5, 77), (32, 8, 16, 4096), (80, 3, 2, 301), (2, 4, 2, 8191), (80, 64, 2, 64)],
)
def test_forward_is_the_oracle(backend, gate, dtype, L, B, T, D):
    hidden, index = make_hidden(L, B, T, D, dtype)
    index[1:2] = -1
    parameters = make_parameters(gate, L, D)
    assert_right(ops.probe_reward(hidden, index, *parameters, gate=gate), hidden, index, parameters, gate)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("form", forms(*make_hidden(2, 2, 2, 2, device="cpu")))
def test_every_form_forward_and_backward(backend, gate, form):
    plain, index = make_hidden(3, 4, 5, 40)
    states, at = forms([h.nan_to_num() for h in plain], index)[form]
    single = isinstance(states, torch.Tensor)
    layers = [h.detach().requires_grad_() for h in ([states] if single else states)]
    parameters = make_parameters(gate, 3, 40, requires_grad=True)
    leaves = [*layers, *(p for p in parameters if p is not None)]
    got = ops.probe_reward(layers[0] if single else layers, at, *parameters, gate=gate)
    upstream = [torch.randn_like(result) for result in got]
    grads = torch.autograd.grad(got, leaves, upstream)
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    with ops.use_backend("reference"):
        count = len(layers)
        given = iter(exact_leaves[count:])
        exact_parameters = [None if p is None else next(given) for p in parameters]
        states = exact_leaves[0] if single else exact_leaves[:count]
        wanted = ops.probe_reward(states, at, *exact_parameters, gate=gate)
        exact = torch.autograd.grad(wanted, exact_leaves, [x.double() for x in upstream])
    for result, right in zip(got, wanted, strict=True):
        torch.testing.assert_close(result.double(), right, rtol=2e-6, atol=2e-6)
    for grad, right in zip(grads, exact, strict=True):
        tolerance = 2**-8 if grad.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(grad.double(), right, rtol=tolerance, atol=1e-5)


def test_same_bits_every_run_and_registered_or_not(backend):
    hidden, index = make_hidden(requires_grad=True)
    parameters = make_parameters("softmax", 32, 4096, requires_grad=True)

    def run():
        result = ops.probe_confidence(hidden, index, *parameters, reduce="batch")
        return *result, *torch.autograd.grad(result.reward.square().sum(), [*hidden, *parameters])

    first = run()
    for _ in range(20):
        assert all(map(torch.equal, first, run()))
    options = (7.5, False, None, True)
    registered = torch.ops.reprdpo.probe_reward(hidden, index, *parameters, "softmax", True, *options)
    assert torch.equal(registered[0], first[1])
    assert torch.equal(registered[4], first[0])


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("reduce", [None, "batch"])
def test_confidence(backend, gate, reduce):
    hidden, index = make_hidden()
    parameters = make_parameters(gate, 32, 4096)
    got = ops.probe_confidence(hidden, index, *parameters, gate=gate, alpha=2.0, floor=0.3, reduce=reduce)
    assert_right(got[1:], hidden, index, parameters, gate)
    wanted = reference.preference_confidence(*got.reward.double().chunk(2), 2.0, False, 0.3, reduce)
    torch.testing.assert_close(got.confidence.double(), wanted, rtol=1e-5, atol=1e-6)


def launches(run):
    """Names of the kernels, copies and fills that ``run`` put on the device."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    return [name for name, _ in device_events(run, "cuda")]


def test_one_launch_forward_and_one_backward(backend):
    hidden, index = make_hidden()
    parameters = make_parameters("softmax", 32, 4096, requires_grad=True)
    upstream = torch.randn(8, device=DEVICE)
    with torch.no_grad():
        assert len(launches(lambda: ops.probe_reward(hidden, index, *parameters))) == 1
        assert len(launches(lambda: ops.probe_confidence(hidden, index, *parameters, reduce="batch"))) == 1
    both = launches(
        lambda: torch.autograd.grad(ops.probe_reward(hidden, index, *parameters).reward, parameters, upstream)
    )
    assert len(both) == 2, both


@pytest.mark.parametrize("gate", GATES)
def test_graph_replay_follows_its_inputs(backend, gate):
    hidden, index = make_hidden()
    parameters = make_parameters(gate, 32, 4096, requires_grad=True)
    leaves = [p for p in parameters if p is not None]

    def run():
        result = ops.probe_confidence(hidden, index, *parameters, gate=gate)
        return *result, *torch.autograd.grad(result.reward.sum(), leaves)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        fresh, where = make_hidden()
        index.copy_(where)
        for layer, states in zip(hidden, fresh, strict=True):
            layer.copy_(states)
        graph.replay()
        for result, wanted in zip(captured, run(), strict=True):
            assert torch.equal(result, wanted)


def test_two_graphs_and_eager_calls_overlap_on_streams_of_their_own(backend):
    hidden, index = make_hidden()
    parameters = make_parameters("softmax", 32, 4096)
    wanted = ops.probe_reward(hidden, index, *parameters).reward
    torch.cuda.synchronize()
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    captured = []
    for graph in graphs:
        with torch.cuda.graph(graph):
            captured.append(ops.probe_reward(hidden, index, *parameters).reward)
    streams = [torch.cuda.Stream() for _ in range(4)]
    eager = []
    for _ in range(50):
        for number, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                if number < 2:
                    graphs[number].replay()
                else:
                    eager.append(ops.probe_reward(hidden, index, *parameters).reward)
    torch.cuda.synchronize()
    assert all(torch.equal(reward, wanted) for reward in (*captured, *eager))


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_counters_first_taken_inside_a_capture(backend):
    from reprdpo_kernels import probe_reward as kernels

    hidden, index = make_hidden(3, 4, 5, 40)
    parameters = make_parameters("softmax", 3, 40)
    wanted = ops.probe_reward(hidden, index, *parameters).reward  # compiles
    torch.cuda.synchronize()
    kernels._slabs.clear()
    kernels._by_stream.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        reward = ops.probe_reward(hidden, index, *parameters).reward
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(reward, wanted)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile(backend, mode):
    hidden, index = make_hidden(3, 4, 5, 64)
    parameters = make_parameters("softmax", 3, 64, requires_grad=True)

    def loss(hidden, index, *parameters):
        result = ops.probe_confidence(hidden, index, *parameters)
        return (result.confidence * result.reward.chunk(2)[0]).sum() + result.layer_scores.square().sum()

    plain = torch.autograd.grad(loss(hidden, index, *parameters), parameters)
    compiled = torch.compile(loss, fullgraph=True, mode=mode)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        grads = torch.autograd.grad(compiled(hidden, index, *parameters), parameters)
        for grad, wanted in zip(grads, plain, strict=True):
            torch.testing.assert_close(grad, wanted)


def test_out_of_memory_leaves_the_op_usable(backend):
    hidden, index = make_hidden(2, 4, 2, 16)
    parameters = make_parameters("softmax", 2, 16)
    wanted = ops.probe_reward(hidden, index, *parameters).reward
    layers = [torch.zeros(1, 1, 1, device=DEVICE, requires_grad=True).expand(2**20, 2**12, 16) for _ in range(64)]
    many = make_parameters("static", 64, 16)
    reward = ops.probe_reward(layers, torch.zeros(2**20, dtype=torch.int64, device=DEVICE), *many, gate="static").reward
    with pytest.raises(torch.OutOfMemoryError):
        torch.autograd.grad(reward.sum(), layers)  # a gradient of 256 GiB a layer
    del reward
    assert torch.equal(ops.probe_reward(hidden, index, *parameters).reward, wanted)


def test_rows_past_two_to_the_31_elements(backend):
    T, D = 2**16, 2**14
    layer = torch.zeros(3, T, D, dtype=torch.float16, device=DEVICE)  # 6 GiB
    index = torch.tensor([T - 1, T - 2, T - 1], device=DEVICE)
    layer[torch.arange(3, device=DEVICE), index] = torch.randn(3, D, device=DEVICE).half()
    parameters = make_parameters("softmax", 1, D)
    assert_right(ops.probe_reward([layer], index, *parameters), [layer], index, parameters, "softmax")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
def test_a_device_that_is_not_the_current_one(backend):
    for number in (1, 0, 1):
        device = torch.device("cuda", number)
        hidden, index = make_hidden(3, 4, 5, 40, device=device)
        parameters = make_parameters("softmax", 3, 40, requires_grad=True, device=device)
        got = ops.probe_reward(hidden, index, *parameters)
        assert got.reward.device == device
        assert_right([x.detach() for x in got], hidden, index, double(parameters), "softmax")
        torch.autograd.grad(got.reward.sum(), parameters)
    mixed = [*hidden[:2], hidden[2].to("cuda:0")]
    with pytest.raises(ValueError, match="must have the device"):
        ops.probe_reward(mixed, index, *parameters)
