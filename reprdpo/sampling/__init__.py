"""Best-of-N sampling and preference pairs, over any engine that generates."""

from reprdpo.sampling.best_of_n import Score, best_of_n, rank_responses, read_samples, sample_responses
from reprdpo.sampling.continuous import ContinuousBatchingEngine
from reprdpo.sampling.engine import Engine, Response, SamplingConfig
from reprdpo.sampling.engine_config import EngineConfig, build_engine
from reprdpo.sampling.openai_engine import OpenAIEngine
from reprdpo.sampling.pairs import PairReport, build_pairs
from reprdpo.sampling.scoring import score_responses
from reprdpo.sampling.transformers_engine import TransformersEngine

__all__ = [
    "ContinuousBatchingEngine",
    "Engine",
    "EngineConfig",
    "OpenAIEngine",
    "PairReport",
    "Response",
    "SamplingConfig",
    "Score",
    "TransformersEngine",
    "best_of_n",
    "build_engine",
    "build_pairs",
    "rank_responses",
    "read_samples",
    "sample_responses",
    "score_responses",
]
