"""Best-of-N sampling and preference pairs, over any engine that generates."""

from reprdpo.sampling.best_of_n import best_of_n, read_samples, sample_responses
from reprdpo.sampling.engine import Engine, Response, SamplingConfig, TransformersEngine
from reprdpo.sampling.pairs import PairReport, build_pairs
from reprdpo.sampling.scoring import score_responses

__all__ = [
    "Engine",
    "PairReport",
    "Response",
    "SamplingConfig",
    "TransformersEngine",
    "best_of_n",
    "build_pairs",
    "read_samples",
    "sample_responses",
    "score_responses",
]
