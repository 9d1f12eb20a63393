"""Prints which kernels launches would compile, a JSON line a step: ops run on the CPU, and no kernel does.

Triton asks its cache hook whether to compile; told no, it launches nothing. Under ``capturing`` the ops do as they
would in a CUDA graph.
"""

import importlib
import json
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

probe_reward, *_ = (
    importlib.import_module(f"reprdpo_kernels.{name}")
    for name in ("probe_reward", "linear_logprob", "logprob", "preference_loss", "sparse_product")
)
# Kernels are jitted by now; the ops are to serve CPU tensors from Triton, as they do for its interpreter.
os.environ["TRITON_INTERPRET"] = "1"
ops = importlib.import_module("reprdpo.ops")
del os.environ["TRITON_INTERPRET"]
schedules = [importlib.import_module(f"reprdpo.ops.{name}_schedule") for name in ("head", "pair")]

VOCABULARY, WIDTH = 1000, 64
asked: set[str] = set()


def refuse_to_compile(*_: Any, key: str, fn: Any, **__: Any) -> bool:
    asked.add(f"{fn.name} {key}")
    return True


def kernels(*steps: Callable[[], Any]) -> set[str]:
    asked.clear()
    for step in steps:
        step()
    return set(asked)


def capturing(step: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> None:
        arrivals = probe_reward._arrivals
        probe_reward._arrivals = lambda count, device: probe_reward._take(count, device, capturing=True)
        for module in schedules:
            module.capturing = lambda tensor: True
        step()
        probe_reward._arrivals = arrivals
        for module in schedules:
            module.capturing = lambda tensor: False

    return run


def preference(sequences: int, length: int, *, frozen: bool = False, number: float = 0.1, **options: Any) -> Any:
    hidden = torch.randn(sequences, length, WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=not frozen)
    labels = torch.randint(VOCABULARY, (sequences, length))
    labels[:, : length // 3] = -100
    zeros = torch.zeros(sequences // 2)
    references = {"ref_chosen_logp": zeros, "ref_rejected_logp": zeros}
    out = ops.linear_preference_loss(hidden, weight, labels, **references, beta=number, temperature=number, **options)
    return torch.autograd.grad(out.loss, (hidden,) if frozen else (hidden, weight))


def token_logprobs(rows: int, *, frozen: bool, **options: Any) -> Any:
    hidden = torch.randn(rows, WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=not frozen)
    labels = torch.randint(VOCABULARY, (rows,))
    labels[::4] = -100
    out = ops.linear_logprob(hidden, weight, labels, **options)
    return torch.autograd.grad(out.sum(), (hidden,) if frozen else (hidden, weight))


def reward(sequences: int, number: float = 1.0) -> Any:
    layers, index = [torch.randn(sequences, 5, 40) for _ in range(3)], torch.zeros(sequences, dtype=torch.long)
    parameters = [torch.randn(shape, requires_grad=True) for shape in ((3, 40), (3,), (3, 40), (3,))]
    out = ops.probe_confidence(layers, index, *parameters, alpha=number)
    return torch.autograd.grad(out.reward.sum(), parameters)


def main() -> None:
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
        )
    )
    triton.knobs.runtime.jit_cache_hook = refuse_to_compile
    small = 2**16  # bytes of a tile
    lengths, numbers = (7, 16, 33, 50), (0.1, 0.5, 1.0, 2.0)
    with ops.use_backend("triton"):
        first = kernels(lambda: preference(4, 15), lambda: preference(4, 15, max_tile_bytes=small), lambda: reward(4))
        more = [lambda n=n, s=s: preference(s, n) for n in lengths for s in (2, 6)]
        more += [lambda n=n, s=s: preference(s, n, max_tile_bytes=small) for n in lengths for s in (2, 6)]
        more += [lambda x=x: preference(4, 15, number=x) for x in numbers]
        more += [lambda s=s, x=x: reward(s, x) for s in (2, 8, 300) for x in numbers]
        print(json.dumps({"what": "sizes and numbers", "first": len(first), "new": sorted(kernels(*more) - first)}))
        steps: dict[str, Callable[[], Any]] = {
            "both gradients": lambda: preference(4, 15, return_stats=True),
            "head frozen": lambda: preference(4, 15, frozen=True),
            "tiles": lambda: token_logprobs(33, frozen=False, max_tile_bytes=small // 2),
            "gradient_mass_eps": lambda: token_logprobs(33, frozen=True, gradient_mass_eps=0.01),
            "reward": lambda: reward(8),
        }
        for what, step in steps.items():
            warm = kernels(step, step)
            captured = kernels(*[capturing(step)] * 3)
            print(json.dumps({"what": what, "first": len(warm), "new": sorted(captured - warm)}))


if __name__ == "__main__":
    main()
