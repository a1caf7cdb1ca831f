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


def made_up_reads():
    """Return the reads of 135 steps of 2 requests in 4 layers."""
    return {
        "read_bytes": 135 * 2**20,
        "dense_bytes": 135 * 2**23,
        "steps": 135,
        "tokens": 270,
        "layer_tokens": 1080,
        "anchors": 270,
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


def made_up_soak():
    """Return a result of the soak, as JSON values."""
    record = {
        "failed": None,
        "steps": 5000,
        "counts": {"requests": 900, "aborted": 90, "preemptions": 12, "prefix_hits": 300},
        "times": {"decode": {"steps": 2000, "median_ms": 4.0, "p999_over_median": 2.25}},
        "agreement": {"all": {"soak": {"tokens": 900, "kl": 1.25e-3}, "alone": {"tokens": 0}}},
    }
    return {
        "kind": "elastickv-serving-soak",
        "version": 1,
        "date_utc": "2000-01-01T00:00:00Z",
        "command": ["benchmarks/serving_soak.py"],
        "settings": {"steps": 5000},
        "environment": {"commit": "made up"},
        "device": "a made-up device",
        "driver": "0",
        "backends": {"ours": record, "stock": {"failed": "not done after 9 s"}},
        "verdicts": [
            {"what": "ours: memory does not grow", "holds": True, "figures": 0},
            {"what": "strict: within stock's", "holds": False, "figures": {"kl": 0.25, "of": 0.125, "requests": 50}},
            {"what": "ours: not seen", "holds": None, "figures": None},
        ],
    }
