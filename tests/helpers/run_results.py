"""What `elastickv run -o` writes, with figures of one's own."""

from typing import Any


def run_result(tokens_per_s=20.0, *, stock=None, new_tokens=64, speedup=None, kv_read_bytes=6.3e6, **more) -> dict[str, Any]:
    """Return a result of `elastickv run`; with `stock`, tokens/s of the stock cache, it is a paired one."""

    def cache(name, rate, read):
        return {
            "cache": name, "rows": 1, "prompt_tokens": 300, "new_tokens": new_tokens, "first_token_s": 0.5,
            "tokens_per_s": rate,
            "kv_read_bytes": read, "kv_stored_bytes": read / 10, "kv_dense_bytes": 2e6, "kv_allocated_bytes": 3e6,
            "held_bytes": None, "peak_bytes": None, "peak_source": None,
        }  # fmt: skip

    elastic = cache("elastic", tokens_per_s, kv_read_bytes) | {
        "read_ratio": 2.0, "stored_ratio": 1.5, "storing_s": 0.01, "storing_share_of_first_token": 0.02, "holds_from": 256,
        "captured_share": None, "not_captured": None, "ahead_share": None, "calibrated": False, "recipe_hash": "abc",
        "recipes": {"0": "int8"},
    }  # fmt: skip
    caches = [elastic] if stock is None else [cache("stock", stock, 2 * kv_read_bytes), elastic]
    return {
        "kind": "elastickv-run",
        "version": 1,
        "environment": {"cpu": "AMD EPYC", "torch_threads": 2, "versions": {"elastickv": "0.1.0"}},
        "command": ["elastickv", "run", "tiny"],
        "model": {
            "name": "tiny", "type": "llama", "dtype": "float32", "device": "cpu", "device_name": None, "weights_bytes": 1e6,
            "read_weights_bytes": 1e6, "elastic_layers": 2, "query_heads": 4, "kv_heads": 2, "head_dim": 64,
        },
        "compress": 2.0,
        "recipe": None,
        "temperature": 0.0,
        "seed": 0,
        "caches": caches,
        "pairing": None if stock is None else "abba",
        "speedup": speedup,
        "noise_floor": None,
        "same_text": None if stock is None else True,
        "text": "Once upon a time",
    } | more  # fmt: skip
