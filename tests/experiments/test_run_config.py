"""A run's YAML is read strictly: every key known, every value of its type."""

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
