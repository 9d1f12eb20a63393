"""The native kernels themselves: the fused confidence and the backward, against the oracle in float64."""

import itertools

import pytest
import torch

from reprdpo.ops import native, probe_reward, reference, use_backend

pytestmark = pytest.mark.skipif(not native.loaded(), reason=f"native: {native.status()}")

GATES = ("softmax", "static", "vote")
# One of each; fewer elements than a vector; 80 layers and a tail; more columns than a thread's share; many sequences.
SHAPES = [(1, 1, 1, 1), (3, 4, 5, 7), (80, 2, 2, 61), (5, 9, 2, 4099), (2, 64, 3, 130), (1, 2, 1, 8192)]


def make_case(gate, L, B, T, D, dtype):
    """Pooled rows, index with one out of range where B > 1, parameters, upstream gradients."""
    hidden, index = torch.randn(L, B, T, D).to(dtype), torch.randint(T, (B,))
    index[1:2] = -1
    mixer = {"softmax": torch.randn(L, D) / D**0.5, "vote": torch.randn(L, L), "static": None}[gate]
    upstream = (torch.randn(B), torch.randn(B, L), torch.randn(B, L))
    return hidden, index, (torch.randn(L, D) / D**0.5, torch.randn(L), mixer, torch.randn(L)), upstream


def forward(hidden, index, parameters, gate, save_pooled=True, confidence=(None, False, None, False)):
    return torch.ops.reprdpo_native.probe_reward(hidden, index, *parameters, gate, save_pooled, *confidence)


def gradients(backward, upstream, pooled, index, parameters, scores, layer_gate, gate, shape, count, dtype, needs):
    return backward(
        *upstream, pooled, index, parameters[0], parameters[2], scores, layer_gate, gate, shape, count, dtype, needs
    )


def double(values):
    return [x.double() if x is not None and x.is_floating_point() else x for x in values]


def check(case, gate, needs, hidden_shape, hidden_count, dtype):
    """Native gradients are within twice the error of the same formula in float32, or a rounding to ``dtype``."""
    upstream, pooled, index, parameters, scores, layer_gate = case
    settings = (gate, hidden_shape, hidden_count, dtype, needs)
    got = gradients(
        torch.ops.reprdpo_native.probe_reward_backward,
        upstream,
        pooled,
        index,
        parameters,
        scores,
        layer_gate,
        *settings,
    )
    settings = (gate, hidden_shape, hidden_count, torch.float32, needs)
    plain = gradients(
        reference.probe_reward_backward, upstream, pooled, index, parameters, scores, layer_gate, *settings
    )
    settings = (gate, hidden_shape, hidden_count, torch.float64, needs)
    exact = gradients(
        reference.probe_reward_backward,
        *(double(upstream), *double((pooled, index)), double(parameters), *double((scores, layer_gate)), *settings),
    )
    for result, eager, right in zip(got[1:], plain[1:], exact[1:], strict=True):
        if right is None:
            assert result.shape == (0,)
            continue
        assert result.dtype == torch.float32
        assert (result - right).abs().max() <= allowed(eager, right)
    assert len(got[0]) == (hidden_count if needs[0] else 0)
    if needs[0]:
        assert {grad.dtype for grad in got[0]} == {dtype}
        # All layers together: a layer's error is that of its one d, which may be lucky in eager.
        result, eager, right = (torch.stack(list(grads)) for grads in (got[0], plain[0], exact[0]))
        step, least = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert ((result - right).abs() <= step * right.abs() + least + allowed(eager, right)).all()


def allowed(eager, right):
    return 2 * (eager - right).abs().max() + 4 * torch.finfo(torch.float32).eps * right.abs().max()


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("L", "B", "T", "D"), SHAPES)
def test_backward_is_the_formula(gate, dtype, L, B, T, D):
    hidden, index, parameters, upstream = make_case(gate, L, B, T, D, dtype)
    _, scores, layer_gate, pooled, _ = forward(list(hidden), index, parameters, gate)
    needs = [True, True, True, gate != "static", True]
    case = (upstream, pooled, index, parameters, scores, layer_gate)
    check(case, gate, needs, [B, T, D], L, dtype)
    check(case, gate, needs, [L, B, T, D], 1, dtype)


@pytest.mark.parametrize("gate", GATES)
def test_backward_of_packed_states_adds_up_the_sequences_that_share_a_row(gate):
    hidden, _, parameters, upstream = make_case(gate, 3, 5, 4, 37, torch.bfloat16)
    index = torch.tensor([7, 2, 7, 20, 7])
    packed = [h.reshape(20, 37) for h in hidden]
    _, scores, layer_gate, pooled, _ = forward(packed, index, parameters, gate)
    case = (upstream, pooled, index, parameters, scores, layer_gate)
    check(case, gate, [True, True, True, gate != "static", True], [20, 37], 3, torch.bfloat16)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("features_apart", [False, True])
def test_backward_of_pooled_rows(gate, features_apart):
    _, _, parameters, upstream = make_case(gate, 3, 5, 1, 37, torch.float32)
    pooled = torch.randn(5, 3, 74)[..., ::2] if features_apart else torch.randn(5, 3, 37)
    _, scores, layer_gate, _, _ = forward([pooled], None, parameters, gate, save_pooled=False)
    case = (upstream, pooled, None, parameters, scores, layer_gate)
    check(case, gate, [True, True, True, gate != "static", True], [5, 3, 37], 1, torch.float32)


@pytest.mark.parametrize("gate", GATES)
def test_whatever_is_asked_of_whatever_comes_back(gate):
    hidden, index, parameters, upstream = make_case(gate, 3, 4, 5, 70, torch.float32)
    _, scores, layer_gate, pooled, _ = forward(list(hidden), index, parameters, gate)
    expanded = (torch.randn(()).expand(4), torch.randn(3).expand(4, 3), torch.randn(4, 1).expand(4, 3))
    for given in (upstream, expanded):
        for comes, asks in itertools.product(itertools.product([False, True], repeat=3), ([0], [1], [3], [2, 4])):
            needs = [number in asks and not (number == 3 and gate == "static") for number in range(5)]
            back = tuple(grad if there else None for grad, there in zip(given, comes, strict=True))
            rows = pooled if needs[1] or needs[3] else None
            check((back, rows, index, parameters, scores, layer_gate), gate, needs, [4, 5, 70], 3, torch.float32)


@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("floor", [None, 0.5])
@pytest.mark.parametrize("reduce", [None, "batch"])
def test_confidence_is_that_of_the_rewards(squash, floor, reduce):
    hidden, index, parameters, _ = make_case("softmax", 3, 6, 5, 70, torch.bfloat16)
    index[1] = 2
    options = (7.5, squash, floor, reduce == "batch")
    reward, *_, confidence = forward(list(hidden), index, parameters, "softmax", confidence=options)
    exact = reference.preference_confidence(*reward.double().split(3), 7.5, squash, floor, reduce)
    torch.testing.assert_close(confidence.double(), exact, rtol=2e-7, atol=0)
    assert torch.equal(reward, forward(list(hidden), index, parameters, "softmax")[0])


def test_confidence_of_a_row_without_a_token_is_nan_and_of_no_pairs_is_empty():
    hidden, index, parameters, _ = make_case("vote", 3, 4, 5, 7, torch.float32)
    *_, confidence = forward(list(hidden), index, parameters, "vote", confidence=(7.5, True, 0.5, False))
    assert confidence.isnan().tolist() == [False, True]
    *_, confidence = forward(list(hidden[:, :0]), index[:0], parameters, "vote", confidence=(7.5, True, 0.5, True))
    assert confidence.shape == (0,)
    with pytest.raises(RuntimeError, match="as many chosen as rejected"):
        forward(list(hidden[:, :3]), index[:3], parameters, "vote", confidence=(7.5, True, 0.5, True))


def test_backward_reads_no_memory_that_is_not_there():
    hidden, index, parameters, upstream = make_case("softmax", 3, 4, 5, 7, torch.float32)
    _, scores, layer_gate, pooled, _ = forward(list(hidden), index, parameters, "softmax")
    good = dict(
        zip(
            [
                *("grad_reward", "grad_scores", "grad_gate"),
                *("pooled", "index", "probe_weight", "gate_weight"),
                "layer_scores",
                "layer_gate",
            ],
            (*upstream, pooled, index, parameters[0], parameters[2], scores, layer_gate),
            strict=True,
        )
    )
    settings = ("softmax", [4, 5, 7], 3, torch.float32, [True] * 5)
    for name, value in good.items():
        for wrong in (value[:-1], value.to(torch.int32), value.unsqueeze(0)):
            with pytest.raises(RuntimeError):
                torch.ops.reprdpo_native.probe_reward_backward(*(good | {name: wrong}).values(), *settings)
    for shape, count in (([4, 5, 6], 3), ([3, 5, 7], 3), ([4, 5, 7], 2), ([7], 3), ([4, 3, 5, 7], 1)):
        with pytest.raises(RuntimeError):
            torch.ops.reprdpo_native.probe_reward_backward(
                *good.values(), "softmax", shape, count, torch.float32, [True] * 5
            )


def test_out_of_memory_is_torch_s_own_error():
    """The library's ABI hands on no type of error; trainers that shrink their batch look for torch.OutOfMemoryError."""
    hidden = torch.zeros(1, 1, 16, requires_grad=True).expand(1, 2**42, 16)
    with use_backend("native"):
        parameters = torch.zeros(1, 16), torch.zeros(1), None, torch.zeros(1)
        index = torch.zeros(1, dtype=torch.int64)
        reward = probe_reward([hidden], index, *parameters, gate="static").reward
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            torch.autograd.grad(reward.sum(), hidden)
