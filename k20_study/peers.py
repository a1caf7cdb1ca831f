"""cuDNN and flash through torch, as benchmarks/gpu_decode.py times them."""

import json, sys

sys.path.insert(0, "benchmarks")
from gpu_decode import torch_us

rows = {}
for row in ((8, 32, 8, 128, 32768), (1, 32, 8, 128, 32768), (1, 32, 8, 128, 131072)):
    rows[str(row)] = torch_us(row, 10)
    print(row, rows[str(row)], flush=True)
json.dump(rows, open(sys.argv[1], "w"), indent=1)
