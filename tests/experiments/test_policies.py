"""Whatever loads a model does so as the run's settings say."""

from collections.abc import Callable
from pathlib import Path

import pytest

from reprdpo.data import TokenizeConfig
from reprdpo.experiments import RunConfig, stages
from reprdpo.experiments.finished_run import FinishedRun
from reprdpo.experiments.pipeline import Pipeline
from reprdpo.experiments.recipes import _states
from reprdpo.experiments.responses_at import Answerer
from reprdpo.experiments.run_folder import RunFolder
from reprdpo.experiments.stages import Policy
from reprdpo.models import Quantization

PAIR = '{"prompt": "%d", "chosen": "a", "rejected": "b"}\n'


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(PAIR % number for number in range(20)))
    return RunConfig(
        output_dir=str(tmp_path / "run"),
        model="base",
        preferences=str(pairs),
        systems=("base", "reprdpo"),
        dtype="bfloat16",
        trust_remote_code=True,
        quantization=Quantization(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
        data=TokenizeConfig(max_length=77),
    )


def finished(config: RunConfig) -> FinishedRun:
    return FinishedRun(Path(config.output_dir), Path("evaluation"), config, "base")


@pytest.mark.parametrize(
    "policy_of",
    [
        pytest.param(lambda config: Pipeline(config, RunFolder(config)).base, id="the pipeline's base"),
        pytest.param(lambda config: Pipeline(config, RunFolder(config)).reference, id="the pipeline's reference"),
        pytest.param(_states.base_policy, id="a recipe's base"),
        pytest.param(lambda config: _states.policy_of(finished(config), "reprdpo"), id="a recipe's row"),
        pytest.param(lambda config: Answerer(finished(config), "reprdpo", 0).policy, id="a recipe's answers"),
    ],
)
def test_every_policy_is_loaded_as_the_run_says(
    policy_of: Callable[[RunConfig], Policy], config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, given = policy_of(config), {}
    monkeypatch.setattr(stages, "load_causal_lm", lambda path, **options: given.update(options))
    policy.model()
    assert (given["quantization"], given["dtype"]) == (config.quantization, "bfloat16")
    assert given["trust_remote_code"]
    assert policy.data == config.data
