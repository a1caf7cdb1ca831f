"""A whole run on the reference backend: what the result says is what was measured."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from safetensors.numpy import save_file

from elastickv import report
from elastickv.benchmark import Gate, Options, Result, prepare, run
from elastickv.benchmark import run as _run_function
from elastickv.benchmark.options import PRESETS
from elastickv.benchmark.sample_inputs import load_sample
from elastickv.benchmark.schema import SCHEMA_PATH, result_schema
from elastickv.benchmark.time_budget import TimeBudget
from elastickv.errors import KernelMismatch, NonFiniteError, UsageError
from elastickv.kvcache.error_metrics import ErrorSummary
from elastickv.recipe import AttentionShape, read_ratio
from elastickv.results.formats import FORMATS
from elastickv.results.measurement import Measurement
from elastickv.sweeps.axes import values
from tests.helpers.reference_backend import ReferenceBackend, ReferenceProgram, measure_with

RUN_MODULE = sys.modules[_run_function.__module__]
SMALL = {"seq": 340, "heads": 2, "dim": 64, "reps": 12, "warmup": 1, "inner_loops": 2, "cache": "hot", "paired": True}


@pytest.fixture
def backend(monkeypatch):
    backend = ReferenceBackend()
    measure_with(monkeypatch, backend)
    return backend


@pytest.fixture
def plain(backend):
    options = Options(**SMALL, compress=1.3, inference=True, decode_tokens=4, layers=2, gate=Gate.parse("speedup>=1.1"))
    return run(options).as_dict()


def test_the_result_is_what_the_schema_file_describes(plain):
    schema = json.loads(SCHEMA_PATH.read_text())
    assert schema == result_schema(), "run: python -m elastickv.benchmark.schema"
    jsonschema.validate(json.loads(FORMATS["json"](plain)), schema)


COMMITTED = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("**/*.json"))
COMMITTED = [path for path in COMMITTED if '"benchmark_type"' in path.read_text(encoding="utf-8")[:200]]


def test_the_committed_results_are_what_the_schema_file_describes():
    schema = json.loads(SCHEMA_PATH.read_text())
    assert len(COMMITTED) > 20
    for path in COMMITTED:
        jsonschema.validate(json.loads(path.read_text(encoding="utf-8")), schema)


def test_one_dense_dtype_is_measured_where_one_is_asked_for(backend):
    plain = run(Options(**SMALL, compress=1.3, dense="fp32")).as_dict()
    assert list(plain["baseline"]["candidates_ms"]) == ["dense-fp32"]
    assert plain["configuration"]["dense"] == "fp32"
    assert any("dense was measured in fp32 only" in warning for warning in plain["warnings"])
    with pytest.raises(UsageError, match="`dense`=int8"):
        Options(**SMALL, dense="int8")


def test_the_originals_keys_are_all_there_in_order(plain):
    assert list(plain)[:7] == [
        "benchmark_type", "brand", "build", "gpu", "configuration", "results", "inference_cycle",
    ]  # fmt: skip
    assert {"cuda_graphs", "inner_loops", "truncate_percent"} <= plain["build"].keys()
    assert {"name", "sm", "theoretical_bw_gbs"} <= plain["gpu"].keys()
    assert {"seq_len", "heads", "head_dim", "compression", "reps", "warmup"} <= plain["configuration"].keys()
    assert {
        "attention_time_ms", "attention_time_std", "coefficient_of_variation", "tokens_per_sec", "baseline_tokens_per_sec",
        "speedup_vs_baseline", "memory_bandwidth_gbs", "memory_efficiency_percent", "roofline_score",
    } <= plain["results"].keys()  # fmt: skip
    assert {
        "decode_tokens", "baseline_total_ms", "elastic_total_ms", "baseline_tokens_per_sec", "elastic_tokens_per_sec",
        "speedup_vs_baseline",
    } <= plain["inference_cycle"].keys()  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "shape", "why"),
    [
        ("int4,pages=1/2:1/4", {"heads": 4, "kv_heads": 2}, "names 2 fractions for 1 KV heads"),
        ("int4,vgroup=40", {"dim": 80}, "vgroup=40 does not divide a head of 64 channels"),
    ],
)
def test_a_recipe_that_the_sample_has_no_shape_for_is_measured_without_its_error(backend, recipe, shape, why):
    result = run(Options(**SMALL | shape, recipe=recipe, compress=1))
    assert result.fidelity.sample is None
    assert any(warning.startswith("no recipe error on the sample: ") and why in warning for warning in result.warnings)


def test_time_proportional_to_bytes_gives_the_byte_ratio_as_speedup(plain):
    recipe, speedup = plain["recipe"], plain["speedup"]
    assert speedup["low"] <= recipe["ratio_read"] <= speedup["high"]
    assert plain["results"]["speedup_vs_baseline"] == speedup["estimate"]
    assert plain["verdict"]["outcome"] == "pass"
    assert plain["faster"]


def test_equal_contenders_are_not_called_faster(backend):
    result = run(Options(**SMALL, compress=1))
    assert str(result.recipe.text) == "dense"
    assert result.noise_floor.contains(1.0)
    assert not result.faster


def test_reps_is_an_exact_count_and_raw_samples_are_kept(plain):
    assert {len(times) for times in plain["samples"].values()} == {12}
    assert len(plain["sample_order"]) == 36
    assert plain["convergence"]["stopped_by"] == "reps"


def test_the_fastest_dense_variant_is_the_baseline(plain):
    candidates = plain["baseline"]["candidates_ms"]
    assert set(candidates) == {"dense-fp32", "dense-fp16", "dense-bf16"}
    assert plain["baseline"]["name"] == "dense-bf16"
    # Twice the bytes, twice the time.
    assert candidates["dense-fp32"] > 1.7 * candidates["dense-bf16"]


def test_figures_agree_with_each_other(plain):
    results, roofline = plain["results"], plain["roofline"]["elastic"]
    milliseconds = results["attention_time_ms"]
    assert results["tokens_per_sec"] == pytest.approx(1e3 / milliseconds)
    assert results["memory_bandwidth_gbs"] == pytest.approx(roofline["bytes_per_step"] / milliseconds / 1e6)
    assert results["memory_efficiency_percent"] == pytest.approx(100 * results["memory_bandwidth_gbs"] / 12.0)
    assert results["memory_efficiency_reference"] == "measured read ceiling"
    cycle = plain["inference_cycle"]
    assert cycle["raw_elastic_total_ms"] == pytest.approx(cycle["elastic_total_ms"] * cycle["layers"])
    assert cycle["elastic_tokens_per_sec"] == pytest.approx(4 / cycle["elastic_total_ms"] * 1e3)


def test_the_layers_of_the_cycle_have_their_anchors_at_different_tokens(backend, monkeypatch):
    anchors, one_launch = [], ReferenceProgram.run

    def noting(self, launches=1):
        times = []
        for token in range(launches):
            if launches == 4 and token == 0:
                assert {(*cache.lengths, cache.step) for cache in self._caches} == {(SMALL["seq"], 0)}
            times += one_launch(self)
            if launches == 4:
                since = [cache.recipe.steps_since_refresh(cache.step, cache.anchor_offset) for cache in self._caches]
                anchors.append([steps == 0 for steps in since])
        return times

    monkeypatch.setattr(ReferenceProgram, "run", noting)
    options = Options(**SMALL, recipe="int4,pages=1/2,anchor_every=4", inference=True, decode_tokens=4, layers=6)
    result = run(options).as_dict()["inference_cycle"]
    assert result["anchor_phases"] == [0, 0, 1, 2, 2, 3]
    # Dense layers have no anchors: they are at one at every step. Every round begins at the same token.
    elastic = [token for token in anchors if not all(token)]
    assert elastic
    for start in range(0, len(elastic), 4):
        rows = elastic[start : start + 4]
        assert [sum(token) for token in rows] == [1, 2, 1, 2]
        assert [sum(layer) for layer in zip(*rows, strict=True)] == [1] * 6


def test_a_context_of_one_token_has_a_cycle(backend):
    result = run(Options(**SMALL | {"seq": 1}, recipe="int8", compress=1, inference=True, decode_tokens=2, layers=2))
    assert result.inference_cycle.decode_tokens == 2


def test_without_anchors_every_layer_has_the_same_phase(plain):
    assert plain["inference_cycle"]["anchor_phases"] == [0, 0]


def test_the_sample_error_is_of_the_recipe_that_was_timed(plain):
    sample = plain["fidelity"]["sample"]
    assert (sample["recipe"], sample["recipe_hash"]) == (plain["recipe"]["text"], plain["recipe"]["hash"])
    assert sample["context"] == [177, 256]
    assert sample["kernel_error"]["max"] < 1e-12
    assert 0 < sample["recipe_error"]["mean"] < 0.1
    assert sample["recipe_error"]["count"] >= 64 * 3 * 3
    assert plain["fidelity"]["sample_differs"] is None


@pytest.mark.parametrize("options", [*PRESETS.values(), {"seq": 2048, "compress": 4}, {"seq": 3000, "compress": 8}])
def test_up_to_4096_tokens_the_error_is_of_the_very_recipe_and_context(options, monkeypatch):
    seen = []
    monkeypatch.setattr(
        RUN_MODULE, "replay", lambda _, sample, recipe, dtype, *others: seen.append((sample.tokens, str(recipe)))
    )
    options = Options(**options)
    on_sample = RUN_MODULE._on_sample(None, options, load_sample(), options.resolved_recipe, TimeBudget(None))
    assert seen == [(3072 if options.seq == 3000 else options.seq, str(options.resolved_recipe))]
    assert (on_sample.refused, on_sample.differs) == (None, None)


@pytest.mark.parametrize(
    ("options", "recipe", "differs"),
    [
        ({"seq": 32768, "compress": 4}, None, "solved anew for C=4 at the sample's 4096 tokens: it is shorter than 32768"),
        ({"seq": 32768, "compress": 1, "recipe": "int8"}, "int8", None),
        (
            {"seq": 2048, "compress": 2, "dim": 80},
            None,
            "the sample's 2048 tokens: vgroup=40 does not divide a head of 64 channels",
        ),
        ({"seq": 1024, "compress": 1, "dim": 128, "recipe": "int4"}, "int4", "over the sample's 64 channels, not over 128"),
    ],
)
def test_where_the_error_is_of_another_recipe_the_result_says_so(options, recipe, differs, monkeypatch):
    seen = []
    monkeypatch.setattr(RUN_MODULE, "replay", lambda _, sample, recipe, dtype, *others: seen.append((sample.tokens, recipe)))
    options = Options(**options)
    sample = load_sample()
    on_sample = RUN_MODULE._on_sample(None, options, sample, options.resolved_recipe, TimeBudget(None))
    ((tokens, replayed),) = seen
    assert tokens == min(options.seq, 4096)
    assert differs in on_sample.differs if differs else on_sample.differs is None
    if recipe:
        assert str(replayed) == recipe
    else:
        assert read_ratio(replayed, [tokens], sample.shape) >= options.compress


def test_a_sample_too_short_for_the_ratio_gives_the_error_of_the_timed_recipe_and_says_so(backend, tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "short.safetensors"
    shapes = {"q": (1, 2, 64, 64), "k": (1, 1, 300, 64), "v": (1, 1, 300, 64)}
    save_file({name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}, path)
    result = run(Options(**(SMALL | {"seq": 1024}), compress=4, input=path))
    assert result.fidelity.sample.recipe == result.recipe.text
    assert result.fidelity.sample.recipe_error.mean > 0
    assert "cannot be met at a context of" in str(result.fidelity.sample_refused)
    assert any(f"is of {result.recipe.text} as timed" in warning for warning in result.warnings)


def test_a_wrong_kernel_is_never_timed(backend, monkeypatch):
    original = ReferenceBackend.cache

    def wrong(self, *arguments):
        cache = original(self, *arguments)
        right = cache.decode
        cache.decode = lambda q: tuple(1.01 * x for x in right(q))
        return cache

    monkeypatch.setattr(ReferenceBackend, "cache", wrong)
    with pytest.raises(KernelMismatch, match="kernel error"):
        run(Options(**SMALL))


def test_one_wrong_head_among_many_is_found(backend, monkeypatch):
    original = ReferenceBackend.cache

    def wrong(self, *arguments):
        cache = original(self, *arguments)
        right = cache.decode

        def one_head_is_zero(queries):
            output, lse = right(queries)
            output[0, 1] = 0
            return output, lse

        cache.decode = one_head_is_zero
        return cache

    monkeypatch.setattr(ReferenceBackend, "cache", wrong)
    with pytest.raises(KernelMismatch, match="kernel error 1"):
        run(Options(**SMALL))


@pytest.mark.parametrize(("spoilt", "error"), [(np.nan, NonFiniteError), (1.0, KernelMismatch)])
def test_a_timed_program_that_does_not_compute_is_found(backend, monkeypatch, spoilt, error):
    original = ReferenceProgram.outputs

    def outputs(self):
        return [np.full_like(output, spoilt) for output in original(self)]

    monkeypatch.setattr(ReferenceProgram, "outputs", outputs)
    with pytest.raises(error):
        run(Options(**SMALL))


def test_bandwidth_is_of_the_bytes_of_an_average_step(backend):
    result = run(Options(**SMALL, recipe="reuse,sinks=0,window=0", compress=4)).as_dict()
    elastic = next(timing for timing in result["contenders"] if timing["name"] == "elastic")
    read = sum(result["recipe"]["bytes_per_step"][key] for key in ("codes", "scales", "exact"))
    assert elastic["kv_bandwidth_gbs"] * elastic["time_ms"] * 1e6 == pytest.approx(read)


def test_an_unpaired_run_interrupted_late_keeps_dense_and_elastic(backend, monkeypatch):
    taken = []

    def clock(self, moved):
        while True:
            taken.append(1)
            if len(taken) > 30:
                raise KeyboardInterrupt
            yield 1.0

    monkeypatch.setattr(ReferenceBackend, "_clock", clock)
    # Named, because `auto` takes more samples first: 6 to prepare, 3 to warm up, 12 of dense, 9 of elastic.
    result = run(Options(**(SMALL | {"paired": False}), recipe="int8", dense="bf16"))
    assert not result.complete
    assert result.noise_floor is None
    assert not result.faster
    jsonschema.validate(json.loads(FORMATS["json"](result.as_dict())), result_schema())
    assert "A/A not measured" in FORMATS["table"](result)


def test_ctrl_c_while_warming_up_ends_the_run(backend, monkeypatch):
    taken = []

    def clock(self, moved):
        while True:
            taken.append(1)
            if len(taken) == 20:
                raise KeyboardInterrupt
            yield 1.0

    monkeypatch.setattr(ReferenceBackend, "_clock", clock)
    with pytest.raises(KeyboardInterrupt):
        run(Options(**(SMALL | {"warmup": 100}), recipe="int8", dense="bf16"))
    assert len(taken) == 20


def test_a_hot_run_is_not_judged_by_memory(backend):
    result = run(Options(**SMALL, compress=1.3, gate=Gate.parse("roofline>=0.1")))
    assert result.verdict.outcome == "inconclusive"
    assert any("hot cache" in warning for warning in result.warnings)


def test_input_that_does_not_fit_the_dtype_is_refused(backend, tmp_path):
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, 2, 64, 64)).astype(np.float32)
    k = rng.standard_normal((1, 2, 128, 64)).astype(np.float32)
    path = tmp_path / "large.safetensors"
    save_file({"q": q, "k": k * 1e5, "v": k}, path)
    with pytest.raises(UsageError, match="`dtype=bf16`"):
        run(Options(**SMALL, dtype="fp16", input=path))


def test_nan_is_never_a_figure(backend, monkeypatch):
    monkeypatch.setattr(ReferenceBackend, "_clock", lambda self, moved: iter([1.0] * 10 + [float("nan")] * 400))
    with pytest.raises(NonFiniteError, match="not a finite positive"):
        run(Options(**SMALL))


def test_ctrl_c_leaves_a_result_marked_incomplete(backend, monkeypatch):
    def clock(self, moved):
        yield from (1.0 for _ in range(14))
        raise KeyboardInterrupt

    monkeypatch.setattr(ReferenceBackend, "_clock", clock)
    result = run(Options(**SMALL, recipe="int8", dense="bf16"))
    assert not result.complete
    assert "interrupted: incomplete" in result.warnings
    assert result.convergence.stopped_by == "interrupt"


def test_ctrl_c_in_the_inference_cycle_keeps_what_came_before(backend, monkeypatch):
    def interrupted(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(ReferenceBackend, "cycle", interrupted)
    result = run(Options(**SMALL, compress=1.3, inference=True))
    assert not result.complete
    assert result.inference_cycle is None
    assert {len(times) for times in result.samples.values()} == {12}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seq": 0}, "`seq`=0"),
        ({"seq": 10**9}, "`seq`=1000000000"),
        ({"heads": 3, "kv_heads": 2}, "3 query heads are not a multiple of 2"),
        ({"dim": 65}, "supported are 64, 80"),
        ({"compress": 0.5}, "out of range"),
        ({"compress": float("nan")}, "out of range"),
        ({"peers": " ,"}, "names nobody"),
        ({"compress": 100}, "cannot be met"),
        ({"reps": 1}, "`reps`=1"),
        ({"truncate": 50}, "`truncate`=50"),
        ({"dtype": "fp8"}, "`dtype`=fp8"),
        ({"cache": "warm"}, "`cache`=warm"),
        ({"recipe": "int5"}, "int5"),
        ({"recipe": "int8", "anchor_every": 4}, "anchor_every=4 does not combine"),
        ({"until_ci_percent": 1.0, "paired": False}, "`paired=True`"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(change, named):
    with pytest.raises(UsageError, match=named.replace("(", r"\(")):
        Options(**(SMALL | change))


def test_more_bytes_than_the_device_has_are_refused_with_what_would_fit(backend):
    with pytest.raises(UsageError, match=r"needs .* GiB .* a context of \d+ would fit"):
        run(Options(seq=1 << 20, heads=32, dim=128))


def test_telling_formats_hold_the_same_figures(plain):
    result = Result.from_dict(plain)
    row = dict(zip(*(line.split(",") for line in FORMATS["csv"](result).splitlines()), strict=True))
    assert float(row["speedup"]) == plain["speedup"]["estimate"]
    assert json.loads(FORMATS["jsonl"](plain))["recipe"]["hash"] == row["recipe_hash"]
    assert plain["recipe"]["hash"] in FORMATS["md"](result)
    assert "Reference <CPU> [1]" in FORMATS["table"](result)
    numbers = re.findall(r": (-?[0-9][^,\n]*)", FORMATS["json"](plain))
    assert numbers
    assert all(re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", number) for number in numbers)


def test_seeded_timing_data_is_neither_zero_nor_equal_between_copies(backend):
    from elastickv.benchmark.contenders import filled_caches
    from elastickv.recipe import Recipe

    one, two = filled_caches(backend, AttentionShape(1, 2, 2, 64), 200, "bf16", Recipe.parse("int8"), 2, 0)
    assert np.abs(one.stored(0, 0).exact_keys).min() > 0
    assert (one.stored(0, 0).exact_keys != two.stored(0, 0).exact_keys).any()


def test_a_peer_with_8_bit_keys_and_values_is_measured_and_never_the_baseline(backend, monkeypatch):
    from elastickv.benchmark.contenders import peers
    from tests.helpers.peers import FakePeer, contender

    fake = FakePeer(
        fast=contender("fake-fast", "fp8", 1e-4), dense=contender("fake-dense", "bf16", 2e-4), gone="no kernel for this"
    )
    monkeypatch.setattr(peers, "PEERS", [fake])
    result = run(Options(**SMALL, compress=1.3, peers="all")).as_dict()
    assert result["baseline"]["name"] == "fake-dense"
    assert "fake-fast" not in result["baseline"]["candidates_ms"]
    assert result["baseline"]["not_run"]["fake-gone"] == "no kernel for this"
    assert "warning: fake-gone was not measured: no kernel for this" in FORMATS["table"](Result.from_dict(result))
    timed = {timing["name"]: timing for timing in result["contenders"]}
    assert timed["fake-fast"]["kind"] == "peer"
    assert timed["fake-fast"]["dtype"] == "fp8"
    assert timed["fake-fast"]["time_ms"] == pytest.approx(1e-4)
    # 1000 bytes a step.
    assert timed["fake-fast"]["kv_bandwidth_gbs"] == pytest.approx(1000 / 1e-4 / 1e6)
    assert result["sample_order"].count("fake-fast") == SMALL["reps"]


def test_peers_not_asked_for_are_not_measured(backend):
    result = run(Options(**SMALL, compress=1.3))
    assert not any(timing.kind == "peer" for timing in result.contenders)


@pytest.mark.parametrize(("elastic_ms", "used"), [(2.0, "dense"), (1.05, "dense"), (0.9, "int8")])
def test_auto_falls_back_to_dense_where_dense_is_faster_and_says_so(backend, monkeypatch, elastic_ms, used):
    real = prepare.ours

    def timed(name, *args):
        contender, program, caches = real(name, *args)
        recipe = args[4]
        return replace(contender, sample=lambda: 1.0 if recipe.is_dense else elastic_ms), program, caches

    monkeypatch.setattr(prepare, "ours", timed)
    monkeypatch.setattr(prepare, "timed_kernel_error", lambda *_: ErrorSummary(0.0, 0.0, 0.0, 1))
    monkeypatch.setattr(ReferenceProgram, "outputs", lambda self: [np.zeros((1, 2, 64), np.float32)])
    result = run(Options(**SMALL, compress=1.3)).as_dict()
    assert result["recipe"]["text"] == used
    said = [warning for warning in result["warnings"] if "fell back to dense" in warning]
    assert len(said) == (used == "dense")
    if used == "dense":
        assert re.search(r"int8 took [\d.e+]+ us a step, dense-bf16 [\d.e+]+ us", said[0])
        assert result["recipe"]["ratio_read"] == 1
        assert result["results"]["speedup_vs_baseline"] == pytest.approx(1)
        assert result["fidelity"]["sample"]["recipe"] == "dense"


def test_a_recipe_that_was_asked_for_by_name_never_falls_back(backend):
    assert run(Options(**SMALL, recipe="bf16,stride=2")).as_dict()["recipe"]["text"] == "bf16,stride=2"


def test_a_recipe_of_forty_heads_comes_back_from_results_tables_and_pages(backend, tmp_path):
    text = "int4,pages=" + ":".join(f"{0.21 + n / 97!r}" for n in range(40))
    assert len(text) > 255
    assert values("recipe", f"int8;{text}") == ["int8", text] and values("recipe", text) == [text]
    result = run(Options(**SMALL | {"heads": 40, "reps": 2, "warmup": 0, "inner_loops": 1}, recipe=text, compress=1))
    assert result.recipe.text == result.recipe.requested == text
    path = tmp_path / "result.json"
    Measurement(result.as_dict()).save(path)
    for form in FORMATS:
        assert text in re.sub(r"\s", "", Measurement.load(path).shown(form))
    assert text in report(path).html


def test_ceilings_and_warm_up_are_never_silent(backend):
    steps = {}

    class Recording:
        name = ""

        def phase(self, name):
            self.name = name

        def progress(self, done, total):
            steps.setdefault(self.name, []).append((done, total))

    _run_function(Options(**SMALL, recipe="int8"), Recording())
    (sampled,) = [shown for name, shown in steps.items() if name.startswith("measuring int8 against")]
    assert [done for done, _ in steps["measuring the ceilings of the device"]] == [1, 2, 3]
    assert steps["warming up"][-1][0] == steps["warming up"][-1][1] and sampled[0][0] == 1
