"""Instructions that the page decode kernels issue for a page against those that the memory leaves time for.

    python benchmarks/instruction_budget.py --output benchmarks/results/h200/instruction_budget.json
    python benchmarks/instruction_budget.py --output FILE --recipes "int4;int8" --group 8

Needs no GPU: kernels are compiled with NVRTC and disassembled with nvdisasm or cuobjdump (of the CUDA toolkit, of the package
nvidia-cuda-nvdisasm, or of Triton). Issued: the instructions of one turn of the loop over pages, without blocks that few turns
enter: those that a branch skips and that neither multiply on tensor cores nor start a load. Available: what the schedulers of
all multiprocessors issue in the time in which the memory delivers a page, at the clock and the read bandwidth that are given.
A pipe's share of that time follows from the cycles for which an instruction occupies it (`CYCLES`).
"""

import argparse
import json
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from command_line import exit_with

import elastickv
from elastickv.backends.cuda.compiler import nvrtc_version
from elastickv.backends.cuda.kernel_selection import Variant, decode_variant
from elastickv.recipe import PAGE_TOKENS, Recipe
from elastickv.recipe.byte_counts import page_bytes

KIND, VERSION = "elastickv-instruction-budget", 1
RECIPES = ("int4", "int4,vgroup=32", "k=int8_per_channel,v=int4", "k=int8,v=int4", "int8", "fp8", "bf16")
SCHEDULERS, LANES = 4, 32
# Opcodes up to the first dot -> pipe; what is not listed goes by the rules of `pipe_of`.
PIPES = {
    "tensor": "HMMA IMMA QMMA",
    "fma": "FADD FMUL FFMA HADD2 HMUL2 HFMA2 IMAD FSEL",
    "alu": "LOP3 SHF PRMT FMNMX FMNMX3 HMNMX2 ISETP FSETP HSETP2 SEL IADD3 VIADD IADD LEA PLOP3 MOV F2FP I2FP VOTE ELECT IABS "
    "IMNMX VIMNMX",
    "xu": "MUFU I2F F2I F2F POPC FLO",
    "shared": "LDS STS SHFL MOVM SYNCS UBLKCP LDGSTS ATOMS LDSM",
    "control": "BRA BSSY BSYNC WARPSYNC NOP YIELD EXIT CALL RET BMOV DEPBAR LDGDEPBAR",
}
# Cycles for which one instruction of a warp occupies its pipe of one scheduler, on Hopper. Shared memory serves a
# multiprocessor's four schedulers, 128 bytes a cycle: a cycle of its own is four of theirs, and a load of 16 bytes a lane takes
# four (`WIDE`; fewer where lanes share words). Tensor cores: at the rate of `mma.sync`, about 0.6 of that of `wgmma`.
CYCLES = {"tensor": 6.5, "fma": 1.0, "alu": 2.0, "xu": 8.0, "shared": 4.0, "uniform": 2.0, "control": 1.0, "other": 1.0}
WIDE = {"128": 4, "64": 2}
LOAD_STARTS = ("UBLKCP", "LDGSTS")


def disassembler() -> list[str]:
    """Return the command that disassembles a cubin.

    Raises
    ------
    SystemExit : if there is none.
    """
    folders = [Path(path).parent for name in ("nvdisasm", "cuobjdump") if (path := shutil.which(name))]
    for package, folder in (("nvidia", "cu13/bin"), ("triton", "backends/nvidia/bin")):
        if spec := find_spec(package):
            folders += [Path(root) / folder for root in spec.submodule_search_locations or ()]
    for name, options in (("nvdisasm", ["-c"]), ("cuobjdump", ["-sass"])):
        for folder in folders:
            if (folder / name).is_file():
                return [str(folder / name), *options]
    raise SystemExit("neither nvdisasm nor cuobjdump is installed: pip install nvidia-cuda-nvdisasm, or the CUDA toolkit")


def page_variant(text: str, head_dim: int, group: int, arch: str, macros: dict[str, int]) -> Variant:
    """Return the kernel that decodes a recipe's pages with equally many blocks per KV head."""
    planned = decode_variant(head_dim, group, "bf16", Recipe.parse(text), arch, "pages").fixed()
    assert planned
    return Variant(planned.source, arch, tuple(sorted((dict(planned.macros) | macros).items())))


def instructions(cubin: bytes) -> tuple[list[str], dict[str, int]]:
    """Return a cubin's instructions, and the index that each label stands for."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([*disassembler(), file.name], capture_output=True, text=True, check=True).stdout
    listed: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(listed)
        elif instruction := re.match(r"\s*/\*([0-9a-f]{4,5})\*/\s+(.*?)\s*;", line):
            labels.setdefault(f"0x{int(instruction[1], 16):x}", len(listed))  # cuobjdump's branches name addresses
            listed.append(instruction[2])
    return listed, labels


def target_of(instruction: str, labels: dict[str, int]) -> int | None:
    """Return the index that a branch leads to; None for other instructions."""
    branch = re.search(r"\bBRA(?!\.DIV)\S*\s.*?(\.L_x_\d+|0x[0-9a-f]+)", instruction)
    return labels.get(branch[1]) if branch else None


def opcode(instruction: str) -> str:
    """Return an instruction's opcode with its suffixes, without a predicate."""
    return re.sub(r"^@!?U?P\d+\s+", "", instruction).split()[0]


def page_loop(listed: list[str], labels: dict[str, int]) -> list[str]:
    """Return the instructions of a turn of the loop over pages, without blocks that few turns enter."""
    loops = []
    for i, instruction in enumerate(listed):
        start = target_of(instruction, labels)
        if start is not None and start <= i:
            names = [opcode(each) for each in listed[start : i + 1]]
            if any("MMA" in name for name in names) and any(name.startswith(LOAD_STARTS) for name in names):
                loops.append((i + 1 - start, start, i + 1))
    if not loops:
        raise SystemExit(
            "the disassembly has no loop over pages, with products on tensor cores and loads: is this a page decode kernel?"
        )
    _, start, end = min(loops)
    turn, i = [], start
    while i < end:
        turn.append(listed[i])
        target = target_of(listed[i], labels)
        skipped = [opcode(each) for each in listed[i + 1 : target]] if target is not None and i < target <= end else []
        seldom = skipped and not any("MMA" in name or name.startswith(LOAD_STARTS) for name in skipped)
        i = target if seldom and target else i + 1
    return turn


def pipe_of(name: str) -> str:
    """Return the pipe of an opcode."""
    base = name.split(".")[0]
    for pipe, listed in PIPES.items():
        if base in listed.split():
            return pipe
    if base.startswith(("U", "R2UR", "S2UR", "VOTEU")):
        return "uniform"
    return "shared" if base.startswith(("LD", "ST", "ATOM", "RED")) else "other"


def budget(text: str, arguments: argparse.Namespace, macros: dict[str, int]) -> dict:
    """Return what one recipe's kernel issues for a page, and what is available."""
    variant = page_variant(text, arguments.head_dim, arguments.group, arguments.arch, macros)
    compiled = variant.compiled()
    loop = page_loop(*instructions(compiled.cubin))
    counts = Counter(opcode(each).split(".")[0] for each in loop)
    pipes = Counter(pipe_of(opcode(each)) for each in loop)
    busy = dict.fromkeys(CYCLES, 0.0)
    for name in map(opcode, loop):
        wide = WIDE.get(name.split(".")[-1], 1) if name.startswith("LDS") else 1
        busy[pipe_of(name)] += CYCLES[pipe_of(name)] * wide
    size, elements = page_bytes(Recipe.parse(text), arguments.head_dim), 2 * PAGE_TOKENS * arguments.head_dim
    cycles = SCHEDULERS * size * arguments.multiprocessors / arguments.read_gbs * arguments.ghz
    issued = len(loop)
    return {
        "recipe": text,
        "macros": dict(variant.macros),
        "registers": compiled.resources[0].registers,
        "spill_bytes": compiled.resources[0].spill_bytes,
        "page_bytes": size,
        "issued": issued,
        "available": cycles,
        "issued_per_element": issued * LANES / elements,
        "available_per_element": cycles * LANES / elements,
        "of_issue_slots": issued / cycles,
        "pipes": {pipe: {"issued": n, "share": busy[pipe] / cycles} for pipe, n in sorted(pipes.items())},
        "opcodes": dict(counts.most_common()),
    }


def table(rows: list[dict]) -> list[str]:
    """Return the lines of a Markdown table."""
    pipes = [*PIPES, "uniform"]
    columns = ["recipe", "bytes a page", "issued", "available", "an element: issued / available", *pipes, "registers"]
    lines = [f"| {' | '.join(columns)} |"]
    lines.append("|" + "---|" * len(columns))
    for r in rows:
        parts = [r["pipes"].get(pipe, {"issued": 0, "share": 0.0}) for pipe in pipes]
        shares = " | ".join(f"{part['issued']} ({part['share']:.0%})" for part in parts)
        lines.append(
            f"| `{r['recipe']}` | {r['page_bytes']} | {r['issued']} ({r['of_issue_slots']:.0%}) | {r['available']:.0f} | "
            f"{r['issued_per_element']:.2f} / {r['available_per_element']:.2f} | {shares} | {r['registers']} |"
        )
    return lines


def _macros(text: str) -> dict[str, int]:
    pairs = [term.split("=") for term in text.split(",")]
    if not all(len(pair) == 2 and pair[1].isdecimal() for pair in pairs):
        raise argparse.ArgumentTypeError(f"{text!r}: give NAME=NUMBER, separated by commas")
    return {name: int(value) for name, value in pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--recipes", default=";".join(RECIPES), help="separated by semicolons")
    parser.add_argument("--macros", type=_macros, default={}, help="beside those of the planned build: PAGES_EARLY=2,STAGES=2")
    parser.add_argument("--arch", default="90")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--group", type=int, default=4, help="query heads of a KV head")
    parser.add_argument("--multiprocessors", type=int, default=132)
    parser.add_argument("--ghz", type=float, default=1.98, help="clock of the multiprocessors")
    parser.add_argument("--read-gbs", type=float, default=4600.0, help="bandwidth of reading, in 10^9 bytes a second")
    arguments = parser.parse_args()
    rows = [budget(text, arguments, arguments.macros) for text in arguments.recipes.split(";")]
    names = ("arch", "head_dim", "group", "multiprocessors", "ghz", "read_gbs")
    result = {
        "kind": KIND,
        "version": VERSION,
        "elastickv": elastickv.__version__,
        "nvrtc": ".".join(map(str, nvrtc_version())),
        "assumed": {name: getattr(arguments, name) for name in names},
        "cycles_of_an_instruction": CYCLES,
        "rows": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(table(rows)))


if __name__ == "__main__":
    exit_with(main)
