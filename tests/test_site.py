"""The documents as a site: every link resolves, and a page fetches nothing from another server."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REMOTE = re.compile(r"\s*(?:[a-z]+:)?//", re.IGNORECASE)


class Fetched(HTMLParser):
    """What a browser fetches for a page: everything but links that a reader may follow."""

    def __init__(self):
        super().__init__()
        self.targets = []

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "srcset", "poster", "data") or (name == "href" and tag != "a"):
                self.targets.append(value)
            if name == "style":
                self.targets += re.findall(r"url\(['\"]?([^'\")]*)", value)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("material")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def test_every_document_is_a_page_that_the_navigation_leads_to(site):
    home = (site / "index.html").read_text(encoding="utf-8")
    for document in (ROOT / "docs").glob("*.md"):
        assert (site / document.with_suffix(".html").name).exists()
        assert document.name == "index.md" or f'href="{document.with_suffix(".html").name}"' in home, document.name


def test_a_page_fetches_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        fetched = Fetched()
        fetched.feed(page.read_text(encoding="utf-8"))
        assert fetched.targets, page.name
        local = [target for target in fetched.targets if target.strip() and not target.startswith(("data:", "#"))]
        assert not [target for target in local if REMOTE.match(target)], page.name
        for target in local:
            path = target.partition("?")[0].partition("#")[0]
            assert (page.parent / path).exists() or page.name == "404.html", f"{page.name}: {target}"
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        assert not [target for target in re.findall(r"(?:url\(|@import )['\"]?([^'\")]*)", text) if REMOTE.match(target)], (
            sheet.name
        )
