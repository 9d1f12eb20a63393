"""Fused ops for preference alignment, importable into any training code; torch alone is needed."""

from reprdpo.ops.backend import backends, use_backend

__all__ = ["backends", "use_backend"]
