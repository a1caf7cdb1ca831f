"""Real attention inputs: the shipped sample, and the loader of `--input` files (format: docs/INPUT.md)."""

from elastickv.data.sample import MIN_QUERIES, SAMPLE_PATH, Sample, load_sample

__all__ = ["MIN_QUERIES", "SAMPLE_PATH", "Sample", "load_sample"]
