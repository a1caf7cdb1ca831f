"""Texts to tokens, the same way for every command: what a model reads begins as its tokenizer begins a text.

Models that were trained with a beginning-of-sequence token predict badly without it. Tokens that tokenizers put at the end of
a text are left out, since windows and prompts continue.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from elastickv.errors import UsageError

Encode = Callable[[str, bool], Sequence[int]]
"""(text, whether special tokens are added) -> token ids."""

_PROBE = "One text, 2 lines"


def special_prefix(encode: Encode) -> tuple[int, ...]:
    """Return the special tokens that a tokenizer puts before a text: () for many, one token for most others.

    They are what precedes a text's own tokens when special tokens are added, so that settings such as `add_bos_token` count.
    """
    with_special, own = list(encode(_PROBE, True)), list(encode(_PROBE, False))
    starts = range(len(with_special) - len(own) + 1)
    first = next((i for i in starts if with_special[i : i + len(own)] == own), 0)
    return tuple(with_special[:first])


def text_prefix(tokenizer: Any) -> tuple[int, ...]:
    """Return the special tokens that a tokenizer of Transformers puts before a text; see `special_prefix`."""
    return special_prefix(lambda text, special: _ids(tokenizer, text, special))


def text_tokens(tokenizer: Any, text: str) -> list[int]:
    """Return a text's own tokens, without those that its tokenizer puts before or after a text.

    A text that spells the special tokens at its beginning, as chat templates do, loses them: they are in `text_prefix`.
    """
    return without_prefix(text_prefix(tokenizer), _ids(tokenizer, text, False))


def prompt_tokens(tokenizer: Any, text: str) -> list[int]:
    """Return a text's tokens as a model reads them: `text_prefix` once, then the text's own."""
    return [*text_prefix(tokenizer), *text_tokens(tokenizer, text)]


def without_prefix(prefix: Sequence[int], ids: Sequence[int]) -> list[int]:
    """Return tokens without the special tokens at their beginning, where the text itself spells these."""
    spelled = bool(prefix) and list(ids[: len(prefix)]) == list(prefix)
    return list(ids[len(prefix) :] if spelled else ids)


def filled_prompts(prefix: Sequence[int], ids: Sequence[int], width: int, rows: int = 1) -> list[list[int]]:
    """Return prompts of exactly `width` tokens: the prefix, then consecutive pieces of a text, which is repeated as needed.

    Raises
    ------
    UsageError : if the prefix leaves no room for text, or the text has no tokens.
    """
    own = width - len(prefix)
    if own < 1:
        raise UsageError(f"`context`={width} leaves no room for text: the tokenizer begins with {len(prefix)} special tokens")
    if not ids:
        raise UsageError("the text has no tokens: give a longer one")
    text = list(ids) * -(-own * rows // len(ids))
    return [[*prefix, *text[row * own : (row + 1) * own]] for row in range(rows)]


def tokens_hash(rows: Sequence[Sequence[int]]) -> str:
    """Return 12 hex digits that are equal for equal prompts: results of different programs show that they read the same."""
    return hashlib.sha256(";".join(",".join(map(str, row)) for row in rows).encode()).hexdigest()[:12]


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False).input_ids)
