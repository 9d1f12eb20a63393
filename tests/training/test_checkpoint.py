"""Nested state survives a round trip exactly; torn checkpoints are passed over."""

from pathlib import Path

import pytest
import torch

from reprdpo.errors import UserError
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
