"""What a result says of its windows: how they begin, how much context they have, and which tokens of a text are scored."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from elastickv.evaluation.texts import Text, Window
from elastickv.transformers.tokenization import text_prefix, text_tokens


def window_records(
    texts: Sequence[Text], tokenizer: Any, windows: Mapping[int, Sequence[Window]], scored: int, haystacks: int
) -> dict[str, Any]:
    """Return the parts of a result that describe its windows, as JSON values.

    Parameters
    ----------
    windows : context -> windows that were cut from the texts.
    scored : number of the last tokens of each window that are scored.
    haystacks : number of the first texts that hide pass keys.
    """
    prefix, cut = list(text_prefix(tokenizer)), [window for of_context in windows.values() for window in of_context]
    counts = Counter(window.number for window in cut)
    return {
        "texts": [text.name for number, text in enumerate(texts) if number in counts or number < haystacks],
        "prefix": {"ids": prefix, "text": tokenizer.decode(prefix) if prefix else ""},
        "scored_texts": [
            {
                "name": texts[number].name,
                "tokens": len(text_tokens(tokenizer, texts[number].content)),
                "windows": counts[number],
                "scored_tokens": counts[number] * scored,
            }
            for number in sorted(counts)
        ],
        "windows": [_record(window, scored) for window in cut],
    }


def _record(window: Window, scored: int) -> dict[str, Any]:
    return {
        "text": window.text,
        "context": len(window.ids),
        "first": window.first,
        "prefix_tokens": window.prefix,
        "context_tokens": len(window.ids) - scored,
        "scored_first": window.end - scored,
        "scored_end": window.end,
    }


def unscored(texts: Sequence[Text], count: int, haystacks: int) -> list[str]:
    """Return a line for each text that gets none of `count` windows and hides no pass key."""
    left = texts[max(count, haystacks) :]
    return [f"text {text.name}: not scored, as there are fewer windows ({count}) than texts" for text in left]
