"""What the machine gives at most: copying a large tensor, and the head's three matmuls at the protocol's shapes."""

from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import DEVICE, Work, measure

# Scored tokens, hidden size, vocabulary: the shapes of the protocol.
HEADS = {
    "cpu": {"cpu": (1024, 1024, 32000)},
    "cuda": {
        "llama2-7b": (2048, 4096, 32000),
        "llama3-8b": (2048, 4096, 128256),
        "gemma2-2b": (4096, 2304, 256000),
    },
}[DEVICE]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("product", ["logits", "grad_hidden", "grad_weight"])
@pytest.mark.parametrize("head", HEADS)
def test_matmul(benchmark: BenchmarkFixture, head: str, product: str, dtype: str) -> None:
    """One matmul as `torch.mm` runs it on row-major operands; its floor is the fastest layout and output."""
    n, d, v = HEADS[head]
    rows, columns, inner = {"logits": (n, v, d), "grad_hidden": (n, d, v), "grad_weight": (v, d, n)}[product]
    benchmark.group = f"ceiling: {product} of {head}, {n} tokens, {d} x {v}, {dtype}"

    def make_inputs(seed: int) -> list[Any]:
        generator = torch.Generator(DEVICE).manual_seed(seed)
        shapes = ((rows, inner), (inner, columns))
        return [torch.randn(*shape, generator=generator, device=DEVICE).to(DTYPES[dtype]) for shape in shapes]

    measure(
        benchmark,
        lambda left, right: left @ right,
        make_inputs,
        oracle=lambda left, right: left.double() @ right.double(),
        max_error=1e-2 if dtype == "bfloat16" else 1e-5,
        work=Work(
            bytes=DTYPES[dtype].itemsize * (rows * inner + inner * columns + rows * columns),
            gemms=((rows, columns, inner),),
        ),
        dtype=DTYPES[dtype],
        device=DEVICE,
        peer=True,
        implementation="torch.mm",
        shape={"N": n, "D": d, "V": v},
        needs_bytes=10 * 8 * max(rows * inner, inner * columns, rows * columns),
    )


def test_copy(benchmark: BenchmarkFixture) -> None:
    count = 2**27 if DEVICE == "cpu" else 2**30
    benchmark.group = f"ceiling: copy of {count / 1e9:.3g} GB"
    measure(
        benchmark,
        torch.clone,
        lambda seed: [torch.randint(256, (count,), dtype=torch.uint8, device=DEVICE)],
        oracle=lambda source: source,
        max_error=0,
        work=Work(bytes=2 * count),
        dtype=torch.uint8,
        device=DEVICE,
        peer=True,
        implementation="torch.clone",
        shape={"bytes": count},
    )
