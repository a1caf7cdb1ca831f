"""Published KV formats as PyTorch references: what a model loses with them, and the bytes that they store."""
