"""The process of an engine: reads requests as lines of JSON from standard input and answers each with a line.

The first line are the arguments of vLLM's `LLM`. `engine_process` is the other end.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from elastickv.errors import NonFiniteError, UsageError

EXPECTED = (UsageError, NonFiniteError)
"""Errors that reach the other process as they are; of others it gets the first line."""


def main() -> None:
    """Serve until standard input ends."""
    with _replies() as replies:
        try:
            _serve(replies)
        except Exception as error:  # whatever vLLM raises: the other process says it
            first = next(iter(str(error).strip().splitlines()), "")
            kind = next((kind.__name__ for kind in EXPECTED if isinstance(error, kind)), None)
            _send(replies, {"error": first if kind else f"{type(error).__name__}: {first}", "kind": kind})
            if kind is None:
                raise
    os._exit(0)  # an engine that is torn down by the interpreter may hang


@contextmanager
def _replies() -> Iterator[TextIO]:
    """Keep standard output for replies alone: what vLLM writes there goes to standard error."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)
        yield replies


def _serve(replies: TextIO) -> None:
    arguments = json.loads(sys.stdin.readline())
    import numpy as np

    from elastickv.vllm.teacher_forcing.forced_engine import ForcedEngine

    engine = ForcedEngine(arguments)
    _send(replies, {"environment": engine.environment, "recipes": engine.recipes})
    for line in sys.stdin:
        request = json.loads(line)
        logits, tokens = engine.decode(request["prompt"], request["forced"], request["tokens"])
        if request["logits"] is not None:
            np.save(request["logits"], logits.numpy())
        _send(replies, {"tokens": tokens})


def _send(replies: TextIO, value: dict[str, Any]) -> None:
    replies.write(json.dumps(value) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
