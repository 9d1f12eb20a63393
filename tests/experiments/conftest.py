"""One small run of every system on the smallest sandbox, shared by the tests that look at it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

import reprdpo.experiments
from reprdpo.experiments import RunConfig, load_config, pipeline, run
from reprdpo.experiments.experiment import run_experiment

TINY = Path(reprdpo.experiments.__file__).parent / "tiny.yaml"


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> RunConfig:
    folder = tmp_path_factory.mktemp("tiny") / "run"
    return load_config(TINY, output_dir=str(folder), cache_dir=str(cache_dir))


@pytest.fixture(scope="session")
def tiny_run(tiny_config: RunConfig) -> Path:
    return run(tiny_config, say=lambda line: None).path


@pytest.fixture(scope="session")
def tiny_experiment(cache_dir: Path) -> Callable[..., Path]:
    """Run an experiment on the smallest sandbox and say nothing; gives its folder."""

    def run(name: str, output_dir: Path, *, settings: Mapping[str, Any] | None = None, **arguments: Any) -> Path:
        own = {"cache_dir": str(cache_dir)} | dict(settings or {})
        quiet = {"say": lambda line: None}
        return run_experiment(name, scale="tiny", output_dir=output_dir, settings=own, **(quiet | arguments))

    return run


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], AbstractContextManager[None]]:
    """A block in which Ctrl-C comes as the training of one system is to begin."""

    @contextmanager
    def at(system: str) -> Iterator[None]:
        train_to_end = pipeline.train_to_end

        def stop(trainer: object, output: Path) -> None:
            if output.parent.name == system:
                raise KeyboardInterrupt
            train_to_end(trainer, output)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "train_to_end", stop)
            with pytest.raises(KeyboardInterrupt):
                yield

    return at
