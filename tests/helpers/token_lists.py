"""A cache as plain lists of tokens, made of what docs/architecture.md and docs/recipes.md say: no code of a cache is asked."""

import copy
import math

import numpy as np

from elastickv.kvcache.attention import Partial, attend, merge
from elastickv.kvcache.hadamard import rotated_tokens
from elastickv.kvcache.quantize import stored_values
from elastickv.kvcache.rounding import limited, rounded
from elastickv.recipe import PAGE_TOKENS


class TokenLists:
    """Of every row the tokens as they were given, rounded as the window rounds them, each (2, kv_heads, head_dim)."""

    def __init__(self, case, capacity):
        self.case, self.recipe, self.shape, self.capacity = case, case.recipe, case.shape, capacity
        self.rows = [[] for _ in range(case.shape.batch)]
        self.fractions = [self.recipe.fraction(head) for head in range(self.shape.kv_heads)]
        self.restart()
        self.mark()

    def restart(self):
        """Be before the first step: the next decode is an anchor."""
        self.step, self.anchor, self.at_anchor = -1, None, {}

    @property
    def lengths(self):
        return [len(row) for row in self.rows]

    @property
    def steps_since_refresh(self):
        """Steps since the last anchor."""
        step = max(self.step, 0)
        anchors = [n for n in range(step + 1) if n == 0 or (n + self.case.anchor_offset) % self.recipe.anchor_every == 0]
        return step - anchors[-1]

    def cold(self, length):
        """Return how many tokens are cold: whole pages behind the sinks, older than the window."""
        if self.recipe.is_dense:
            return 0
        return max(0, length - self.recipe.sinks - self.recipe.window) // PAGE_TOKENS * PAGE_TOKENS

    def add(self, keys, values, counts):
        """Give row b the first `counts[b]` of (batch, kv_heads, tokens, head_dim)."""
        both = rounded(np.stack(rotated_tokens(keys, values, self.recipe)), self.case.exact)
        for row, count in enumerate(counts):
            self.rows[row] += [both[:, row, :, token] for token in range(count)]

    def parts(self, row, head):
        """Return (cold keys, cold values, exact keys, exact values) as they are read, and the places of the cold ones."""
        (cold_keys, cold_values, *exact), places = self._held(row, head)
        cold = rotated_tokens(cold_keys, cold_values, self.recipe)
        return (*cold, *rotated_tokens(*exact, self.recipe)), places

    def _held(self, row, head):
        """Return what `parts` returns as it is stored, perhaps rotated."""
        recipe, dim, tokens = self.recipe, self.shape.head_dim, self.rows[row]
        cold = self.cold(len(tokens))
        places = list(range(recipe.sinks, recipe.sinks + cold, recipe.stride)) if cold else []
        exact = [place for place in range(len(tokens)) if not 0 <= place - recipe.sinks < cold]

        def of(which, where):
            return np.array([tokens[place][which, head] for place in where], np.float32).reshape(-1, dim)

        if not places:
            empty = np.zeros((0, dim))
            return (empty, empty, *(of(which, exact).astype(float) for which in (0, 1))), places
        keys = stored_values(of(0, places), recipe.key_format, False, dim)
        values = stored_values(of(1, places), recipe.value_format, True, recipe.v_group(dim))
        return (keys, values, *(of(which, exact).astype(float) for which in (0, 1))), places

    def refuses_crop(self, lengths):
        """Whether a crop to `lengths` needs tokens that a stride has dropped."""
        pairs = zip(self.lengths, lengths, strict=True)
        return self.recipe.stride > 1 and any(self.cold(old) > self.cold(new) for old, new in pairs)

    def crop(self, lengths):
        """Keep the first tokens; those that were cold and are no more keep what their codes stand for."""
        for row, length in enumerate(lengths):
            again = range(self.cold(length), self.cold(len(self.rows[row])))
            heads = [self._held(row, head)[0][:2] for head in range(self.shape.kv_heads)]
            for number in again:
                read = np.array([[which[number] for which in head] for head in heads]).swapaxes(0, 1)
                self.rows[row][self.recipe.sinks + number] = limited(read, self.case.exact)
            del self.rows[row][length:]
        self.restart()
        self.marked = None

    def clear(self):
        """Forget all tokens."""
        self.rows, self.marked = [[] for _ in self.rows], None
        self.restart()

    def take(self, rows):
        """Make row i a copy of what row `rows[i]` was."""
        self.rows = [list(self.rows[row]) for row in rows]
        heads = range(self.shape.kv_heads)
        held = {(i, head): self.at_anchor.get((row, head)) for i, row in enumerate(rows) for head in heads}
        self.at_anchor = {place: kept for place, kept in held.items() if kept is not None}
        self.marked = None

    def mark(self):
        self.marked = copy.deepcopy((self.rows, self.step, self.anchor, self.at_anchor))

    def rewind(self):
        self.rows, self.step, self.anchor, self.at_anchor = copy.deepcopy(self.marked)

    def decode(self, queries, pages_read):
        """Return outputs and log-sum-exps in float64; at anchors `pages_read` tells which pages were chosen."""
        shape = self.shape
        outputs = np.zeros((shape.batch, shape.query_heads, shape.head_dim))
        lse = np.zeros((shape.batch, shape.query_heads))
        for row, head in np.ndindex(shape.batch, shape.kv_heads):
            heads = slice(head * shape.group, (head + 1) * shape.group)
            found = self._decode_head(row, head, queries[row, heads], pages_read(row, head))
            outputs[row, heads], lse[row, heads] = found.output, found.lse
        self.anchor = self.step - self.steps_since_refresh
        return outputs, lse

    def _decode_head(self, row, head, queries, pages):
        recipe, steps_since_refresh = self.recipe, self.steps_since_refresh
        (keys, values, *exact), places = self.parts(row, head)
        recent = attend(queries, *exact)
        if recipe.selection == "pages":
            read = self._pages(row, head, len(places) // PAGE_TOKENS, pages)
            tokens = (read[:, None] * PAGE_TOKENS + np.arange(PAGE_TOKENS)).ravel()
            return merge(attend(queries, keys[tokens], values[tokens]), recent)
        if recipe.selection != "reuse":
            mass = math.log(self.cold(len(self.rows[row])) / len(places)) if places else 0.0
            return merge(attend(queries, keys, values).weighted(mass), recent)
        if steps_since_refresh == 0:
            self.at_anchor[row, head] = attend(queries, keys, values)
        before: Partial = self.at_anchor[row, head]
        fresh = slice(self.cold(len(self.rows[row]) - steps_since_refresh), None)
        return merge(
            before.weighted(steps_since_refresh * math.log(recipe.decay)), attend(queries, keys[fresh], values[fresh]), recent
        )

    def _pages(self, row, head, there, chosen):
        """Return the pages that are to be read: at an anchor as many as the share says, later the same and those since."""
        if self.steps_since_refresh == 0:
            count = min(there, max(1, int(self.fractions[head] * there)))
            assert len(chosen) == count and (np.diff(chosen) > 0).all() and all(0 <= page < there for page in chosen)
            self.at_anchor[row, head] = (chosen, there)
        listed, known = self.at_anchor[row, head]
        np.testing.assert_array_equal(chosen, np.r_[listed, np.arange(known, there)])
        return np.asarray(chosen, np.int64)
