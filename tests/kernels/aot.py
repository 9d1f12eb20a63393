"""Compile a Triton kernel ahead of time, with no GPU, and read what it costs: registers, stack, shared memory.

Compilation runs in a worker process without TRITON_INTERPRET, as Triton decorates kernels once, one way or the other.
"""

import atexit
import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

CAPABILITIES = (80, 90, 100)
# Bytes of shared memory that one program may take.
MAX_SHARED = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


class Resources(NamedTuple):
    """A kernel's registers a thread, bytes of stack a thread (where spills go) and of shared memory; loads, rows."""

    registers: int
    spills: int
    shared: int
    narrow_loads: int  # of 2 bytes a thread: a row of bf16 whose alignment the compiler has lost
    narrow_rows: int  # products with a stride in 32 bits: addresses that end at 2^31 elements
    # In the order of the code: l a load, c one past the first-level cache, s a store, b a barrier of all threads,
    # a an atomic that releases and acquires for the whole device, x any other.
    accesses: str


def compile(
    kernel: Any,
    signature: Mapping[str, str | Sequence[str]],
    constexprs: Mapping[str, Any],
    capability: int,
    *,
    num_warps: int = 4,
    num_stages: int = 3,
    maxnreg: int | None = None,
) -> Resources:
    """Compile a module's jitted ``kernel``, in this process jitted or interpreted, for ``sm_{capability}``.

    Args:
        signature: the type of every argument that is not in ``constexprs``: ``"*bf16"``, ``"i64"``, ``"fp32"``; with
            ``":16"`` behind it where the launch would find a pointer or an integer divisible by 16;
            a tuple's is the sequence of its elements' types.
        constexprs: the value of every constexpr argument, of None arguments, and of integers that are 1; a dtype is
            written as in ``"tl.bfloat16"``.

    Raises:
        RuntimeError: the kernel does not compile; the message is the compiler's.
    """
    request = {
        "module": kernel.fn.__module__,
        "kernel": kernel.fn.__name__,
        "signature": dict(signature),
        "constexprs": dict(constexprs),
        "capability": capability,
        # As the launchers ask for, whatever this Triton's default.
        "options": {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg, "enable_fp_fusion": True},
    }
    worker = _worker()
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(json.dumps(request) + "\n")
    worker.stdin.flush()
    if not (line := worker.stdout.readline()):
        raise RuntimeError(f"the compiler's process ended with {worker.wait()}")
    answer = json.loads(line)
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return Resources(**answer)


@functools.cache
def _worker() -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    worker = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    atexit.register(_stop, worker)
    return worker


def _stop(worker: subprocess.Popen[str]) -> None:
    assert worker.stdin is not None
    worker.stdin.close()
    worker.wait()


def _serve() -> None:
    """Answer requests, a JSON line each, until there are no more."""
    # Whatever else prints goes to stderr.
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        try:
            answer: dict[str, Any] = _compile(**json.loads(line))._asdict()
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def _compile(
    module: str,
    kernel: str,
    signature: dict[str, str | list[str]],
    constexprs: dict[str, Any],
    capability: int,
    options: dict[str, int | None],
) -> Resources:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    jitted = getattr(importlib.import_module(module), kernel)
    if missing := set(jitted.arg_names) ^ (signature.keys() | constexprs.keys()):
        raise TypeError(f"{kernel}: signature and constexprs do not fit its arguments: {sorted(missing)}")
    types = {name: "constexpr" if name in constexprs else signature[name] for name in jitted.arg_names}
    divisible = [["tt.divisibility", 16]]
    attributes = {(position,): divisible for position, name in enumerate(types) if types[name][-3:] == ":16"}
    types = {name: text.removesuffix(":16") if isinstance(text, str) else tuple(text) for name, text in types.items()}
    constexprs = {name: _dtype(value) for name, value in constexprs.items()}
    source = ASTSource(jitted, types, constexprs, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack = _usage(compiled.asm["cubin"])
    narrow_loads = len(re.findall(r"ld\.global\S*\.b16", compiled.asm["ptx"]))
    arguments = [
        name
        for name, each in types.items()
        if name not in constexprs
        for _ in (each if isinstance(each, tuple) else (each,))
    ]
    narrow_rows = _narrow_rows(compiled.asm["ttir"], arguments)
    found = re.findall(r"(ld|st|atom|red)\.global(\S*)|(bar\.sync)", compiled.asm["ptx"])
    accesses = "".join(_access(*each) for each in found)
    return Resources(registers, stack, compiled.metadata.shared, narrow_loads, narrow_rows, accesses)


def _access(kind: str, how: str, barrier: str) -> str:
    if barrier:
        return "b"
    if kind in ("atom", "red"):
        return "a" if how.startswith(".gpu.acq_rel") else "x"
    return "s" if kind == "st" else "c" if how.startswith(".cg") else "l"


def _narrow_rows(ttir: str, arguments: list[str]) -> int:
    """32-bit products of a stride among the kernel's ``arguments`` with a number that is not a constant."""
    header = ttir[ttir.index("tt.func public") :].split("attributes", 1)[0]
    values = dict(zip(arguments, re.findall(r"(%[\w.]+): ", header), strict=True))
    strides = {value for name, value in values.items() if name.endswith("stride")}
    constants = set(re.findall(r"(%\w+) = arith\.constant -?\d+ : i32", ttir))
    products = [set(pair) for pair in re.findall(r"arith\.muli (%\w+), (%\w+) : i32", ttir)]
    return sum(bool(pair & strides) and not pair & constants for pair in products)


def _dtype(value: Any) -> Any:
    import triton.language as tl

    return getattr(tl, value[3:]) if isinstance(value, str) and value.startswith("tl.") else value


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of the one kernel in ``cubin``."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.check_output([cuobjdump, "--dump-resource-usage", file.name], text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {text}")
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    _serve()
