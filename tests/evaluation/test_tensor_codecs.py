"""Our formats in PyTorch: bit for bit what the quantizers that define them return."""

import numpy as np
import pytest
import torch

from elastickv.evaluation.tensor_codecs import TensorCompensation, channel_scales, stored_rows
from elastickv.kvcache.quantize import CODECS, quantize_int4_keys, stored_values
from elastickv.recipe.formats import FORMATS, value_groups

HEADS, TOKENS, CHANNELS = 3, 96, 64
ROWS = np.random.default_rng(7).standard_normal((HEADS, TOKENS, CHANNELS)).astype(np.float32)
CASES = {
    "normal": ROWS,
    "biased": ROWS + np.float32(1e3) * (np.arange(CHANNELS) % 7 == 0).astype(np.float32),
    "tiny": ROWS * np.float32(1e-6),
    "large": ROWS * np.float32(1e4),
    "zeros": np.where(np.arange(TOKENS)[:, None] < 40, 0, ROWS).astype(np.float32),
    "equal": np.full_like(ROWS, -1.7),
    "positive": np.abs(ROWS) + np.float32(0.1),
    "halves": np.round(ROWS * 8) / np.float32(2),  # many ties between codes
}
FORMAT_CASES = [
    (fmt, value, group)
    for fmt in CODECS
    for value in (False, True)
    if not value or FORMATS[fmt].values is not None
    for group in (value_groups(CHANNELS) if value and fmt in ("int4", "int3", "int2") else (CHANNELS,))
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("fmt", "value", "group"), FORMAT_CASES)
def test_rows_become_what_the_quantizers_make_of_them(fmt, value, group, case):
    rows = CASES[case]
    stored = stored_rows(torch.from_numpy(rows), fmt, value, group)
    expected = np.stack([stored_values(head, fmt, value, group) for head in rows]).astype(np.float32)
    np.testing.assert_array_equal(stored.numpy(), expected)


@pytest.mark.parametrize("case", CASES)
def test_scales_of_channels_are_those_of_the_codes(case):
    pages = CASES[case].reshape(-1, 32, CHANNELS)
    _, scales, zeros = quantize_int4_keys(pages)
    for own, plane in zip(channel_scales(torch.from_numpy(pages)), (scales, zeros), strict=True):
        np.testing.assert_array_equal(own.numpy(), plane.astype(np.float32))


def test_a_format_without_a_codec_here_takes_the_quantizer(monkeypatch):
    monkeypatch.setattr("elastickv.evaluation.tensor_codecs._GRIDS", {})
    expected = np.stack([stored_values(head, "int4", True, 32) for head in ROWS]).astype(np.float32)
    np.testing.assert_array_equal(stored_rows(torch.from_numpy(ROWS), "int4", True, 32).numpy(), expected)


@pytest.mark.parametrize(("fmt", "value", "group"), [each for each in FORMAT_CASES if each[0] != "fp8"])
def test_rows_are_rounded_by_hessians_as_the_reference_rounds_them(fmt, value, group):
    mixed = torch.randn(len(ROWS), CHANNELS, CHANNELS, generator=torch.Generator().manual_seed(0))
    compensation = TensorCompensation.of(mixed.mT @ mixed, is_rotated=True)
    batch = torch.stack([torch.from_numpy(ROWS), torch.from_numpy(ROWS).flip(-2)])
    stored = stored_rows(batch, fmt, value, group, compensation)
    heads = [(order.numpy(), shares.numpy()) for order, shares in zip(compensation.order, compensation.shares, strict=True)]
    expected = [[stored_values(x, fmt, value, group, of) for x, of in zip(each.numpy(), heads, strict=True)] for each in batch]
    np.testing.assert_array_equal(stored.numpy(), np.array(expected, np.float32))
    assert not torch.equal(stored, stored_rows(batch, fmt, value, group))
