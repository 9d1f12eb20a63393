"""Triton programs and their launchers; needs torch and triton alone."""
