"""Hidden states and lm_head to token log-probs, and logits to log-probs, beside every peer; the floor is the matmuls.

Every mode of a training loop: both gradients, the head frozen, no gradient (reference log-probs).
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.harness import DEVICE, Work, gradients, measure, rms_error
from benchmarks.logprob_peers import (
    DTYPES,
    MAX_GRADIENT_ERROR,
    MAX_LOGPROB_ERROR,
    SHAPES,
    TOKEN_LOGPS,
    HeadShape,
    in_float64,
    make_inputs,
    ours,
)
from reprdpo import ops

# The long and the wide shapes are measured in the dtype they are trained in.
IN_BOTH = [(name, dtype) for name in SHAPES for dtype in DTYPES if dtype == "bfloat16" or name in ("cpu", "llama2-7b")]
SHORT = [(name, dtype) for name, dtype in IN_BOTH if name in ("cpu", "llama2-7b")]
implementations = pytest.mark.parametrize("implementation", TOKEN_LOGPS)


def measure_gradients(
    benchmark: BenchmarkFixture,
    implementation: str,
    name: str,
    dtype: str,
    *,
    upstream: float,
    peaked: bool,
    frozen: bool,
) -> None:
    shape = SHAPES[name]
    arguments = (0,) if frozen else (0, 1)
    asked = "gradient of hidden states, head frozen" if frozen else "both gradients"
    states = "1.5 nats" if peaked else "random states"
    benchmark.group = f"linear_logprob, {asked}, {name}, {dtype}, {states}, upstream {upstream:g}"
    measure(
        benchmark,
        gradients(TOKEN_LOGPS[implementation](shape), arguments, upstream),
        lambda seed: make_inputs(shape, DTYPES[dtype], peaked=peaked, frozen=frozen, seed=seed),
        oracle=in_float64(gradients(ours(shape), arguments, upstream)),
        max_error=MAX_GRADIENT_ERROR[dtype],
        work=shape.work(DTYPES[dtype], matmuls=1 + len(arguments)),
        dtype=DTYPES[dtype],
        device=DEVICE,
        peer=implementation != "reprdpo",
        implementation=implementation,
        shape=shape.sizes(),
        upstream=upstream,
        oracle_key=("logprob", name, dtype, peaked, frozen, upstream),
        needs_bytes=shape.needs_bytes(DTYPES[dtype]),
        headline="kernel" if peaked and upstream == 1 else None,
    )


@pytest.mark.secondary
@implementations
@pytest.mark.parametrize(("name", "dtype"), IN_BOTH)
def test_both_gradients(benchmark: BenchmarkFixture, implementation: str, name: str, dtype: str) -> None:
    measure_gradients(benchmark, implementation, name, dtype, upstream=1.0, peaked=True, frozen=False)


@pytest.mark.secondary
@implementations
@pytest.mark.parametrize(("name", "dtype"), SHORT)
def test_both_gradients_random_states(benchmark: BenchmarkFixture, implementation: str, name: str, dtype: str) -> None:
    measure_gradients(benchmark, implementation, name, dtype, upstream=0.37, peaked=False, frozen=False)


@implementations
@pytest.mark.parametrize(("name", "dtype"), IN_BOTH)
def test_head_frozen(benchmark: BenchmarkFixture, implementation: str, name: str, dtype: str) -> None:
    measure_gradients(benchmark, implementation, name, dtype, upstream=1.0, peaked=True, frozen=True)


@implementations
@pytest.mark.parametrize(("name", "dtype"), IN_BOTH)
def test_no_gradient(benchmark: BenchmarkFixture, implementation: str, name: str, dtype: str) -> None:
    shape = SHAPES[name]
    benchmark.group = f"linear_logprob, no gradient, {name}, {dtype}, 1.5 nats (error in nats a token)"
    with torch.no_grad():
        measure(
            benchmark,
            TOKEN_LOGPS[implementation](shape),
            lambda seed: make_inputs(shape, DTYPES[dtype], peaked=True, frozen=False, seed=seed),
            oracle=in_float64(ours(shape)),
            max_error=MAX_LOGPROB_ERROR,
            work=shape.work(DTYPES[dtype], matmuls=1),
            dtype=DTYPES[dtype],
            device=DEVICE,
            peer=implementation != "reprdpo",
            implementation=implementation,
            shape=shape.sizes(),
            error=rms_error,
            oracle_key=("logprob", name, dtype),
            needs_bytes=shape.needs_bytes(DTYPES[dtype]),
            headline="kernel",
        )


# Logits that exist already


def gathered(logits_nV: Tensor, labels_n: Tensor) -> Tensor:
    return logits_nV.float().log_softmax(-1).gather(-1, labels_n[:, None]).squeeze(-1)


def cross_entropy(logits_nV: Tensor, labels_n: Tensor) -> Tensor:
    return -F.cross_entropy(logits_nV.float(), labels_n, reduction="none")


def from_logits(implementation: str) -> Any:
    if implementation == "compiled":
        torch._dynamo.reset()
        return torch.compile(gathered, dynamic=False)
    return {"reprdpo": ops.logprob, "eager": gathered, "cross_entropy": cross_entropy}[implementation]


@pytest.mark.parametrize("implementation", ["reprdpo", "eager", "cross_entropy", "compiled"])
@pytest.mark.parametrize(("name", "dtype"), SHORT)
def test_from_logits(benchmark: BenchmarkFixture, implementation: str, name: str, dtype: str) -> None:
    """Forward and backward over logits [n, V]: read twice, their gradient written once."""
    shape: HeadShape = SHAPES[name]
    benchmark.group = f"logprob of logits, forward + backward, {shape.scored} x {shape.vocabulary}, {dtype}"

    def make_logits(seed: int) -> list[Any]:
        generator = torch.Generator(DEVICE).manual_seed(seed)
        logits_nV = torch.randn(shape.scored, shape.vocabulary, generator=generator, device=DEVICE)
        labels_n = torch.randint(shape.vocabulary, (shape.scored,), generator=generator, device=DEVICE)
        logits_nV[torch.arange(shape.scored, device=DEVICE), labels_n] += shape.lean
        return [logits_nV.to(DTYPES[dtype]).requires_grad_(), labels_n]

    measure(
        benchmark,
        gradients(from_logits(implementation), (0,), 0.37),
        make_logits,
        oracle=in_float64(gradients(ops.logprob, (0,), 0.37)),
        max_error=MAX_GRADIENT_ERROR[dtype],
        work=Work(bytes=3 * shape.scored * shape.vocabulary * DTYPES[dtype].itemsize),
        dtype=DTYPES[dtype],
        device=DEVICE,
        peer=implementation != "reprdpo",
        implementation=implementation,
        shape={"N": shape.scored, "V": shape.vocabulary},
        upstream=0.37,
        oracle_key=("logits", name, dtype),
        needs_bytes=6 * 8 * shape.scored * shape.vocabulary,
    )
