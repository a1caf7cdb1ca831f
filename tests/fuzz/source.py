"""What a fuzzer's bytes mean: numbers, texts and edits of documents, so that few bytes reach far behind a parser's syntax."""

import json

# Rendered as they stand: Python's own encoder would not write them.
RAW = {
    "@digits": "9" * 5000,
    "@large": "1" + "0" * 400,
    "@infinite": "1e999",
    "@nan": "NaN",
    "@deep": "[" * 3000 + "]" * 3000,
    "@objects": '{"a":' * 3000 + "1" + "}" * 3000,
}
ODD = (
    *(None, True, False, 0, 1, -1, 2, 3, 64, 0.0, -0.0, 0.5, 1.0, 1e-320, 1e308, -1.5, 10**18, 2**31, 2**63, -(2**63)),
    *("", " ", "x", "0", "1", "-1", "1.0", "nan", "inf", "²", "1/2", "int4", "int8,stride=2", "dense", "ok", "failed", "page"),
    *("\x1b[31mred\x1b[0m", "[red]x[/]", "[/]", "<script>alert(1)</script>", "a|b\nc", "\ud800", "\0", "../../up", "=1+1"),
    *([], {}, [[]], [1, 2], [1.0] * 6, {"a": 1}, {"": {}}, [None], ["x"], [[1.0, 2.0], [3.0]], *RAW),
)


class Source:
    """Reads choices from bytes; when they end every choice is the first."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def below(self, count: int) -> int:
        """Return a number from 0 to count - 1."""
        size = 1 if count <= 256 else 2
        taken = self._data[self._at : self._at + size]
        self._at += size
        return int.from_bytes(taken, "little") % count

    def pick(self, options):
        """Return one of the options."""
        return options[self.below(len(options))]

    def text(self, most: int = 40) -> str:
        """Return a text, perhaps no UTF-8."""
        size = self.below(most)
        taken = self._data[self._at : self._at + size]
        self._at += size
        return taken.decode("utf-8", "surrogateescape")

    def rest(self) -> bytes:
        """Return what is left."""
        taken, self._at = self._data[self._at :], len(self._data)
        return taken

    def odd(self):
        """Return a value that may stand where another was meant."""
        kind = self.below(8)
        if kind < 5:
            return self.pick(ODD)
        return self.text() if kind == 5 else self.below(70000) if kind == 6 else self.below(65536) / 4096


def edited(value, source: Source):
    """Return `value` with something deep inside it replaced, left out, moved or added; what is not changed is shared."""
    action = source.below(16)
    if isinstance(value, dict) and value and action:
        key = source.pick(list(value))
        if action == 1:
            return {name: item for name, item in value.items() if name != key}
        if action == 2:
            return value | {source.text(): source.odd()}
        if action == 3:
            return value | {key: source.pick(list(value.values()))}
        return value | {key: edited(value[key], source)}
    if isinstance(value, list) and value and action:
        at = source.below(len(value))
        if action == 1:
            return value[:at] + value[at + 1 :]
        if action == 2:
            return [*value[:at], source.odd(), *value[at:]]
        if action == 3:
            return value + [value[at]] * (1 + source.below(30))
        return [*value[:at], edited(value[at], source), *value[at + 1 :]]
    return source.odd()


def edits(value, source: Source, most: int = 5):
    """Return `value` with a few edits, at least none."""
    for _ in range(source.below(most)):
        value = edited(value, source)
    return value


def as_json(value) -> bytes:
    """Return the JSON of an edited document, what Python would not write put in."""
    text = json.dumps(value)
    if '"@' in text:
        for mark, raw in RAW.items():
            text = text.replace(f'"{mark}"', raw)
    return text.encode()
