"""Judges and the rates they give."""
