"""Sweep a grid of contexts, batches, ratios and recipes: the plan, the crash-safe file, the workers, the table."""
