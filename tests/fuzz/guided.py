"""One target under atheris, guided by coverage: `python -m tests.fuzz.guided TARGET REPORT [libFuzzer options] [CORPUS]`.

The report tells what was found; the run goes on after a finding, so that one bug does not hide the next.
"""

import json
import sys

import atheris

# What Numba compiles must stay as it is.
_ALL = ("recipe", "measure", "reports", "sweeps", "cli", "data", "fidelity", "transformers", "inputs", "errors")
# Where more than parsing is done only what decides is watched: watching everything makes a run several times as long.
_WATCHED = {
    "options": ("measure.options", "recipe.recipe", "recipe.shape", "recipe.resolve"),
    "results": ("reports.documents", "reports.readers", "reports.sides", "inputs"),
    "comparison": ("reports.readers", "reports.matching", "reports.change", "reports.comparison_table"),
    "sweep": ("sweeps.journal", "sweeps.table", "reports.rows", "inputs"),
    "plan": ("sweeps.plan", "sweeps.axes", "inputs"),
    "activations": ("data", "inputs"),
    "calibration": ("recipe.model_calibration", "inputs"),
    "saved-cache": ("transformers.saving", "inputs"),
    "recipe-file": ("transformers.plan", "recipe.model_calibration", "inputs"),
    "gguf": ("data.gguf_header", "baselines.gguf_file"),
    "kernel-cache": ("backends.cuda.compiler",),
    "command-line": ("cli", "sweeps.axes", "reports.files"),
}


def main() -> None:
    name, report, *rest = sys.argv[1:]
    with atheris.instrument_imports(
        include=[f"elastickv.{part}" for part in _WATCHED.get(name, _ALL)],
        exclude=["elastickv.backends.cpu"],
        enable_loader_override=False,
    ):
        import elastickv.backends.cuda.compiler
        import elastickv.cli.bench
        import elastickv.evaluation.suggestion
        import elastickv.evaluation.texts
        import elastickv.model_benchmark.gguf_file
        import elastickv.results.compare.comparison_table
        import elastickv.sweeps.sweep_result

        if name in ("saved-cache", "recipe-file", "command-line"):
            import elastickv.transformers.serialization  # noqa: F401
    from tests.fuzz.command_line import TARGET
    from tests.fuzz.findings import Findings, quiet
    from tests.fuzz.targets import TARGETS

    quiet()
    findings = Findings((TARGETS | {"command-line": TARGET})[name])

    def one(data: bytes) -> None:
        new = findings.run(data)
        if new or findings.runs % 256 == 0:
            with open(report, "w", encoding="utf-8") as file:
                told = {"runs": findings.runs, "refused": findings.refused, "slowest_s": round(findings.slowest_s, 3)}
                json.dump(told | {"found": {kind: data.hex() for kind, data in findings.found.items()}}, file)

    # What is made once must not count as the time of the first input.
    for data in findings.target.seeds[:4]:
        findings.run(data)
    atheris.Setup([sys.argv[0], *rest], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
