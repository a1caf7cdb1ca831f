"""What the page on several GPUs says of large models, computed anew from the published sizes."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GB, TOKENS = 1e9, 131072


@pytest.fixture(scope="module")
def rows():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        lines = importlib.import_module("parallel_figures").large_models()
        sys.modules.pop("parallel_figures")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| Llama")]
    return {(row[0].removeprefix("Llama 3.1 "), row[1].split(" of ")[0]): [float(cell) for cell in row[2:]] for row in cells}


# Weights in billions and layers; all have 8 KV heads of 128 channels.
SIZES = {"8B": (8.03, 32), "70B": (70.6, 80), "405B": (405.9, 126)}


@pytest.mark.parametrize(("model", "gpus"), [("8B", 1), ("8B", 2), ("70B", 4), ("70B", 8), ("405B", 8), ("405B", 16)])
def test_weights_and_caches_are_those_of_the_published_sizes(rows, model, gpus):
    billions, layers = SIZES[model]
    weights, dense, int4, fit_dense, fit_int4, *reads = rows[model, str(gpus)]
    exact = layers * 2 * 8 * 128 * 2 * TOKENS / gpus / GB  # keys and values, 2 bytes each
    assert weights == pytest.approx(2 * billions / gpus, abs=0.06)
    assert dense == pytest.approx(exact, abs=0.06)
    assert int4 == pytest.approx(exact / 3.46, abs=0.06)  # a page of 4736 bytes in place of 16,384, and a window
    assert fit_int4 > 3 * fit_dense
    for read, ratio in zip(reads, (1, 3.46, 4, 8), strict=True):
        assert read == pytest.approx(2 * billions / gpus + 8 * exact / ratio, rel=0.01)
