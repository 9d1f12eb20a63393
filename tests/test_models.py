"""What is read off a causal LM equals what the model itself computes, for every kind of head."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from reprdpo.errors import UserError
from reprdpo.models import (
    check_head,
    decoder,
    decoder_layers,
    head_spec,
    load_causal_lm,
    load_tokenizer,
    model_fingerprint,
    output_head,
)

VOCABULARY = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 3,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SIZES | {"intermediate_size": 24, "num_key_value_heads": 1}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "gpt2": ("GPT2Config", SIZES),
    # A softcap this low bends the logits of a random model.
    "gemma2": ("Gemma2Config", GROUPED | {"head_dim": 8, "final_logit_softcapping": 0.05}),
    "cohere": ("CohereConfig", GROUPED | {"logit_scale": 0.25}),
    "granite": ("GraniteConfig", GROUPED | {"logits_scaling": 8.0}),
    "gpt_neox": ("GPTNeoXConfig", SIZES | {"intermediate_size": 24}),
    "phi_with_bias": ("PhiConfig", SIZES | {"intermediate_size": 24}),
    "opt_without_model_attribute": ("OPTConfig", SIZES | {"ffn_dim": 24, "word_embed_proj_dim": 16}),
    "mpt_unused_scale": ("MptConfig", {"vocab_size": VOCABULARY, "d_model": 16, "n_layers": 3, "n_heads": 2}),
    "falcon_h1_multiplier": (
        "FalconH1Config",
        GROUPED | {"lm_head_multiplier": 0.5, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
    ),
}
CONFIGS["mpt_unused_scale"][1]["logit_scale"] = "inv_sqrt_d_model"


def build(name: str) -> PreTrainedModel:
    class_name, settings = CONFIGS[name]
    config = getattr(transformers, class_name)(**settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    if (bias := getattr(output_head(model), "bias", None)) is not None:
        nn.init.normal_(bias)
    return model


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return build(request.param)


def test_the_head_gives_the_models_own_logits(model: PreTrainedModel) -> None:
    ids_BT = torch.randint(3, VOCABULARY, (2, 7))
    spec = head_spec(model)
    with torch.no_grad():
        wanted_BTV = model(input_ids=ids_BT).logits
        hidden_BTD = decoder(model)(input_ids=ids_BT).last_hidden_state
        found_BTV = nn.functional.linear(hidden_BTD, spec.weight, spec.bias) * spec.logit_scale
        if spec.softcap is not None:
            found_BTV = spec.softcap * torch.tanh(found_BTV / spec.softcap)
    torch.testing.assert_close(found_BTV, wanted_BTV, rtol=1e-5, atol=1e-6)
    check_head(model)


def test_every_decoder_layer_runs_once_in_order(model: PreTrainedModel) -> None:
    ran: list[int] = []
    for index, layer in enumerate(decoder_layers(model)):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 5, 9]]))
    assert ran == [0, 1, 2]


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere"])
def test_a_head_that_does_more_than_the_formula_is_found_out(name: str) -> None:
    model = build(name)
    model.lm_head.register_forward_hook(lambda _module, _inputs, logits: logits * 1.01)
    with pytest.raises(UserError, match="this architecture's head is not supported"):
        check_head(model)


def test_check_head_leaves_the_mode(real_dir: Path) -> None:
    model = load_causal_lm(real_dir / "models" / "stories260K")
    assert not model.training
    check_head(model.train())
    assert model.training
    check_head(model.to(torch.bfloat16))


def test_wrappers_are_seen_through() -> None:
    model = build("llama")

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    wrapped = Wrapper(torch.compile(model))
    assert decoder_layers(wrapped) is model.model.layers
    assert head_spec(wrapped).weight is model.lm_head.weight
    assert model_fingerprint(wrapped) == model_fingerprint(model)


def test_models_without_decoder_or_head_are_refused() -> None:
    headless = transformers.AutoModel.from_config(build("llama").config)
    with pytest.raises(UserError, match="no lm_head"):
        output_head(headless)
    with pytest.raises(UserError, match="no decoder under the head"):
        decoder(headless)
    model = build("llama")
    model.config.num_hidden_layers = 4
    with pytest.raises(UserError, match="no list of 4 decoder layers"):
        decoder_layers(model)


def test_fingerprints_are_of_the_parameters(tmp_path: Path) -> None:
    model = build("llama")
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
    build("llama").save_pretrained(tmp_path / "model")
    load_causal_lm(tmp_path / "model")
    harm(tmp_path / "model")
    with pytest.raises(UserError, match=rf"^{tmp_path / 'model'}: .*{message}") as caught:
        load_causal_lm(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_a_headless_checkpoint_does_not_get_a_random_head(tmp_path: Path) -> None:
    build("llama").model.save_pretrained(tmp_path / "model")
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
