"""What decodes read of the KV cache, as counters of vLLM's metrics."""
