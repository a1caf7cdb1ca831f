"""A result of the serving benchmark: made-up figures of a made-up device."""


def made_up_contender(name, ms, tokens, ratio):
    """Return a contender of which every figure is made up."""
    bounds = None if ratio is None else {"estimate": ratio, "low": ratio - 0.01, "high": ratio + 0.01}
    samples = [[ms, ms, ms], [ms, ms, ms]]
    timed = {"samples": samples, "of_baseline": bounds}
    return {
        "contender": name,
        "kv_cache_dtype": name,
        "backends": ["a.made.up.Backend"],
        "flash_attention": 3 if ratio is None else None,
        "steps": [{"context": 4096, "batch": 2, "ms": ms} | timed],
        "capacity": [{"context": 1024, "tokens": tokens, "requests": tokens / 1024}],
        "throughput": {"context": 1024, "requests": 10, "step_ms": ms, "tokens_per_s": 1e4 / ms, "samples": samples}
        | {"of_baseline": None if ratio is None else {"estimate": 1 / ratio, "low": 1.3, "high": 1.4}},
        "first_token": {"context": 4096, "s": 1.5} | timed,
        "startup_s": [30.0, 20.0],
        "graph_bytes": 2.0**30,
        "peak_bytes": None,
        "failures": [],
    }


def made_up_serving():
    """Return a result of the serving benchmark, as JSON values."""
    return {
        "kind": "elastickv-serving",
        "version": 1,
        "environment": {"date_utc": "2000-01-01T00:00:00+00:00", "commit": "made up"},
        "command": ["benchmarks/serving.py", "--out", "FOLDER"],
        "device": {"device": "a made-up device", "driver": "0", "vllm": "0.0", "torch": None},
        "model": "shape:made-up",
        "weights": "random",
        "settings": {"rounds": 2, "samples": 3, "prefill": False, "device": "cuda", "engine": {}, "time_limit": 560.0},
        "baseline": "bf16",
        "contenders": [made_up_contender("bf16", 8.0, 100_000, None), made_up_contender("elastickv_int4", 6.0, 320_000, 0.75)],
        "dropped": ["fp8, round 2: repetition dropped: 20 s were left"],
        "processes": [],
    }
