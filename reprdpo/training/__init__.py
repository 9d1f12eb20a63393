"""The trainer, its config, reference log-probs and the baselines."""
