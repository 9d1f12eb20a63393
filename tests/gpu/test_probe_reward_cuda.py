"""The CUDA C++ kernels of probe_reward on a GPU, against the oracle in float64, and under a CUDA graph."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from benchmarks.device import device_events
from reprdpo.ops import native, reference

pytestmark = pytest.mark.skipif(not native.loaded("cuda"), reason=f"native: {native.status('cuda')}")

GATES = ("softmax", "static", "vote")
CONFIDENCE = (7.5, False, 0.4, False)


def make_case(gate, L, B, T, D, dtype):
    mixer = {"softmax": torch.randn(L, D) / D**0.5, "vote": torch.randn(L, L), "static": None}[gate]
    parameters = (torch.randn(L, D) / D**0.5, torch.randn(L), mixer, torch.randn(L))
    hidden = [torch.randn(B, T, D).to("cuda", dtype) for _ in range(L)]
    return hidden, torch.randint(T, (B,)).cuda(), [None if p is None else p.cuda() for p in parameters]


def forward(hidden, index, parameters, gate):
    return torch.ops.reprdpo_native.probe_reward(hidden, index, *parameters, gate, True, *CONFIDENCE)


def double(values):
    return [None if value is None else value.double() for value in values]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    # One of each; no whole vector; as in training; more layers than one launch takes; many sequences.
    ("L", "B", "T", "D"),
    [(1, 2, 1, 1), (3, 4, 5, 77), (32, 8, 7, 4096), (130, 2, 2, 64), (5, 64, 2, 2304)],
)
def test_forward_and_backward_are_the_formula(gate, dtype, L, B, T, D):
    hidden, index, parameters = make_case(gate, L, B, T, D, dtype)
    index[1] = -1
    *results, pooled, confidence = forward(hidden, index, parameters, gate)
    exact = reference.probe_reward(reference.pool_last_token(double(hidden), index), *double(parameters), gate)
    for result, right in zip(results, exact, strict=True):
        torch.testing.assert_close(result.double(), right, rtol=1e-5, atol=1e-5, equal_nan=True)
    reward, scores, layer_gate = results
    wanted = reference.preference_confidence(*reward.split(B // 2), 7.5, False, 0.4, None)
    torch.testing.assert_close(confidence, wanted, rtol=1e-6, atol=0, equal_nan=True)

    upstream = [torch.randn(B).cuda(), torch.randn(B, L).cuda(), torch.randn(B, 1).cuda().expand(B, L)]
    needs = [True, True, True, gate != "static", True]
    shape = [B, T, D]
    got = torch.ops.reprdpo_native.probe_reward_backward(
        *upstream, pooled, index, parameters[0], parameters[2], scores, layer_gate, gate, shape, L, dtype, needs
    )
    exact = reference.probe_reward_backward(
        *double(upstream), pooled.double(), index, *double((parameters[0], parameters[2], scores, layer_gate)),
        gate, shape, L, torch.float64, needs,
    )  # fmt: skip
    for result, right in zip(got[1:], exact[1:], strict=True):
        if right is not None:
            torch.testing.assert_close(result.double(), right, rtol=1e-5, atol=1e-5)
    for result, right in zip(got[0], exact[0], strict=True):
        torch.testing.assert_close(result.double(), right, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_same_bits_every_run_and_on_every_stream():
    hidden, index, parameters = make_case("softmax", 32, 8, 3, 4096, torch.bfloat16)
    first = forward(hidden, index, parameters, "softmax")
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    runs = []
    for turn in range(40):
        with torch.cuda.stream(streams[turn % 4]):
            runs.append(forward(hidden, index, parameters, "softmax"))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for run in runs for a, b in zip(first, run, strict=True))


def test_threads_that_share_a_stream_share_no_counters():
    """More layers than one launch takes: another thread's may come between two of a call."""
    hidden, index, parameters = make_case("softmax", 130, 8, 2, 64, torch.bfloat16)
    first = forward(hidden, index, parameters, "softmax")
    torch.cuda.synchronize()

    def run(_):
        return [forward(hidden, index, parameters, "softmax") for _ in range(100)]

    with ThreadPoolExecutor(4) as threads:
        runs = [results for each in threads.map(run, range(4)) for results in each]
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for results in runs for a, b in zip(first, results, strict=True))


def test_the_reward_of_no_layers():
    hidden, w = torch.randn(4, 0, 8, device="cuda"), torch.randn(0, 8, device="cuda")
    reward, _, _, _, confidence = forward([hidden], None, (w, w[:, 0], w, w[:, 0]), "softmax")
    assert reward.tolist() == [0.0] * 4
    assert confidence.tolist() == [0.5] * 2


def test_a_captured_launch_is_replayed_beside_others():
    hidden, index, parameters = make_case("vote", 32, 8, 3, 4096, torch.bfloat16)
    eager = forward(hidden, index, parameters, "vote")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward(hidden, index, parameters, "vote")
    other = torch.cuda.Stream()
    for _ in range(20):
        graph.replay()
        with torch.cuda.stream(other):
            beside = forward(hidden, index, parameters, "vote")
    torch.cuda.synchronize()
    for right, replayed, result in zip(eager, captured, beside, strict=True):
        assert torch.equal(right, replayed)
        assert torch.equal(right, result)


@pytest.mark.parametrize("backward", [False, True])
def test_one_launch(backward):
    hidden, index, parameters = make_case("softmax", 32, 8, 3, 4096, torch.bfloat16)
    _, scores, layer_gate, pooled, _ = forward(hidden, index, parameters, "softmax")
    upstream = torch.randn(8).cuda()

    def run():
        if not backward:
            return forward(hidden, index, parameters, "softmax")
        return torch.ops.reprdpo_native.probe_reward_backward(
            upstream, None, None, pooled, index, parameters[0], parameters[2], scores, layer_gate, "softmax",
            [8, 3, 4096], 32, torch.bfloat16, [True] * 5,
        )  # fmt: skip

    run()
    torch.cuda.synchronize()
    kernels = device_events(run, "cuda")
    assert len(kernels) == 1, kernels


FIRST_CALL_IN_A_CAPTURE = """
import torch
from reprdpo.ops import native, reference
assert native.loaded("cuda")
hidden, parameters = torch.randn(2, 3, 40, device="cuda"), torch.randn(4, 3, 40, device="cuda")
w, b, v, c = parameters[0], parameters[1, :, 0].contiguous(), parameters[2], parameters[3, :, 0].contiguous()
wanted = reference.probe_reward(hidden, w, b, v, c, "softmax")[0]
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    reward = torch.ops.reprdpo_native.probe_reward(
        [hidden], None, w, b, v, c, "softmax", False, None, False, None, False
    )[0]
graph.replay()
torch.testing.assert_close(reward, wanted, rtol=1e-5, atol=1e-5)
"""


def test_first_call_of_a_process_inside_a_capture():
    command = [sys.executable, "-c", FIRST_CALL_IN_A_CAPTURE]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
