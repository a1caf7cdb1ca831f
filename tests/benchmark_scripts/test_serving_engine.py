"""One contender's process: what is kept when time or room runs out, and which blocks a prompt's cache is filled with."""

import importlib
import json
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


class _Base:
    """In place of vLLM's class of connectors."""

    def __init__(self, vllm_config, role, kv_cache_config):
        self._connector_metadata = None


@pytest.fixture(scope="module")
def engine():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("serving_engine")


@pytest.fixture
def recorder(engine, tmp_path):
    def made(seconds=1e6, samples=3):
        return engine.Recorder(tmp_path / "record.json", {"seconds": seconds, "samples": samples}, time.time())

    return made


class FullEngine:
    """An engine that has room for 7 requests."""

    def __init__(self, error):
        self._error = error

    def requests_that_fit(self, context):
        return 9, False

    def prompts(self, context, batch):
        return [None] * batch

    def step_ms(self, context, prompts):
        if len(prompts) > 7:
            raise self._error("too many")
        return 5.0 * len(prompts)


def test_what_was_measured_is_on_disk_at_once(recorder, tmp_path):
    recorder().save(startup_s=3.0)
    assert json.loads((tmp_path / "record.json").read_text())["startup_s"] == 3.0


def test_a_batch_that_does_not_stay_together_is_made_smaller(engine, recorder):
    record = recorder()
    measured = engine.throughput(FullEngine(engine.NotTogether), record, 1024)
    assert measured == {"context": 1024, "requests": 7, "samples_ms": [35.0] * 2}
    assert len(record.record["not_measured"]) == 2


def test_a_measurement_that_fails_is_named_and_gives_no_samples(engine, recorder):
    record = recorder()
    assert engine.throughput(FullEngine(MemoryError), record, 1024) is None
    assert record.record["not_measured"] == ["throughput: MemoryError: too many"]


def test_a_probe_that_fails_is_named_too(engine, recorder):
    record, full = recorder(), FullEngine(MemoryError)
    full.requests_that_fit = lambda context: 1 // 0
    assert engine.throughput(full, record, 1024) is None
    assert record.record["not_measured"] == ["throughput: ZeroDivisionError: integer division or modulo by zero"]


class CountingScheduler:
    """Counts the steps of an engine while it has a counter."""

    def __init__(self):
        self.reads = None

    def read_counter(self):
        totals = SimpleNamespace(steps=0)
        return SimpleNamespace(totals=totals, take=lambda: totals)


def counting_engine(engine, step_ms):
    made = engine.Engine.__new__(engine.Engine)
    made.core = SimpleNamespace(scheduler=CountingScheduler())
    made.step_ms = lambda context, prompts: step_ms(made.core.scheduler, context, prompts)
    return made


def test_bytes_are_counted_in_steps_of_their_own_and_not_while_others_are_timed(engine, recorder):
    def step_ms(scheduler, context, prompts):
        scheduler.reads.totals.steps += context * len(prompts)

    counting, record = counting_engine(engine, step_ms), recorder()
    assert engine.reads_of_cell(counting, record, 100, 2, [None] * 2) == {"steps": 200}
    assert counting.core.scheduler.reads is None and not record.record["not_measured"]


@pytest.mark.parametrize("error", ["NotTogether", "MemoryError"])
def test_bytes_that_could_not_be_counted_are_named_and_timing_goes_on(engine, recorder, error):
    def step_ms(scheduler, context, prompts):
        raise getattr(engine, error, MemoryError)("too many")

    counting, record = counting_engine(engine, step_ms), recorder()
    assert engine.reads_of_cell(counting, record, 100, 2, [None] * 2) is None
    assert record.record["not_measured"] == [f"100x2, bytes: {error}: too many"]
    assert counting.core.scheduler.reads is None


def test_without_time_there_are_fewer_samples(recorder):
    record = recorder(seconds=0)
    assert record.sample("1024x1", lambda: 1.0) == []
    assert record.record["not_measured"] == ["1024x1: 0 of 3 samples, no time was left"]


def test_a_contender_of_ours_that_vllm_runs_on_another_backend_is_not_measured_as_ours(engine):
    assert engine.not_ours({"backends": ["elastickv.vllm.attention_backend.ElasticBackend"]}) is None
    reason = engine.not_ours({"backends": ["vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend"]})
    assert reason.startswith("vLLM took vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend instead of")


@pytest.fixture
def filler(monkeypatch):
    torch = pytest.importorskip("torch")
    path = "vllm.distributed.kv_transfer.kv_connector.v1.base"
    parts = path.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
    base = sys.modules[path]
    base.KVConnectorBase_V1, base.KVConnectorMetadata = _Base, object
    base.SupportsHMA = type("SupportsHMA", (), {})
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "cache_filler", raising=False)
    module = importlib.import_module("cache_filler")
    monkeypatch.delitem(sys.modules, "cache_filler")
    groups = [
        SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=32), layer_names=["pages"]),
        SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=8), layer_names=["window"]),
    ]
    connector = module.CacheFiller(None, None, SimpleNamespace(num_blocks=40, kv_cache_groups=groups))
    # The window's own blocks are half as large as the engine's.
    connector.caches = {"pages": torch.zeros(40, 2, dtype=torch.uint8), "window": torch.zeros(80, 3)}
    connector.register_kv_caches(connector.caches)
    return connector


def step(connector):
    """Return what the next engine step tells the worker, once the worker has done it."""
    connector._connector_metadata = connector.build_connector_meta(None)
    connector.start_load_kv(None)
    return connector._connector_metadata


def request(tokens, **params):
    return SimpleNamespace(num_tokens=tokens, num_output_tokens=0, kv_transfer_params=params or None)


def allocated(connector, one, pages, window, external=0):
    blocks = SimpleNamespace(get_block_ids=lambda: (pages, window))
    connector.update_state_after_alloc(one, blocks, external)


def test_an_ordinary_request_is_computed(filler):
    one = request(100)
    assert filler.get_num_new_matched_tokens(one, 0) == (0, False)
    allocated(filler, one, [1, 2, 3, 4], [5])
    assert step(filler).fills == [] and step(filler).sample is None


def test_all_but_the_last_token_of_a_filled_request_counts_as_computed(filler):
    assert filler.get_num_new_matched_tokens(request(100, fill=True), 0) == (99, False)
    assert filler.get_num_new_matched_tokens(request(100, fill=True), 64) == (35, False)


def test_the_sample_is_kept_a_step_after_its_blocks_were_allocated(filler):
    allocated(filler, request(64, source=True), [1, 2, 3], [0, 0, 0, 0, 0, 0, 6, 7, 8])
    assert step(filler).sample is None
    assert step(filler).sample == ([1, 2], [6, 7])  # whole blocks alone, and none that the window has left


def test_the_blocks_of_a_filled_request_are_copies_of_the_samples(filler):
    pages, window = filler.caches["pages"], filler.caches["window"].view(40, 2, 3)
    allocated(filler, request(64, source=True), [1, 2], [0] * 6 + [6, 7])
    step(filler)
    pages[1], pages[2], window[6], window[7] = 11, 22, 66.0, 77.0
    step(filler)
    allocated(filler, request(101, fill=True), [10, 11, 12, 13, 14], [0] * 10 + [20, 21, 22, 23], external=100)
    step(filler)
    assert pages[10:15, 0].tolist() == [11, 22, 11, 22, 0]  # the fifth holds none of the 100 tokens
    assert window[20:24, 1, 2].tolist() == [66, 77, 66, 0]


def test_a_sample_too_short_for_a_block_is_refused(filler):
    allocated(filler, request(20, source=True), [1], [2, 3, 4])
    step(filler)
    with pytest.raises(ValueError, match="give a longer one"):
        step(filler)
