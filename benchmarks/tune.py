"""The Triton kernels' frozen configurations against their neighbours, on this device: `python -m benchmarks.tune`.

From the entry of a kernel's CONFIGS that serves the device, one field at a time is moved as long as the mean of its
cases' times falls; a configuration whose results are not those of the frozen one does not count. `--out` keeps every
trial as it is made; `--apply FILE` writes what was found into the kernels' source, to be committed with it.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from benchmarks import bench_probe_reward as probe
from benchmarks.conftest import commit_info, machine_info
from benchmarks.device import device_name, event_seconds, graph_seconds
from benchmarks.harness import DEVICE, gradients, relative_error
from benchmarks.logprob_peers import HeadShape, make_inputs, ours
from reprdpo import ops

KERNELS = Path(__file__).resolve().parent.parent / "kernels" / "reprdpo_kernels"
BUDGET_SECONDS = 0.15
# Less is noise.
GAIN = 0.97
_REGISTERS = (96, 128, 168, 255)
Call = Callable[[], Any]
Timer = Callable[[Call], float]


@dataclass(frozen=True)
class Kernel:
    """A module with CONFIGS, the entry that serves the device, and calls that its configuration is judged by."""

    module: str
    key: int
    fields: tuple[str, ...]
    cases: Callable[[], dict[str, Call]]
    timer: Timer


def serving(configs: dict[int, Any], capability: int) -> int:
    """The entry that serves a device: its own, or the newest before it."""
    return max(known for known in configs if known <= max(capability, min(configs)))


def neighbours(field: str, value: int) -> list[int]:
    """What to try instead of a value: half and twice, a stage less or more, another number of registers."""
    if field.endswith("registers"):
        return [other for other in _REGISTERS if other != value]
    if field == "stages":
        return [other for other in (value - 2, value - 1, value + 1) if other > 0]
    return [other for other in (value // 2, 2 * value) if other > 0]


def search(
    start: Any, fields: Sequence[str], judge: Callable[[Any], float], until: Callable[[], bool] = lambda: False
) -> Any:
    """The best configuration found; a judgement of the start is 1, of what cannot be infinity; none is judged twice."""
    known = {start: 1.0}
    best, moved = start, True
    while moved:
        moved = False
        for field in fields:
            for value in neighbours(field, getattr(best, field)):
                candidate = best._replace(**{field: value})
                if candidate in known or until():
                    continue
                known[candidate] = judge(candidate)
                if known[candidate] < GAIN * known[best]:
                    best, moved = candidate, True
                    break
    return best


def head_rows(rows: int, vocabulary: int, **options: Any) -> Call:
    """The pass over fp32 logits [rows, vocabulary] that leaves a bf16 residual."""
    from reprdpo_kernels.logprob import token_residual

    generator = torch.Generator(DEVICE).manual_seed(0)
    logits = torch.randn(rows, vocabulary, generator=generator, device=DEVICE)
    labels = torch.randint(vocabulary, (rows,), generator=generator, device=DEVICE)
    settings = {"softcap": None, "entropy": False, "stats": False} | options
    arguments = (logits, labels, None, 1.0, settings.pop("softcap"), 1.0)
    return partial(token_residual, *arguments, residual_dtype=torch.bfloat16, **settings)


def logprob_cases(rows: int = 2048, vocabularies: Sequence[int] = (32000, 128256, 256000)) -> dict[str, Call]:
    short, long, widest = vocabularies
    return {
        f"{rows} x {short}": head_rows(rows, short),
        f"{rows} x {short}, statistics": head_rows(rows, short, entropy=True, stats=True),
        f"{rows} x {long}": head_rows(rows, long),
        f"{rows} x {widest}, softcap": head_rows(rows, widest, softcap=30.0),
    }


def probe_cases(L: int = 32, D: int = 4096) -> dict[str, Call]:
    def case(task: Callable[..., Any], dtype: torch.dtype) -> Call:
        inputs = probe.make_inputs(0, L, D, dtype, requires_grad=task is probe.gradients)
        return partial(task, probe.ours, *inputs)

    tasks = (probe.forward, probe.gradients)
    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    return {f"{task.__name__}, {name}": case(task, dtype) for task in tasks for name, dtype in dtypes.items()}


def sparse_cases(shape: HeadShape | None = None, sharpness: float = 7.75) -> dict[str, Call]:
    """The frozen head's gradient at 1.5 nats, as the bar has it: the product is the half of it that moves."""
    shape = shape or HeadShape(4, 512, 4096, 32000)
    hidden, *rest = make_inputs(shape, torch.bfloat16, peaked=False, frozen=True, seed=0)
    inputs = [(sharpness * hidden.detach()).requires_grad_(), *rest]
    return {"frozen, eps 2^-9": partial(gradients(ours(shape, gradient_mass_eps=2**-9), (0,)), *inputs)}


def kernels(capability: tuple[int, int]) -> list[Kernel]:
    def entry(module: str, number: int, cases: Callable[[], dict[str, Call]], timer: Timer) -> Kernel:
        loaded = import_module(f"reprdpo_kernels.{module}")
        return Kernel(module, serving(loaded.CONFIGS, number), loaded.Config._fields, cases, timer)

    major, minor = capability
    return [
        entry("logprob", 10 * major + minor, logprob_cases, in_a_row),
        entry("probe_reward", major, probe_cases, in_a_graph),
        entry("sparse_product", 10 * major + minor, sparse_cases, in_a_row),
    ]


def in_a_row(call: Call) -> float:
    return median(event_seconds(call, DEVICE, BUDGET_SECONDS))


def in_a_graph(call: Call) -> float:
    """What takes microseconds shows only where no host is in between."""
    return median(graph_seconds([call] * 8, DEVICE, BUDGET_SECONDS))


def results(call: Call) -> list[Tensor]:
    """A call's tensors that hold something, in float64."""
    found = call()
    tensors = (found,) if isinstance(found, Tensor) else found
    return [each.detach().double() for each in tensors if each.numel()]


def same(found: Iterable[Tensor], wanted: Iterable[Tensor], tolerance: float = 2**-7) -> bool:
    return all(bool(relative_error(a, b) <= tolerance) for a, b in zip(found, wanted, strict=True))


def tuned(kernel: Kernel, seconds: float, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The record of one kernel's search; ``keep`` is given it after every trial."""
    configs = import_module(f"reprdpo_kernels.{kernel.module}").CONFIGS
    frozen, end, cases = configs[kernel.key], time.monotonic() + seconds, kernel.cases()
    tried: list[dict[str, Any]] = []
    record: dict[str, Any] = {"module": kernel.module, "key": kernel.key, "frozen": frozen._asdict(), "tried": tried}
    try:
        wanted = {name: results(call) for name, call in cases.items()}
        base = {name: kernel.timer(call) for name, call in cases.items()}
        tried.append({"config": frozen._asdict(), "seconds": base, "ratio": 1.0})

        def judge(candidate: Any) -> float:
            configs[kernel.key] = candidate
            trial: dict[str, Any] = {"config": candidate._asdict(), "seconds": {}, "ratio": None}
            try:
                for name, call in cases.items():
                    if not same(results(call), wanted[name]):
                        raise ValueError(f"{name}: not the frozen configuration's results")
                    trial["seconds"][name] = kernel.timer(call)
                trial["ratio"] = fmean(trial["seconds"][name] / base[name] for name in cases)
            except Exception as failure:  # too many registers, too much shared memory, or wrong
                trial["reason"] = f"{type(failure).__name__}: {str(failure)[:200]}"
            tried.append(trial)
            record.update(best_of(tried))
            keep(record)
            return trial["ratio"] or float("inf")

        search(frozen, kernel.fields, judge, lambda: time.monotonic() > end)
    finally:
        configs[kernel.key] = frozen
    return record | best_of(tried) | {"stopped": time.monotonic() > end}


def best_of(tried: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The best configuration so far, the first of them unless another is better by more than noise, and its ratio."""
    best = min((trial for trial in tried if trial["ratio"]), key=lambda trial: trial["ratio"])
    chosen = best if best["ratio"] < GAIN else tried[0]
    return {"best": chosen["config"], "ratio": chosen["ratio"]}


def apply(record: dict[str, Any], folder: Path = KERNELS) -> bool:
    """Write a record's best configuration into its module's CONFIGS; False where it is the one that stands there."""
    path = folder / f"{record['module']}.py"
    text = path.read_text(encoding="utf-8")
    if record["best"] == record["frozen"]:
        return False
    table = re.search(r"^CONFIGS = \{.*?\}$", text, re.MULTILINE | re.DOTALL)
    new = f"{record['key']}: Config({', '.join(f'{name}={value}' for name, value in record['best'].items())})"
    changed, count = re.subn(rf"\b{record['key']}: Config\([^()]*\)", new, table[0] if table else "")
    if table is None or count != 1:
        raise ValueError(f"{path} has no entry {record['key']} in CONFIGS")
    path.write_text(text[: table.start()] + changed + text[table.end() :], encoding="utf-8")
    return True


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("tuned.json"), help="the trials (default: tuned.json)")
    parser.add_argument("--seconds", type=float, default=450, help="for all kernels together (default: 450)")
    parser.add_argument("--apply", type=Path, metavar="FILE", help="write what FILE holds into the kernels' source")
    arguments = parser.parse_args(argv)
    if arguments.apply:
        for record in json.loads(arguments.apply.read_text(encoding="utf-8"))["kernels"]:
            if "best" in record:
                print(f"{record['module']}.py: {'changed' if apply(record) else 'stays as it is'}")
        return 0
    if DEVICE != "cuda":
        print("benchmarks.tune: there is no CUDA device", file=sys.stderr)
        return 2
    return tune(kernels(torch.cuda.get_device_capability()), arguments.out, arguments.seconds)


def tune(every: Sequence[Kernel], out: Path, seconds: float) -> int:
    """Every kernel's search, for an equal part of the time; status 1 where one failed."""
    result: dict[str, Any] = {
        "device": device_name(DEVICE),
        "machine_info": machine_info(),
        "commit_info": commit_info(),
        "kernels": [],
    }

    def keep(record: dict[str, Any]) -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        shown = result | {"kernels": [*result["kernels"], record]}
        out.write_text(json.dumps(shown, indent=1) + "\n", encoding="utf-8")

    failed = False
    with ops.use_backend("triton"):
        for kernel in every:
            try:
                record = tuned(kernel, seconds / len(every), keep)
            except Exception as failure:
                failed = True
                record = {"module": kernel.module, "reason": f"{type(failure).__name__}: {str(failure)[:300]}"}
            keep(record)
            result["kernels"].append(record)
            print(line(record), flush=True)
    return int(failed)


def line(record: dict[str, Any]) -> str:
    """A record in words."""
    if "best" not in record:
        return f"{record['module']}: failed: {record['reason']}"
    trials = f"{len(record['tried']) - 1} others tried{', then out of time' if record['stopped'] else ''}"
    if record["best"] == record["frozen"]:
        return f"{record['module']}: {record['frozen']} stays, {trials}"
    return f"{record['module']}: {record['best']} takes {record['ratio']:.3f} of {record['frozen']}, {trials}"


if __name__ == "__main__":
    sys.exit(main())
