"""Preference data: one schema, readers, tokenisation, collators, the sandbox world."""
