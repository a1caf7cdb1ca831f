"""Speed of a whole model: Transformers with stock and elastic caches, llama.cpp with its own KV cache types."""

from elastickv.model_benchmark.presets import gguf_baseline, transformers_baseline

__all__ = ["gguf_baseline", "transformers_baseline"]
