"""The soak of the serving engine: its load, what is made of its steps and answers, and its result when an engine fails."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = ("serving_soak", "soak_engine", "soak_load", "serving_record")


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield {name: importlib.import_module(name) for name in NAMES}
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture
def load(scripts):
    return scripts["soak_load"]


def requests_of(load, seed=0, steps=3000):
    arrivals = load.Load(500, 300, 50, seed)
    return [request for step in range(steps) for request in arrivals.arrivals(step, 1000)]


def test_a_load_has_all_that_is_asked_of_it(load):
    requests = requests_of(load)
    prompts, answers = [len(request.prompt) for request in requests], [request.tokens for request in requests]
    assert (min(prompts), max(prompts)) == (1, 300) and (min(answers), max(answers)) == (1, 50)
    several = sum(request.answers > 1 for request in requests) / len(requests)
    assert 0.02 < several < 0.1
    begins = [tuple(request.prompt[:8]) for request in requests if len(request.prompt) > 8]
    assert len(set(begins)) < 0.8 * len(begins), "no prefix is shared"
    assert len({request.name for request in requests}) == len(requests)


def test_the_same_seed_is_the_same_load(load):
    assert requests_of(load, 1, 300) == requests_of(load, 1, 300) != requests_of(load, 2, 300)


def test_no_more_arrive_than_there_is_room_for(load):
    arrivals = load.Load(500, 300, 50)
    assert max(len(arrivals.arrivals(step, 1)) for step in range(2000)) == 1
    assert not any(arrivals.arrivals(step, 0) for step in range(2000))


def test_only_running_requests_are_aborted_and_only_some(load):
    arrivals = load.Load(500, 300, 50)
    assert not any(arrivals.aborted([]) for _ in range(500))
    names = [arrivals.aborted(["a", "b"]) for _ in range(2000)]
    assert set(names) == {"a", "b", None} and names.count(None) > 1900


def test_every_item_is_as_likely_in_a_sample(load):
    counts = np.zeros(20)
    for seed in range(2000):
        sample = load.Sample(5, np.random.default_rng(seed))
        for item in range(20):
            sample.offer(item)
        assert len(set(sample.items)) == 5
        counts[sample.items] += 1
    assert counts.min() > 400 and counts.max() < 600  # 500 is the mean, 19 its deviation


def test_times_are_of_decode_steps_after_the_warm_up(load):
    steps = [load.Step(number, 1000.0, 1, 1, True) for number in range(10)]
    steps += [load.Step(number, 2.0, 4, 4, True) for number in range(10, 2010)]
    steps += [load.Step(2010, 50.0, 2, 300, False), load.Step(2011, 7.0, 4, 4, True), load.Step(2012, 90.0, 0, 0, False)]
    times = load.step_times(steps, 10)
    assert times["decode"]["steps"] == 2001 and times["all"]["steps"] == 2002 and times["warm_up"]["median_ms"] == 1000
    assert times["decode"]["median_ms"] == times["decode"]["p99_ms"] == 2
    assert times["decode"]["longest"][0] == {"step": 2011, "ms": 7.0, "requests": 4, "tokens": 4}
    assert times["decode"]["p999_over_median"] == times["decode"]["p999_ms"] / 2
    assert load.step_times([], 10)["decode"] == {"steps": 0}


def test_the_divergence_of_tokens_is_estimated_without_bias(load):
    rng = np.random.default_rng(0)
    p, q = (np.exp(x) / np.exp(x).sum() for x in rng.normal(size=(2, 50)) * 0.3)
    pairs = [(np.log(p[tokens]), np.log(q[tokens])) for tokens in rng.choice(50, (200, 40), p=p)]
    found, exact = load.divergence(pairs), float((p * np.log(p / q)).sum())
    assert abs(found["kl"] - exact) < 3 * found["kl_error"] < exact
    assert found["tokens"] == 8000 and found["difference"]["max"] == pytest.approx(np.abs(np.log(p / q)).max())
    assert load.divergence([([-1.0, -2.0], [-1.0, -2.0])])["kl"] == 0
    assert load.divergence([]) == load.divergence([([], [])]) == {"tokens": 0}


def test_answers_are_compared_with_what_is_read_alone_by_their_history(load):
    checked = load.Checked([1], [5, 6], [-1.0, -1.0], "plain", [-1.0, -3.0], [-1.5, -2.5])
    same = load.Checked([2], [3], [-2.0], "preempted", [-2.0], [-2.0])
    result = load.agreement([checked, same])
    assert set(result) == {"all", "plain", "preempted"}
    assert result["all"]["soak"]["tokens"] == result["all"]["chunks"]["tokens"] == 3
    assert result["all"]["soak"]["kl"] == pytest.approx((math.exp(-2) + 1) / 3)
    assert result["plain"]["chunks"]["difference"]["mean"] == 0.5
    assert result["preempted"]["soak"]["kl"] == 0
    assert load.agreement([])["all"]["soak"] == {"tokens": 0}


def test_requests_of_each_history_are_checked_first(load):
    histories = ["plain", "plain", "plain", "prefix hit", "preempted", "prefix hit"]
    checked = [load.Checked([number], [], [], history) for number, history in enumerate(histories)]
    ordered = load.in_turns(checked)
    assert {each.history for each in ordered[:3]} == set(histories)
    assert sorted(each.prompt for each in ordered) == [each.prompt for each in checked]


def scheduler_of(batches):
    """Return a scheduler that schedules these: tokens by request, new requests, preempted ones."""
    outputs = iter(batches)

    def schedule():
        counts, new, preempted = next(outputs)
        return SimpleNamespace(num_scheduled_tokens=counts, scheduled_new_reqs=new, preempted_req_ids=preempted)

    return SimpleNamespace(schedule=schedule)


def test_a_batch_decodes_if_it_has_one_token_of_each_and_nothing_new(scripts):
    scheduler = scheduler_of(
        [({"a": 1, "b": 1}, [], None), ({"a": 1, "b": 2}, [], {"c"}), ({"a": 1}, ["a"], None), ({}, [], {"c"})]
    )
    batches = scripts["soak_engine"].ScheduledBatches(scheduler)
    seen = []
    for _ in range(4):
        scheduler.schedule()
        seen.append((batches.requests, batches.tokens, batches.decode))
    assert seen == [(2, 2, True), (2, 3, False), (1, 1, False), (0, 0, False)]
    assert batches.preempted == ["c", "c"]


def test_what_is_wrong_is_named(scripts):
    soak = scripts["serving_soak"]
    free = {"free_at_start": 9, "free_at_end": 9, "prefix_cache_reset": True}
    assert soak.faults("ours", {"failed": None, "blocks": free, "not_finite": 0, "growth": {"torch_bytes": 0}}) == []
    assert "8 at the end" in soak.faults("ours", {"blocks": free | {"free_at_end": 8}})[0]
    assert soak.faults("ours", {"blocks_after_check": free | {"prefix_cache_reset": False}})
    assert "3 log-probabilities" in soak.faults("ours", {"not_finite": 3})[0]
    assert "more at the end" in soak.faults("ours", {"growth": {"torch_bytes": 1 << 30}})[0]
    logged = ["ElasticKV: layer 3 has a NaN at position 7 of a request: its answer is wrong from there on", "ElasticKV: page 1"]
    assert soak.faults("ours", {"logged": logged}) == [f"ours: {logged[0]}"]
    assert soak.faults("stock", {"failed": "exit status 1"}) == ["stock: exit status 1"]


def record_of(kl, chunks=0.001, free_at_end=9, ratio=2.0, grown=0):
    free = {"free_at_start": 9, "free_at_end": free_at_end, "prefix_cache_reset": True}
    found = {name: {"tokens": 90, "kl": value, "kl_error": 0.0002} for name, value in (("soak", kl), ("chunks", chunks))}
    return {
        "blocks": free,
        "blocks_after_check": free,
        "growth": {"torch_bytes": grown},
        "times": {"decode": {"p999_over_median": ratio}},
        "agreement": {"all": found | {"requests": 50}},
    }


def test_what_is_asked_is_judged(scripts):
    judge = scripts["serving_soak"].verdicts
    good = {"ours": record_of(0.4), "stock": record_of(0.001), "strict": record_of(0.0012)}
    assert [each["holds"] for each in judge(good)] == [True] * 8
    wrong = [{"free_at_end": 8}, {"grown": 1 << 30}, {"ratio": 3.0}]
    for place, options in enumerate(wrong):
        assert [each["holds"] for each in judge(good | {"ours": record_of(0.001, **options)})].index(False) == place
    apart = judge(good | {"strict": record_of(0.002)})
    assert [each["holds"] for each in apart[-2:]] == [False, False] and apart[-1]["figures"]["requests"] == 50
    assert [each["holds"] for each in judge(good | {"strict": record_of(0.002, chunks=0.002)})[-2:]] == [False, True]
    beside = judge(good | {"strict": record_of(0.02), "stock-int4": record_of(0.03), "stock-fp8": record_of(0.01)})
    assert [(each["what"].split()[-1], each["holds"]) for each in beside[-2:]] == [
        ("fp8", False),
        ("int4_per_token_head", True),
    ]
    without = judge({"ours": record_of(0.001) | {"agreement": {}, "times": {}}})
    assert [each["holds"] for each in without] == [True, True, None, None, None]


def test_growth_is_from_the_first_note_to_the_last(scripts):
    growth = scripts["serving_soak"].growth
    notes = [{"step": 500, "resident_bytes": 5}, {"step": 1000, "resident_bytes": 9}, {"step": 1200, "resident_bytes": 7}]
    assert growth(notes) == {"resident_bytes": 2}
    assert growth(notes[:1]) == growth([]) == {}


# In place of an engine: writes a part of its record, and is killed, or does not end, or ends well.
FAKE = """
import json, sys, time, os, signal
from pathlib import Path
plan, record = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
part = {"done": False, "steps": 500, "environment": {"device": "a GPU", "driver": "1"}}
part["done"] = not plan["ours"]
record.write_text(json.dumps(part))
print("ElasticKV: page 32 tokens", flush=True)
if plan["ours"]:
    os.kill(os.getpid(), signal.SIGKILL)
"""


def run(scripts, monkeypatch, tmp_path, *arguments):
    pytest.importorskip("safetensors")
    pytest.importorskip("torch")
    soak, fake = scripts["serving_soak"], tmp_path / "fake.py"
    fake.write_text(FAKE, encoding="utf-8")
    monkeypatch.setattr(soak, "ENGINE", fake)
    output = tmp_path / "results" / "soak.json"
    monkeypatch.setattr(sys, "argv", ["serving_soak.py", f"--output={output}", "--device=cpu", *arguments])
    status = soak.main()
    return status, json.loads(output.read_text(encoding="utf-8"))


def test_a_killed_engine_leaves_what_it_had_recorded_and_the_other_backend_runs(scripts, monkeypatch, tmp_path):
    status, result = run(scripts, monkeypatch, tmp_path)
    assert status == 1 and result["device"] == "a GPU" and list(result["backends"]) == ["ours", "stock", "strict"]
    ours, stock, _ = result["backends"].values()
    assert ours["steps"] == 500 and "exit status -9" in ours["failed"]
    assert stock["done"] and stock["failed"] is None and stock["logged"] == ["ElasticKV: page 32 tokens"]
    assert "additional_config" in ours["engine"] and "additional_config" not in stock["engine"]
    assert str(tmp_path) not in json.dumps(result["backends"])


def test_one_backend_alone_can_be_run(scripts, monkeypatch, tmp_path):
    status, result = run(scripts, monkeypatch, tmp_path, "--backend=stock")
    assert status == 0 and list(result["backends"]) == ["stock"]


def test_an_unknown_backend_is_refused(scripts, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(scripts, monkeypatch, tmp_path, "--backends=ours,theirs")
    assert "'theirs' is no backend: give some of ours, strict, stock, stock-fp8, stock-int4" in capsys.readouterr().err


def test_quantized_caches_of_vllm_are_refused_on_cpus(scripts, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(scripts, monkeypatch, tmp_path, "--backends=stock,stock-int4")
    assert "no int4_per_token_head on CPUs: leave stock-int4 out" in capsys.readouterr().err


def test_a_quantized_cache_of_vllm_is_stock_but_for_its_dtype(scripts):
    options = scripts["serving_soak"].engine_options
    assert options("stock-fp8", "cuda", "int4") == options("stock", "cuda", "int4") | {"kv_cache_dtype": "fp8"}


@pytest.mark.parametrize(("version", "key"), [("0.33.1", "kv_cache_dtype"), ("0.32.0", "additional_config")])
def test_the_format_is_named_as_the_version_of_vllm_takes_it(scripts, monkeypatch, version, key):
    soak = scripts["serving_soak"]
    monkeypatch.setattr(soak, "installed_version", lambda: SimpleNamespace(version=version))
    options = soak.engine_options("ours", "cuda", "int8")
    assert "int8" in json.dumps(options[key]) and options["attention_backend"] == "ELASTICKV"
    assert (
        not {"kv_cache_dtype", "additional_config", "attention_backend"} & soak.engine_options("stock", "cuda", "int8").keys()
    )
    assert math.prod((options["max_num_seqs"], options["max_model_len"] // 32)) > options["num_gpu_blocks_override"]


@pytest.mark.parametrize(("script", "option"), [("serving", "--out"), ("serving_soak", "--output")])
def test_a_place_that_cannot_be_written_is_one_line_and_status_2(tmp_path, script, option):
    (tmp_path / "file").write_text("", encoding="utf-8")
    command = [sys.executable, str(BENCHMARKS / f"{script}.py"), option, str(tmp_path / "file" / "inside" / "it.json")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"{script}.py: ") and f"choose another {option}" in ended.stderr
    assert ended.stderr.count("\n") == 1
