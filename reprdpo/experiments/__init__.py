"""The method and its baselines as one resumable run."""
