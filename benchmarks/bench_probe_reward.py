"""How long hidden states take to the reward, its gradients and gamma, beside PyTorch as one would write it."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, get_args

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.harness import DEVICE, Work, measure
from reprdpo import ops
from reprdpo.ops.backend import Backend

# B sequences (four pairs), T padded length, L layers, D hidden size; the first is a 7B model's, and the bar.
B, T = 8, 8
SHAPES = [
    (32, 4096),
    *(pytest.param(*shape, marks=pytest.mark.secondary) for shape in ((8, 4096), (80, 4096), (32, 1024), (32, 8192))),
]
ALPHA = 7.5
UPSTREAM = 0.7  # accumulation makes others than 1 the normal case
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OURS = get_args(Backend)


def make_inputs(seed: int, L: int, D: int, dtype: torch.dtype, requires_grad: bool) -> list[Any]:
    """L layers [B, T, D], the index [B], w, b, v, c, and the upstream gradient [B]."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    layers = [random(B, T, D).to(DEVICE, dtype) for _ in range(L)]
    index = torch.randint(T, (B,), generator=generator).to(DEVICE)
    parameters = (random(L, D) / D**0.5, random(L), random(L, D) / D**0.5, random(L))
    given = [parameter.to(DEVICE).requires_grad_(requires_grad) for parameter in parameters]
    return [layers, index, *given, torch.full((B,), UPSTREAM, device=DEVICE)]


def multiply_sum(layers: list[Tensor], index: Tensor, w: Tensor, b: Tensor, v: Tensor, c: Tensor) -> Tensor:
    rows = torch.arange(B, device=index.device)
    pooled_BLD = torch.stack([states[rows, index] for states in layers], dim=1).to(w.dtype)
    scores_BL = (pooled_BLD * w).sum(-1) + b
    return ((pooled_BLD * v).sum(-1) + c).softmax(-1).mul(scores_BL).sum(-1)


def einsum(layers: list[Tensor], index: Tensor, w: Tensor, b: Tensor, v: Tensor, c: Tensor) -> Tensor:
    rows = torch.arange(B, device=index.device)
    pooled_BLD = torch.stack([states[rows, index] for states in layers], dim=1).to(w.dtype)
    scores_BL = torch.einsum("bld,ld->bl", pooled_BLD, w) + b
    gate_BL = (torch.einsum("bld,ld->bl", pooled_BLD, v) + c).softmax(-1)
    return torch.einsum("bl,bl->b", gate_BL, scores_BL)


def ours(*inputs: Any) -> Tensor:
    return ops.probe_reward(*inputs).reward


def forward(reward: Callable[..., Tensor], *inputs: Any) -> Tensor:
    return reward(*inputs[:-1])


def gradients(reward: Callable[..., Tensor], *inputs: Any) -> Sequence[Tensor]:
    """Those of the four parameters; the states are detached, as where the reward learns online."""
    *given, upstream = inputs
    return torch.autograd.grad(reward(*given), given[2:], upstream)


def confidence(reward: Callable[..., Tensor], *inputs: Any) -> Tensor:
    if reward is ours:
        return ops.probe_confidence(*inputs[:-1], alpha=ALPHA).confidence
    chosen, rejected = reward(*inputs[:-1]).chunk(2)
    return torch.sigmoid(ALPHA * (chosen - rejected))


@cache
def compiled(peer: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(peer, fullgraph=True, dynamic=False)


PEERS: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "multiply-sum": lambda: multiply_sum,
    "einsum": lambda: einsum,
    "multiply-sum, torch.compile": lambda: compiled(multiply_sum),
    "einsum, torch.compile": lambda: compiled(einsum),
}


def oracle(task: Callable[..., Any], layers: list[Tensor], index: Tensor, *rest: Tensor) -> Any:
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in rest]
    return task(multiply_sum, [states.double() for states in layers], index, *exact)


def counted(task: Callable[..., Any], L: int, D: int, dtype: torch.dtype) -> Work:
    """The states' rows and both weights once; for the gradients the rows kept, read again, and two gradients."""
    rows, weights = B * L * D * dtype.itemsize, 2 * L * D * torch.float32.itemsize
    return Work(bytes=3 * rows + 2 * weights if task is gradients else rows + weights)


def run(
    benchmark: BenchmarkFixture, task: Callable[..., Any], implementation: str, L: int, D: int, dtype: torch.dtype
) -> None:
    benchmark.group = f"probe_reward {task.__name__}, {B} x {L} x {D}, {str(dtype).removeprefix('torch.')}"
    peer = implementation not in OURS
    if not peer and not (status := ops.backends()[implementation]).available:
        pytest.skip(f"{implementation}: {status.reason}")
    asks = task is gradients
    reward = PEERS[implementation]() if peer else ours
    with ops.use_backend("auto" if peer else implementation), torch.set_grad_enabled(asks):  # type: ignore[arg-type]
        measure(
            benchmark,
            partial(task, reward),
            partial(make_inputs, L=L, D=D, dtype=dtype, requires_grad=asks),
            oracle=partial(oracle, task),
            oracle_key=(task.__name__, L, D, dtype),
            max_error=1e-5,
            work=counted(task, L, D, dtype),
            dtype=dtype,
            device=DEVICE,
            peer=peer,
            shape={"L": L, "D": D},
            upstream=UPSTREAM if asks else 1.0,
            headline="kernel" if SHAPES[0] == (L, D) else None,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("L", "D"), SHAPES)
@pytest.mark.parametrize("implementation", [*OURS, *PEERS])
def test_forward(benchmark: BenchmarkFixture, implementation: str, L: int, D: int, dtype: str) -> None:
    run(benchmark, forward, implementation, L, D, DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("L", "D"), SHAPES)
@pytest.mark.parametrize("implementation", [*OURS, *PEERS])
def test_gradients(benchmark: BenchmarkFixture, implementation: str, L: int, D: int, dtype: str) -> None:
    run(benchmark, gradients, implementation, L, D, DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("L", "D"), SHAPES[:1])
@pytest.mark.parametrize("implementation", [*OURS, *PEERS])
def test_confidence(benchmark: BenchmarkFixture, implementation: str, L: int, D: int, dtype: str) -> None:
    run(benchmark, confidence, implementation, L, D, DTYPES[dtype])
