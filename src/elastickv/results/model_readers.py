"""Runs from results of whole models: `bench --model`, `baseline transformers` and `baseline gguf`."""

from typing import Any

from elastickv.errors import UsageError
from elastickv.results.compare.runs import BenchmarkRun, Cell, OutputErrors, Times
from elastickv.results.field_reader import Reader


def model_run(reader: Reader) -> BenchmarkRun:
    """Return a model's speed with an elastic cache, and its price where it was measured.

    Raises
    ------
    UsageError : naming the file and what is missing.
    """
    at = reader.at
    if at("version") != 1:
        raise UsageError(f"{reader.source} is of version {at('version')}, and this program reads 1: update elastickv")
    caches = {str(cache.get("cache")): cache for cache in at("caches", kind=list) if isinstance(cache, dict)}
    if "elastic" not in caches:
        raise reader.refused("lacks the elastic cache")
    tokens = reader.count("tokens")
    rounds = {name: reader.rounds(cache.get("step_s"), f"steps of {name}") for name, cache in caches.items()}
    token_ms = {name: tuple(1e3 * total / tokens for total in totals) for name, totals in rounds.items()}
    elastic = token_ms.pop("elastic")
    if len(elastic) < 2:
        raise reader.refused("has no two rounds of the elastic cache")
    cache, model = Reader(reader.source, caches["elastic"]), at("model", kind=dict)
    workload = (("model", reader.text("model", "name")), ("context", reader.count("context")), ("batch", reader.count("batch")))
    asked = (
        ("compress", str(reader.optional("compress"))),
        ("recipe", str(reader.optional("recipe"))),
        ("calibrated", reader.at("calibrated", kind=bool)),
        ("dtype", str(model.get("dtype"))),
    )
    device = model.get("device_name") or reader.optional("environment", "cpu") or model.get("device")
    return BenchmarkRun(
        source=reader.source,
        cell=Cell(workload, asked),
        device=str(device),
        recipe=str(cache.at("recipe_hash")),
        ratio_read=cache.number("read_ratio"),
        protocol={
            "program": "elastickv bench --model",
            "pairing": at("pairing"),
            "tokens of a sample": tokens,
            "threads": reader.optional("environment", "torch_threads"),
        }
        | versions(reader),
        figures={"token": Times(sum(elastic) / len(elastic), elastic, token_ms, 0.0)},
        fidelity=_price(reader, "elastic"),
        complete=True,
    )


def gguf_run(reader: Reader) -> BenchmarkRun:
    """Return llama.cpp's speed with each KV cache type, the first of them the control of the others; the dearest's price.

    Raises
    ------
    UsageError : naming the file and what is missing.
    """
    at = reader.at
    if at("version") != 1:
        raise UsageError(f"{reader.source} is of version {at('version')}, and this program reads 1: update elastickv")
    caches = [Reader(reader.source, cache) for cache in at("caches", kind=list) if isinstance(cache, dict)]
    names = [cache.text("cache") for cache in caches]
    reference = reader.text("baseline")
    if reference not in names or len(set(names)) < len(names):
        raise reader.refused(f"has the caches {', '.join(names) or 'none'}, of which {reference} should be one")
    context, tokens, figures = reader.count("context"), reader.count("tokens"), {}
    prices = {name: _price(cache, name) for name, cache in zip(names, caches, strict=True)}
    for figure, key, count in (("token", "decode_s", tokens), ("prompt token", "prompt_s", context)):
        token_ms = {}
        for name, cache in zip(names, caches, strict=True):
            samples = cache.times(cache.at(key), f"{key} of {name}")
            if len(samples) < 2:
                raise reader.refused(f"has no two samples of {name}")
            token_ms[name] = tuple(1e3 * seconds / count for seconds in samples)
        for name, series in token_ms.items():
            control = {} if name == reference else {reference: token_ms[reference]}
            figures[f"{figure}, {name}"] = Times(sum(series) / len(series), series, control, 0.0, prices[name])
    workload = (("model", reader.text("model", "name")), ("context", context), ("batch", 1))
    return BenchmarkRun(
        source=reader.source,
        cell=Cell(workload, (("kv types", ",".join(names)),)),
        device=reader.text("engine", "device"),
        recipe=None,
        ratio_read=None,
        protocol={
            "program": "elastickv baseline gguf",
            "pairing": at("pairing"),
            "tokens of a sample": tokens,
            "threads": reader.optional("threads"),
            "llama.cpp": f"{reader.optional('engine', 'name')} {reader.optional('engine', 'version')}",
        }
        | versions(reader),
        figures=figures,
        fidelity=max(filter(None, prices.values()), key=lambda price: price.mean, default=None),
        complete=True,
    )


def _price(reader: Reader, cache: str) -> OutputErrors | None:
    """Return what a model's predictions lose with a cache; older files do not tell."""
    if reader.optional("fidelity") is None:
        return None
    price = ("fidelity",)
    on = f"KL of {cache} to {reader.text(*price, 'reference')}, {reader.count(*price, 'tokens')} tokens of "
    on += f"{reader.text(*price, 'text')} after {reader.count(*price, 'context')}"
    mean, p95, most = (reader.number(*price, key) for key in ("kl_mean", "kl_p95", "kl_max"))
    return OutputErrors(on, mean, p95, most, None)


def versions(reader: Reader) -> dict[str, Any]:
    """Return what the times depend on beside this package, whose changes are what a comparison is for."""
    found = reader.optional("environment", "versions")
    return {name: v for name, v in found.items() if name != "elastickv"} if isinstance(found, dict) else {}
