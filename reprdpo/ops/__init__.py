"""Fused ops for preference alignment, importable into any training code; torch alone is needed."""

from reprdpo.ops.backend import backends, use_backend
from reprdpo.ops.linear_logprob import LinearLogprob, linear_logprob
from reprdpo.ops.linear_preference import LinearPreferenceLoss, SequenceStats, linear_preference_loss
from reprdpo.ops.logprob import logprob
from reprdpo.ops.preference_loss import PreferenceLoss, preference_loss
from reprdpo.ops.sequence_sum import sequence_sum

__all__ = [
    "LinearLogprob",
    "LinearPreferenceLoss",
    "PreferenceLoss",
    "SequenceStats",
    "backends",
    "linear_logprob",
    "linear_preference_loss",
    "logprob",
    "preference_loss",
    "sequence_sum",
    "use_backend",
]
