"""Results whose texts are anything that a file can hold."""

import re

# What no page, table or terminal may get: control characters, halves of characters, and what XML has no form for.
NOT_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
# By these a reader knows what a file is, or which numbers belong together.
_STRUCTURE = {"benchmark_type", "schema_version", "kind", "status", "pairing"}
# Tables whose keys are names of contenders.
_NAMED = {"samples", "flagged_samples", "candidates_ms", "not_run", "kernel_error"}
# Names of contenders and caches that the readers look for.
_ROLES = {"elastic", "baseline", "dense"}
_AWKWARD = (
    "", "\\1\\g<0>\\x", "&amp;<b>\"'", "\x00\x0b\x1b[31m", "\ud800", "\ufffe\uffff", "x" * 10_000, "\u202eabc\u05d0",
    "|`\n\r\t", "]]>-->", "<!--", "$x^2$ \\frac", "=1+1", "\u2028\u2029\x85", "_a", "{0} {{ x }} %s",
    "url(#a) id=\"b\" href=\"#c", "![a](b) **c** <d>", "# e", "\U0001f600\u0301" * 40,
)  # fmt: skip


def any_text(random):
    """Return any text: an awkward one, or up to 20 characters of all of Unicode, or both."""
    some = "".join(chr(random.randrange(random.choice((0x80, 0x3000, 0x110000)))) for _ in range(random.randrange(20)))
    return random.choice((random.choice(_AWKWARD), some, some + random.choice(_AWKWARD)))


def hostile(value, text):
    """Return a result with a text before every text in it, and before the names of contenders; equal ones stay equal."""
    changed = {one: text() + one for one in dict.fromkeys(_texts_of(value)) if one not in _ROLES}

    def of(value, key=""):
        if isinstance(value, dict):
            names = changed if key in _NAMED else {}
            return {names.get(name, name): of(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [of(item, key) for item in value]
        return changed.get(value, value) if isinstance(value, str) and key not in _STRUCTURE else value

    return of(value)


def _texts_of(value):
    if isinstance(value, dict):
        for key, item in value.items():
            yield from () if key in _STRUCTURE else _texts_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts_of(item)
    elif isinstance(value, str):
        yield value
