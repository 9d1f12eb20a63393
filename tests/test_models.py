"""What is found in a causal LM is what the model itself uses; what cannot be loaded is refused in a line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import CAUSAL_LMS, tiny_causal_lm
from torch import nn
from transformers import PreTrainedModel

from reprdpo.errors import UserError
from reprdpo.models import (
    base_fingerprint,
    decoder,
    decoder_layers,
    load_causal_lm,
    load_tokenizer,
    model_fingerprint,
    output_head,
)


@pytest.fixture(params=CAUSAL_LMS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_causal_lm(request.param)


def test_every_decoder_layer_runs_once_in_order(model: PreTrainedModel) -> None:
    ran: list[int] = []
    for index, layer in enumerate(decoder_layers(model)):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 5, 9]]))
    assert ran == [0, 1, 2]


def test_wrappers_are_seen_through() -> None:
    model = tiny_causal_lm("llama")

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    wrapped = Wrapper(torch.compile(model))
    assert decoder_layers(wrapped) is model.model.layers
    assert output_head(wrapped) is model.lm_head
    assert model_fingerprint(wrapped) == model_fingerprint(model)


def test_models_without_decoder_or_head_are_refused() -> None:
    headless = transformers.AutoModel.from_config(tiny_causal_lm("llama").config)
    with pytest.raises(UserError, match="no lm_head"):
        output_head(headless)
    with pytest.raises(UserError, match="no decoder under the head"):
        decoder(headless)
    model = tiny_causal_lm("llama")
    model.config.num_hidden_layers = 4
    with pytest.raises(UserError, match="no list of 4 decoder layers"):
        decoder_layers(model)


@pytest.mark.parametrize(("asked", "found"), [("auto", torch.bfloat16), ("float32", torch.float32)])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_a_model_is_loaded_in_its_dtype_or_the_one_asked_for_and_does_not_train(
    asked: str, found: torch.dtype, device: str | None, tmp_path: Path
) -> None:
    tiny_causal_lm("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    model = load_causal_lm(tmp_path, dtype=asked, device=device)
    assert {parameter.dtype for parameter in model.parameters()} == {found}
    assert not any(module.training for module in model.modules())


def test_fingerprints_are_of_the_parameters(tmp_path: Path) -> None:
    model = tiny_causal_lm("llama")
    model.save_pretrained(tmp_path / "copy")
    first = model_fingerprint(model)
    assert model_fingerprint(load_causal_lm(tmp_path / "copy")) == first
    assert model_fingerprint(model.to(torch.bfloat16)) != first
    model = load_causal_lm(tmp_path / "copy")
    model.train().requires_grad_(False)
    assert model_fingerprint(model) == first
    with torch.no_grad():
        model.lm_head.weight[-1, -1] = torch.nextafter(model.lm_head.weight[-1, -1], torch.tensor(9.0))
    assert model_fingerprint(model) != first
    wide, long = torch.nn.Linear(3, 2, bias=False), torch.nn.Linear(2, 3, bias=False)
    long.weight = torch.nn.Parameter(wide.weight.detach().view(3, 2))
    assert model_fingerprint(wide) != model_fingerprint(long)


def test_the_base_is_known_in_a_wider_dtype_and_under_adapters() -> None:
    model = tiny_causal_lm("qwen2_tied").to(torch.bfloat16)
    base = base_fingerprint(model)
    model.float()
    assert base_fingerprint(model) == base != base_fingerprint(tiny_causal_lm("qwen2_tied"))
    assert base_fingerprint(tiny_causal_lm("llama").double()) == base_fingerprint(tiny_causal_lm("llama"))
    before = model_fingerprint(model)
    peft = pytest.importorskip("peft")
    targets = {"target_modules": ["q_proj"], "modules_to_save": ["norm"], "init_lora_weights": False}
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, **targets))
    assert base_fingerprint(adapted) == base
    assert model_fingerprint(adapted) != before
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 0] += 1
    assert base_fingerprint(adapted) != base


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def torn(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def lacking_one(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def of_another_shape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(7)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def of_no_causal_lm(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))


def torn_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (without_weights, "no causal LM could be loaded: .*model.safetensors"),
        (torn, "no causal LM could be loaded"),
        (lacking_one, r"lack 1 of the model's parameters \(first: model.layers.1.mlp.up_proj.weight\)"),
        (of_another_shape, "no causal LM could be loaded"),
        (without_config, "no causal LM could be loaded"),
        (torn_config, "not a valid JSON file"),
        (of_no_causal_lm, "Unrecognized configuration class"),
    ],
)
def test_harmed_folders_are_refused_in_one_line(tmp_path: Path, harm: Callable[[Path], None], message: str) -> None:
    tiny_causal_lm("llama").save_pretrained(tmp_path / "model")
    load_causal_lm(tmp_path / "model")
    harm(tmp_path / "model")
    with pytest.raises(UserError, match=rf"^{tmp_path / 'model'}: .*{message}") as caught:
        load_causal_lm(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_a_headless_checkpoint_does_not_get_a_random_head(tmp_path: Path) -> None:
    tiny_causal_lm("llama").model.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"first: lm_head\.weight"):
        load_causal_lm(tmp_path / "model")


@pytest.mark.parametrize("load", [load_causal_lm, load_tokenizer])
@pytest.mark.parametrize("place", ["./nothing", "a/b/c", "runs/nothing", "file.txt", Path("owner/name")])
def test_local_places_never_reach_the_network(
    load: Callable[[Any], Any], place: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "file.txt").write_text("x")
    for cls in (transformers.AutoConfig, transformers.AutoTokenizer):
        monkeypatch.setattr(cls, "from_pretrained", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match=r"(is a file|no such folder); give the folder of a transformers"):
        load(place)


def test_tokenizers(tmp_path: Path, real_dir: Path) -> None:
    source = real_dir / "models" / "stories260K"
    assert load_tokenizer(source).eos_token_id == 2
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, tmp_path)
        (tmp_path / name).chmod(0o644)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(tmp_path).pad_token_id == 2, "padding defaults to EOS"
    del settings["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"no end-of-sequence token.*set eos_token"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="no tokenizer could be loaded"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no tokenizer could be loaded"):
        load_tokenizer(source.parent)


def test_a_name_that_is_no_folder_is_said_to_be_taken_for_the_hubs(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load in (load_tokenizer, load_causal_lm):
        with pytest.raises(UserError, match=r"^nowhere: no .* loaded: .*no such folder here: check it, or the hub"):
            load("nowhere")
