"""Options on a server's command line: what is wrong is known before an engine starts."""

import json
import sys

import pytest

from elastickv.vllm import plugin
from elastickv.vllm.plugin import refusal
from elastickv.vllm.versions import Installation

BACKEND = ("--attention-backend", "ELASTICKV")


def arguments(ours, *others):
    return ["serve", "MODEL", *BACKEND, *others, "--additional-config", json.dumps({"elastickv": ours})]


@pytest.mark.parametrize(
    ("ours", "others", "word"),
    [
        ({"format": "int4", "sinks": 4}, (), "sinks"),
        ({"format": "int4", "window": 31}, (), "window"),
        ({"format": "int3"}, (), "int3"),
        ({"format": "int4", "calibration": "missing.json", "compress": 3}, (), "contradict"),
        ({"calibration": "missing.json", "compress": 3}, (), "missing.json"),
        ({"calibration": "missing.json"}, (), "compress"),
        ({}, (), "nothing says the format"),
        ({"format": "int8"}, ("--kv-cache-dtype", "elastickv_int4"), "contradict"),
        ({"format": "int8"}, ("--kv_cache_dtype=elastickv_int4",), "contradict"),
        ({"format": "int8"}, ("--kv-cache-dtype", "fp8"), "fp8"),
    ],
)
def test_what_the_options_alone_show_to_be_wrong_is_one_line(ours, others, word):
    reason = refusal(arguments(ours, *others))
    assert reason is not None and word in reason
    assert "\n" not in reason


@pytest.mark.parametrize(
    "given",
    [
        [],
        ["serve", "MODEL"],
        ["serve", "MODEL", "--kv-cache-dtype", "fp8"],
        ["serve", "MODEL", "--kv-cache-dtype", "elastickv_int4", "--config", "options.yaml"],
        ["serve", "MODEL", "--kv-cache-dtype", "elastickv_int4", *BACKEND],
        ["serve", "MODEL", "--kv-cache-dtype"],
        ["serve", "MODEL", "--additional-config"],
        ["serve", "MODEL", "--additional-config", "no JSON"],
        ["serve", "MODEL", "--additional-config", '{"other": {"format": "int3"}}'],
        ["serve", "MODEL", "--additional-config=[1]"],
        arguments({"format": "int4"}),
        arguments({"window": 256}, "--kv-cache-dtype", "elastickv_int4"),
        arguments({"window": 256}, "--config", "options.yaml"),
    ],
)
def test_other_command_lines_are_vllms_own_business(given):
    assert refusal(given) is None


@pytest.mark.parametrize(
    ("given", "word"),
    [
        (["--additional-config.elastickv.format", "int3"], "int3"),
        (["--additional_config.elastickv.window=31", "--additional-config.elastickv.format=int4"], "window is 31"),
        (["--additional-config.elastickv.layers.4-7=int3", "--additional-config.elastickv.format=int4"], "layers"),
        (["--additional-config.elastickv", '{"format": "int3"}'], "int3"),
        (["--additional-config.elastickv.window", "64"], "nothing says the format"),
        ([*arguments({"format": "int3"}), "--additional-config.elastickv.format", "int4"], None),
        (["--additional-config.elastickv.format", "int4", "--additional-config.elastickv.window", "1k"], None),
        (["--additional-config.other.format", "int3"], None),
        (["--additional-config.elastickv=int4", "--additional-config.elastickv.window=31"], None),
        (["--additional-config.elastickv.format"], "format is ''"),
    ],
)
def test_options_may_be_given_part_by_part_as_vllm_reads_them(given, word):
    reason = refusal(["serve", "MODEL", *BACKEND, *given])
    assert (reason is None) if word is None else (reason is not None and word in reason)


def test_a_file_of_options_hides_only_the_dtype():
    assert "window" in refusal(arguments({"window": 31}, "--config", "options.yaml"))


OPTIONS = ["--additional-config", '{"elastickv": {"format": "int4"}}']


@pytest.mark.parametrize(
    "asked",
    [
        ["--attention-backend=elastickv"],
        ["--attention_backend", "ELASTICKV"],
        ["--attention-config.backend", "ELASTICKV"],
        ["--attention-config", '{"backend": "ELASTICKV"}'],
        ["-ac.backend=ELASTICKV"],
        ["-ac", '{"backend": "ELASTICKV"}'],
        ["--config", "options.yaml"],
    ],
    ids=" ".join,
)
def test_on_gpus_options_need_the_backend(asked):
    reason = refusal(["serve", "MODEL", *OPTIONS])
    assert reason is not None and "add `attention_backend=ELASTICKV`" in reason and "\n" not in reason
    assert refusal(["serve", "MODEL", *OPTIONS, *asked]) is None


def test_on_gpus_a_cache_dtype_needs_the_backend():
    """vLLM would name all backends of its own, none of which stores it."""
    reason = refusal(["serve", "MODEL", "--kv-cache-dtype", "elastickv_int8"])
    assert reason is not None and "elastickv_int8" in reason and "add `attention_backend=ELASTICKV`" in reason


@pytest.mark.parametrize(
    ("ours", "remedy"),
    [(None, {"format": "k8v4"}), ({"window": 64}, {"format": "k8v4", "window": 64}), ({"format": "k8v4"}, {"format": "k8v4"})],
    ids=str,
)
def test_where_cache_dtypes_have_no_name_the_format_goes_into_the_options(ours, remedy):
    options = [] if ours is None else ["--additional-config", json.dumps({"elastickv": ours})]
    given = ["serve", "MODEL", "--kv-cache-dtype", "elastickv_k8v4", *options]
    reason = refusal(given, on_cpu=True, named_cache_dtypes=False)
    assert reason is not None and f"give `additional_config={json.dumps({'elastickv': remedy})}`" in reason
    assert refusal(given, on_cpu=True) is None


def test_on_cpus_the_options_alone_ask_for_elastickv():
    reason = refusal(["serve", "MODEL", *BACKEND], on_cpu=True)
    assert reason is not None and 'give `additional_config={"elastickv": {"format": "int4"}}`' in reason
    assert refusal(["serve", "MODEL", *OPTIONS], on_cpu=True) is None
    assert refusal(["serve", "MODEL", *OPTIONS, *BACKEND], on_cpu=True) is None
    assert refusal(["serve", "MODEL"], on_cpu=True) is None
    assert refusal(arguments({"compress": 8}), on_cpu=True) is None


def test_a_file_that_is_no_calibration_is_refused_where_the_user_starts(tmp_path):
    file = tmp_path / "calibration.json"
    file.write_text("{}", encoding="utf-8")
    said = refusal([*BACKEND, *arguments({"calibration": str(file), "compress": 3})])
    assert said is not None and "no calibration" in said and "\n" not in said


def test_the_last_of_several_values_counts():
    given = [*BACKEND, "--additional-config={}", *arguments({"format": "int3"}), *arguments({"format": "int4"})]
    assert refusal(given) is None


def test_the_process_that_the_user_starts_ends_with_the_line(monkeypatch):
    monkeypatch.setattr(plugin, "_registered", False)
    monkeypatch.setattr(plugin, "installed_version", lambda: Installation("vllm", "0.33.0"))
    monkeypatch.setattr(sys, "argv", ["vllm", *arguments({"format": "int4", "window": 5})])
    with pytest.raises(SystemExit, match=r"^ElasticKV: .*window is 5"):
        plugin.register()
