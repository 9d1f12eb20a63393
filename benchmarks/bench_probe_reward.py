"""How long the pooled reward takes, by backend, beside PyTorch as one would write it.

`pytest benchmarks/bench_probe_reward.py`; each implementation is first checked against the float64 oracle.
"""

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from reprdpo import ops

# B sequences, T padded length, L layers, D hidden size: a batch of four pairs at the shape of a 7B model.
B, T, L, D = 8, 32, 32, 4096
Inputs = tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor, Tensor]


def make_inputs(dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hidden_states = [random(B, T, D).to(dtype) for _ in range(L)]
    index = torch.randint(T, (B,), generator=generator)
    return hidden_states, index, random(L, D) / D**0.5, random(L), random(L, D) / D**0.5, random(L)


def eager(hidden_states: list[Tensor], index: Tensor, w: Tensor, b: Tensor, v: Tensor, c: Tensor) -> Tensor:
    rows = torch.arange(B)
    pooled_BLD = torch.stack([states[rows, index] for states in hidden_states], dim=1).to(w.dtype)
    scores_BL = (pooled_BLD * w).sum(-1) + b
    return ((pooled_BLD * v).sum(-1) + c).softmax(-1).mul(scores_BL).sum(-1)


def by_backend(backend: str) -> Callable[..., Tensor]:
    def run(*inputs: Tensor) -> Tensor:
        with ops.use_backend(backend):
            return ops.probe_reward(*inputs).reward

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", ["eager", "reference", "native"])
def test_probe_reward_forward(benchmark: BenchmarkFixture, implementation: str, dtype: torch.dtype) -> None:
    if implementation != "eager" and not (status := ops.backends()[implementation]).available:
        pytest.skip(f"{implementation}: {status.reason}")
    benchmark.group = f"probe_reward forward, {B} x {L} x {D}, {dtype}, {torch.get_num_threads()} threads"
    run = eager if implementation == "eager" else by_backend(implementation)
    inputs = make_inputs(dtype)
    hidden_states, index, *parameters = inputs
    exact = eager([states.double() for states in hidden_states], index, *(p.double() for p in parameters))
    with torch.no_grad():
        torch.testing.assert_close(run(*inputs), exact.float(), rtol=1e-4, atol=1e-4)
        benchmark(run, *inputs)
