"""Decodes as captured CUDA graphs: recorded, replayed, launched speculatively."""
