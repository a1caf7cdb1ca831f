"""Published KV selections and evictions as PyTorch references: what a model loses with them, and the bytes that they read."""
