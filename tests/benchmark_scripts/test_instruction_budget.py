"""benchmarks/instruction_budget.py: the loop that is counted, the pipes, and a kernel as it is compiled."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

LISTING = [
    ("", "S2R R0, SR_TID.X"),
    (".L_x_0", "LDS.128 R4, [R0]"),
    ("", "HMMA.16816.F32 R8, R4, R6, RZ"),
    ("", "@!P0 BRA `(.L_x_1)"),
    ("", "SHFL.BFLY PT, R1, R2, 0x1, 0x1f"),
    ("", "FMUL R8, R8, R1"),
    (".L_x_1", "@P1 BRA `(.L_x_2)"),
    ("", "UBLKCP.S.G [UR4], [UR6], UR8"),
    (".L_x_2", "@P2 BRA `(.L_x_0)"),
    ("", "EXIT"),
]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("instruction_budget")
    sys.modules.pop("instruction_budget", None)


def listing():
    return [text for _, text in LISTING], {label: i for i, (label, _) in enumerate(LISTING) if label}


def test_a_turn_leaves_out_what_is_seldom_entered_and_keeps_loads(script):
    loop = script.page_loop(*listing())
    assert [each.split()[0] for each in loop] == ["LDS.128", "HMMA.16816.F32", "@!P0", "@P1", "UBLKCP.S.G", "@P2"]


def test_a_listing_without_a_loop_over_pages_is_refused(script):
    found, labels = listing()
    with pytest.raises(SystemExit, match="loop over pages"):
        script.page_loop(found[:-2], labels)


def test_only_branches_have_targets(script):
    _, labels = listing()
    assert script.target_of("@P2 BRA `(.L_x_0)", labels) == 1
    assert script.target_of("BRA.DIV UR6, `(.L_x_0)", labels) is None
    assert script.target_of("FADD R1, R2, R3", labels) is None


@pytest.mark.parametrize(
    ("name", "pipe"),
    [
        ("IMMA.16832.U8.U8", "tensor"),
        ("IMAD.WIDE.U32", "fma"),
        ("LOP3.LUT", "alu"),
        ("MUFU.EX2", "xu"),
        ("LDS.128", "shared"),
        ("UIADD3", "uniform"),
        ("UBLKCP.S.G", "shared"),
        ("BSYNC", "control"),
        ("NANOSLEEP", "other"),
    ],
)
def test_every_opcode_has_a_pipe(script, name, pipe):
    assert script.pipe_of(name) == pipe


def test_a_compiled_kernel_has_a_budget(script, tmp_path, monkeypatch, capsys):
    try:
        script.disassembler()
    except SystemExit as reason:
        pytest.skip(str(reason))
    pytest.importorskip("cuda.bindings")
    target = tmp_path / "budget.json"
    monkeypatch.setattr(sys, "argv", ["instruction_budget.py", "--output", str(target), "--recipes", "int4"])
    script.main()
    (row,) = json.loads(target.read_text())["rows"]
    assert row["page_bytes"] == 2 * 32 * 64 + 2 * 2 * 128 + 2 * 2 * 32  # codes; scales and zeros of channels and of tokens
    # 32 tokens x 128 channels for keys and as many for values, 16 x 8 x 16 products at once, two halves of a query.
    assert row["pipes"]["tensor"]["issued"] >= 32
    assert row["issued"] == sum(part["issued"] for part in row["pipes"].values())
    assert 0 < row["of_issue_slots"] < 1
    assert "| `int4` | 4736 |" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["PAGES_EARLY", "PAGES_EARLY=no", "PAGES_EARLY=1,,"])
def test_macros_that_are_no_numbers_are_refused(script, monkeypatch, capsys, text):
    monkeypatch.setattr(sys, "argv", ["instruction_budget.py", "--output", "none", "--macros", text])
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert "give NAME=NUMBER, separated by commas" in capsys.readouterr().err
