"""A page, parsed; and results that try to be more than text."""

import re
from html.parser import HTMLParser

EVIL = "<script>window.hacked=1</script>\"'><img src=x onerror=hacked=1>$x^2$ & "
# By these a reader knows what a file is; everything else is only shown.
_STRUCTURE = {"benchmark_type", "schema_version", "kind", "status", "pairing"}
_VOID = {"meta", "br", "img", "input", "link", "hr"}


def evil(value, key=""):
    """Return a result with every text in it made hostile."""
    if isinstance(value, dict):
        return {name: evil(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [evil(item, key) for item in value]
    return EVIL + value if isinstance(value, str) and key not in _STRUCTURE else value


class Page(HTMLParser):
    """Tags, texts and attributes of a page; refuses one whose tags do not nest."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts, self.rows = [], [], [], [], []
        self.feed(html)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        if tag not in _VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in _VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> in {self.open}"
        self.open.pop()

    def handle_data(self, data):
        self.texts.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def values(self, *names):
        return [value for _, name, value in self.attributes if name in names]
