"""A headless Chromium that tells what a page logs, asks for, and how wide it gets."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

ARTIFACTS = Path(os.environ.get("ELASTICKV_TEST_ARTIFACTS") or Path(__file__).parents[2] / ".test-artifacts")
_OPTIONS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


@contextmanager
def browser():
    """Yield a browser with a profile of its own; skip where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=list(_OPTIONS))
        yield opened
        opened.close()


class Visit:
    """A page as it is opened: `logged` and `asked` are what must stay empty."""

    def __init__(self, opened, path, width=1280, scheme="light"):
        self.context = opened.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page, self.logged, self.asked = self.context.new_page(), [], []
        self.page.on("console", lambda message: self.logged.append(message.text))
        self.page.on("pageerror", lambda error: self.logged.append(str(error)))
        self.page.on("request", self._request)
        self.page.goto(Path(path).as_uri(), wait_until="load")

    def _request(self, request):
        if not request.url.startswith(("file:", "data:")):
            self.asked.append(request.url)

    def ask(self, expression):
        return self.page.evaluate(expression)

    def keep(self, name):
        """Save a picture of the whole page among the tests' artefacts and return it."""
        ARTIFACTS.mkdir(parents=True, exist_ok=True)
        return self.page.screenshot(path=ARTIFACTS / f"{name}.png", full_page=True)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.context.close()
