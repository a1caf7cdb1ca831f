"""Text from token ids as they arrive: the pieces together equal the decode of all ids at once."""

import re
from typing import Any

_REPLACEMENT = "\ufffd"
_MOST_REPLACEMENTS = 4  # of one character whose bytes are not all there yet
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
_CONTEXT_TOKENS, _MOST_TOKENS = 16, 64
# What `PreTrainedTokenizerBase.clean_up_tokenization` replaces, in its order; each pattern loses its spaces.
_CLEANED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


class IncrementalDetokenizer:
    """Decodes one token at a time, and returns text as soon as no later token can change it.

    A token is decoded together with up to 64 before it, because what it adds depends on its neighbors: a decoder strips the
    first space of a text, joins bytes to characters, and puts spaces between words. Text is held back while its last character
    is incomplete, while a run of byte tokens goes on (one invalid byte changes how the whole run is decoded), and while
    clean-up of spaces may still rewrite it.

    Parameters
    ----------
    tokenizer : a Transformers tokenizer, or anything with its `decode`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._skipped = _skipped_ids(tokenizer)
        self._clean_up = _SpaceCleanUp() if _cleans_up(tokenizer) else None
        # The tokens that are decoded together, and how much of their text has been returned.
        self._recent: list[int] = []
        self._returned = 0

    def add(self, token: int) -> str:
        """Return the text that is settled by the next token."""
        self._ids.append(token)
        if token in self._skipped:
            return ""
        self._recent.append(token)
        if self._is_byte(token):
            return ""
        decoded = self._decode(self._recent)
        complete = len(decoded.rstrip(_REPLACEMENT))
        settled = max(complete, len(decoded) - _MOST_REPLACEMENTS)
        added = decoded[self._returned : settled]
        self._returned = max(self._returned, settled)
        if len(self._recent) > _MOST_TOKENS:
            self._forget_oldest(decoded)
        return added if self._clean_up is None else self._clean_up.add(added)

    def end(self) -> str:
        """Return the rest of the text."""
        rest = self._decode(self._recent)[self._returned :]
        return rest if self._clean_up is None else self._clean_up.add(rest) + self._clean_up.end()

    def whole(self) -> str:
        """Return the decode of all ids at once."""
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def _decode(self, ids: list[int]) -> str:
        # Only where it cleans up: not every tokenizer takes the argument.
        options = {} if self._clean_up is None else {"clean_up_tokenization_spaces": False}
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, **options))

    def _is_byte(self, token: int) -> bool:
        named = getattr(self._tokenizer, "convert_ids_to_tokens", None)
        name = None if named is None else named(token)
        return isinstance(name, str) and _BYTE_TOKEN.fullmatch(name) is not None

    def _forget_oldest(self, decoded: str) -> None:
        """Keep the last tokens only, if their text has the same end: what is not returned yet and a character before it."""
        recent = self._recent[-_CONTEXT_TOKENS:]
        shorter = self._decode(recent)
        end = len(decoded) - self._returned + 1
        if len(shorter) >= end and shorter[-end:] == decoded[-end:]:
            self._recent, self._returned = recent, len(shorter) - end + 1


class _SpaceCleanUp:
    """Applies Transformers' clean-up of spaces piece by piece."""

    def __init__(self) -> None:
        self._held = ""

    def add(self, text: str) -> str:
        """Return what is clean whatever follows."""
        self._held += text
        for cut in range(len(self._held), 0, -1):
            if self._held[cut - 1] == " ":
                continue  # every pattern begins with one
            clean, settled = _cleaned(self._held[:cut])
            if settled:
                self._held = self._held[cut:]
                return clean
        return ""

    def end(self) -> str:
        """Return the rest."""
        clean, _ = _cleaned(self._held)
        self._held = ""
        return clean


def _cleaned(text: str) -> tuple[str, bool]:
    """Return a text cleaned up, and whether what follows it can be cleaned on its own: no pattern can begin in the text."""
    settled = True
    for pattern in _CLEANED:
        tail = text[text.rfind(" ") :] if " " in text else ""
        settled = settled and not (tail and len(tail) < len(pattern) and pattern.startswith(tail))
        text = text.replace(pattern, pattern.strip(" "))
    return text, settled


def _skipped_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids that `skip_special_tokens` skips."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    special = {int(number) for number, token in added.items() if getattr(token, "special", False)}
    return frozenset(special | set(getattr(tokenizer, "all_special_ids", None) or ()))


def _cleans_up(tokenizer: Any) -> bool:
    """Whether the tokenizer's `decode` cleans spaces up, which it does for BPE only if forced."""
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    backend = getattr(tokenizer, "backend_tokenizer", None)
    forced = getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    return backend is None or type(backend.model).__name__ != "BPE" or bool(forced)
