"""How long the pooled reward takes, by backend, beside PyTorch as one would write it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.harness import Work, measure
from reprdpo import ops

# B sequences, T padded length, L layers, D hidden size: a batch of four pairs at the shape of a 7B model.
B, T, L, D = 8, 8, 32, 4096
Implementation = Callable[..., Tensor]


def make_inputs(seed: int, dtype: torch.dtype) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hidden_states = [random(B, T, D).to(dtype) for _ in range(L)]
    index = torch.randint(T, (B,), generator=generator)
    return [hidden_states, index, random(L, D) / D**0.5, random(L), random(L, D) / D**0.5, random(L)]


def eager(hidden_states: list[Tensor], index: Tensor, w: Tensor, b: Tensor, v: Tensor, c: Tensor) -> Tensor:
    rows = torch.arange(B)
    pooled_BLD = torch.stack([states[rows, index] for states in hidden_states], dim=1).to(w.dtype)
    scores_BL = (pooled_BLD * w).sum(-1) + b
    return ((pooled_BLD * v).sum(-1) + c).softmax(-1).mul(scores_BL).sum(-1)


def oracle(hidden_states: list[Tensor], index: Tensor, *parameters: Tensor) -> Tensor:
    return eager([states.double() for states in hidden_states], index, *(p.double() for p in parameters))


def by_backend(backend: Any) -> Implementation:
    def run(*inputs: Any) -> Tensor:
        with ops.use_backend(backend):
            return ops.probe_reward(*inputs).reward

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", ["eager", "reference", "native"])
def test_probe_reward_forward(benchmark: BenchmarkFixture, implementation: str, dtype: torch.dtype) -> None:
    if implementation != "eager" and not (status := ops.backends()[implementation]).available:
        pytest.skip(f"{implementation}: {status.reason}")
    benchmark.group = f"probe_reward forward, {B} x {L} x {D}, {str(dtype).removeprefix('torch.')}"
    with torch.no_grad():
        measure(
            benchmark,
            eager if implementation == "eager" else by_backend(implementation),
            lambda seed: make_inputs(seed, dtype),
            oracle=oracle,
            max_error=1e-5,
            work=Work(bytes=B * L * D * dtype.itemsize + 2 * L * D * 4),
            dtype=dtype,
        )
