"""Plots and a page from a run folder; nothing is computed here."""
