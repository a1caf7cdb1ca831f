"""References on a small real model: Transformers with stock and elastic caches, llama.cpp with its own KV cache types."""
