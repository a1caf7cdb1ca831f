"""A few decodes of one variant, for ncu: python profile_one.py int4 few [shape index]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import numpy as np
from elastickv.backends.cuda.backend import CudaBackend
from elastickv.recipe import AttentionShape
from time_variants import SHAPES, recipe_of, variants_of
from variants import use

text, name = sys.argv[1:3]
row = SHAPES[int(sys.argv[3]) if len(sys.argv) > 3 else 0]
backend, shape = CudaBackend(None, "auto"), AttentionShape(*row[:4])
caches = [backend.cache(shape, row[4], "bf16", recipe_of(text, row)) for _ in range(2)]
for seed, cache in enumerate(caches):
    cache.fill_random(np.full(shape.batch, row[4]), seed)
    use(cache, cache.variant, cache._fixed, variants_of(text)[name])
queries = np.random.default_rng(1).standard_normal((shape.batch, shape.query_heads, shape.head_dim), dtype=np.float32)
backend.attention(caches, [queries] * 2, 4, False).run(1)
print("done", text, name)
