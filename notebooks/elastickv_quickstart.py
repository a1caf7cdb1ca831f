# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # ElasticKV: quick start
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/elastickv/blob/main/notebooks/elastickv_quickstart.ipynb)
#
# While a language model decodes, every new token reads the whole KV cache. ElasticKV gives decoding a **byte budget**:
# `compress=C` reads at most 1/C of the bytes that a dense 16-bit cache would. This notebook measures on *this* machine what that
# buys and what it costs. It needs no GPU: on a CPU everything runs, only smaller. Nothing below is typed in: every figure is
# measured when you run it.

# %% [markdown]
# ## Settings
#
# The defaults are fine. Each can also be set from outside, by the environment variable beside it.

# %%
import os
from pathlib import Path

# Where `pip` finds ElasticKV if it is neither installed, nor a checkout around this notebook, nor a wheel beside it.
ADDRESS = os.environ.get("ELASTICKV_ADDRESS", "https://github.com/OWNER/elastickv")
# The Transformers baseline: a hub id, a folder or a .gguf file.
RUN_TRANSFORMERS = os.environ.get("ELASTICKV_TRANSFORMERS", "1") == "1"
MODEL = os.environ.get("ELASTICKV_MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")
# The llama.cpp baseline: one toggle, and a .gguf file or OWNER/NAME:FILE.gguf on the hub.
RUN_GGUF = os.environ.get("ELASTICKV_GGUF", "0") == "1"
GGUF_MODEL = os.environ.get("ELASTICKV_GGUF_MODEL", "bartowski/SmolLM2-135M-Instruct-GGUF:SmolLM2-135M-Instruct-Q4_K_M.gguf")
# Every result lands here, as JSON.
RESULTS = Path(os.environ.get("ELASTICKV_RESULTS", "elastickv-results"))
# A glance instead of a measurement: few samples, wide intervals.
QUICK = os.environ.get("ELASTICKV_QUICK", "0") == "1"
print(f"Transformers: {MODEL if RUN_TRANSFORMERS else 'off'}\nGGUF: {GGUF_MODEL if RUN_GGUF else 'off'}\nresults: {RESULTS}")

# %% [markdown]
# ## Install
#
# One `pip install`, and none where `import elastickv` works already.

# %%
import importlib
import importlib.util
import shutil
import subprocess
import sys

if importlib.util.find_spec("elastickv") is None:
    around = [folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "src" / "elastickv").is_dir()]
    wheels = sorted(Path.cwd().glob("elastickv-*.whl"))
    source = wheels[-1].resolve().as_uri() if wheels else around[0].as_uri() if around else f"git+{ADDRESS}"
    extras = ["report", "transformers"] + ["cuda"] * bool(shutil.which("nvidia-smi")) + ["gguf"] * RUN_GGUF
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", f"elastickv[{','.join(extras)}] @ {source}"], check=True)
    importlib.invalidate_caches()
print("elastickv is installed")

# %% [markdown]
# ## What this machine is

# %%
from html import escape

import elastickv
from elastickv.backends import load
from elastickv.results.formats.html import html_table


class Html(str):
    """A text that a notebook shows as HTML."""

    def _repr_html_(self):
        return str(self)


backend, _ = load()
device = backend.device
on_gpu = device.kind == "cuda"
RESULTS.mkdir(parents=True, exist_ok=True)
print(
    f"elastickv {elastickv.__version__} on {device.name} ({device.compute_units} {'multiprocessors' if on_gpu else 'threads'})"
)

# %% [markdown]
# ## The CUDA source, written
#
# The kernels are CUDA C++. This one decodes an `int4` cache: the cell writes its source next to the results.

# %%
from elastickv import Recipe
from elastickv.backends.cuda.compiler import KERNELS, compile_file
from elastickv.backends.cuda.kernel_selection import decode_variant

architecture = device.sm if on_gpu else "9.0"
kernel = decode_variant(head_dim=128, group=4, dtype="bf16", recipe=Recipe.parse("int4"), arch=architecture.replace(".", ""))
cuda_source = (KERNELS / f"{kernel.source}.cu").read_text(encoding="utf-8")
cuda_file = RESULTS / f"{kernel.source}.cu"
cuda_file.write_text(cuda_source, encoding="utf-8")
print(f"{cuda_file}: {len(cuda_source.splitlines())} lines, and {len(list(KERNELS.glob('*.cuh')))} headers in {KERNELS.name}/")
Html(f"<pre style='max-height: 24em; overflow: auto; font-size: 85%'>{escape(cuda_source)}</pre>")

# %% [markdown]
# ## The CUDA source, compiled
#
# NVRTC from a wheel compiles the file: no CUDA toolkit, no host compiler. On a GPU it does so for this GPU; without one it can still
# compile, for an H100. `bench` compiles what it needs in the same way and stores it in a cache.

# %%
import time

began, compiled_table = time.perf_counter(), ""
try:
    built = compile_file(cuda_file, kernel.arch, dict(kernel.macros))
except elastickv.UsageError as missing:
    print(f"not compiled, and not needed to go on without a GPU: {missing}")
else:
    seconds = time.perf_counter() - began
    print(
        f"{cuda_file.name} for compute capability {architecture}: {len(built.cubin)} bytes of machine code in {seconds:.1f} s"
    )
    taken = [[r.kernel, str(r.registers), str(r.spill_bytes), str(r.shared_bytes)] for r in built.resources]
    compiled_table = html_table(["kernel", "registers", "bytes spilled", "bytes of static shared memory"], taken, [])
Html(compiled_table)

# %% [markdown]
# ## The long preset
#
# One decode step of attention, elastic against the fastest dense contender that this machine has: they take turns, so that what
# the machine does to one it does to the other. The speed-up stands with its 95 % interval; A/A is dense against itself; the recipe
# error is its quality cost, measured on real activations through the same kernels.

# %%
if QUICK:
    effort = {"reps": 6, "warmup": 1, "inner_loops": 1, "cache": "hot", "dense": "bf16"}
elif on_gpu:
    effort = {"reps": 200, "inference": True, "time_limit_s": 120}
else:
    effort = {"reps": 40, "warmup": 2, "inner_loops": 4, "time_limit_s": 30}

long = elastickv.bench(preset="long", paired=True, **effort)
long.save(RESULTS / "long.json")
print(long)

# %% [markdown]
# ## The short preset
#
# The same at a short context, where there is less to save.

# %%
short = elastickv.bench(preset="short", paired=True, **effort)
short.save(RESULTS / "short.json")
print(short)

# %% [markdown]
# ## A result as JSON
#
# Every figure is in the file, with what is needed to repeat the run.

# %%
import json

stored = json.loads((RESULTS / "long.json").read_text(encoding="utf-8"))
print(f"{RESULTS / 'long.json'} has {', '.join(stored)}")
print(json.dumps({name: stored[name] for name in ("recipe", "speedup")}, indent=1))

# %% [markdown]
# ## Every result in one table

# %%
COLUMNS = {
    "source": "file", "model": "model", "context": "context", "recipe": "recipe", "cache": "cache",
    "ratio_read": "reads 1/", "baseline": "against", "speedup": "speed-up", "speedup_low": "low", "speedup_high": "high",
    "recipe_error": "recipe error", "tokens_per_s": "tokens/s",
}  # fmt: skip


def shown(value):
    """Return a value as a cell of a table."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else Path(str(value)).name


def table():
    """Return every JSON file of the results as rows of one table: columns that hold anything."""
    rows = elastickv.report(RESULTS).rows()
    used = [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
    return Html(html_table([COLUMNS[name] for name in used], [[shown(row[name]) for name in used] for row in rows], []))


table()

# %% [markdown]
# ## The report's plots

# %%
page = elastickv.report(RESULTS)
plots = "".join(f"<div style='flex: 1 1 24em; max-width: 36em'>{svg}</div>" for svg in page.figures.values())
Html(f"<div style='display: flex; flex-wrap: wrap; gap: 1em'>{plots}</div>")

# %% [markdown]
# ## Transformers mini baseline
#
# A small real model in Hugging Face Transformers: tokens/s with the stock cache and with the elastic one, taking turns, and what
# the elastic one does to the model's predictions of a text. The recipe is not calibrated here; `elastickv calibrate` makes it
# cost less.

# %%
import warnings

from elastickv.model_benchmark import gguf_baseline, transformers_baseline
from elastickv.results.formats.plain_json import dumps

if QUICK:
    sizes = {"context": 256, "reps": 2, "decode_tokens": 2, "scored": 4}
elif on_gpu:
    sizes = {"context": 4096, "reps": 10, "decode_tokens": 64, "scored": 64}
else:
    sizes = {}

if RUN_TRANSFORMERS:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the text above says it
        try:
            result = transformers_baseline(MODEL, **sizes)
        except elastickv.UsageError as reason:
            shape = "shape:1b" if on_gpu else "shape:tiny"
            print(f"{reason}\nInstead: {shape}, a made-up model with random weights. Its speed is real, its text is not.\n")
            result = transformers_baseline(shape, **sizes)
    (RESULTS / "transformers.json").write_text(dumps(result), encoding="utf-8")
    print(elastickv.load(RESULTS / "transformers.json"))
else:
    print("off: RUN_TRANSFORMERS = True switches it on")

# %% [markdown]
# ## GGUF baseline
#
# llama.cpp through prebuilt bindings, with its 16-bit, `q8_0` and `q4_0` KV caches taking turns, and the bytes of our formats
# beside theirs. It is off unless `RUN_GGUF` is on.

# %%
gguf_table = ""
if RUN_GGUF:
    result = gguf_baseline(GGUF_MODEL, **sizes)
    (RESULTS / "gguf.json").write_text(dumps(result), encoding="utf-8")
    baseline = elastickv.load(RESULTS / "gguf.json")
    print(baseline)
    names = ("tokens_per_s", "kv_bytes_per_token", "stored_ratio")
    lines = [[f"llama.cpp {c['cache']}", *(shown(c[name]) for name in names)] for c in baseline["caches"]]
    lines += [[f"ElasticKV {own['recipe']}", "", *(shown(own[name]) for name in names[1:])] for own in baseline["formats"]]
    note = "ElasticKV keeps sinks and window in 16 bit: its bytes are those of the whole cache at this context."
    gguf_table = html_table(["cache", "tokens/s", "KV bytes a token", "1/x of 16 bit"], lines, [note])
else:
    print("off: RUN_GGUF = True switches it on")
Html(gguf_table)

# %% [markdown]
# ## Everything together
#
# The page below is also a file of its own, which fetches nothing: send it to a colleague.

# %%
page = elastickv.report(RESULTS)
page.save(RESULTS / "report.html")
print(f"{RESULTS / 'report.html'} and {len(list(RESULTS.glob('*.json')))} results beside it")
table()

# %%
page
