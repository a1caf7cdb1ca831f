"""Every peer sees the same numbers, and none is timed that computes something else."""

import gc

import numpy as np
import pytest

from elastickv.benchmark.contenders import torch_timing
from elastickv.benchmark.contenders.base import PeerWork
from elastickv.benchmark.contenders.rotation import Rotation
from elastickv.benchmark.contenders.torch_timing import Clock, checked, inputs
from elastickv.errors import KernelMismatch
from elastickv.kvcache.attention import attend as float64_attention
from elastickv.kvcache.error_metrics import relative_l2
from elastickv.recipe import AttentionShape
from tests.helpers.peers import peer_work

torch = pytest.importorskip("torch", reason="peers are called with PyTorch's tensors")


def test_inputs_are_drawn_once_while_they_are_held():
    work = peer_work()
    one = inputs(work, "bf16")
    assert inputs(work, "bf16") is one
    drawn = one.rows[1][1].clone()
    del one
    gc.collect()
    assert torch.equal(inputs(work, "bf16").rows[1][1], drawn)
    assert not torch.equal(*(inputs(work, "bf16").rows[copy][1] for copy in (0, 1)))


def test_pages_and_8_bit_hold_the_same_numbers():
    work = peer_work()
    plain, paged, eight = inputs(work, "bf16"), inputs(work, "bf16", 32), inputs(work, "fp8", 32)
    assert plain.rows[0][1].shape == (2, 2, 100, 64)
    for row, pages, cast in zip(plain.rows, paged.rows, eight.rows, strict=True):
        assert torch.equal(row[0], pages[0])
        assert torch.equal(row[0], cast[0])
        for plane in (1, 2):
            # Two sequences of four pages; the last holds four tokens.
            assert pages[plane].shape == cast[plane].shape == (8, 2, 32, 64)
            assert torch.equal(pages[plane][5], row[plane][1, :, 32:64])
            assert torch.equal(pages[plane][7, :, :4], row[plane][1, :, 96:])
            assert not pages[plane][7, :, 4:].any()
            assert torch.equal(cast[plane].float(), pages[plane].to(torch.float8_e4m3fn).float())
    assert eight.kv_bytes * 2 == plain.kv_bytes == paged.kv_bytes == 2 * 2 * 2 * 100 * 64 * 2
    assert relative_l2(paged.expected, plain.expected).max() == 0
    assert 0.01 < relative_l2(eight.expected, plain.expected).mean() < 0.1


def test_expected_is_float64_attention():
    data = inputs(peer_work(), "fp32")
    queries, keys, values = (tensor[0].double().numpy() for tensor in data.rows[0])
    for head in range(4):
        wanted = float64_attention(queries[head], keys[head // 2], values[head // 2]).output
        np.testing.assert_allclose(data.expected[0, head], wanted[0], rtol=1e-12)


def test_a_wrong_output_is_refused():
    work = peer_work()
    data = inputs(work, "fp32")

    def attend(copy):
        return torch.from_numpy(data.expected)

    assert checked("right", "1", "fp32", work, data, attend).error.max == 0
    with pytest.raises(KernelMismatch, match="off by 1 of float64"):
        checked("nothing", "1", "fp32", work, data, lambda copy: 0 * attend(copy))
    with pytest.raises(KernelMismatch, match="off by inf"):
        checked("nan", "1", "fp32", work, data, lambda copy: float("nan") * attend(copy))


def test_a_sample_goes_round_the_copies():
    seen = []
    clock = Clock(peer_work(), lambda copy: seen.append(copy) or torch.zeros(1), Rotation(2, 5, 0.0, False), torch.no_grad)
    assert clock.sample() > 0
    assert seen == [0, 1, 0, 1, 0]


@pytest.mark.parametrize(("milliseconds", "steps"), [(0.1, 4), (3, 4), (4, 3), (20, 2)])
def test_a_sample_of_a_slow_peer_has_fewer_steps_and_at_least_one_round(milliseconds, steps, monkeypatch):
    data = inputs(peer_work(), "fp32")
    output = torch.from_numpy(data.expected)
    # A clock of its own: a busy machine sleeps longer than it is told to.
    elapsed_ns = [0]
    monkeypatch.setattr(torch_timing, "perf_counter_ns", lambda: elapsed_ns[0])

    def attend(copy):
        elapsed_ns[0] += int(milliseconds * 1e6)
        return output

    contender = checked("slow", "1", "fp32", peer_work(), data, attend)
    assert (contender.rotation.copies, contender.rotation.steps) == (2, steps)


def test_a_peer_of_half_the_bytes_goes_round_twice_the_copies():
    device = peer_work().device
    cache = device.last_level_cache_bytes
    work = PeerWork(device, 0, AttentionShape(1, 1, 1, 64), 1, Rotation(4, 6, 2.0 * cache, True), 0, True)
    half = work.rotation_of(cache / 4)
    assert (half.copies, half.steps, half.cold) == (8, 8, True)
    assert half.touched_bytes == 2 * cache
    assert work.rotation_of(cache).copies == 4
