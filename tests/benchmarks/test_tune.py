"""benchmarks.tune: the search, what it does with a configuration that is wrong, and the source that it writes."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks import tune
from benchmarks.logprob_peers import HeadShape
from reprdpo import ops


class Config(NamedTuple):
    block: int = 4096
    warps: int = 8
    stages: int = 3


def test_the_search_goes_down_one_field_at_a_time_and_judges_nothing_twice() -> None:
    seen: list[Config] = []

    def judge(config: Config) -> float:
        seen.append(config)
        if config.warps > 16:
            return float("inf")
        return abs(config.block - 1024) / 4096 + (2 if config.warps < 16 else 1) + 0.001 * config.stages

    best, judgement = tune.search(Config(), Config._fields, lambda config: judge(config) / judge(Config()))
    assert best[:2] == (1024, 16)
    assert judgement < 1
    tried = [config for config in seen if config != Config()]
    assert len(tried) == len(set(tried))


def test_the_search_takes_no_gain_that_is_noise_and_stops_in_time() -> None:
    assert tune.search(Config(), Config._fields, lambda config: 0.98) == (Config(), 1.0)
    assert tune.search(Config(), Config._fields, lambda config: 0.1, until=lambda: True) == (Config(), 1.0)


@pytest.mark.parametrize(
    ("module", "key", "change"),
    [
        ("logprob", 90, {"block": 2048}),
        ("probe_reward", 9, {"forward_warps": 16, "backward_registers": 255}),
        ("sparse_product", 90, {"stages": 4}),
        ("sparse_product", 120, {"block_d": 64}),
    ],
)
def test_what_was_found_is_written_into_the_entry_alone(
    module: str, key: int, change: dict[str, int], tmp_path: Path
) -> None:
    shutil.copy(tune.KERNELS / f"{module}.py", tmp_path)
    loaded = load(tune.KERNELS / f"{module}.py")
    frozen = loaded.CONFIGS[key]._asdict()
    record: dict[str, Any] = {"module": module, "key": key, "frozen": frozen, "best": frozen}
    assert not tune.apply(record, tmp_path)
    assert tune.apply(record | {"best": frozen | change}, tmp_path)
    written = load(tmp_path / f"{module}.py")
    wanted = loaded.CONFIGS | {key: loaded.Config(**frozen | change)}
    assert wanted == written.CONFIGS
    with pytest.raises(ValueError, match="no entry 7 in CONFIGS"):
        tune.apply(record | {"key": 7, "best": frozen | change}, tmp_path)


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("written", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.interpreter
def test_every_kernel_s_cases_run_and_trials_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A timer that likes whatever is not the frozen configuration stands for the device's."""
    monkeypatch.setattr(tune, "machine_info", dict)
    monkeypatch.setattr(tune, "neighbours", lambda field, value: [value // 2])
    small = {
        "logprob": lambda: tune.logprob_cases(2, (100, 150, 260)),
        "probe_reward": lambda: tune.probe_cases(1, 8),
    }
    kernels = [
        tune.Kernel(each.module, each.key, each.fields[-1:], small[each.module], timer_of(each))
        for each in tune.kernels((8, 0))
        if each.module in small
    ]
    broken = tune.Kernel("logprob", 90, (), lambda: {"broken": lambda: 1 // 0}, lambda call: 1.0)
    assert tune.tune([broken, *kernels], tmp_path / "tuned.json", 60) == 1
    first, *records = json.loads((tmp_path / "tuned.json").read_text(encoding="utf-8"))["kernels"]
    assert "ZeroDivisionError" in first["reason"]
    for kernel, record in zip(kernels, records, strict=True):
        field = kernel.fields[0]
        assert record["best"] | {field: 0} == record["frozen"] | {field: 0}
        assert record["best"][field] != record["frozen"][field], record["tried"]
        assert record["ratio"] == 0.5
    (product,) = tune.sparse_cases(HeadShape(1, 2, 8, 64)).values()
    with ops.use_backend("triton"):
        assert all(result.isfinite().all() for result in tune.results(product))


def timer_of(kernel: tune.Kernel) -> tune.Timer:
    configs = tune.import_module(f"reprdpo_kernels.{kernel.module}").CONFIGS
    frozen = configs[kernel.key]
    return lambda call: 1.0 if configs[kernel.key] == frozen else 0.5


@pytest.mark.interpreter
def test_a_configuration_with_other_results_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = tune.import_module("reprdpo_kernels.logprob").CONFIGS
    frozen = configs[90]

    def call() -> Any:
        return torch.full((2,), float(configs[90].warps == frozen.warps) + 1)

    kernel = tune.Kernel("logprob", 90, ("warps",), lambda: {"a": call}, lambda call: configs[90].warps)
    record = tune.tuned(kernel, 60, lambda record: None)
    assert record["best"] == record["frozen"]
    assert all("not the frozen configuration's results" in trial["reason"] for trial in record["tried"][1:])
    assert configs[90] == frozen
