"""The extras of this package: what each adds, and whether what it requires is installed, as the package's metadata says."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata

from elastickv.backends.gpu_detection import gpu_present
from elastickv.benchmark.doctor import Finding

PACKAGE = "elastickv"
# Commands that need no extra, and those that an extra adds.
BASE_COMMANDS = ("bench", "sweep", "compare", "doctor")
MEASURING_COMMANDS = ("bench", "sweep")
COMMANDS: dict[str, tuple[str, ...]] = {
    "transformers": ("run", "eval", "calibrate", "bench --model", "baseline transformers"),
    "report": ("report",),
    "gguf": ("baseline gguf",),
}
PURPOSES = {
    "transformers": "ElasticCache and real models in Transformers",
    "report": "one page of results, with charts",
    "gguf": "llama.cpp as a reference",
    "cuda": "decode attention on NVIDIA GPUs, from compute capability 6.1, with CUDA 12.9",
    "cuda13": "decode attention on NVIDIA GPUs, from compute capability 7.5, with CUDA 13; not beside cuda",
    "vllm": "serving with vLLM on NVIDIA GPUs, from compute capability 8.0, with CUDA 13; not beside cuda",
}
FOR_GPUS = ("cuda", "cuda13", "vllm")
FOR_CONTRIBUTORS = ("dev", "docs", "reliability", "test")


@dataclass(frozen=True)
class Extra:
    """An extra and the state of what it requires.

    Attributes
    ----------
    name : as in `pip install "elastickv[name]"`.
    installed : packages with their versions.
    missing : packages that are not installed.
    unsupported : packages in a version that the extra excludes, with the versions that it accepts.
    """

    name: str
    installed: tuple[str, ...]
    missing: tuple[str, ...]
    unsupported: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether everything is installed in a supported version; an extra that requires nothing on this machine is not."""
        return bool(self.installed) and not self.missing and not self.unsupported

    @property
    def adds(self) -> str:
        """Commands and purpose."""
        purpose = PURPOSES.get(self.name, "its packages")
        commands = COMMANDS.get(self.name)
        return f"{', '.join(commands)}: {purpose}" if commands else purpose


def declared_extras() -> list[Extra]:
    """Return the extras that the package declares; none if it is not installed."""
    try:
        declared = metadata.metadata(PACKAGE).get_all("Provides-Extra") or []
        requirements = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return []
    return [_extra(name, requirements) for name in declared]


def _extra(name: str, requirements: Iterable[str]) -> Extra:
    from packaging.requirements import Requirement

    installed, missing, unsupported = [], [], []
    for requirement in map(Requirement, requirements):
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}) or not marker.evaluate({"extra": name}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            missing.append(requirement.name)
            continue
        installed.append(f"{requirement.name} {version}")
        if not requirement.specifier.contains(version, prereleases=True):
            unsupported.append(f"{requirement.name} {version}, supported is {requirement.specifier}")
    return Extra(name, tuple(installed), tuple(missing), tuple(unsupported))


def commands_that_work(extras: list[Extra], can_measure: bool) -> Finding:
    """Return the commands that work, which no GPU is needed for."""
    names = [name for name in BASE_COMMANDS if can_measure or name not in MEASURING_COMMANDS]
    names += [name for extra in extras if extra.complete for name in COMMANDS.get(extra.name, ())]
    return Finding("works now", "ok", ", ".join(names))


def extra_findings(extras: list[Extra]) -> Iterator[Finding]:
    """Yield what each extra adds, and how to get it."""
    for extra in extras:
        if extra.name not in FOR_CONTRIBUTORS:
            yield _finding(extra)
    others = [extra.name for extra in extras if extra.name in FOR_CONTRIBUTORS]
    if others:
        yield Finding("extras for contributors", "ok", ", ".join(others))
    if not extras:
        yield Finding("extras", "absent", "unknown: this copy runs from its source and is not installed", "pip install .")


def _finding(extra: Extra) -> Finding:
    topic = f"extra {extra.name}"
    if extra.complete:
        return Finding(topic, "ok", f"{extra.adds} ({', '.join(extra.installed)})")
    if extra.name in FOR_GPUS:
        # What is missing where there is a GPU is a finding of its own.
        needed = "" if gpu_present() else "; without an NVIDIA GPU there is no use for it"
        return Finding(topic, "absent", f"would add {extra.adds}{needed}")
    reasons = [f"not installed: {', '.join(extra.missing)}"] if extra.missing else []
    reasons += [f"unsupported: {text}" for text in extra.unsupported]
    return Finding(topic, "absent", f"would add {extra.adds} ({'; '.join(reasons)})", f'pip install "elastickv[{extra.name}]"')
