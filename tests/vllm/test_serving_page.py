"""docs/vllm.md says of options, dtypes and versions what the package accepts."""

import json
import re
from dataclasses import fields
from pathlib import Path

from elastickv.recipe import HEAD_DIMS
from elastickv.vllm.metrics.decode_reads import COUNTERS
from elastickv.vllm.selection.request_ratios import ARGUMENT
from elastickv.vllm.serving_options import CACHE_DTYPES, PAGE_FORMATS, ServingOptions
from elastickv.vllm.versions import SUPPORTED

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8")


def section(title):
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)[1]


def rows(text):
    """Return the cells of the rows of the tables in a text, without those that only separate."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|") and not line.startswith("|--")]
    return [[cell.strip() for cell in cells] for cells in lines]


def test_the_table_of_options_is_that_of_the_package():
    table = {name.strip("`"): default.strip("`") for name, default, _ in rows(section("Options"))[1:]}
    options = ServingOptions()
    defaults = {each.name: getattr(options, each.name) for each in fields(ServingOptions)}
    assert table == {name: str(value).lower() if value else "-" for name, value in defaults.items()}


def test_every_additional_config_on_the_page_is_accepted():
    shown = [json.loads(text) for text in re.findall(r"--additional-config '([^']*)'", PAGE)]
    assert len(shown) >= 3
    assert all(ServingOptions.parse(config) is not None for config in shown)


def contenders():
    """Return what the serving benchmark has measured."""
    files = (ROOT / "benchmarks" / "results" / "h200").glob("serving*.json")
    results = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    return {each["contender"] for result in results for each in result.get("contenders", ())}


def test_the_table_of_formats_is_that_of_the_package():
    table = [(dtype.strip("`"), name.strip("`")) for dtype, name, _, _ in rows(section("Start"))[1:]]
    assert dict(table) == dict(zip(CACHE_DTYPES, PAGE_FORMATS, strict=True))
    assert set(re.findall(r"elastickv_\w+", PAGE)) <= {
        *CACHE_DTYPES,
        ARGUMENT,
        *contenders(),
        *(name.removeprefix("vllm:") for name, _ in COUNTERS.values()),
    }


def test_the_table_of_counters_is_that_of_the_package():
    table = [name.strip("`") for name, _ in rows(section("Metrics"))[1:]]
    assert sorted(table) == sorted(name for name, _ in COUNTERS.values())
    assert set(re.findall(r"vllm:elastickv_\w+", section("Metrics"))) == set(table)


def test_the_table_of_versions_is_that_of_the_package():
    table = [
        (minor, package.strip("`"), "--kv-cache-dtype" in where) for minor, package, _, where in rows(section("Versions"))[1:]
    ]
    supported = [(each.minor, package, each.named_cache_dtypes) for each in SUPPORTED.values() for package in each.packages]
    assert sorted(table) == sorted(supported)


def test_a_kv_cache_dtype_is_shown_for_versions_that_can_name_it():
    """Only the commands under 'vLLM 0.33' use one; the README and the quick start say the version."""
    commands = re.split(r"^# (?=vLLM|vllm)", section("Start"), flags=re.MULTILINE)[1:]
    named = {re.match(r"\S+ (\d\.\d+)", command)[1]: "elastickv_int4" in command.partition("```")[0] for command in commands}
    assert named == {minor: each.named_cache_dtypes for minor, each in SUPPORTED.items()}


def test_the_sizes_of_heads_are_those_of_the_kernels():
    first, last = HEAD_DIMS[:-1], HEAD_DIMS[-1]
    assert f"{', '.join(map(str, first))} or {last} channels" in section("Limits")
