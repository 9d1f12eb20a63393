"""Fused ops for preference alignment, importable into any training code; torch alone is needed."""

from reprdpo.ops.backend import backends, use_backend
from reprdpo.ops.pooling import last_token_index, pool_last_token
from reprdpo.ops.preference_confidence import preference_confidence
from reprdpo.ops.probe_reward import ProbeReward, probe_reward

__all__ = [
    "ProbeReward",
    "backends",
    "last_token_index",
    "pool_last_token",
    "preference_confidence",
    "probe_reward",
    "use_backend",
]
