"""Nested state survives a round trip exactly; torn checkpoints are passed over, those of another course refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from reprdpo.errors import UserError
from reprdpo.training import ReprDPOTrainer
from reprdpo.training.checkpoint import last_checkpoint, load_state, save_state


def test_optimizer_state_round_trip_is_exact(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    layer(torch.rand(4, 3)).sum().backward()
    optimizer.step()
    state = {"adam": optimizer.state_dict(), "empty": [], "none": None, "name": "x", "shared": layer.weight[:, ::2]}
    save_state(tmp_path / "state.safetensors", state)
    got = load_state(tmp_path / "state.safetensors")
    assert set(got["adam"]["state"]) == {0, 1}
    for key in ("exp_avg", "exp_avg_sq", "step"):
        assert torch.equal(got["adam"]["state"][0][key], state["adam"]["state"][0][key])
    assert got["adam"]["param_groups"][0]["lr"] == 0.1
    assert (got["empty"], got["none"], got["name"]) == ([], None, "x")
    assert torch.equal(got["shared"], layer.weight[:, ::2])


def test_torn_state_is_the_users_one_line(tmp_path: Path) -> None:
    save_state(tmp_path / "state.safetensors", {"a": torch.rand(8)})
    content = (tmp_path / "state.safetensors").read_bytes()
    (tmp_path / "state.safetensors").write_bytes(content[:-5])
    with pytest.raises(UserError, match="earlier checkpoint"):
        load_state(tmp_path / "state.safetensors")
    with pytest.raises(UserError, match="nowhere"):
        load_state(tmp_path / "nowhere")


def test_last_checkpoint_is_the_newest_whole_one(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for step, state in ((2, "{}"), (10, "{}"), (20, '{"torn'), (30, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_a_run_of_another_course_is_not_gone_on_with(
    make_model: Callable[..., Any], make_config: Callable[..., Any], pairs: Dataset
) -> None:
    def trainer(**changed: Any) -> ReprDPOTrainer:
        settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "confidence_source": "fixed", **changed}
        return ReprDPOTrainer(make_model(), make_config(**settings), train_dataset=pairs)

    trainer(gradient_accumulation_steps=2).train()
    for name, changed in (
        ("seed", {"seed": 1, "data_seed": 42}),
        ("data_seed", {"data_seed": 1}),
        ("learning_rate", {"learning_rate": 0.5}),
        ("optim", {"optim": "sgd"}),
        ("train_sampling_strategy", {"train_sampling_strategy": "sequential"}),
        ("global_batch_size", {"gradient_accumulation_steps": 1}),
    ):
        with pytest.raises(UserError, match=f"was trained with {name} "):
            trainer(**{"gradient_accumulation_steps": 2, **changed}).train(resume_from_checkpoint=True)
    same = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_tokens_per_device": 100}
    trainer(**same, max_steps=2).train(resume_from_checkpoint=True)
