"""Preference alignment re-ranked by the model's own representations."""

__version__ = "0.1.0"
