"""Hidden states and lm_head to preference loss and gradients, beside eager PyTorch; the floor is the bare matmuls."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.harness import Work, measure
from reprdpo import ops

# P pairs, T tokens (half of them prompt), D hidden size, V vocabulary: the shape "cpu" of the protocol.
P, T, D, V = 4, 256, 1024, 32000
SCORED = P * T
BETA = 0.1

Gradients = tuple[Tensor, ...]


def make_inputs(seed: int, dtype: torch.dtype) -> list[Any]:
    """Hidden states that lean towards their label's row of the head by as much as gives a mean entropy of 1.5 nats."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(V, D, generator=generator) / D**0.5
    labels = torch.randint(V, (2 * P, T), generator=generator)
    hidden = torch.randn(2 * P, T, D, generator=generator) + 13.3 * weight[labels]
    labels[:, : T // 2] = -100
    return [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels]


def fused(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    reference = torch.zeros(P)
    return ops.linear_preference_loss(
        hidden, weight, labels, ref_chosen_logp=reference, ref_rejected_logp=reference, beta=BETA
    ).loss


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    scored = labels != -100
    logp = (hidden @ weight.T).log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    chosen, rejected = torch.where(scored, logp, 0).sum(-1).float().chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def with_gradients(loss: Callable[..., Tensor]) -> Callable[..., Gradients]:
    """The gradients of hidden states and weight."""

    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> Gradients:
        return torch.autograd.grad(loss(hidden, weight, labels), (hidden, weight))

    return run


def oracle(hidden: Tensor, weight: Tensor, labels: Tensor) -> Gradients:
    exact = [value.detach().double().requires_grad_() for value in (hidden, weight)]
    with ops.use_backend("reference"):
        return with_gradients(fused)(*exact, labels)


@pytest.mark.parametrize("implementation", ["eager", "reprdpo"])
def test_forward_and_backward(benchmark: BenchmarkFixture, implementation: str) -> None:
    benchmark.group = f"linear_preference_loss forward + backward, P={P} T={T} D={D} V={V}, float32"
    measure(
        benchmark,
        with_gradients(eager if implementation == "eager" else fused),
        lambda seed: make_inputs(seed, torch.float32),
        oracle=oracle,
        max_error=1e-4,
        work=Work(bytes=4 * (SCORED * D + V * D), gemms=((SCORED, V, D), (SCORED, D, V), (V, D, SCORED))),
        dtype=torch.float32,
    )
