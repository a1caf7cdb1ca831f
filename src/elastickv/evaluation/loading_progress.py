"""Pass on what the progress bars of Transformers, the hub and the GGUF reader count while a model is loaded."""

from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib import import_module
from io import StringIO
from typing import Any

from elastickv.evaluation.layer_progress import Progress


@contextmanager
def loading_progress(progress: Progress) -> Iterator[None]:
    """Call `progress` with (done, total) of what is loaded at present, tensors or bytes, and show none of the loader's bars.

    All of them draw by `tqdm.display`; the switch by which Transformers turns off some is without effect meanwhile.
    """
    class_: Any = import_module("tqdm.std").tqdm
    switches: Any = import_module("transformers.utils.logging")
    shown: Any = None

    def count(bar: Any, *_: Any, **__: Any) -> None:
        nonlocal shown
        # Several files may be downloaded at once: one of them is shown to its end.
        if bar.total and (shown is None or shown is bar or shown.n >= shown.total):
            shown = bar
            progress(int(bar.n), int(bar.total))

    display, class_.display = class_.display, count
    disable, switches.disable_progress_bar = switches.disable_progress_bar, lambda: None
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        class_.display, switches.disable_progress_bar = display, disable
