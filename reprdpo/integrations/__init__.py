"""Trainers of other libraries with the method in them; each module needs its library, and nothing here imports it."""
