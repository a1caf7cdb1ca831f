"""The device of these engines: a GPU, or with ELASTICKV_SERVING_DEVICE=cpu the CPU, to try the tests themselves."""

import os

import pytest

from tests.helpers.serving_scenarios import CHUNKED, GPU_MEMORY, NEW_TOKENS


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Show what a test measured, and why it failed, as soon as it ends: a visit to a GPU may end before the session does."""
    report = yield
    terminal = item.config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None and (report.when == "call" or report.failed):
        measured = [line for line in report.capstdout.splitlines() if line.startswith("measured: ")]
        for line in [f"{item.name}: {report.when} {report.outcome} in {report.duration:.1f} s", *measured]:
            terminal.write_line(f"\n{line}" if line.startswith(item.name) else line)
        if report.failed:
            terminal.write_line(report.longreprtext)
        terminal.flush()
    return report


@pytest.fixture(scope="session")
def device():
    torch = pytest.importorskip("torch")
    chosen = os.environ.get("ELASTICKV_SERVING_DEVICE", "cuda")
    if chosen == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    return chosen


@pytest.fixture(scope="session")
def bf16_settings(device):
    """Return a function that gives the options of an engine in bfloat16, compiled and with graphs on a GPU."""
    from elastickv.vllm.versions import installed_version, minor_version

    def settings(fmt):
        options = {"dtype": "bfloat16", "enforce_eager": device == "cpu", "async_scheduling": None}
        if device == "cuda":
            options |= {"attention_backend": "ELASTICKV"} | GPU_MEMORY
            if minor_version(installed_version().version).named_cache_dtypes:
                options["kv_cache_dtype"] = f"elastickv_{fmt}"
        return options

    return settings


@pytest.fixture(scope="session")
def serve_bf16(serve, bf16_settings):
    """Return the engine with options, those of `bf16_settings` unless they say otherwise."""
    return lambda fmt="int4", **options: serve(fmt, **(bf16_settings(fmt) | options))


@pytest.fixture(scope="session")
def rounded_rule(rule, weights):
    """Return the plain model of bfloat16 weights, queries, keys and values; `added` are sums of adapters with weights."""
    import torch

    rounded = {name: tensor.to(torch.bfloat16).float() for name, tensor in weights.items()}
    sums = {None: rounded}

    def model(recipe="int4", window=64, added=None, **options):
        key = added and id(added)
        if key not in sums:
            sums[key] = {name: tensor + added.get(name, 0) for name, tensor in rounded.items()}
        return rule(recipe, window, weights=sums[key], rounding="bfloat16", **options)

    return model


@pytest.fixture(scope="session")
def graphed(serve_bf16, prompts):
    """Answers of the engine with graphs, to prompts that arrive in chunks."""
    return serve_bf16(**CHUNKED).generate(prompts, NEW_TOKENS)
