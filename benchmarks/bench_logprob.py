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
    secondary_unless,
)
from reprdpo import ops

# The long and the wide shapes are measured in the dtype they are trained in.
IN_BOTH = [(name, dtype) for name in SHAPES for dtype in DTYPES if dtype == "bfloat16" or name in ("cpu", "llama2-7b")]
SHORT = [(name, dtype) for name, dtype in IN_BOTH if name in ("cpu", "llama2-7b")]
# Mean entropy in nats to the standard deviation of the logits that has it, at 32000 words.
SHARPNESS = {0.5: 17.7, 1.5: 7.75, 3.0: 4.97}
# Beside ours the two fastest peers; both gradients are compared with all of them in bench_linear_preference.py.
fastest_peers = pytest.mark.parametrize(
    "implementation", secondary_unless(("reprdpo", "compiled", "cut_cross_entropy"), TOKEN_LOGPS)
)


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
@fastest_peers
@pytest.mark.parametrize(("name", "dtype"), IN_BOTH)
def test_both_gradients(benchmark: BenchmarkFixture, implementation: str, name: str, dtype: str) -> None:
    measure_gradients(benchmark, implementation, name, dtype, upstream=1.0, peaked=True, frozen=False)


@pytest.mark.secondary
@fastest_peers
@pytest.mark.parametrize(("name", "dtype"), SHORT)
def test_both_gradients_random_states(benchmark: BenchmarkFixture, implementation: str, name: str, dtype: str) -> None:
    measure_gradients(benchmark, implementation, name, dtype, upstream=0.37, peaked=False, frozen=False)


@fastest_peers
@pytest.mark.parametrize(("name", "dtype"), IN_BOTH)
def test_head_frozen(benchmark: BenchmarkFixture, implementation: str, name: str, dtype: str) -> None:
    measure_gradients(benchmark, implementation, name, dtype, upstream=1.0, peaked=True, frozen=True)


@pytest.mark.secondary
@fastest_peers
@pytest.mark.parametrize(("name", "dtype"), IN_BOTH)
def test_head_frozen_other_upstream(benchmark: BenchmarkFixture, implementation: str, name: str, dtype: str) -> None:
    measure_gradients(benchmark, implementation, name, dtype, upstream=0.37, peaked=True, frozen=True)


@pytest.mark.parametrize("eps", [None, 2**-9])
@pytest.mark.parametrize("shared", [0.0, pytest.param(0.5, marks=[pytest.mark.secondary] if DEVICE == "cpu" else [])])
@pytest.mark.parametrize("entropy", secondary_unless((1.5,), SHARPNESS))
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_frozen_mass_eps(
    benchmark: BenchmarkFixture, dtype: str, entropy: float, shared: float, eps: float | None
) -> None:
    """Where few columns hold the mass beside the label: logits of one standard deviation, labels drawn from them.

    ``shared``: how much of the logits' variance is the same in every row, as frequent tokens are in text.
    """
    name = {"cpu": "cpu", "cuda": "llama2-7b"}[DEVICE]
    shape = SHAPES[name]

    def sharp_inputs(seed: int) -> list[Any]:
        hidden, weight_VD, labels_ST, scored_n = make_inputs(shape, torch.float32, peaked=False, frozen=True, seed=seed)
        generator = torch.Generator(DEVICE).manual_seed(~seed)  # not the numbers that make_inputs drew
        common_D = torch.randn(shape.hidden, generator=generator, device=DEVICE)
        hidden = SHARPNESS[entropy] * ((1 - shared) ** 0.5 * hidden.detach() + shared**0.5 * common_D)
        p_nV = (hidden.flatten(0, 1)[scored_n] @ weight_VD.T).softmax(1)
        labels_ST.view(-1)[scored_n] = torch.multinomial(p_nV, 1, generator=generator).squeeze(1)
        return [hidden.to(DTYPES[dtype]).requires_grad_(), weight_VD.to(DTYPES[dtype]), labels_ST, scored_n]

    drawn = f"logits drawn, {entropy} nats" + (f", {shared:g} of their variance shared" if shared else "")
    benchmark.group = f"linear_logprob, head frozen, gradient_mass_eps, {name}, {dtype}, {drawn}"
    measure(
        benchmark,
        gradients(ours(shape, gradient_mass_eps=eps), (0,), 1.0),
        sharp_inputs,
        oracle=in_float64(gradients(ours(shape), (0,), 1.0)),
        max_error=MAX_GRADIENT_ERROR[dtype] + (eps or 0),
        work=shape.work(DTYPES[dtype], matmuls=2),
        dtype=DTYPES[dtype],
        device=DEVICE,
        peer=False,
        implementation="reprdpo" if eps is None else f"reprdpo, eps {eps:g}",
        shape=shape.sizes(),
        upstream=1.0,
        oracle_key=("logprob drawn", dtype, entropy, shared),
        needs_bytes=shape.needs_bytes(DTYPES[dtype]),
    )


@fastest_peers
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
