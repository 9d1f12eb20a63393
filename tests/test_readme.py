"""What the README shows runs as it stands."""

import re
from pathlib import Path

import torch
import yaml

from reprdpo.experiments.config import RunConfig, build

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_example_of_an_op_runs() -> None:
    (example,) = blocks("python")
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    gradient = names["hidden_states"][-1].grad  # type: ignore[index]
    assert torch.isfinite(gradient).all()
    assert gradient.abs().sum() > 0


def test_the_example_of_a_run_is_valid() -> None:
    (example,) = blocks("yaml")
    config = build(RunConfig, yaml.safe_load(example))
    assert "reprdpo" in config.systems
