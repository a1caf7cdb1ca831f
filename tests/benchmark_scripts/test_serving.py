"""The benchmark of vLLM takes turns, survives what fails, refuses a wrong baseline and compares like with like."""

import importlib
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import elastickv

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# In place of an engine: a contender's figures, made up, or what the environment variable FAKE says of it.
FAKE_ENGINE = """
import json, os, sys, time
plan = json.load(open(sys.argv[1]))
contender = plan["engine"]["kv_cache_dtype"]
environment = {
    "vllm": "0.0", "torch": "0.0", "device": "a made-up device", "driver": "0", "backends": ["made.up.Backend"],
    "backend_names": ["MADE_UP"], "flash_attention": None, "kv_cache_dtype": contender,
}
record = {"environment": environment, "startup_s": 2.0, "not_measured": [], "memory": {"peak_bytes": 5e9}}
ms = {"auto": 8.0}.get(contender, 6.0)
record["steps"] = [{"context": c, "batch": b, "samples_ms": [ms, ms + 1, ms - 1]} for c, b in plan["cells"]]
if plan["ours"]:
    counted = {"read_bytes": 1e9, "dense_bytes": 4e9, "steps": 135, "tokens": 135, "layer_tokens": 540, "anchors": 135}
    record["steps"][0]["reads"], record["steps"][1]["reads"] = counted, None
record["capacity"] = [{"context": c, "tokens": 1e6 / ms, "requests": 1e6 / ms / c} for c in plan["capacities"]]
record["throughput"] = {"context": 32768, "requests": 10, "samples_ms": [20.0]} if plan["throughput"] else None
record["first_token"] = {"context": plan["first_token"], "samples_s": [1.5]}
what = json.loads(os.environ.get("FAKE", "{}")).get(contender)
if what == "refused":
    record["refused"] = "the bf16 baseline runs on something else"
if what == "says why":
    record["error"] = "RuntimeError: the reason"
if what != "breaks at once":
    json.dump(record, open(sys.argv[2], "w"))
print("INFO 01-01 00:00:00 [runner.py:1] Graph capturing finished in 3 secs, took 0.50 GiB")
if what == "hangs":
    time.sleep(60)
if what in ("breaks", "breaks at once", "says why"):
    raise ValueError("no kernel for this device")
sys.exit(2 if what == "refused" else 0)
"""


@pytest.fixture(scope="module")
def scripts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield {name: importlib.import_module(name) for name in ("serving", "serving_engine", "serving_summary")}


@pytest.fixture
def run(scripts, monkeypatch, tmp_path, capsys):
    engine = tmp_path / "engine.py"
    engine.write_text(FAKE_ENGINE)
    monkeypatch.setattr(scripts["serving"], "ENGINE", engine)

    def call(*arguments, **fake):
        monkeypatch.setenv("FAKE", json.dumps(fake))
        monkeypatch.setattr(sys, "argv", ["serving.py", f"--out={tmp_path}", "--cells=65536x1,1024x64", *arguments])
        status, said = scripts["serving"].main(), capsys.readouterr()
        target = tmp_path / "serving.json"
        return status, said, json.loads(target.read_text()) if target.exists() else None

    return call


def contender(result, name):
    return next(one for one in result["contenders"] if one["contender"] == name)


def test_contenders_take_turns_and_every_second_round_is_reversed(run):
    status, _, result = run()
    assert status == 0
    order = ["bf16", "elastickv_int4", "fp8", "fp8", "elastickv_int4", "bf16"]
    assert [process["contender"] for process in result["processes"]] == order
    assert [process["round"] for process in result["processes"]] == [0, 0, 0, 1, 1, 1]


def test_a_result_holds_ratios_to_the_baseline_and_every_sample(run):
    _, _, result = run()
    step = contender(result, "elastickv_int4")["steps"][0]
    assert (step["ms"], step["samples"]) == (6.0, [[6.0, 7.0, 5.0], [6.0, 7.0, 5.0]])
    assert step["of_baseline"] == {"estimate": 0.75, "low": 0.75, "high": 0.75}
    assert contender(result, "bf16")["steps"][0]["of_baseline"] is None
    assert contender(result, "fp8")["throughput"]["tokens_per_s"] == 500.0
    assert contender(result, "fp8")["graph_bytes"] == 2**29
    assert result["device"]["device"] == "a made-up device"


def test_bytes_read_are_those_of_all_rounds_where_they_were_counted(run):
    _, _, result = run()
    counted, other = (step.get("reads") for step in contender(result, "elastickv_int4")["steps"])
    assert counted == {
        "read_bytes": 2e9,
        "dense_bytes": 8e9,
        "steps": 270,
        "tokens": 270,
        "layer_tokens": 1080,
        "anchors": 270,
    }
    assert other is None and not any("reads" in step for step in contender(result, "bf16")["steps"])


def test_the_result_is_one_that_the_package_reads(run, tmp_path):
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    run()
    report = elastickv.report(tmp_path / "serving.json")
    page = report.to_json()
    assert "0.750 [0.750, 0.750] of the time of bf16" in json.loads(page)["headline"]["sentence"]
    assert "Bytes of the KV cache that decode steps read" in page


def test_the_bounds_of_a_ratio_are_those_of_single_rounds(scripts):
    def process(name, number, ms):
        steps = [{"context": 64, "batch": 1, "samples_ms": ms}]
        return {"contender": name, "round": number, "environment": {}, "steps": steps}

    processes = [process("bf16", 0, [10.0]), process("x", 0, [5.0]), process("x", 1, [8.0]), process("bf16", 1, [10.0])]
    for one in processes:
        one["environment"] = {"vllm": "0"}
    timed = scripts["serving_summary"].timed("x", processes, scripts["serving_summary"].step_samples(64, 1), "ms")
    assert timed == {"ms": 6.5, "samples": [[5.0], [8.0]], "of_baseline": {"estimate": 0.65, "low": 0.5, "high": 0.8}}


def test_a_contender_that_fails_is_named_and_the_others_are_measured(run):
    status, said, result = run("--rounds=1", elastickv_int4="breaks at once")
    assert status == 1
    failed = contender(result, "elastickv_int4")
    assert failed["failures"] == ["round 1: exit status 1: ValueError: no kernel for this device"]
    assert failed["steps"] == [] and contender(result, "fp8")["steps"]
    assert "elastickv_int4 (round 1): failed: exit status 1" in said.out


def test_what_a_process_measured_before_it_broke_counts(run):
    _, _, result = run("--rounds=1", fp8="breaks")
    assert contender(result, "fp8")["steps"][0]["ms"] == 6.0
    assert "no kernel" in contender(result, "fp8")["failures"][0]


def test_the_error_that_a_process_wrote_down_counts_more_than_what_it_said_at_its_end(run):
    _, _, result = run("--rounds=1", fp8="says why")
    assert contender(result, "fp8")["failures"] == ["round 1: exit status 1: RuntimeError: the reason"]


def test_a_process_that_takes_too_long_is_ended(run):
    status, _, result = run("--rounds=1", "--contenders=fp8", "--process-timeout=3", fp8="hangs")
    assert status == 1
    assert contender(result, "fp8")["failures"] == [
        "round 1: not done after 3 s, at: Graph capturing finished in 3 secs, took 0.50 GiB"
    ]


def test_without_time_repetitions_are_dropped_and_named(run, scripts, monkeypatch):
    now = iter(range(0, 10_000, 40))
    clock = SimpleNamespace(monotonic=lambda: float(next(now)), time=time.time)  # of the script, not of the processes
    monkeypatch.setattr(scripts["serving"], "time", clock)
    status, said, result = run("--time-limit=130", "--contenders=bf16,fp8")
    assert status == 1
    assert [process["round"] for process in result["processes"]] == [0, 0, 1]
    assert len(result["dropped"]) == 1 and result["dropped"][0].startswith("bf16, round 2: repetition dropped")
    assert result["dropped"][0] in said.out


def test_rounds_are_added_to_the_result_that_is_there(run):
    run("--rounds=1", "--contenders=bf16,fp8")
    status, _, result = run("--rounds=1", "--contenders=bf16,elastickv_int4", "--add")
    assert status == 0
    assert [(one["round"], one["contender"]) for one in result["processes"]] == [
        (0, "bf16"), (0, "fp8"), (1, "bf16"), (1, "elastickv_int4"),
    ]  # fmt: skip
    assert contender(result, "bf16")["steps"][0]["samples"] == [[8.0, 9.0, 7.0]] * 2
    assert contender(result, "elastickv_int4")["steps"][0]["of_baseline"]["estimate"] == 0.75


@pytest.mark.parametrize("other", ["--shape=1b", "--prefill", '--engine={"enforce_eager": true}'])
def test_rounds_of_another_model_or_method_are_not_added(run, other):
    run("--rounds=1", "--contenders=bf16")
    with pytest.raises(elastickv.UsageError, match="choose another folder"):
        run("--rounds=1", "--contenders=bf16", "--add", other)


def test_heads_are_split_over_gpus_in_all_contenders(run):
    _, _, result = run("--rounds=1", "--tensor-parallel-size=2", "--no-throughput")
    assert [process["options"]["tensor_parallel_size"] for process in result["processes"]] == [2, 2, 2]
    assert result["settings"]["engine"] == {"tensor_parallel_size": 2}  # so that rounds of one GPU are not added
    assert all(one["throughput"] is None for one in result["contenders"])


def test_without_a_result_there_is_nothing_to_add_to(run):
    with pytest.raises(elastickv.UsageError, match="leave out --add"):
        run("--add")


def test_a_wrong_baseline_ends_it_with_one_line(run):
    status, said, result = run(auto="refused")
    assert (status, result) == (2, None)
    assert said.err.splitlines() == ["serving.py: the bf16 baseline runs on something else"]


@pytest.mark.parametrize(
    ("capability", "names", "version", "accepted"),
    [
        ([9, 0], ["FLASH_ATTN"], 3, True),
        ([9, 0], ["FLASH_ATTN"], 2, False),
        ([9, 0], ["TRITON_ATTN"], None, False),
        ([9, 0], ["FLASH_ATTN", "TRITON_ATTN"], 3, False),
        ([10, 0], ["FLASHINFER"], None, True),
        (None, ["CPU_ATTN"], None, True),
    ],
)
def test_on_hopper_the_baseline_is_flash_attention_3(scripts, capability, names, version, accepted):
    environment = {"compute_capability": capability, "backend_names": names, "flash_attention": version}
    reason = scripts["serving_engine"].not_the_baseline(environment)
    assert reason is None if accepted else "must be FLASH_ATTN with FlashAttention 3" in reason


def test_only_our_contenders_name_a_backend(run):
    _, _, result = run("--rounds=1", "--contenders=bf16,fp8,elastickv_k8v4")
    options = {process["contender"]: process["options"] for process in result["processes"]}
    assert options["elastickv_k8v4"]["attention_backend"] == "ELASTICKV"
    assert options["elastickv_k8v4"]["kv_cache_dtype"] == "elastickv_k8v4"
    assert "attention_backend" not in options["bf16"] and options["fp8"]["kv_cache_dtype"] == "fp8"


def test_slow_contenders_run_one_request_alone(run):
    _, _, result = run("--rounds=1", "--contenders=int4_per_token_head")
    slow = contender(result, "int4_per_token_head")
    assert [(step["context"], step["batch"]) for step in slow["steps"]] == [(65536, 1)]
    assert slow["throughput"] is None


@pytest.mark.parametrize(
    "arguments", [["--contenders=bf17"], ["--cells=64"], ["--capacities=1k"], ["--engine=[1]"], ["--engine={"], ["--rounds=0"]]
)
def test_arguments_that_mean_nothing_are_refused(run, arguments):
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2


def test_the_line_that_says_why_is_the_error_not_what_follows_it(scripts):
    text = "Traceback:\n  File x\nValueError: a reason\nINFO: shutting down\n"
    assert scripts["serving_summary"].telling_line(text) == "ValueError: a reason"
    assert scripts["serving_summary"].telling_line("") == "nothing was said"


def test_a_contender_with_a_budget_asks_for_it_beside_its_format(run):
    _, _, result = run("--rounds=1", "--contenders=bf16,elastickv_compress8")
    options = {each["contender"]: each["options"] for each in result["processes"]}
    assert options["elastickv_compress8"]["kv_cache_dtype"] == "elastickv_int4"
    assert options["elastickv_compress8"]["additional_config"] == {"elastickv": {"compress": 8}}
    assert "additional_config" not in options["bf16"]
    _, _, result = run("--rounds=1", "--contenders=bf16,elastickv_compress4", "--device=cpu")
    ours = result["processes"][-1]["options"]
    assert (ours["kv_cache_dtype"], ours["additional_config"]) == ("auto", {"elastickv": {"format": "int4", "compress": 4}})
