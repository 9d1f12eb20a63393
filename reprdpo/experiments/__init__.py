"""The method and its baselines as one resumable run."""

from reprdpo.experiments.config import RunConfig, load_config
from reprdpo.experiments.pipeline import run

__all__ = ["RunConfig", "load_config", "run"]
