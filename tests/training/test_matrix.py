"""LoRA, activation checkpointing, bf16 autocast, compiled layers and packed rows in every combination: a few steps."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from test_trainer import logged
from torch import nn

from reprdpo.reward import HiddenStateTap
from reprdpo.training import ReprDPOTrainer

NAMES = ("lora", "ckpt", "bf16", "compile")
# Compiling takes seconds a case: one with everything stands for the rest outside the slow tests.
CASES = [
    pytest.param(
        *case,
        id="-".join(itertools.compress(NAMES, case)) or "plain",
        marks=[pytest.mark.slow] if case[-1] and not all(case) else [],
    )
    for case in itertools.product((False, True), repeat=4)
]


def with_lora(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj", "lm_head"]))


def run(
    folder: Path, lora: bool, checkpointing: bool, bf16: bool, compiled: bool, packing: str = "padded"
) -> tuple[list[Any], nn.Module]:
    model: Any = tiny_runs.make_model()
    if compiled:
        for layer in model.model.layers:
            layer.compile(backend="eager" if lora else "aot_eager", dynamic=True)
    model = with_lora(model) if lora else model
    settings: dict[str, Any] = {"max_steps": 3, "bf16": bf16, "learning_rate": 1e-2, "packing": packing}
    if checkpointing:
        settings |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    config = tiny_runs.make_config(str(folder), **settings)
    reward = tiny_runs.make_reward()
    ReprDPOTrainer(model, config, train_dataset=tiny_runs.make_pairs(), reward=reward).train()
    return logged(folder), model


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The lines of the run with the same trainable parameters and nothing else."""
    torch._dynamo.reset()
    found: dict[bool, list[Any]] = {}

    def lines(lora: bool) -> list[Any]:
        if lora not in found:
            found[lora] = run(tmp_path_factory.mktemp("plain"), lora, False, False, False)[0]
        return found[lora]

    return lines


@pytest.mark.parametrize("packing", ["padded", "prefix"])
@pytest.mark.parametrize(("lora", "checkpointing", "bf16", "compiled"), CASES)
def test_each_combination_trains_as_the_plain_run(
    plain: Any, tmp_path: Path, lora: bool, checkpointing: bool, bf16: bool, compiled: bool, packing: str
) -> None:
    torch._dynamo.reset()
    lines, model = run(tmp_path, lora, checkpointing, bf16, compiled, packing)
    wanted = plain(lora)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=0.02 if bf16 else 1e-5)
    tolerance = 0.1 if bf16 else 1e-4
    for line, other in zip(lines, wanted, strict=True):
        for name in ("loss", "hybrid/margins", "rewards/margins"):
            assert line[name] == pytest.approx(other[name], abs=tolerance), name
    assert lines[-1]["rewards/margins"] != lines[0]["rewards/margins"]
    if lora:
        names = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert all("lora_" in name for name in names)


def test_under_lora_the_reference_is_the_base_model(tmp_path: Path) -> None:
    """Adapters that already say something do not speak in the reference, and no second model is made."""
    model = with_lora(tiny_runs.make_model())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    pairs, data = tiny_runs.make_pairs(), {}
    for name, policy in (("base", tiny_runs.make_model()), ("lora", model)):
        config = tiny_runs.make_config(str(tmp_path / name))
        data[name] = ReprDPOTrainer(policy, config, train_dataset=pairs, reward=tiny_runs.make_reward()).train_dataset
    assert data["lora"]["ref_chosen_logps"][:] == pytest.approx(data["base"]["ref_chosen_logps"][:], abs=1e-5)
    ids = torch.tensor([pairs[0]["chosen_input_ids"]])
    with torch.no_grad(), HiddenStateTap(model) as tap:
        model(input_ids=ids)
    with torch.no_grad(), HiddenStateTap(base := tiny_runs.make_model()) as untouched:
        base(input_ids=ids)
    assert not torch.allclose(tap.states[-1], untouched.states[-1]), "the adapters were left off"
