"""The page in a real browser: silent, alone, as wide as the window, in both colours."""

import gzip
import io

import pytest

from elastickv import report
from tests.helpers.browser import Visit, browser
from tests.helpers.pages import EVIL, evil
from tests.helpers.results import COMMITTED, GGUF, ORIGINAL, quiet, result, write
from tests.helpers.run_results import run_result

NEEDLES = COMMITTED / "h200" / "fidelity-smollm2-135m-instruct-needle.json"

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

# Text that is cut off by, or runs out of, the figure that it stands in.
_OUTSIDE = """() => [...document.querySelectorAll('svg')].flatMap(svg => {
  const box = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('text')].filter(text => {
    const own = text.getBoundingClientRect();
    return own.left < box.left - 2 || own.right > box.right + 2 || own.top < box.top - 2 || own.bottom > box.bottom + 2;
  }).map(text => svg.getAttribute('aria-label').slice(0, 40) + ': ' + text.textContent);
})"""
# Tables and commands of which a part lies beyond their right edge.
_CUT_OFF = """() => [...document.querySelectorAll('.scroll, pre')].filter(box => box.scrollWidth > box.clientWidth + 1)
  .map(box => [box.getAttribute('aria-label'), box.scrollWidth, box.clientWidth])"""
# The least contrast of a text with the paper that it stands on (WCAG 2: relative luminance).
_CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const light = colour => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = light(getComputedStyle(document.querySelector('section')).backgroundColor);
  const contrast = colour => { const [a, b] = [light(colour), paper].sort((x, y) => y - x); return (a + 0.05) / (b + 0.05); };
  const texts = [...document.querySelectorAll('section p, section td, section th, figcaption, dd, dt, h2')];
  const drawn = [...document.querySelectorAll('svg text')].map(text => getComputedStyle(text).fill);
  return Math.min(...new Set([...texts.map(text => getComputedStyle(text).color), ...drawn].map(contrast)));
}"""


@pytest.fixture(scope="module")
def opened():
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def page(h100, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    h100.save(path)
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1280, 1920])
def test_it_looks_right_at_every_width_in_both_colours(opened, page, width, scheme):
    with Visit(opened, page, width, scheme) as visit:
        visit.keep(f"report-{width}-{scheme}")
        assert visit.logged == []
        assert visit.asked == []
        assert visit.ask("document.scrollingElement.scrollWidth <= innerWidth")
        assert visit.ask(_CUT_OFF) == []
        assert visit.ask(_OUTSIDE) == []
        assert visit.ask(_CONTRAST) >= 4.5
        small = "Math.min(...[...document.querySelectorAll('svg text')].map(text => text.getBoundingClientRect().height))"
        assert visit.ask(small) >= 8


@pytest.mark.parametrize("width", [360, 1280, 1920])
def test_no_table_is_cut_off_on_a_page_of_every_kind_of_result(opened, tmp_path, width):
    unpaired = result(quiet(0.5, 9), quiet(1.0, 9), cycle=True) | {"pairing": "sequential"}
    unpaired["recipe"]["text"] = "int4,vgroup=64,pages=0.816,anchor_every=8"
    header = {"sweep": {"version": 1, "plan_hash": "h", "cells": 40, "axes": {"seq": list(range(1, 21)), "dim": [64, 128]}}}
    path = write(tmp_path, "cells.jsonl", [header, {"cell": {"seq": 1, "dim": 64}, "status": "failed", "reason": "no " * 200}])
    losses = (COMMITTED / "cpu" / "fidelity-smollm2-135m-4096.json", NEEDLES)
    model = COMMITTED / "h100" / "model-8b-32768x1.json"
    made = report(path, unpaired, result(seq=2048, cycle=True), run_result(stock=16.0), GGUF, ORIGINAL, model, *losses)
    made.save(tmp_path / "page.html")
    with Visit(opened, tmp_path / "page.html", width) as visit:
        visit.keep(f"every-kind-{width}")
        visit.ask("document.querySelectorAll('details').forEach(part => part.open = true)")
        assert visit.ask(_CUT_OFF) == []
        assert visit.ask("document.scrollingElement.scrollWidth <= innerWidth")


def test_a_reader_chooses_the_colours(opened, page):
    with Visit(opened, page, scheme="light") as visit:
        color = "getComputedStyle(document.querySelector('section')).backgroundColor"
        light = visit.ask(color)
        visit.page.check("#theme-dark")
        assert visit.ask(color) != light
        visit.page.check("#theme-light")
        assert visit.ask(color) == light


def test_the_files_inside_it_can_be_saved(opened, page):
    with Visit(opened, page) as visit:
        with visit.page.expect_download() as told:
            visit.page.click("a[download^='samples']")
        with open(told.value.path(), "rb") as file:
            assert gzip.decompress(file.read()).startswith(b"result,figure,contender")


def test_on_paper_it_is_light_and_open(opened, page):
    with Visit(opened, page, 794, "dark") as visit:
        visit.page.emulate_media(media="print", color_scheme="dark")
        visit.keep("report-print")
        assert visit.ask("getComputedStyle(document.querySelector('section p')).color") == "rgb(27, 31, 36)"
        assert visit.ask("document.querySelector('.theme').checkVisibility()") is False
        assert visit.page.pdf().startswith(b"%PDF")


def test_the_format_for_paper_in_a_browser(opened, h100, tmp_path):
    h100.save(tmp_path / "paper.html", "pdf-ready")
    with Visit(opened, tmp_path / "paper.html", 794, "dark") as visit:
        visit.keep("report-pdf-ready")
        assert visit.logged == visit.asked == []
        assert visit.ask("getComputedStyle(document.querySelector('section')).backgroundColor") == "rgb(255, 255, 255)"
        assert visit.ask("[...document.querySelectorAll('details')].every(part => part.open)")


def test_a_hostile_file_runs_nothing(opened, tmp_path):
    made = report(evil(result(quiet(0.5), quiet(1.0))), title=EVIL)
    made.save(tmp_path / "evil.html")
    (tmp_path / "notebook.html").write_text(f"<!doctype html><body>{made._repr_html_()}</body>", encoding="utf-8")
    for name in ("evil.html", "notebook.html"):
        with Visit(opened, tmp_path / name, 360) as visit:
            assert visit.ask("window.hacked") is None
            assert "window.hacked=1" in visit.page.inner_text("h1")
            assert visit.logged == visit.asked == []
            assert visit.ask("document.scrollingElement.scrollWidth <= innerWidth")


def test_every_kind_of_result_on_a_phone(opened, tmp_path):
    report(COMMITTED / "cpu", NEEDLES).save(tmp_path / "cpu.html")
    with Visit(opened, tmp_path / "cpu.html", 360) as visit:
        picture = visit.keep("report-cpu-360-light")
        assert visit.logged == visit.asked == []
        assert visit.ask("document.scrollingElement.scrollWidth <= innerWidth")
        assert visit.ask(_OUTSIDE) == []
        assert visit.ask("document.querySelector('#needle svg') !== null")
    image = pytest.importorskip("PIL.Image")
    assert image.open(io.BytesIO(picture)).size[0] == 360
