"""How fast a model generates with stock and elastic caches: `elastickv run` and `elastickv bench --model`."""
