"""Counters of what decodes read, against what the kernels of CPUs are told to read."""

from types import SimpleNamespace

import pytest
from vllm.v1.metrics.perf import DebugPerfStats, PerfMetricsDebugLogging, PerfStats
from vllm.v1.metrics.stats import SchedulerStats

from elastickv.backends.cpu.blocks.host_blocks import EVERY_PAGE, AnchorField, RowField
from elastickv.recipe import PAGE_TOKENS, Recipe
from elastickv.vllm import model_setup
from elastickv.vllm.cpu_attention import CpuAttention
from elastickv.vllm.metrics import read_metrics, served_reads
from elastickv.vllm.metrics.decode_reads import ReadTotals
from tests.helpers.serving_scenarios import NGRAM, SMALL_POOL, WINDOW, random_prompts

LAYER_RECIPES = {0: "int4,pages=1/4:1/2,anchor_every=4", 1: "int4,pages=1/3,anchor_every=24"}
PARSED = {layer: Recipe.parse(f"{text},sinks=0,window={WINDOW}") for layer, text in LAYER_RECIPES.items()}
LAYERS, HEADS, HEAD_DIM = 2, 2, 64
CODES = PAGE_TOKENS * HEAD_DIM // 2  # of K, and of V: 4 bits
KEY_SCALES, VALUE_SCALES = HEAD_DIM * 4, PAGE_TOKENS * 4  # of a scale and a zero, in 16 bits each
PAGE_BYTES = 2 * CODES + KEY_SCALES + VALUE_SCALES
WINDOW_ROW_BYTES = 2 * HEAD_DIM * 2  # K and V: 2 bytes, although the model is float32
NAMES = {
    "read_bytes": "kv_read_bytes",
    "dense_bytes": "kv_dense_bytes",
    "steps": "decode_steps",
    "tokens": "decode_tokens",
    "layer_tokens": "layer_tokens",
    "anchors": "anchors",
}
LENGTHS, NEW_TOKENS = (300, 37, 200, 64, 5), 60
CACHED = {"enable_prefix_caching": True, **SMALL_POOL}


class KernelReads:
    """What decodes read by the arguments of their kernels."""

    def __init__(self, patch):
        self.read = self.dense = self.rows = self.anchors = 0
        attend, part_of_step = CpuAttention._attend_rows, CpuAttention.decode

        def decode(attention, step, query, output):
            self.prompts = None if step.batch.prompts is None else step.batch.prompts.tolist()
            self.kernels = attention._kernels
            part_of_step(attention, step, query, output)
            self.prompts = self.kernels = None

        def attend_rows(attention, part, query, output, selected=None):
            if self.kernels is not None:
                self.count(part, selected)
            attend(attention, part, query, output, selected)

        self.prompts = self.kernels = None
        patch.setattr(CpuAttention, "decode", decode)
        patch.setattr(CpuAttention, "_attend_rows", attend_rows)

    def count(self, part, selected):
        for request, length in enumerate(part.lengths.tolist()):
            first, end = part.starts[request : request + 2].tolist()
            for row in range(first, end):
                tokens = length - (end - row) + 1
                if self.prompts is None or tokens > self.prompts[request]:
                    self.read += self.row(tokens, None if selected is None else selected.rows[row])
                    self.dense += tokens * HEADS * HEAD_DIM * 2 * 2
                    self.rows += 1
        if selected is not None:
            self.anchors += len(selected.anchors)
            self.read += int(selected.anchors[:, AnchorField.PAGES].sum()) * HEADS * KEY_SCALES

    @staticmethod
    def row(tokens, row):
        pages = -(-max(0, tokens - WINDOW) // PAGE_TOKENS)
        read = min(tokens, WINDOW) * HEADS * WINDOW_ROW_BYTES
        if row is None or row[RowField.LIST] == EVERY_PAGE:
            return read + HEADS * pages * PAGE_BYTES
        listed = row[len(RowField) :].tolist()
        since_list = pages - int(row[RowField.LISTED_PAGES])
        return read + (sum(listed) + HEADS * since_list) * PAGE_BYTES + sum(-(-4 * count // 32) * 32 for count in listed)


@pytest.fixture
def kernel_reads(monkeypatch):
    return KernelReads(monkeypatch)


@pytest.fixture(scope="module")
def selecting(serve):
    """Return engines whose layers have these recipes, as a calibration may choose them."""
    with pytest.MonkeyPatch.context() as patch:
        solved = served_reads.layer_recipes

        def recipes(options, *others):
            return PARSED if options.compress else solved(options, *others)

        for module in (model_setup, served_reads):
            patch.setattr(module, "layer_recipes", recipes)
        serve.close()
        yield lambda **options: serve(**{"elastickv": {"compress": 4}} | options)
        serve.close()


def counters(engine):
    counted = engine.reads()
    return ReadTotals(**{name: counted[counter] for name, counter in NAMES.items()})


def since(engine, before):
    return ReadTotals(*(vars(counters(engine))[name] - value for name, value in vars(before).items()))


def test_counters_are_what_the_kernels_read(selecting, kernel_reads):
    engine = selecting()
    before = counters(engine)
    engine.generate(random_prompts(LENGTHS), NEW_TOKENS)
    found = since(engine, before)
    tokens = len(LENGTHS) * (NEW_TOKENS - 1)
    assert found == ReadTotals(
        read_bytes=kernel_reads.read,
        dense_bytes=kernel_reads.dense,
        steps=NEW_TOKENS - 1,
        tokens=tokens,
        layer_tokens=LAYERS * tokens,
        anchors=kernel_reads.anchors,
    )
    assert kernel_reads.rows == LAYERS * tokens and 0 < found.anchors < found.layer_tokens


def test_tokens_of_prompts_are_not_counted(selecting, kernel_reads):
    """In chunks of 33 tokens, the last chunk of one is computed as a decode is."""
    engine = selecting()
    before = counters(engine)
    whole_step, engine.scheduler.max_num_scheduled_tokens = engine.scheduler.max_num_scheduled_tokens, 33
    engine.generate(random_prompts([331]), 40)
    engine.scheduler.max_num_scheduled_tokens = whole_step
    found = since(engine, before)
    assert (found.tokens, found.steps) == (39, 39)
    assert (found.read_bytes, found.dense_bytes) == (kernel_reads.read, kernel_reads.dense)


def test_requests_with_ratios_of_their_own_are_counted_by_them(selecting, kernel_reads):
    engine = selecting()
    before, prompts = counters(engine), random_prompts([300] * 4)
    asked = [{"extra_args": {"elastickv_compress": ratio}} for ratio in (1, 2, 3.5, 4)]
    engine.finish([engine.add(prompt, 40, **each) for prompt, each in zip(prompts, asked, strict=True)], prompts)
    found = since(engine, before)
    assert (found.read_bytes, found.dense_bytes) == (kernel_reads.read, kernel_reads.dense)
    assert found.anchors == kernel_reads.anchors


def test_drafts_read_too(selecting, kernel_reads):
    engine = selecting(speculative_config=NGRAM, max_model_len=512)
    before, drafts = counters(engine), engine.counter("vllm:spec_decode_num_draft_tokens")
    engine.generate(random_prompts(LENGTHS), NEW_TOKENS)
    found = since(engine, before)
    assert found.tokens * LAYERS == kernel_reads.rows
    assert found.tokens > found.steps and engine.counter("vllm:spec_decode_num_draft_tokens") > drafts
    assert (found.read_bytes, found.dense_bytes) == (kernel_reads.read, kernel_reads.dense)
    assert found.anchors == kernel_reads.anchors


def test_after_a_preemption_lists_that_came_back_are_counted(selecting, kernel_reads):
    """Strict hits end in the prompt: what was generated is computed anew, which makes the lists, and is not counted."""
    engine = selecting(elastickv={"compress": 4, "prefix_reuse": "strict"}, **CACHED)
    before = counters(engine)
    answers = engine.generate(random_prompts(LENGTHS), 90)
    found = since(engine, before)
    assert sum(answer.preemptions for answer in answers) > 0
    assert (found.read_bytes, found.anchors) == (kernel_reads.read, kernel_reads.anchors)


def test_after_a_preemption_lists_that_are_gone_are_counted_as_every_page(selecting, kernel_reads):
    """A soft hit brings back tokens that chose lists, and not the lists: every page is read until the next anchor."""
    engine, prompt = selecting(**CACHED), random_prompts([299])[0]
    before, scheduler = counters(engine), engine.scheduler
    layers = engine.core.vllm_config.compilation_config.static_forward_context.values()
    selections = [layer.impl._selection for layer in layers if hasattr(layer, "impl")]
    name = engine.add(prompt, NEW_TOKENS)
    for _ in range(30):
        engine.step()
    for block in scheduler.kv_cache_manager.get_block_ids(name)[engine.record.pages]:
        for selection in selections:
            selection.lists.forget(block, 0, len(prompt) + NEW_TOKENS)
    scheduler._preempt_request(scheduler.running.pop(), 0.0)
    anchors = kernel_reads.anchors
    (answer,) = engine.finish([name], [prompt])
    found = since(engine, before)
    assert answer.preemptions == 1 and len(selections) == LAYERS
    assert (found.read_bytes, found.anchors) == (kernel_reads.read, kernel_reads.anchors) and anchors < found.anchors


def test_formats_without_a_selection_are_counted(serve, kernel_reads):
    engine = serve()
    before = counters(engine)
    engine.generate(random_prompts(LENGTHS), 40)
    found = since(engine, before)
    assert (found.read_bytes, found.dense_bytes, found.anchors) == (kernel_reads.read, kernel_reads.dense, 0)
    assert found.dense_bytes > found.read_bytes > 0


def test_a_stock_engine_has_no_such_counters(serve):
    engine = serve(fmt=None)
    assert engine.counter("vllm:generation_tokens") == 0 and engine.reads() == {}


TOTALS = ReadTotals(2**40 + 1, 2**43, 1, 256, 8192, 2048)


def sent(stats):
    """Return vLLM's statistics as the front end gets them."""
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    return (
        MsgpackDecoder(EngineCoreOutputs)
        .decode(MsgpackEncoder().encode(EngineCoreOutputs(scheduler_stats=stats)))
        .scheduler_stats
    )


def test_sums_arrive_in_the_process_of_the_front_end():
    stats = SchedulerStats()
    read_metrics.attach(stats, TOTALS)
    assert read_metrics.attached(sent(stats).perf_stats) == TOTALS


def test_a_step_without_decodes_sends_nothing():
    stats = SchedulerStats()
    read_metrics.attach(stats, ReadTotals())
    assert stats.perf_stats is None and read_metrics.attached(PerfStats()) == ReadTotals()


def test_sums_travel_beside_vllms_own():
    own = PerfStats(5, 6, 7, DebugPerfStats(0.5, 1, 2, {"a": 1}, {"b": 2}, {"c": 3}, {"d": 4}))
    stats = SchedulerStats(perf_stats=own)
    read_metrics.attach(stats, TOTALS)
    perf = sent(stats).perf_stats
    assert (perf.num_flops_per_gpu, perf.num_read_bytes_per_gpu, perf.num_write_bytes_per_gpu) == (5, 6, 7)
    assert perf.debug_stats.num_read_bytes_per_gpu_breakdown["c"] == 3 and perf.debug_stats.context_breakdown == {"a": 1}
    assert own.debug_stats.num_read_bytes_per_gpu_breakdown == {"c": 3} and read_metrics.attached(perf) == TOTALS


def test_vllms_debug_log_takes_sums_without_its_own():
    stats, log = SchedulerStats(), PerfMetricsDebugLogging()
    read_metrics.attach(stats, TOTALS)
    log.observe(stats.perf_stats.debug_stats)
    assert log.total_read_bytes_per_gpu_breakdown["elastickv_read_bytes"] == TOTALS.read_bytes


def config(layers, stages, kinds=None):
    model = SimpleNamespace(get_total_num_hidden_layers=lambda: layers, hf_text_config=SimpleNamespace(layer_types=kinds))
    return SimpleNamespace(model_config=model, parallel_config=SimpleNamespace(pipeline_parallel_size=stages))


def caches(pages, windows=()):
    groups = [
        SimpleNamespace(
            kv_cache_spec=SimpleNamespace(sliding_window=window), layer_names=[f"model.layers.{n}.attn" for n in numbers]
        )
        for numbers, window in ((pages, None), (windows, 64))
    ]
    return SimpleNamespace(kv_cache_groups=groups)


@pytest.mark.parametrize(
    ("of_config", "of_scheduler", "expected"),
    [
        (config(4, 1), caches(range(4)), [0, 1, 2, 3]),
        (config(4, 1), caches([0, 1, 2, 3, 4]), [0, 1, 2, 3]),  # an EAGLE head's follows
        (config(4, 1, ["a", "b"] * 2), caches([1, 3], [0, 2]), [1, 3]),
        (config(6, 2), caches([0, 1, 2]), [0, 1, 2, 3, 4, 5]),
        (config(6, 2, ["a", "b"] * 3), caches([1], [0, 2]), [1, 3, 5]),
    ],
    ids=["all", "a drafter", "windowed layers", "stages", "stages with windowed layers"],
)
def test_layers_are_those_of_the_model_on_all_stages(of_config, of_scheduler, expected):
    assert served_reads.served_layers(of_config, of_scheduler) == expected
