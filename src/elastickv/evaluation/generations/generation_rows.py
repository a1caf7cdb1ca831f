"""Long texts of every cache after the same exact prefill, compared with those of full attention."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from elastickv.benchmark.reporter import Reporter
from elastickv.evaluation import sessions
from elastickv.evaluation.generations.continuation_options import ContinuationOptions
from elastickv.evaluation.generations.continuations import continuations
from elastickv.evaluation.generations.divergence import end_tokens
from elastickv.evaluation.generations.text_figures import Texts, text_figures
from elastickv.evaluation.generations.token_choice import TokenChoice, texts_of
from elastickv.evaluation.prefill import Prefill
from elastickv.evaluation.subject import DecodePath, Subject
from elastickv.evaluation.texts import Window

FULL = "full"


def generation_rows(
    subject: Subject,
    windows: Sequence[Window],
    start: Prefill,
    paths: Sequence[DecodePath],
    options: ContinuationOptions,
    progress: Reporter,
) -> Iterator[dict[str, Any]]:
    """Yield what each cache generates, full attention first, as JSON values; nothing if no texts are asked for.

    All texts of all windows are rows of one batch.

    Parameters
    ----------
    start : prefill of the windows.
    """
    if not options.tokens:
        return
    stock = DecodePath(FULL, lambda begun, _: sessions.stock(subject.model, begun), {"compress": None})
    full_greedy: Texts = []
    full_sampled: Texts = []
    for path in [stock, *paths]:
        progress.phase(f"{path.name} generates {options.tokens} tokens after {len(windows)} windows")
        began = time.monotonic()
        greedy, sampled = _texts(subject, windows, start, path, options, progress)
        if path is stock:
            full_greedy, full_sampled = greedy, sampled
        yield {
            "context": len(windows[0].ids),
            "cache": path.name,
            "compress": path.figures["compress"],
            "windows": len(windows),
            "tokens": options.tokens,
            "samples": options.samples,
            "greedy": asdict(text_figures(greedy, full_greedy, options.tokens)),
            "sampled": asdict(text_figures(sampled, full_sampled, options.tokens)) if options.samples else None,
            "seconds": time.monotonic() - began,
        }


def _texts(
    subject: Subject,
    windows: Sequence[Window],
    start: Prefill,
    path: DecodePath,
    options: ContinuationOptions,
    progress: Reporter,
) -> tuple[Texts, Texts]:
    """Return the greedy texts, one a window, and the sampled ones."""
    each, ends = 1 + options.samples, end_tokens(subject.model)
    first = [window.ids[start.tokens] for window in windows for _ in range(each)]
    choose = TokenChoice(options, len(windows), subject.model.device)
    ids = continuations(first, start.repeated(each), path.decoding, options.tokens, progress.progress, choose, ends)
    texts = texts_of(ids, ends)
    of_windows = [texts[number : number + each] for number in range(0, len(texts), each)]
    return [window[:1] for window in of_windows], [window[1:] for window in of_windows]
