"""The Triton kernels of probe_reward themselves: arrivals, layouts, gradients; and what each compiles to."""

import gc
import itertools
import re
import weakref

import pytest
import torch

pytest.importorskip("triton")

import aot
from reprdpo_kernels import probe_reward as kernels

from reprdpo.ops import reference

GATES = ("softmax", "static", "vote")
NO_CONFIDENCE = (None, False, None, False)
# One of each; a feature more than a vector; 80 layers; two blocks of features and a tail; many sequences.
SHAPES = [(1, 1, 1, 1), (3, 4, 5, 9), (80, 2, 2, 61), (2, 4, 2, 4099), (2, 64, 3, 130), (1, 2, 1, 8192)]


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """What a kernel does not write shows as NaN (or as a count that is wrong)."""
    empty = torch.Tensor.new_empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(7)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


def make_parameters(gate, L, D, dtype=torch.float32):
    gate_weight = {"softmax": torch.randn(L, D) / D**0.5, "vote": torch.randn(L, L), "static": None}[gate]
    parameters = (torch.randn(L, D) / D**0.5, torch.randn(L), gate_weight, torch.randn(L))
    return [None if p is None else p.to(dtype) for p in parameters]


def make_hidden(L, B, T, D, dtype):
    """Layers of NaN but for the tokens that the index takes, and an index of which one is out of range."""
    index = torch.randint(T, (B,))
    hidden = torch.full((L, B, T, D), float("nan")).to(dtype)
    hidden[:, torch.arange(B), index] = torch.randn(L, B, D).to(dtype)
    index[2:3] = -1
    return list(hidden), index


def double(values):
    return [None if x is None else x.double() for x in values]


def check_forward(got, hidden, index, parameters, gate, *, save_pooled=True):
    """Reward, scores, gate and pooled rows are the oracle's, to twice the error of the same in float32."""
    pooled = reference.pool_last_token(hidden, index)
    exact = reference.probe_reward(pooled.double(), *double(parameters), gate)
    plain = reference.probe_reward(pooled, *parameters, gate)
    for result, eager, right in zip(got[:3], plain, exact, strict=True):
        assert torch.equal(result.isnan(), right.isnan())
        allowed = 2 * (eager - right).abs().nan_to_num().max() + 4 * 2**-23 * right.abs().nan_to_num().max()
        assert (result - right).abs().nan_to_num().max() <= allowed
    torch.testing.assert_close(got[3], pooled if save_pooled else pooled.new_empty(0), rtol=0, atol=0, equal_nan=True)


def counters():
    return [slab for slabs in kernels._slabs.values() for slab in slabs]


@pytest.mark.interpreter
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("L", "B", "T", "D"), SHAPES)
def test_forward_of_every_shape(gate, dtype, L, B, T, D):
    hidden, index = make_hidden(L, B, T, D, dtype)
    parameters = make_parameters(gate, L, D)
    got = kernels.probe_reward_forward(hidden, index, *parameters, gate, True, *NO_CONFIDENCE)
    check_forward(got, hidden, index, parameters, gate)
    assert got[4].numel() == 0
    assert counters()
    assert not any(slab.any() for slab in counters())


@pytest.mark.interpreter
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("B", [2, 6, 8])
def test_several_sequences_a_program(monkeypatch, gate, B):
    monkeypatch.setattr(kernels, "_MANY_PROGRAMS", 1)
    hidden, index = make_hidden(5, B, 3, 20, torch.float32)
    parameters = make_parameters(gate, 5, 20)
    got = kernels.probe_reward_forward(hidden, index, *parameters, gate, True, 2.0, False, None, False)
    check_forward(got, hidden, index, parameters, gate)
    wanted = reference.preference_confidence(*got[0].chunk(2), 2.0, False, None, None)
    torch.testing.assert_close(got[4], wanted, equal_nan=True)
    assert not any(slab.any() for slab in counters())


@pytest.mark.interpreter
@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("floor", [None, 0.4])
@pytest.mark.parametrize(
    "pairs", [1, 3, pytest.param(130, marks=pytest.mark.slow)]
)  # 130: more than a block of the batch mean
def test_confidence(squash, floor, pairs):
    hidden = [torch.randn(2 * pairs, 1, 4) for _ in range(2)]
    index, parameters = torch.zeros(2 * pairs, dtype=torch.int64), make_parameters("softmax", 2, 4)
    for reduce in (None, "batch"):
        options = (3.0, squash, floor, reduce == "batch")
        reward, *_, confidence = kernels.probe_reward_forward(hidden, index, *parameters, "softmax", False, *options)
        exact = reference.preference_confidence(*reward.double().chunk(2), 3.0, squash, floor, reduce)
        torch.testing.assert_close(confidence.double(), exact, rtol=2e-6, atol=1e-7)
        assert not any(slab.any() for slab in counters())


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_low_precision_and_strided_inputs(dtype):
    hidden, index = make_hidden(3, 4, 5, 32, dtype)
    parameters = [p.t().contiguous().t() if p.dim() == 2 else p for p in make_parameters("softmax", 3, 32, dtype)]
    layouts = {
        "features apart": [h.repeat_interleave(2, dim=-1)[..., ::2] for h in hidden],
        "layers unlike": [hidden[0], hidden[1].transpose(0, 1).contiguous().transpose(0, 1), hidden[2]],
        "rows off 16 bytes": [torch.cat([h[..., :1], h], dim=-1)[..., 1:] for h in hidden],
        "all rows one": [h[:, :1].expand(4, 5, 32) for h in hidden],
    }
    for name, layers in layouts.items():
        wide = index.repeat_interleave(2)[::2]
        got = kernels.probe_reward_forward(layers, wide, *parameters, "softmax", True, *NO_CONFIDENCE)
        pooled = reference.pool_last_token(layers, index)
        exact = reference.probe_reward(pooled.double(), *double(parameters), "softmax")
        for result, right in zip(got, exact, strict=False):
            torch.testing.assert_close(result.double(), right, rtol=2e-6, atol=2e-6, equal_nan=True, msg=name)


@pytest.mark.interpreter
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("L", "B", "T", "D"), [*SHAPES[:4], (2, 20, 3, 520)])
def test_backward_of_every_shape_and_upstream(gate, L, B, T, D):
    hidden, index = make_hidden(L, B, T, D, torch.float32)
    parameters = make_parameters(gate, L, D)
    _, scores, layer_gate, pooled, _ = kernels.probe_reward_forward(
        hidden, index, *parameters, gate, True, *NO_CONFIDENCE
    )
    upstream = (torch.randn(1).expand(B), torch.randn(L, B).t(), torch.randn(B, 2 * L)[:, ::2])
    for given in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        grads = [grad if asked else None for grad, asked in zip(upstream, given, strict=True)]
        check_backward(grads, pooled, index, parameters, scores, layer_gate, gate, (B, T, D), L)


def check_backward(upstream, pooled, index, parameters, scores, layer_gate, gate, shape, count, needs=None):
    needs = needs or [True, True, True, gate != "static", True]
    rest = (gate, shape, count, torch.float32, needs)
    probe, _, gate_weight, _ = parameters
    got = kernels.probe_reward_backward(*upstream, pooled, index, probe, gate_weight, scores, layer_gate, *rest)
    given = double([*upstream, pooled])
    found = reference.probe_reward_backward(
        *given, index, *double([probe, gate_weight, scores, layer_gate]), *rest[:3], torch.float64, needs
    )
    exact = [*(found[0] or []), *(grad for grad in found[1:] if grad is not None)]
    for grad, right in zip([*got[0], *(g for g in got[1:] if g.numel() or g.dim() == 2)], exact, strict=True):
        torch.testing.assert_close(grad.double(), right, rtol=1e-5, atol=2e-5)
    return got


@pytest.mark.interpreter
@pytest.mark.parametrize("gate", GATES)
def test_backward_does_what_is_asked_alone(gate):
    hidden, index = make_hidden(3, 4, 5, 9, torch.float32)
    parameters = make_parameters(gate, 3, 9)
    _, scores, layer_gate, pooled, _ = kernels.probe_reward_forward(
        hidden, index, *parameters, gate, True, *NO_CONFIDENCE
    )
    upstream = (torch.randn(4), torch.randn(4, 3), None)
    for needs in itertools.product([False, True], repeat=5):
        if not any(needs) or (needs[3] and gate == "static"):
            continue
        got = check_backward(upstream, pooled, index, parameters, scores, layer_gate, gate, (4, 5, 9), 3, needs)
        assert [bool(got[0]), *(grad.numel() > 0 for grad in got[1:])] == list(needs)


@pytest.mark.interpreter
@pytest.mark.parametrize("B", [4, 20])
def test_sequences_that_read_one_token_of_a_packed_batch_add_up(B):
    hidden = [torch.randn(6, 9) for _ in range(3)]
    index = torch.randint(6, (B,))
    index[:3] = torch.tensor([5, 5, -1])
    parameters = make_parameters("softmax", 3, 9)
    _, scores, layer_gate, pooled, _ = kernels.probe_reward_forward(
        hidden, index, *parameters, "softmax", True, *NO_CONFIDENCE
    )
    upstream = (torch.randn(B), None, None)
    check_backward(upstream, pooled, index, parameters, scores, layer_gate, "softmax", (6, 9), 3)


@pytest.mark.interpreter
def test_a_counter_that_is_too_small_grows_and_the_old_one_is_left_at_zero():
    parameters = make_parameters("static", 1, 2)
    for B in (2, 300, 4, 70_000):
        with torch.device("cpu"):
            arrivals = kernels._arrivals(B, torch.device("cpu"))
        assert arrivals.numel() >= B
        assert not arrivals.any()
        assert arrivals.data_ptr() == kernels._arrivals(2, torch.device("cpu")).data_ptr()
    hidden = torch.randn(300, 1, 2)
    got = kernels.probe_reward_forward([hidden], None, *parameters, "static", False, *NO_CONFIDENCE)
    torch.testing.assert_close(got[0], reference.probe_reward(hidden, *parameters, "static")[0])


def test_counters_of_a_captured_launch_are_aligned_and_outlive_their_slab():
    cpu = torch.device("cpu")
    kernels._arrivals(2, cpu)
    slab = weakref.ref(kernels._slabs[cpu][-1])
    cuts = [kernels._take(count, cpu, capturing=True) for count in (9, 3, 40)]
    # A pointer off 16 bytes would ask for another kernel, which no capture can load.
    assert all(cut.data_ptr() % 16 == 0 for cut in cuts)
    del cuts  # a graph holds addresses alone
    kernels._arrivals(2 * kernels._SLAB, cpu)
    gc.collect()
    assert slab() is not None


def test_alignment_is_of_every_row():
    like = torch.empty(0, dtype=torch.bfloat16)
    assert kernels._aligned((64, 1024), (8, 4096), like)
    assert not kernels._aligned((64, 1032), (8, 4096), like)
    assert not kernels._aligned((64, 1024), (4, 4096), like)


GATE_NUMBERS = range(3)
TL = {"bf16": "tl.bfloat16", "fp16": "tl.float16", "fp32": "tl.float32"}


def compiled(kernel, signature, constexprs, capability, num_warps, maxnreg):
    none = {name: None for name, kind in signature.items() if kind is None}
    given = {name: kind for name, kind in signature.items() if kind is not None}
    return aot.compile(kernel, given, constexprs | none, capability, num_warps=num_warps, maxnreg=maxnreg)


def compile_forward(capability, dtype, gate, *, L=32, D=4096, aligned=True, sequences=1, parameters="fp32", full=True):
    config = kernels.CONFIGS[capability // 10]
    small = D <= kernels._SMALL_ROW
    weight, result = f"*{parameters}:16", "*fp32:16"
    integers = ("B", "T", "L", "layer_stride", "sequence_stride", "token_stride", "feature_stride", "index_stride")
    signature = {
        "addresses": ["i64"] * L, "index_ptr": "*i64:16" if full else None, "probe_weight_ptr": weight,
        "probe_bias_ptr": weight, "gate_weight_ptr": None if gate == 1 else weight, "gate_bias_ptr": weight,
        "reward_ptr": result, "scores_ptr": result, "gate_ptr": result, "pooled_ptr": f"*{dtype}:16" if full else None,
        "confidence_ptr": result if full else None, "arrivals_ptr": "*i32:16", **dict.fromkeys(integers, "i32"),
        "D": "i32:16" if aligned else "i32", "alpha": "fp32", "floor": "fp32", "squash": "i32", "reduce_batch": "i32",
    }  # fmt: skip
    constexprs = {
        "DTYPE": TL[dtype], "GATE": gate, "ALIGNED": aligned, "SEQUENCES": sequences, "BLOCK_L": kernels._block(L),
        "BLOCK_D": kernels._SMALL_ROW if small else config.forward_features,
    }  # fmt: skip
    warps, registers = 4 if small else config.forward_warps, kernels._registers(config.forward_registers, L)
    return compiled(kernels._probe_reward_fwd_kernel, signature, constexprs, capability, warps, registers)


def compile_backward(capability, dtype, gate, *, L=32, aligned=True, parameters="fp32", weights=True, hidden=True):
    config = kernels.CONFIGS[capability // 10]
    weight, result, divisible = f"*{parameters}:16", "*fp32:16", "i32:16" if aligned else "i32"
    integers = (
        "B", "T", "L", "layer_stride", "sequence_stride", "token_stride", "index_stride", "reward_stride", "has_reward",
        "has_scores", "has_gate", "needs_probe", "needs_probe_bias", "needs_gate", "needs_gate_bias", "packed",
    )  # fmt: skip
    signature = {
        "addresses": ["i64"] * L if hidden else None, "grad_reward_ptr": result, "grad_scores_ptr": result,
        "grad_gate_ptr": result, "pooled_ptr": f"*{dtype}:16" if weights else None, "index_ptr": "*i64:16",
        "probe_weight_ptr": weight, "gate_weight_ptr": None if gate == 1 else weight, "scores_ptr": result,
        "gate_ptr": result, "grad_probe_ptr": weight, "grad_probe_bias_ptr": weight, "grad_gate_weight_ptr": weight,
        "grad_gate_bias_ptr": weight, **dict.fromkeys(integers, "i32"), "D": divisible,
        "pooled_sequence_stride": divisible, "pooled_layer_stride": divisible,
        "scores_strides": ["i32", "i32"], "gate_strides": ["i32", "i32"],
    }  # fmt: skip
    constexprs = {
        "pooled_feature_stride": 1, "DTYPE": TL[dtype], "GATE": gate, "ALIGNED": aligned,
        "BLOCK_B": kernels._rows(config, L), "BLOCK_L": kernels._block(L), "BLOCK_D": config.backward_features,
    }  # fmt: skip
    return compiled(
        kernels._probe_reward_bwd_kernel, signature, constexprs, capability, config.backward_warps,
        kernels._registers(config.backward_registers, L, aligned or not hidden),
    )  # fmt: skip


def check_resources(resources, capability, settings):
    assert resources.spills == 0, settings
    assert resources.registers <= 255
    assert resources.shared <= aot.MAX_SHARED[capability]


def check_order(accesses, gate):
    """What a program counts on of the others, from whose atomic on a counter it has learnt that they are through."""
    assert "x" not in accesses
    assert not re.search(r"s[^b]*a", accesses), "a store may be outrun by the atomic that announces it"
    assert not re.search(r"a[^b]*[cl]", accesses), "only the thread of the atomic has acquired"
    assert "c" in accesses
    if gate == 0:
        assert not re.search(r"c[lc]*s", accesses), "a logit may be overwritten before another warp has read it"


# Every value of every compile-time choice, beside each other's.
FORWARDS = [
    ("bf16", {}),
    ("fp32", {"D": 1024, "full": False}),
    ("fp16", {"sequences": 4, "parameters": "fp16"}),
    ("bf16", {"L": 80, "aligned": False, "parameters": "bf16"}),
    ("fp32", {"L": 300, "aligned": False, "sequences": 4, "D": 1024}),
]
BACKWARDS = [
    ("bf16", {"hidden": False}),
    ("fp32", {"L": 80, "aligned": False}),
    ("fp16", {"parameters": "fp16"}),
    ("bf16", {"weights": False, "L": 1}),
    ("fp32", {"L": 300}),
]


@pytest.mark.parametrize("capability", aot.CAPABILITIES)
@pytest.mark.parametrize("gate", GATE_NUMBERS)
@pytest.mark.parametrize("compile_one", [compile_forward, compile_backward])
def test_compiles_without_spills(capability, gate, compile_one):
    for dtype, settings in FORWARDS if compile_one is compile_forward else BACKWARDS:
        resources = compile_one(capability, dtype, gate, **settings)
        check_resources(resources, capability, (dtype, settings))
        if compile_one is compile_forward:
            check_order(resources.accesses, gate)
        if dtype == "bf16" and settings.get("aligned", True):
            assert resources.narrow_loads == 0


@pytest.mark.slow
@pytest.mark.parametrize("capability", aot.CAPABILITIES)
@pytest.mark.parametrize("gate", GATE_NUMBERS)
def test_every_pair_of_choices_compiles_without_spills(capability, gate):
    for (i, dtype), (j, parameters), aligned in itertools.product(
        enumerate(TL), enumerate(("fp32", "bf16", "fp16")), (True, False)
    ):
        common = {"L": (1, 32, 80)[(i + j) % 3], "aligned": aligned, "parameters": parameters}
        for D, sequences in itertools.product((1024, 4096), (1, 4)):
            settings = common | {"D": D, "sequences": sequences, "full": (D == 1024) == (sequences == 1)}
            check_resources(compile_forward(capability, dtype, gate, **settings), capability, (dtype, settings))
        for weights, hidden in ((True, True), (True, False), (False, True), (False, False)):
            settings = common | {"weights": weights, "hidden": hidden}
            check_resources(compile_backward(capability, dtype, gate, **settings), capability, (dtype, settings))
