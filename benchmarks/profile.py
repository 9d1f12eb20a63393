"""Where each op's time goes beyond its floor, on a CUDA device: `python -m benchmarks.profile`.

torch's profiler times an op's kernels, which are put into matmuls, the library's own passes and the rest; what calls in
a row take beyond their sum is a device that waits. Matmuls stand beside the fastest GEMM of the machine at their sizes,
passes beside their bytes at copy bandwidth.
"""

import argparse
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import bench_probe_reward as probe
from benchmarks.bench_linear_preference import fused
from benchmarks.device import (
    copy_bandwidth,
    device_events,
    device_name,
    event_seconds,
    graph_seconds,
    host_seconds,
)
from benchmarks.harness import DEVICE, Work, gradients
from benchmarks.logprob_peers import SHAPES, HeadShape, make_inputs, ours
from reprdpo import ops
from reprdpo.ops.backend import Request

Call = Callable[[], Any]
DTYPE = torch.bfloat16
BUDGET_SECONDS = 0.3
_MATMUL = re.compile(r"gemm|gemv|nvjet|cutlass|cublas|xmma|splitk|matmul|packed_product", re.IGNORECASE)
_OWN = re.compile(r"reprdpo|^_\w+_kernel$")  # C++ by its namespace, Triton's by the names of their functions


@dataclass(frozen=True)
class Case:
    """An op at a shape: how to make a call of it, what it must do at the least, and the bytes of its own passes."""

    name: str
    make: Callable[[], Call]
    work: Work
    pass_bytes: int
    backend: Request = "auto"


def head_cases(name: str, shape: HeadShape) -> Iterator[Case]:
    """The head's ops; a pass reads the fp32 logits of the scored tokens, and writes their residual in ``DTYPE``."""
    logits = 4 * shape.scored * shape.vocabulary
    residual = DTYPE.itemsize * shape.scored * shape.vocabulary

    def make(run: Callable[..., Any], frozen: bool) -> Call:
        return partial(run, *make_inputs(shape, DTYPE, peaked=True, frozen=frozen, seed=0))

    def no_gradient(*inputs: Any) -> Any:
        with torch.no_grad():
            return ours(shape)(*inputs)

    both, frozen = gradients(fused(shape), (0, 1)), gradients(fused(shape), (0,))
    yield Case(
        f"{name}: preference loss, both gradients", partial(make, both, False), shape.work(DTYPE, 3), logits + residual
    )
    yield Case(
        f"{name}: preference loss, head frozen", partial(make, frozen, True), shape.work(DTYPE, 2), logits + residual
    )
    yield Case(f"{name}: log-probs, no gradient", partial(make, no_gradient, True), shape.work(DTYPE, 1), logits)
    if shape.softcap is None:
        sparse = gradients(ours(shape, gradient_mass_eps=2**-9), (0,))
        moved = logits + 4 * residual  # thresholds, union and packing read the residual once more each
        yield Case(f"{name}: log-probs, frozen, eps 2^-9", partial(make, sparse, True), shape.work(DTYPE, 2), moved)


def probe_cases(L: int, D: int) -> Iterator[Case]:
    """The reward of rows that fit the cache: bytes are not what holds it, launches and their latency are."""
    for backend in ("native", "triton"):
        if not ops.backends()[backend].available:
            continue
        for task in (probe.forward, probe.confidence, probe.gradients):
            asks = task is probe.gradients

            def make(task: Callable[..., Any] = task, asks: bool = asks) -> Call:
                return partial(task, probe.ours, *probe.make_inputs(0, L, D, DTYPE, asks))

            work = probe.counted(task, L, D, DTYPE)
            yield Case(f"probe_reward {task.__name__}, {backend}", make, work, work.bytes, backend)


def cases(shapes: Mapping[str, HeadShape], L: int, D: int) -> Iterator[Case]:
    """Every op at the shapes of the bar."""
    yield from probe_cases(L, D)
    for name, shape in shapes.items():
        yield from head_cases(name, shape)


@dataclass(frozen=True)
class Times:
    """Seconds of a call: its floors, one of many in a row, in a CUDA graph (or None), the host's, each launch's."""

    floor: float
    matmul_floor: float
    pass_floor: float
    call: float
    graph: float | None
    host: float
    kernels: Sequence[tuple[str, float]]


def measure(case: Case) -> Times:
    call = case.make()
    with ops.use_backend(case.backend):
        for _ in range(3):
            call()
        kernels = device_events(call, DEVICE)
        try:
            graph = median(graph_seconds([call], DEVICE, BUDGET_SECONDS))
        except Exception:  # what cannot be captured has no such time
            torch.cuda.synchronize()
            graph = None
        floor = case.work.floor_seconds(DTYPE, DEVICE)
        return Times(
            floor=floor,
            matmul_floor=floor if case.work.gemms else 0.0,
            pass_floor=case.pass_bytes / copy_bandwidth(DEVICE),
            call=median(event_seconds(call, DEVICE, BUDGET_SECONDS)),
            graph=graph,
            host=host_seconds(call, DEVICE),
            kernels=kernels,
        )


def kind_of(kernel: str) -> str:
    """matmul, own or other."""
    return "matmul" if _MATMUL.search(kernel) else "own" if _OWN.search(kernel) else "other"


def report(name: str, times: Times, top: int = 8) -> str:
    """The op's time by kind, each beside its own floor, then the kernels that take longest."""

    def line(label: str, seconds: float, count: int, floor: float = 0.0) -> str:
        beside = f", of which {1e6 * floor:.1f} us are its floor" if floor else ""
        return f"  {label:29}{1e6 * seconds:10.1f} us {seconds / times.call:6.1%} in {count:3d} launches{beside}"

    sums: dict[str, float] = defaultdict(float)
    counts = Counter(kind_of(kernel) for kernel, _ in times.kernels)
    by_name: dict[str, list[float]] = defaultdict(list)
    for kernel, seconds in times.kernels:
        sums[kind_of(kernel)] += seconds
        by_name[kernel].append(seconds)
    waits = max(0.0, times.call - sum(sums.values()))
    graph = "cannot be captured" if times.graph is None else f"{1e6 * times.graph:.1f} us in a graph"
    lines = [
        f"{name}: {1e6 * times.call:.1f} us, {times.call / times.floor:.2f} times its floor of "
        f"{1e6 * times.floor:.1f} us; {graph}; host {1e6 * times.host:.1f} us, {len(times.kernels)} launches",
        line("matmuls", sums["matmul"], counts["matmul"], times.matmul_floor),
        line("own passes", sums["own"], counts["own"], times.pass_floor),
        line("other kernels, copies, fills", sums["other"], counts["other"]),
        f"  {'the device waits':29}{1e6 * waits:10.1f} us {waits / times.call:6.1%}",
    ]
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:top]
    lines += [f"    {1e6 * sum(each):10.1f} us {len(each):3d} x {kernel[:90]}" for kernel, each in longest]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    parser.add_argument("--out", type=Path, help="also write the report here, case after case")
    parser.add_argument("--once", action="store_true", help="only call each op once, as a profiler around it wants")
    arguments = parser.parse_args(argv)
    if DEVICE != "cuda":
        print("benchmarks.profile: there is no CUDA device", file=sys.stderr)
        return 2
    shapes = {name: SHAPES[name] for name in ("llama2-7b", "llama3-8b", "gemma2-2b")}
    if arguments.once:
        shapes = {"llama2-7b": SHAPES["llama2-7b"]}
    return run(cases(shapes, 32, 4096), arguments.out, arguments.once)


def run(every: Iterable[Case], out: Path | None, once: bool) -> int:
    """Each case's report as soon as it is measured; status 1 where one failed."""
    texts = [f"{device_name(DEVICE)}, torch {torch.__version__}"]
    failed = False
    for case in every:
        try:
            text = once_called(case) if once else report(case.name, measure(case))
        except Exception as failure:
            failed = True
            text = f"{case.name}: failed: {type(failure).__name__}: {str(failure)[:300]}"
        print(text, flush=True)
        texts.append(text)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    return int(failed)


def once_called(case: Case) -> str:
    with ops.use_backend(case.backend):
        case.make()()
    return case.name


if __name__ == "__main__":
    sys.exit(main())
