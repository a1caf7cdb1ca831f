"""Each variant against the oracle: layouts, formats, lengths, 6 steps. Prints the largest error per variant and format."""

import sys, time, traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import numpy as np
from elastickv.backends.cuda.backend import CudaBackend
from elastickv.kvcache import Oracle
from elastickv.kvcache.error_metrics import relative_l2
from elastickv.recipe import AttentionShape, Recipe
from variants import VARIANTS, RINGS, built, compile_all, use

CASES = [
    ("int4", 128, 4, (900, 900, 900)),
    ("int4", 128, 4, (2500, 2500, 2500)),
    ("int4", 128, 4, (900, 133, 5)),
    ("int4,vgroup=64", 128, 4, (900, 900, 900)),
    ("int4,vgroup=32", 64, 3, (700, 700, 700)),
    ("int8", 128, 4, (900, 900, 900)),
    ("int8", 128, 1, (900, 163, 31)),
    ("fp8", 128, 4, (900, 900, 900)),
    ("k=int8,v=int4", 128, 2, (900, 900, 900)),
    ("k=int4,v=int8", 128, 4, (900, 900, 900)),
    ("k=int8_per_channel,v=int8", 128, 4, (900, 900, 900)),
    ("k=int4,v=bf16", 128, 4, (900, 900, 900)),
    ("int4,pages=1/2", 128, 4, (900, 900, 900)),
]


def names_of(text, dim, fixed):
    names = {n: m for n, m in VARIANTS.items() if n != "base"} | (RINGS.get(text, {}) if dim == 128 else {})
    return {n: m for n, m in names.items() if fixed or "TWO_PAGES" not in m}


bad = 0
start = time.time()
backend = CudaBackend(None, "pages")
jobs = set()
for text, dim, group, lengths in CASES:
    recipe = Recipe.parse(text)
    planned = backend._variant(AttentionShape(3, 2 * group, 2, dim), max(lengths) + 40, "bf16", recipe)
    kernels = [planned.fixed()] if len(set(lengths)) == 1 else [planned]
    jobs |= {built(k, m) for m in names_of(text, dim, len(set(lengths)) == 1).values() for k in kernels} | {
        planned,
        planned.storing(),
        planned.editing(),
    }
    if recipe.selection == "pages":
        jobs.add(planned.selecting())
compile_all(jobs)
print(f"{len(jobs)} builds [{time.time() - start:.0f} s]", flush=True)
for text, dim, group, lengths in CASES:
    recipe, shape = Recipe.parse(text), AttentionShape(3, 2 * group, 2, dim)
    names = names_of(text, dim, len(set(lengths)) == 1)
    line = []
    for name, macros in names.items():
        try:
            rng = np.random.default_rng([dim, group, *lengths])
            cache = backend.cache(shape, max(lengths) + 40, "bf16", recipe)
            # one or two blocks a head, so that a warp goes through many pages
            fixed = cache._fixed and (cache._fixed[0], 6 if max(lengths) < 1000 else 12)
            use(cache, cache.variant, fixed, macros)
            keys, values = rng.standard_normal((2, 3, 2, max(lengths), dim), dtype=np.float32)
            keys[..., 3] += 6
            cache.prefill(keys, values, np.array(lengths))
            oracle, most = Oracle(cache), 0.0
            for step in range(6 if max(lengths) < 1000 else 2):
                queries = rng.standard_normal((3, 2 * group, dim), dtype=np.float32) * (1 if step % 2 else 4)
                out, lse = cache.decode(queries)
                want, want_lse = oracle.decode(queries)
                error = float(relative_l2(out, want).max())
                most = max(most, error if np.isfinite(error) else 1e9)
                if not np.allclose(lse, want_lse, atol=1.6e-2):
                    most = max(most, 1e6)
                cache.append(*rng.standard_normal((2, 3, 2, dim), dtype=np.float32))
            line.append(f"{name} {most:.1e}")
            bad += most > 4e-3
        except Exception as error:
            traceback.print_exc()
            line.append(f"{name} FAILED {type(error).__name__}")
            bad += 1
    print(f"{text:28} {dim} {group} {lengths}: " + ", ".join(line), f"[{time.time() - start:.0f} s]", flush=True)
# More pages in a warp than integer sums may hold at once.
for text in ("int4", "int8"):
    recipe, shape, tokens = Recipe.parse(text), AttentionShape(1, 4, 1, 128), 140_000
    line, oracle, want = [], None, None
    for name, macros in names_of(text, 128, True).items():
        if "VINT" not in macros:
            continue
        cache = backend.cache(shape, tokens, "bf16", recipe)
        use(cache, cache.variant, (cache.variant.fixed(), 1), macros)
        cache.fill_random(np.array([tokens]), seed=3)
        queries = np.random.default_rng(3).standard_normal((1, 4, 128), dtype=np.float32)
        out, lse = cache.decode(queries)
        if want is None:
            want, want_lse = Oracle(cache).decode(queries)
        error = float(relative_l2(out, want).max())
        bad += not error <= 4e-3
        line.append(f"{name} {error:.1e}")
    print(f"{text}, {tokens} tokens, one block: " + ", ".join(line), f"[{time.time() - start:.0f} s]", flush=True)
print("CHECK", "all within 4e-3" if not bad else f"{bad} FAILED")
