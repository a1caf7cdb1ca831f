"""The page says what the files say, as text, and fetches nothing."""

import base64
import copy
import csv
import gzip
import io
import json
import re
from pathlib import Path

import pytest

from elastickv import UsageError, report
from elastickv.html_report.charts.fidelity_charts import front, offers
from elastickv.sweeps.sweep_result import Sweep
from tests.helpers.pages import EVIL, Page, evil
from tests.helpers.results import COMMITTED, GGUF, ORIGINAL, quiet, result, write

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

RESULTS = [
    path for path in sorted((COMMITTED / "h100").rglob("*.json")) if "benchmark_type" in path.read_text(encoding="utf-8")[:80]
]
MODEL = COMMITTED / "h100" / "model-8b-32768x1.json"
LOSSES = COMMITTED / "cpu" / "fidelity-smollm2-135m-4096.json"
NEEDLES = COMMITTED / "h200" / "fidelity-smollm2-135m-instruct-needle.json"
SECTIONS = {
    "speedup", "roofline", "time", "fidelity", "needle", "models", "latency", "memory", "results", "warnings", "environment",
    "commands",
}  # fmt: skip


def load(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def header(cells=1):
    return {
        "sweep": {"version": 1, "plan_hash": "h", "cells": cells, "axes": {}, "command": ["elastickv", "sweep", "--seq=8 9"]}
    }


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_headline_holds_the_figures_of_its_file(path):
    value, sentence = load(path), report(path).content.headline.sentence
    ratio, error = value["speedup"], value["fidelity"]["sample"]["recipe_error"]
    assert f"{ratio['estimate']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}] times the speed of" in sentence
    assert f"reads 1/{value['recipe']['ratio_read']:.2f} of the dense bytes" in sentence
    assert f"recipe error is {error['mean']:.4f} on average and {error['p95']:.4f}" in sentence
    for name in (value["gpu"]["name"], value["recipe"]["text"], value["baseline"]["name"]):
        assert name in sentence


def test_the_headline_is_the_surest_of_several_and_says_how_the_others_did(h100):
    best = max((load(path) for path in RESULTS), key=lambda value: value["speedup"]["low"])
    headline = h100.content.headline
    assert f"{best['speedup']['estimate']:.3f}×" in [figure for _, figure, _ in headline.tiles]
    least = min(load(path)["speedup"]["estimate"] for path in RESULTS)
    faster = sum(load(path)["faster"] for path in RESULTS)
    assert f"{faster} of {len(RESULTS)}" in headline.beside[0]
    assert f"{least:.3f}" in headline.beside[0]


def test_a_wide_interval_wins_no_headline():
    sure, lucky = result(quiet(0.5), quiet(1.0)), result(quiet(0.5, 1), quiet(1.0, 1))
    lucky["speedup"] |= {"estimate": 9.0, "low": 0.5, "high": 20.0}
    sure["speedup"] |= {"estimate": 2.0, "low": 1.9, "high": 2.1}
    assert "2.000 [1.900, 2.100]" in report(lucky, sure).content.headline.sentence


def test_every_result_stands_in_the_table_with_its_figures(h100):
    page = Page(h100.html)
    rows = {row[-1]: row for row in page.rows if len(row) == 15}
    for path in RESULTS:
        value, row = load(path), rows[str(path.relative_to(COMMITTED / "h100"))]
        ratio = value["speedup"]
        fell_back = any(warning.startswith("auto fell back") for warning in value["warnings"])
        assert row[0] == value["recipe"]["text"] + " (fallback)" * fell_back
        assert row[1] == str(value["configuration"]["seq_len"])
        assert row[3:5] == [f"{value['recipe'][name]:.2f}" for name in ("ratio_read", "ratio_stored")]
        assert row[5].startswith(f"{ratio['estimate']:.3f}× [{ratio['low']:.3f}, {ratio['high']:.3f}]")
        assert row[7] == f"{value['fidelity']['sample']['recipe_error']['mean']:.4f}"
        assert row[11] == value["baseline"]["name"]


def test_the_page_of_the_h100_has_every_section_that_has_data(h100):
    page = Page(h100.html)
    assert set(page.values("id")) >= SECTIONS - {"needle"} | {"raw", "absent"}
    assert [section.name for section in h100.content.absent] == ["frontier", "generations", "needle", "tasks", "serving"]
    assert "Pass keys found : needs a result of elastickv eval" in page.text
    for path in RESULTS:
        for warning in load(path)["warnings"]:
            assert warning in page.text
    assert all(name in h100.figures for name in ("speedup-1", "roofline-1", "time-1", "recipe-error", "latency-step", "memory"))


def test_the_page_is_small_fetches_nothing_and_is_sound(h100):
    html, page = h100.html, Page(h100.html)
    assert len(html.encode()) < 2_000_000
    assert not {"script", "link", "iframe", "object", "embed", "img"} & set(page.tags)
    assert all(value.startswith(("#", "data:")) for value in page.values("src", "href", "xlink:href", "action", "srcset"))
    assert not re.search(r"@import|url\((?!#)", html)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert {value[1:] for value in page.values("href", "xlink:href") if value.startswith("#")} <= set(ids)
    assert "default-src 'none'" in html
    assert ("html", "lang", "en") in page.attributes
    assert page.tags.count("h1") == 1
    labels = [value for tag, name, value in page.attributes if tag == "svg" and name == "aria-label"]
    assert len(labels) == len(h100.figures) == page.values("role").count("img")
    assert all(len(label) > 40 for label in labels)


def test_the_same_results_make_the_same_page():
    path = COMMITTED / "cpu" / "short.json"
    assert report(path).html == report(path).html


def test_the_download_holds_every_sample_and_the_results_themselves(h100):
    files = {}
    for tag, name, value in Page(h100.html).attributes:
        if tag == "a" and name == "href" and value.startswith("data:"):
            files[len(files)] = gzip.decompress(base64.b64decode(value.partition(",")[2])).decode()
    samples = list(csv.DictReader(io.StringIO(files[0])))
    long = load(COMMITTED / "h100" / "long.json")
    found = [
        float(row["ms"])
        for row in samples
        if row["result"].endswith("/long.json") and "notebook" not in row["result"] and row["figure"] == "step"
    ]
    assert sorted(found) == sorted(sample for series in long["samples"].values() for sample in series)
    assert long in [json.loads(line) for line in files[1].splitlines()]
    assert (
        report(*(json.loads(line) for line in files[1].splitlines())).content.headline.sentence
        == h100.content.headline.sentence
    )


def test_every_command_is_there_as_it_was_typed(tmp_path):
    path = write(tmp_path, "plane.jsonl", [header(), {"cell": {"seq": 1}, "status": "ok", "reason": None, **result()}])
    (section,) = [section for section in report(path).content.sections if section.name == "commands"]
    assert "elastickv sweep '--seq=8 9'" in dict(section.commands).values()
    given = load(COMMITTED / "cpu" / "short.json")["configuration"]["command"]
    assert " ".join(given) in Page(report(COMMITTED / "cpu" / "short.json").html).text


def test_losses_and_pass_keys_are_shown():
    made = report(LOSSES, NEEDLES)
    page = Page(made.html)
    for row in load(LOSSES)["rows"]:
        cells = next(cells for cells in page.rows if row["cache"] in cells and "4096" in cells)
        figure = row["kl"]
        assert f"{figure['mean']:.4f} [{figure['low']:.4f}, {figure['high']:.4f}]" in cells
    found = load(NEEDLES)["needle"][0]["found"]
    for cache, hits in found.items():
        assert [cells[3:] for cells in page.rows if cache in cells and "3500" in cells] == [[str(sum(hits)), str(len(hits))]]
    assert {"kl-1", "perplexity-1", "needle-1"} <= set(made.figures)
    assert "2/2" in made.figures["needle-1"]
    assert "perplexity changes by 1.26 % [0.72, 1.80]" in made.content.headline.sentence


def test_a_model_is_shown_cache_by_cache():
    made, value = report(MODEL), load(MODEL)
    page, ratio = Page(made.html), value["speedups"][value["baseline"]]
    assert (
        f"{ratio['estimate']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}] times the speed of"
        in made.content.headline.sentence
    )
    for cache in value["caches"]:
        step = cache["step_ms"]
        assert any(f"{step['estimate']:.2f} [{step['low']:.2f}, {step['high']:.2f}]" in cells for cells in page.rows)


def test_the_original_programs_result_is_shown_without_an_interval():
    made = report(ORIGINAL)
    assert "1.667 times the speed" in made.content.headline.sentence
    assert "no interval" in made.content.headline.sentence
    assert "recipe error not measured" in made.content.headline.sentence
    assert "GTX 1070" in made.html


@pytest.mark.parametrize("path", [COMMITTED / "cpu" / "short.json", MODEL, LOSSES, NEEDLES, None], ids=str)
def test_a_hostile_file_is_text(path):
    value = evil(ORIGINAL if path is None else load(path))
    if path == MODEL:  # the reader looks for this cache
        value["caches"][-1]["cache"] = "elastic"
    made = report(value, title=EVIL)
    for html in (made.html, made._repr_html_(), made.printable):
        page = Page(html)
        assert not {"script", "img"} & set(page.tags)
        assert not [name for _, name, _ in page.attributes if name.startswith("on")]
        assert "window.hacked=1" in page.text
    for name, svg in made.figures.items():
        assert not {"script", "img"} & set(Page(svg).tags), name
    assert not re.search(r"(?<!\\)<script", made.markdown)


def test_control_characters_and_long_names_leave_the_page_sound(tmp_path):
    from xml.etree import ElementTree

    value = result(quiet(0.5), quiet(1.0))
    value["recipe"]["text"] = "_\x00\x1b[31m\ud800" + "x" * 500
    value["gpu"]["name"] = "深度\u202e \x07"
    made = report(value)
    for svg in made.figures.values():
        ElementTree.fromstring(svg)
    for text in (made.html, made.printable, made._repr_html_(), made.markdown):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e\ud800-\udfff]", text)
    made.save(tmp_path / "a.png")


def test_a_sweep_says_which_cells_have_no_result(tmp_path):
    cells = [
        {"cell": {"seq": 1024}, "status": "ok", "reason": None, **result(quiet(0.5), quiet(1.0))},
        {"cell": {"seq": 2048}, "status": "does not fit", "reason": "needs 9 GiB"},
    ]
    path = write(tmp_path, "plane.jsonl", [header(2), *cells])
    with path.open("a", encoding="utf-8") as file:
        file.write('{"cell": {"se')
    text = Page(report(path).html).text
    assert "seq=2048 needs 9 GiB" in text
    assert "was cut off while it was written" in text
    in_memory = report(Sweep.load(path))
    assert in_memory.content.headline.sentence == report(path).content.headline.sentence


def test_objects_dictionaries_lists_and_paths_are_taken(tmp_path):
    class Bench:
        def as_dict(self):
            return result(quiet(0.5), quiet(1.0))

    made = report(Bench(), [result(quiet(0.4), quiet(1.0), seq=2048)], str(write(tmp_path, "a.json", result(seq=4096))))
    assert [step.context for step in made.facts.steps] == [1024, 2048, 4096]


def test_a_copy_counts_once_and_is_named(tmp_path):
    paths = [write(tmp_path, name, result(quiet(0.5), quiet(1.0))) for name in ("a.json", "b.json")]
    made = report(*paths, tmp_path)
    assert len(made.facts.steps) == 1
    assert all("once more, and counts once" in note for note in made.facts.notes)
    assert len(report(LOSSES, LOSSES).facts.evaluations) == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is no JSON"),
        ("", "is empty"),
        ('{"a": NaN}', "holds NaN"),
        ("[]", "holds no result"),
        ('{"kind": "elastickv-fidelity", "version": 2}', "is of version 2"),
        ('{"kind": "elastickv-fidelity", "version": 1}', "lacks environment"),
        (json.dumps(result() | {"schema_version": "2.0"}), "is of schema 2.0"),
        (json.dumps({k: v for k, v in result().items() if k != "roofline"}), "lacks roofline"),
        (json.dumps(header(0)), "holds no result"),
    ],
)
def test_a_bad_file_is_named_in_one_line(tmp_path, content, said):
    good, bad = write(tmp_path, "good.json", result(quiet(0.5), quiet(1.0))), tmp_path / "bad.json"
    bad.write_text(content, encoding="utf-8")
    for given in ((bad,), (good, bad), (tmp_path,)):
        if given == (bad,):
            with pytest.raises(UsageError, match=said) as error:
                report(*given)
            reason = str(error.value)
        else:
            with pytest.warns(UserWarning, match=f"left out of the report: .*{said}"):
                made = report(*given)
            (reason,) = made.facts.unreadable
            assert reason in Page(made.html).text
            assert [step.context for step in made.facts.steps] == [1024]
        assert "bad.json" in reason
        assert said in reason
        assert "\n" not in reason


def _shown_or_refused(value):
    try:
        return report(value).to_json()
    except UsageError as error:
        return "result 1" in str(error)


def _without(value, *path):
    made = copy.deepcopy(value)
    inner = made
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return made


@pytest.mark.parametrize("path", [COMMITTED / "cpu" / "short.json", MODEL, LOSSES, NEEDLES], ids=lambda path: path.stem)
def test_a_file_that_lacks_anything_is_shown_or_refused(path):
    value = load(path)
    cut = [(name,) for name in value]
    cut += [(name, key) for name, inner in value.items() if isinstance(inner, dict) for key in inner]
    cut += [(name, 0, key) for name, inner in value.items() if isinstance(inner, list) for first in inner[:1]
            if isinstance(first, dict) for key in first]  # fmt: skip
    for keys in cut:
        assert _shown_or_refused(_without(value, *keys))


@pytest.mark.parametrize("wrong", ["text", None, [], {}, -1, True, [[]], [{}]], ids=str)
@pytest.mark.parametrize("path", [COMMITTED / "cpu" / "short.json", MODEL, LOSSES, NEEDLES], ids=lambda path: path.stem)
def test_a_value_of_another_kind_is_shown_or_refused(path, wrong):
    value = load(path)
    places = [(name,) for name in value]
    places += [(name, key) for name, inner in value.items() if isinstance(inner, dict) for key in inner]
    for *before, last in places:
        made = copy.deepcopy(value)
        inner = made
        for key in before:
            inner = inner[key]
        inner[last] = wrong
        assert _shown_or_refused(made)


def test_the_pareto_front_is_what_nothing_beats(h100):
    found = offers(h100.facts.steps)
    best = front(found)
    for offer in found:
        beaten = any(o.read >= offer.read and o.error.estimate <= offer.error.estimate and o != offer for o in found)
        assert (offer in best) != beaten
    assert all(f"  {offer.name}" in h100.figures["recipe-error"] for offer in best)


def test_rows_json_and_pandas_hold_the_same(h100):
    rows = h100.rows()
    told = json.loads(h100.to_json())
    assert told["rows"] == rows
    assert told["headline"]["sentence"] == h100.content.headline.sentence
    by_source = {row["source"]: row for row in rows if row["kind"] == "step"}
    for path in RESULTS:
        row, value = by_source[str(path)], load(path)
        assert row["speedup"] == value["speedup"]["estimate"]
        assert row["recipe_error"] == value["fidelity"]["sample"]["recipe_error"]["mean"]
        assert row["ms"] == value["results"]["attention_time_ms"]
    pandas = pytest.importorskip("pandas")
    frame = h100.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert len(frame) == len(rows)


def test_many_cells_stay_readable(tmp_path):
    cells = []
    for number in range(200):
        value = result(quiet(0.5 + number / 400, number), quiet(1.0, number), seq=1024 * (1 + number % 5))
        value["recipe"] |= {"requested": f"r{number % 20}", "text": f"int8,x={number % 20}", "ratio_read": 1 + number % 20 / 4}
        cells.append({"cell": {"n": number}, "status": "ok", "reason": None, **value})
    made = report(write(tmp_path, "many.jsonl", [header(200), *cells]))
    page = Page(made.html)
    assert len(made.facts.steps) == 200
    assert len(made.figures) < 12
    assert "too much to be drawn" in page.text
    assert len(page.rows) > 200


def test_markdown_has_its_figures_beside_it(tmp_path):
    made = report(COMMITTED / "cpu" / "short.json")
    made.save(tmp_path / "my page.md")
    text = (tmp_path / "my page.md").read_text(encoding="utf-8")
    linked = re.findall(r"\]\((my%20page-figures/[^)]+\.svg)\)", text)
    assert len(linked) == len(made.figures)
    assert all((tmp_path / link.replace("%20", " ")).read_text().startswith("<svg") for link in linked)
    widths = [line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")]
    assert widths
    assert "1.618× [1.600, 1.637]" in text.replace("\\", "")


def test_formats_follow_the_suffix_or_are_refused(tmp_path):
    made = report(COMMITTED / "cpu" / "short.json")
    made.save(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    made.save(tmp_path / "a.html", "pdf-ready")
    page = Page((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert "input" not in page.tags
    assert page.tags.count("details") == sum(name == "open" for tag, name, _ in page.attributes if tag == "details")
    for name, wanted, said in (
        ("a.pdf", None, "no PDF"),
        ("a.png", "html", "names png"),
        ("a.html", "docx", "is unknown"),
        ("none/a.html", None, "does not exist"),
    ):
        with pytest.raises(UsageError, match=said):
            made.save(tmp_path / name, wanted)


def test_a_baselines_quality_cost_is_shown():
    value = load(MODEL) | {
        "fidelity": {"reference": "stock", "text": "a text", "context": 512, "tokens": 16, "perplexity": 20.125,
                     "reference_perplexity": 20.0, "kl_mean": 0.0123, "kl_p95": 0.1, "kl_max": 0.2, "top1_percent": 93.75},
        "fidelity_not_measured": None,
    }  # fmt: skip
    made = report(value)
    assert "KL divergence of its predictions is 0.0123 nats a token" in made.content.headline.sentence
    assert any({"elastic", "0.0123", "20.125"} <= set(cells) for cells in Page(made.html).rows)


def test_our_formats_are_shown_beside_those_of_another_program():
    page = Page(report(GGUF).html)
    assert any({"int4", "4.0 KiB", "3.25"} <= set(cells) for cells in page.rows)
    assert any({"q8_0", "0.0010", "20.100"} <= set(cells) for cells in page.rows)


def test_a_result_is_never_overwritten(tmp_path):
    path = write(tmp_path, "a.json", result())
    before = path.read_bytes()
    with pytest.raises(UsageError, match="is one of the results"):
        report(path).save(path, "html")
    assert path.read_bytes() == before


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("elastickv.html_report.report.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'jinja2 and matplotlib: pip install "elastickv\[report\]"'):
        report(COMMITTED / "cpu" / "short.json")


def test_the_guides_example_runs(tmp_path, monkeypatch):
    pytest.importorskip("pandas")
    guide = Path(__file__).parents[2] / "docs" / "report.md"
    (code,) = re.findall(r"```python\n(.*?)```", guide.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "results").mkdir()
    write(tmp_path / "results", "short.json", load(COMMITTED / "cpu" / "short.json"))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(guide), "exec"), {})
    assert (tmp_path / "report.html").exists()


def test_the_guides_options_exist():
    from elastickv.cli.report import command

    guide = (Path(__file__).parents[2] / "docs" / "report.md").read_text(encoding="utf-8")
    known = {name for parameter in command.params for name in parameter.opts}
    used = {
        option
        for line in re.findall(r"^elastickv report (.*)$", guide, re.MULTILINE)
        for option in re.findall(r"--?[a-z]+", line)
    }
    assert used >= {"-o", "--title", "--format"}
    assert {option for option in used if option.startswith("--")} <= known
