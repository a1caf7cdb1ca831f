"""The parsers, each as a function of bytes that returns, or raises the documented error and nothing else."""

import contextlib
import copy
import json
import math
import os
import re
import struct
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from elastickv.benchmark import Gate, Options
from elastickv.benchmark.options import AXES, SETTINGS
from elastickv.benchmark.sample_inputs import load_sample
from elastickv.errors import NonFiniteError, UsageError
from elastickv.recipe import AttentionShape, ModelCalibration, Recipe, resolve
from elastickv.recipe.allocation import allot, check_calibration
from elastickv.recipe.layer_solver import for_ratio_by_layer
from elastickv.recipe.recipe import parse_open
from elastickv.results.compare import comparison_table
from elastickv.results.compare.comparison import compare
from elastickv.results.compare.result_sets import read_result_set
from elastickv.sweeps.axes import values
from elastickv.sweeps.plan import PRESETS, SweepPlan, merged, read_plan
from elastickv.sweeps.sweep_result import Sweep
from tests.fuzz.source import Source, as_json, edits

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
SHAPE = AttentionShape(1, 4, 2, 64)


@dataclass(frozen=True)
class Target:
    """A parser under test.

    Attributes
    ----------
    one : takes bytes; whatever comes out of it but a return or the documented error is a finding.
    seeds : inputs to begin with.
    words : what the mutator may put in as it stands.
    share : executions of a full run, of 1000 over all targets.
    documented : the errors that may come out.
    longest : bytes of an input.
    """

    one: Callable[[bytes], None]
    seeds: tuple[bytes, ...]
    words: tuple[str, ...] = ()
    share: int = 20
    documented: tuple[type[Exception], ...] = (UsageError,)
    longest: int = 2048


@cache
def folder() -> Path:
    """Return a folder for files, in memory where the system has such a place."""
    held = tempfile.TemporaryDirectory(prefix="fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    _KEPT.append(held)
    return Path(held.name)


_KEPT: list = []


def written(name: str, data: bytes) -> Path:
    """Write a file of the folder."""
    path = folder() / name
    path.write_bytes(data)
    return path


def recipe(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    parsed, _ = parse_open(text)
    assert Recipe.parse(str(parsed)) == parsed, "a recipe's text names another recipe"
    assert Recipe.parse(str(parsed)).hash == parsed.hash
    with contextlib.suppress(UsageError):
        Recipe.parse(text)


def resolved(data: bytes) -> None:
    source = Source(data)
    ratio = source.pick((1, 2, 1.5, 4.0, 8, 0, -1, 64, 1e9, math.nan, math.inf, 1.0001, source.below(65536) / 1024))
    context = source.pick((1, 0, 31, 32, 33, 163, 164, 165, 1024, 4096, 32768, 1 << 20, source.below(65536)))
    shape = AttentionShape(*(source.pick(sizes) for sizes in ((1, 3, 0), (4, 1, 8, 7), (1, 2, 4, 0), (64, 80, 128, 256, 60))))
    numbers = [source.pick((None, None, None, 0, 1, 4, 128, 4096, 1 << 20, -1, 10**400)) for _ in range(3)]
    dtype = source.pick(("bf16", "fp16", "fp32"))
    found = resolve(source.rest().decode("utf-8", "surrogateescape"), ratio, context, shape, dtype, *numbers)
    assert Recipe.parse(str(found)) == found


def gate(data: bytes) -> None:
    parsed = Gate.parse(data.decode("utf-8", "surrogateescape"))
    for criterion in parsed.criteria:
        assert math.isfinite(criterion.threshold)
        assert criterion.judge(0.5, 1.5) in ("pass", "fail", "inconclusive")


def axes(data: bytes) -> None:
    source = Source(data)
    name = source.pick((*AXES, *SETTINGS, "device"))
    with _few_cells():
        found = values(name, source.rest().decode("utf-8", "surrogateescape"))
    assert found
    assert len(found) == len(set(found))
    for value in found[:3]:
        assert not isinstance(value, float) or math.isfinite(value)


_NUMBERS = (0, 1, -1, 2, 64, 128, 4096, 1 << 20, 65536, 10**18, 10**400, 0.0, 0.5, 5.0, 1e-320, 1e308, math.nan, math.inf)
_OPTION_VALUES = {
    "dtype": ("bf16", "fp16", "fp32", "x"),
    "cache": ("cold", "hot", ""),
    "dense": (None, "bf16", "int8"),
    "recipe": ("int8", "int4,pages=1/4", "reuse,anchor_every=4", "dense", "int4,pages=1/4:1/2", "pages=0", "stride=4", "auto"),
    "backend": ("auto", "cpu", "x"),
    "peers": (None, "all", " , ", "torch"),
    "paired": (True, False),
    "inference": (True, False),
    "dim": (64, 128, 80, 63, 0),
}
_FIELDS = (
    "seq",
    "heads",
    "dim",
    "compress",
    "reps",
    "warmup",
    "inner_loops",
    "truncate",
    "paired",
    "inference",
    "decode_tokens",
    "batch",
    "kv_heads",
    "dtype",
    "recipe",
    "sinks",
    "window",
    "anchor_every",
    "layers",
    "cache",
    "peers",
    "time_limit_s",
    "until_ci_percent",
    "dense",
    "backend",
    "device",
    "seed",
)


def options(data: bytes) -> None:
    # Solving `auto` takes most of the time, and is `resolve`'s.
    source, given = Source(data), {"recipe": "int8"}
    while source and len(given) < 8:
        name = source.pick(_FIELDS)
        given[name] = source.pick(_OPTION_VALUES.get(name, (*_NUMBERS, source.below(65536))))
    made = Options(**given)
    assert made.shape.query_heads >= 1
    assert Recipe.parse(str(made.resolved_recipe)) == made.resolved_recipe


_PLAN = {
    "seq": [512, 1024],
    "compress": "1.5,2",
    "recipe": ["int8", "int4,pages=1/4"],
    "heads": [4],
    "kv-heads": 2,
    "dim": 64,
    "reps": 6,
    "cells": [{"seq": 512, "batch": "1-4*2"}, {"window": [64, 128], "sinks": 4}],
}


def plan(data: bytes) -> None:
    source = Source(data)
    kind = source.below(4)
    if kind == 0:
        path = written("plan.json", as_json(edits(_PLAN, source)))
    else:
        path = written("plan.json" if kind == 1 else "plan.toml", source.rest())
    given = read_plan(path)
    count = math.prod(len(v) if isinstance(v, list) else 1 for v in given.values())
    if count > 64:
        return  # Valid, and solved cell by cell: seconds of work that is asked for.
    with _few_cells():
        made = SweepPlan.of(merged(given))
    json.dumps([made.cells, made.settings, made.hash, made.axes], allow_nan=False)


@contextlib.contextmanager
def _few_cells():
    """Let no plan have more cells than are solved in a moment."""
    from elastickv.sweeps import axes as axes_module
    from elastickv.sweeps import plan as plan_module

    before = axes_module.MAX_CELLS
    axes_module.MAX_CELLS = plan_module.MAX_CELLS = 64
    try:
        yield
    finally:
        axes_module.MAX_CELLS = plan_module.MAX_CELLS = before


_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def _brief(name: str):
    """Return a committed result with few samples."""
    value = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    if "samples" in value:
        value["samples"] = {series: times[:5] for series, times in value["samples"].items()}
        value["results"]["attention_time_ms"] = sorted(value["samples"]["elastic"])[2]
        value["contenders"] = value["contenders"][:4]
        value["warnings"] = ["[b]a warning[/b]"]
    if value.get("inference_cycle"):
        cycle = value["inference_cycle"]["raw_token_latencies_ms"]
        value["inference_cycle"]["raw_token_latencies_ms"] = {k: [row[:2] for row in v[:2]] for k, v in cycle.items()}
    if "caches" in value:
        for held in value["caches"]:
            held["step_s"] = [row[:4] for row in held["step_s"][:2]]
        value["tokens"] = 4
    return value


@cache
def _documents() -> tuple:
    from tests.helpers.results import ORIGINAL

    short, model = _brief("cpu/short.json"), _brief("cpu/model-8000.json")
    cell = {"cell": {"seq": 1024, "compress": 2.0}, "status": "ok", "reason": None} | short
    failed = {"cell": {"seq": 2048, "compress": 2.0}, "status": "failed", "reason": "it [b]broke[/b]"}
    head = {"version": 1, "plan_hash": "0" * 16, "cells": 2, "axes": {"seq": [1024, 2048], "compress": [2.0]}}
    head |= {"settings": {}, "command": [], "environment": {"commit": None}}
    whole = {"sweep": head, "cells": [cell, failed]}
    cycle = {"decode_tokens": 64, "elastic_total_ms": 9.0}
    return short, model, ORIGINAL, ORIGINAL | {"inference_cycle": cycle}, whole, [{"sweep": head}, cell, failed]


def _side(name: str, source: Source) -> Path:
    kind = source.below(16)
    if kind < 4:
        return written(name + (".json" if kind < 2 else ".jsonl"), source.rest())
    document = source.pick(_documents())
    if isinstance(document, list):
        lines = [as_json(edits(line, source, 3)) for line in document]
        return written(name + ".jsonl", b"\n".join(lines) + source.pick((b"\n", b"", b"\n{")))
    return written(name + ".json", as_json(edits(document, source)))


def results(data: bytes) -> None:
    read_result_set(_side("a", Source(data)), "A")


def comparisons(data: bytes) -> None:
    """Compare two files, one of them edited twice, and write the comparison in every format."""
    source = Source(data)
    document = source.pick(_documents())
    if isinstance(document, list):
        document = document[1]
    a = written("before.json", as_json(edits(document, source, 3)))
    b = written("after.json", as_json(edits(document, source, 3)))
    found = compare(a, b, control=source.pick(("dense", "none")), allow_different_device=bool(source.below(2)))
    name = source.pick(("json", "jsonl", "csv", "md", "html", "jsonl", "csv", "table"))
    text = comparison_table.FORMATS[name](found)
    text.encode()
    assert not _CONTROL.search(text), f"a control sequence of the file reached {name}"
    assert name != "html" or "<script" not in text
    assert name != "json" or json.loads(text)


def sweeps(data: bytes) -> None:
    source = Source(data)
    if source.below(4) == 0:
        path = written("sweep.jsonl", source.rest())
    else:
        lines = [as_json(edits(line, source, 3)) for line in _documents()[-1]]
        path = written("sweep.jsonl", b"\n".join(lines) + source.pick((b"\n", b"\n", b"", b"\n{}\n")))
    found = Sweep.load(path)
    form = source.pick((found._repr_html_, found.to_json, *((found.to_markdown, found.to_csv) if found.cells else ())))
    text = form()
    text.encode()
    assert not _CONTROL.search(text), "a control sequence of the file was shown"
    assert form != found._repr_html_ or "<script" not in text
    assert found.complete in (True, False)


_HEADER = {
    name: {"dtype": "F16", "shape": [1, 1, 64, 64], "data_offsets": [8192 * n, 8192 * (n + 1)]} for n, name in enumerate("qkv")
} | {"__metadata__": {"model": "m"}}


def activations(data: bytes) -> None:
    source = Source(data)
    if source.below(4) == 0:
        path = written("a.safetensors", source.rest())
    else:
        header = as_json(edits(_HEADER, source))
        length = source.pick((len(header), len(header), len(header), len(header), 1 << 20, 1 << 62, len(header) - 1, 0))
        body = bytes(3 * 8192) if source.below(8) else source.rest()
        path = written("a.safetensors", struct.pack("<Q", length) + header + body)
    sample = load_sample(path)
    assert np.isfinite(sample.q).all()
    assert sample.shape.kv_heads == sample.k.shape[1]


@cache
def _calibration():
    errors = [[0.1, 0.2], [0.3, 0.1]]
    none = [[0.0, 0.0], [0.0, 0.0]]
    return {
        "format": "elastickv-calibration",
        "version": 1,
        "model": "m",
        "fingerprint": "0" * 16,
        "layers": [0, 1],
        "query_heads": 4,
        "kv_heads": 2,
        "head_dim": 64,
        "text": "t",
        "tokens": 128,
        "queries": 64,
        "pages": {"1": {"1.0": none, "0.5": errors}, "4": {"1.0": none, "0.25": errors}},
        "keys": {"bf16": none, "int8": none, "int4": errors},
        "values": {"bf16": none, "int8": none, "int4/32": errors, "int4": errors},
    }


def calibrations(data: bytes) -> None:
    source = Source(data)
    raw = source.rest() if source.below(4) == 0 else as_json(edits(_calibration(), source, 4))
    found = ModelCalibration.load(written("c.json", raw))
    assert ModelCalibration.loads(found.dumps()) == found
    # What is accepted must serve: the solver may refuse a budget, not break.
    if source.below(16) == 1:
        for_ratio_by_layer(found, source.pick((4.0, 2.0, 1.0, 8.0)), source.pick((4096, 1 << 20, 600)))


def allotments(data: bytes) -> None:
    source = Source(data)
    heads = source.pick((1, 2, 3))
    numbers = (0.0, 0.1, 1.0, 0.5, 1e308, 1e-320, -1.0, math.nan, math.inf, 2.0)
    given = {source.pick(numbers): [source.pick(numbers) for _ in range(source.pick((heads, heads, 1)))] for _ in range(4)}
    check_calibration(given, heads)
    pages, total = source.pick((0, 1, 7, 1000)), source.pick((0, 1, 5, 10**6))
    counts = allot(given, pages, total)
    assert all(0 <= count <= pages for count in counts)
    assert sum(counts) <= max(total, len(counts))


_RECIPES = {"format": "elastickv-recipes", "version": 1, "recipe": "int8", "layers": {"0": "int4,pages=1/4", "1": "dense"}}


def recipe_files(data: bytes) -> None:
    from elastickv.transformers.config import recipes_in

    source = Source(data)
    kind = source.below(4)
    raw = source.rest() if kind == 0 else as_json(edits(_RECIPES if kind < 3 else _calibration(), source))
    found = recipes_in(written("recipe", raw))
    if not isinstance(found, ModelCalibration):
        whole, layers = found
        assert all(Recipe.parse(str(r)) == r for r in (*layers.values(), *([whole] if whole else [])))


def kernel_caches(data: bytes) -> None:
    """Read a kept kernel: one that is damaged in any way is none."""
    import hashlib

    from elastickv.backends.cuda.compiler import _read

    source = Source(data)
    row = {"kernel": "k", "registers": 32, "spill_bytes": 0, "shared_bytes": 0}
    if source.below(3):
        body = as_json(edits([row], source)) + b"\n" + source.rest()
        raw = hashlib.sha256(body).digest() + body
    else:
        raw = source.rest()
    found = _read(written("k.kernel", raw))
    assert found is None or isinstance(found.cubin, bytes)


def gguf_headers(data: bytes) -> None:
    from elastickv.model_benchmark.gguf_file import KV_TYPES, read_gguf

    source = Source(data)
    fields = [*_GGUF_FIELDS[:6], *(source.pick(_GGUF_FIELDS[6:]) for _ in range(source.below(3)))]
    head = [source.pick((3, 3, 3, 2, 0)), source.pick((1, 1, 1, 0, 1 << 32)), source.pick((len(fields),) * 4 + (0, 2**64 - 1))]
    whole = bytearray(b"GGUF" + struct.pack("<IQQ", *head) + b"".join(fields) + _GGUF_TENSOR + bytes(64))
    for _ in range(source.below(3)):
        at = source.below(len(whole))
        whole[at : at + source.below(9)] = source.rest()[:8] if source.below(4) == 0 else bytes([source.below(256)])
    found = read_gguf(str(written("m.gguf", bytes(whole))))
    assert found.layers * found.query_heads * found.positions * found.vocabulary > 0
    assert all(found.kv_bytes_per_token(name) >= 0 for name in KV_TYPES)


def _gguf_text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _gguf_field(key: str, kind: int, value: bytes) -> bytes:
    return _gguf_text(key) + struct.pack("<I", kind) + value


_GGUF_TENSOR = _gguf_text("t") + struct.pack("<IQIQ", 1, 4, 0, 0)
_GGUF_FIELDS = (
    _gguf_field("general.architecture", 8, _gguf_text("llama")),
    *(
        _gguf_field(f"llama.{key}", 4, struct.pack("<I", value))
        for key, value in (("block_count", 1), ("attention.head_count", 2), ("embedding_length", 128), ("context_length", 64))
    ),
    _gguf_field("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 1) + _gguf_text("a")),
    _gguf_field("llama.block_count", 9, struct.pack("<IQI", 4, 1, 1)),
    _gguf_field("llama.attention.head_count_kv", 9, struct.pack("<IQII", 4, 2, 1, 0)),
    _gguf_field("llama.attention.key_length", 5, struct.pack("<i", -5)),
    _gguf_field("llama.attention.head_count", 6, struct.pack("<f", math.nan)),
    _gguf_field("general.alignment", 4, struct.pack("<I", 0)),
    _gguf_field("a", 9, struct.pack("<IQ", 4, 2**61)),
    _gguf_field("b", 9, struct.pack("<IQ", 9, 1) * 9),
    _gguf_field("c", 77, b""),
)


def texts(data: bytes) -> None:
    from elastickv.evaluation.texts import read_text

    assert read_text(written("t.txt", data)).content.strip()


def tolerances(data: bytes) -> None:
    from elastickv.evaluation.suggestion import Tolerance

    parsed = Tolerance.parse(data.decode("utf-8", "surrogateescape"))
    assert math.isfinite(parsed.bound)
    assert Tolerance.parse(str(parsed)).figure == parsed.figure


@cache
def _saved():
    """Return a tiny model, and the JSON and the arrays of a cache of its that was saved."""
    import torch
    from safetensors import safe_open

    import elastickv.transformers as ekv
    from tests.helpers.tiny_models import tiny_llama

    model = tiny_llama(layers=1).model
    path, found = folder() / "saved.safetensors", []
    for given in ({"recipe": "int4,pages=1/2,anchor_every=4,window=32"}, {"recipe": "int8"}, {"compress": 2}):
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            cache = ekv.ElasticCache.for_model(model, **given)
            tokens = torch.arange(200)[None] % 128
            model(tokens, past_key_values=cache)
            model(tokens[:, :1], past_key_values=cache)
        cache.save(path)
        with safe_open(path, "np") as file:
            found.append((json.loads(file.metadata()["elastickv"]), {n: file.get_tensor(n) for n in file.keys()}))  # noqa: SIM118
    return model, tuple(found)


def saved_caches(data: bytes) -> None:
    """Load a saved cache whose record and arrays are edited; what is loaded must decode without touching other memory."""
    import torch
    from safetensors.numpy import save

    import elastickv.transformers as ekv

    source = Source(data)
    model, kept = _saved()
    path = folder() / "cache.safetensors"
    record, arrays = source.pick(kept)
    if source.below(8) == 0:
        path.write_bytes(source.rest())
    else:
        arrays = copy.copy(arrays)
        text = as_json(edits(record, source, 3)).decode()
        for _ in range(source.below(3)):
            name = source.pick(sorted(arrays))
            array = arrays[name].copy()
            kind = source.below(6)
            if kind == 0:
                array = array[..., : source.below(9)]
            elif kind == 1:
                array = array.astype(source.pick((np.float64, np.int64, np.uint8, np.bool_)))
            elif array.nbytes:
                flat = array.reshape(-1).view(np.uint8)
                at = source.below(65536) % len(flat)
                flat[at : at + 8] = source.pick((0, 255, 127, 128, 1, source.below(256)))
            arrays[name] = array
        path.write_bytes(save({n: np.ascontiguousarray(a) for n, a in arrays.items()}, {"elastickv": text}))
    cache = ekv.ElasticCache.load(path, model, capture=False)
    if source.below(16) == 1:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            model(torch.zeros((max(1, cache.layers[0].batch), 1), dtype=torch.int64), past_key_values=cache)


def _seeds(*texts: str) -> tuple[bytes, ...]:
    return tuple(text.encode() for text in texts)


_RECIPE_SEEDS = _seeds(
    "dense",
    "bf16",
    "int8,stride=2",
    "k=int8,v=int4,vgroup=32",
    "int4,pages=1/4:1/2,anchor_every=4",
    "reuse,anchor_every=4,decay=.9",
    "int4,pages,sinks=0,window=64",
    "fp8",
    "pages=0.3",
    "stride",
)
_RECIPE_WORDS = (
    "dense",
    "bf16",
    "fp16",
    "fp8",
    "int8",
    "int4",
    "k=",
    "v=",
    "vgroup=",
    "pages=",
    "stride=",
    "reuse",
    "anchor_every=",
    "decay=",
    "sinks=",
    "window=",
    "1/4",
    ":",
    ",",
    "e-",
    "auto",
)
_CHOICES = tuple(bytes([a, b, c, 0, 5, 9]) * 6 for a in (1, 5, 9) for b in (0, 2, 7) for c in (4, 13))
_TOML = b"""\x02seq = [1024, 4096]\ncompress = "1-4*2"\nreps = 6\n[[cells]]\nheads = 4\nkv-heads = [2, 4]\n"""

TARGETS: dict[str, Target] = {
    "recipe": Target(recipe, _RECIPE_SEEDS, _RECIPE_WORDS, 320, longest=160),
    "resolve": Target(resolved, tuple(b"\1\x08" + bytes(8) + seed for seed in _RECIPE_SEEDS), _RECIPE_WORDS, 25, longest=160),
    "gate": Target(
        gate, _seeds("golden", "speedup>=1.5,cv<=5", " roofline >= 0.8 "), ("speedup", "cv", ">=", "<="), 180, longest=120
    ),
    "axes": Target(
        axes, _seeds("\0001024,4096", "\0011-64*4", "\0021-2+0.25", "\3int4,pages;int8"), ("-", "*", "+", ","), 60, longest=100
    ),
    "options": Target(options, _CHOICES, (), 22, longest=64),
    "tolerance": Target(tolerances, _seeds("ppl=0.5%", "kl=.01", "top1=96%"), ("ppl=", "kl=", "top1=", "%"), 150, longest=64),
    "plan": Target(plan, (_TOML, b"\1" + json.dumps(_PLAN).encode(), *_CHOICES), (*AXES, *SETTINGS, "[[cells]]", *PRESETS), 20),
    "results": Target(results, (*_CHOICES, b'\1{"benchmark_type": 1}'), (), 22),
    "comparison": Target(comparisons, _CHOICES, (), 20, (UsageError, NonFiniteError), 256),
    "sweep": Target(sweeps, _CHOICES, (), 20, longest=512),
    "activations": Target(activations, (*_CHOICES, b"\0" + struct.pack("<Q", 2) + b"{}"), (), 22, longest=512),
    "calibration": Target(calibrations, _CHOICES, (), 20, longest=512),
    "allotment": Target(allotments, _CHOICES, (), 40, longest=64),
    "recipe-file": Target(recipe_files, (*_CHOICES, b"\0int4,pages=1/4"), _RECIPE_WORDS, 20, longest=512),
    "gguf": Target(gguf_headers, _CHOICES, (), 20, longest=512),
    "kernel-cache": Target(kernel_caches, _CHOICES, (), 22, longest=256),
    "text": Target(texts, _seeds("a text", "é", " "), (), 60, longest=128),
    "saved-cache": Target(saved_caches, _CHOICES, (), 2, longest=256),
}
