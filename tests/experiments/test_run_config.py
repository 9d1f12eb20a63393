"""A run's YAML is read strictly: every key known, every value of its type."""

from dataclasses import replace
from pathlib import Path

import pytest

from reprdpo.errors import UserError
from reprdpo.experiments import RunConfig, load_config

MINIMAL = "output_dir: out\n"


def read(tmp_path: Path, text: str) -> RunConfig:
    (tmp_path / "run.yaml").write_text(text)
    return load_config(tmp_path / "run.yaml")


def test_defaults_and_nested_values(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        MINIMAL + "seeds: [1, 2]\nsystems: base\ndata: {max_length: 64}\n"
        "fit: {C: [0.1, 1], alpha: auto}\nsample: {temperature: 1}\n",
    )
    assert config.seeds == (1, 2)
    assert config.systems == ("base",)
    assert config.data.max_length == 64
    assert config.fit.C == (0.1, 1.0)
    assert config.fit.alpha == "auto"
    assert config.sample.temperature == 1.0


def test_numbers_that_yaml_takes_for_text(tmp_path: Path) -> None:
    assert read(tmp_path, MINIMAL + "sample: {min_gap: 1e-3}\n").sample.min_gap == 1e-3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a mapping of keys, got NoneType"),
        ("- 1\n", "expected a mapping of keys, got list"),
        ("a: [1\n", "is not YAML"),
        ("model: x\n", "output_dir: missing"),
        (MINIMAL + "modle: x\n", "modle: no such key; did you mean 'model'?"),
        (MINIMAL + "dtype: no\n", "dtype: expected str, got False (no, off, yes and on are booleans in YAML"),
        (MINIMAL + "data: {max_lenght: 3}\n", "data.max_lenght: no such key; did you mean 'max_length'?"),
        (MINIMAL + "train: {betta: 3}\n", "train.betta: no such key; did you mean 'beta'?"),
        (MINIMAL + "train_overrides: {dpo: {betta: 3}}\n", "train_overrides.dpo.betta: no such key"),
        (MINIMAL + "sample: {top: 0}\n", "sample.top: must be at least 1, not 0"),
        (MINIMAL + "sample: {min_gap: .nan}\n", "sample.min_gap: must be at least 0, not nan"),
        (MINIMAL + "fit: {limit: 0}\n", "fit.limit: must be at least 1, not 0"),
        (MINIMAL + "online: {num_responses: 1}\n", "online.num_responses: must be at least 2, not 1"),
        (MINIMAL + "evaluate: {limit: 0}\n", "evaluate.limit: must be at least 1, not 0"),
        (MINIMAL + "evaluate: {temperature: -1}\n", "temperature is -1.0"),
        (MINIMAL + "train: {max_length: 9}\n", "train.max_length: is decided for the whole run; set data.max_length"),
        (MINIMAL + "sft: {truncation_mode: drop}\n", "sft.truncation_mode: is decided for the whole run"),
        (MINIMAL + "train_overrides: {dpo: {seed: 3}}\n", "train_overrides.dpo.seed: is decided for the whole run"),
        (MINIMAL + "online: {reward_model: {lr: 3}}\n", "online.reward_model.lr: no such key"),
        (MINIMAL + "seeds: [a]\n", "seeds: expected int, got 'a'"),
        (MINIMAL + "seeds: []\n", "each must name at least one"),
        (MINIMAL + "seeds: [1, 1]\n", "seeds: 1, 1 names one twice"),
        (MINIMAL + "data: 3\n", "data: expected a mapping of keys, got 3"),
        (MINIMAL + "data: {max_length: true}\n", "data.max_length: expected int, got True"),
        (MINIMAL + "data: {max_length: 1}\n", "max_length"),
        (MINIMAL + "scale: huge\n", "scale: expected one of 'demo', 'tiny', got 'huge'"),
        (MINIMAL + "systems: [sfd]\n", "systems: 'sfd' is unknown; did you mean 'sft'?"),
        (MINIMAL + "model: gpt2\n", "preferences: missing"),
        (MINIMAL + "holdout: 1\n", "holdout: must be between 0 and 1"),
        (MINIMAL + "fit: {gate: hard}\n", "gate"),
        (MINIMAL + "sample: {num_responses: 0}\n", "num_responses is 0"),
    ],
)
def test_what_is_wrong_is_named_with_its_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, text)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'run.yaml'}: ")
    assert "\n" not in str(caught.value)


def test_a_systems_training_arguments_are_those_it_is_trained_with(tmp_path: Path) -> None:
    text = MINIMAL + "train: {preset: paper, beta: 0.3}\ntrain_overrides: {reprdpo: {preset: null, beta: 0.2}}\n"
    config = read(tmp_path, text)
    paper, plain = config.training_arguments("dpo"), config.training_arguments("reprdpo")
    assert (paper["alpha"], paper["per_device_train_batch_size"], paper["beta"]) == (7.5, 4, 0.3)
    assert (plain["alpha"], plain["per_device_train_batch_size"], plain["beta"]) == ("auto", 8, 0.2)


def test_how_prompts_are_answered(tmp_path: Path) -> None:
    """The sampling alone, whose number of responses the online system sets anew."""
    text = MINIMAL + "sample: {num_responses: 8, best_of: 4, seed: 3}\n"
    sampling = read(tmp_path, text).sampling()
    assert (sampling.num_responses, sampling.seed, sampling.truncation_mode) == (8, 3, "error")
    assert replace(sampling, num_responses=2).num_responses == 2
    assert read(tmp_path, text + "data: {truncation_mode: keep_end}\n").sampling().truncation_mode == "keep_end"
    assert read(tmp_path, text + "data: {truncation_mode: drop}\n").sampling().truncation_mode == "error"


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_config(tmp_path / "none.yaml")


def test_overrides_replace_keys(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(MINIMAL)
    assert load_config(tmp_path / "run.yaml", output_dir="other", seeds=None).output_dir == "other"


@pytest.mark.parametrize("name", ["demo", "tiny"])
def test_the_shipped_configurations_are_valid(name: str) -> None:
    import reprdpo.experiments

    path = Path(reprdpo.experiments.__file__).parent / f"{name}.yaml"
    assert len(load_config(path).systems) >= 7


def test_the_sample_section_names_an_engine(tmp_path):
    server = "engine: openai, base_url: 'http://127.0.0.1:8000/v1', extra_body: {min_p: 0.1}, request_timeout: 9"
    sample = read(tmp_path, MINIMAL + f"sample: {{{server}, num_responses: 4}}\n").sample
    assert (sample.engine, sample.num_responses, sample.request_timeout) == ("openai", 4, 9.0)
    assert sample.extra_body == {"min_p": 0.1}
    assert read(tmp_path, MINIMAL).sample.engine == "transformers"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("engine: openai", "base_url is missing"),
        ("engine: vllm", "sample.engine: expected one of"),
        ("base_url: 'http://h/v1'", "asks no server"),
        ("engine: openai, base_url: 'h:8000'", "not http://"),
        ("engine: openai, base_url: 'http://u:p@h'", "holds a user or password"),
        ("concurrency: 0", "concurrency is 0"),
        ("request_retries: -1", "request_retries is -1"),
        ("request_timeout: 0", "request_timeout is 0"),
        ("extra_body: [1]", "sample.extra_body: expected a mapping"),
        ("num_responses: 0", "num_responses is 0"),
    ],
)
def test_bad_engines(tmp_path, section, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, MINIMAL + f"sample: {{{section}}}\n")
