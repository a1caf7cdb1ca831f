"""Reading GGUF files: their headers, and once for all that Transformers asks of them."""
