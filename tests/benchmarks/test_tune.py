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

    best = tune.search(Config(), Config._fields, lambda config: judge(config) / judge(Config()))
    assert best[:2] == (1024, 16)
    tried = [config for config in seen if config != Config()]
    assert len(tried) == len(set(tried))


def test_the_search_takes_no_gain_that_is_noise_and_stops_in_time() -> None:
    assert tune.search(Config(), Config._fields, lambda config: 0.98) == Config()
    assert tune.search(Config(), Config._fields, lambda config: 0.1, until=lambda: True) == Config()


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
def test_trials_are_kept_and_a_kernel_that_fails_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A timer that likes whatever is not the frozen configuration stands for the device's."""
    monkeypatch.setattr(tune, "machine_info", dict)
    configs = tune.import_module("reprdpo_kernels.logprob").CONFIGS
    frozen = configs[80]
    broken = tune.Kernel("logprob", 80, (), lambda: {"broken": lambda: 1 // 0}, lambda call: 1.0)
    works = tune.Kernel(
        "logprob",
        80,
        ("warps",),
        lambda: tune.logprob_cases(2, (100, 150, 260)),
        lambda call: 1.0 if configs[80] == frozen else 0.5,
    )
    assert tune.tune([broken, works], tmp_path / "tuned.json", 60) == 1
    first, second = json.loads((tmp_path / "tuned.json").read_text(encoding="utf-8"))["kernels"]
    assert "ZeroDivisionError" in first["reason"]
    assert second["best"] == frozen._asdict() | {"warps": frozen.warps // 2}
    assert second["ratio"] == 0.5
    assert len(second["tried"]) == 3
    assert configs[80] == frozen


def test_the_best_of_trials_is_kept_while_they_go_on() -> None:
    tried: list[dict[str, Any]] = [{"config": "frozen", "ratio": 1.0}]
    for config, ratio, best in [("a", 0.98, "frozen"), ("b", None, "frozen"), ("c", 0.9, "c"), ("d", 0.95, "c")]:
        tried.append({"config": config, "ratio": ratio})
        assert tune.best_of(tried)["best"] == best


@pytest.mark.interpreter
def test_the_other_kernels_cases_run() -> None:
    calls = [tune.probe_cases(1, 8)["forward, bfloat16"], *tune.sparse_cases(HeadShape(1, 2, 8, 64)).values()]
    with ops.use_backend("triton"):
        assert all(result.isfinite().all() for call in calls for result in tune.results(call))


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
