"""An engine of vLLM in a process of its own, which ends with the block that started it: its memory is free for the next one."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from elastickv.errors import UsageError
from elastickv.vllm.teacher_forcing.engine_worker import EXPECTED

_SOURCE = str(Path(__file__).parents[3])
_WORKER = "elastickv.vllm.teacher_forcing.engine_worker"
# One process is the whole engine, so that the model's logits are within reach; it says nothing to anybody else, and imports
# nothing from the folder that it is started in.
_VARIABLES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "PYTHONSAFEPATH": "1",
}
LOG_VARIABLE = "ELASTICKV_ENGINE_LOG"
"""Variable of the environment: a file to which the logs of engines are appended."""
_WAIT_S = 10
_RANKS_ERROR = re.compile(r"\(Worker\S* pid=\d+\) ERROR [^\]]*\] (?:\w+\.)*(\w+(?:Error|Exception)): (.+)")


@dataclass(frozen=True)
class EngineProcess:
    """A running engine, which decodes one request after the other; `running_engine` starts it.

    Attributes
    ----------
    environment : what runs, as `engine_environment` returns it.
    recipes : the recipe of each layer that ElasticKV serves, as text, by its number; None with a stock backend.
    """

    environment: dict[str, Any]
    recipes: dict[int, str] | None
    _process: "subprocess.Popen[str]"
    _log: IO[str]
    _folder: Path

    def logits(self, prompt: Sequence[int], forced: Sequence[int]) -> NDArray[np.float32]:
        """Return the (len(forced), vocabulary) logits after each of the tokens that are generated after a prompt.

        Raises
        ------
        UsageError : if the engine fails.
        NonFiniteError : if a logit is NaN.
        """
        path = self._folder / "logits.npy"
        self._ask({"prompt": [*prompt], "forced": [*forced], "tokens": 1, "logits": str(path)})
        try:
            logits: NDArray[np.float32] = np.load(path)
        finally:
            path.unlink(missing_ok=True)
        return logits

    def greedy(self, prompt: Sequence[int], forced: Sequence[int], tokens: int) -> list[int]:
        """Return `tokens` tokens that are generated greedily after a prompt and the given tokens; none ends the text.

        Raises
        ------
        UsageError, NonFiniteError : as `logits`.
        """
        reply = self._ask({"prompt": [*prompt], "forced": [*forced], "tokens": tokens, "logits": None})
        return [int(token) for token in reply["tokens"]]

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        return _exchange(self._process, self._log, request)


@contextmanager
def running_engine(arguments: Mapping[str, Any], variables: Mapping[str, str] | None = None) -> Iterator[EngineProcess]:
    """Start an engine, and end its process, whatever happens.

    Parameters
    ----------
    arguments : of vLLM's `LLM`, as JSON values; see `ForcedEngine`.
    variables : of the process's environment, where the user has set none of that name.

    Raises
    ------
    UsageError : if vLLM does not start, with the reason.
    OSError : if the file that `LOG_VARIABLE` names cannot be written.
    """
    paths = [_SOURCE, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**(variables or {}), **os.environ, **_VARIABLES, "PYTHONPATH": os.pathsep.join(paths)}
    with (
        tempfile.TemporaryDirectory(prefix="elastickv-") as folder,
        _log_file(folder).open("a+", errors="replace") as log,
    ):
        process = subprocess.Popen(
            [sys.executable, "-m", _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            encoding="utf-8",
            env=environment,
            start_new_session=True,  # a Ctrl-C is for this process, which ends the other
        )
        assert process.stdin is not None
        try:
            ready = _exchange(process, log, dict(arguments))
            recipes = ready["recipes"]
            numbered = None if recipes is None else {int(layer): text for layer, text in recipes.items()}
            yield EngineProcess(ready["environment"], numbered, process, log, Path(folder))
            process.stdin.close()  # the process ends by itself
            with suppress(subprocess.TimeoutExpired):
                process.wait(_WAIT_S)
        finally:
            _kill(process)


def _log_file(folder: str) -> Path:
    return Path(os.environ.get(LOG_VARIABLE) or Path(folder) / "log")


def _exchange(process: "subprocess.Popen[str]", log: IO[str], value: dict[str, Any]) -> dict[str, Any]:
    """Send a line and return the reply to it."""
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):  # the end of its replies says why
        process.stdin.write(json.dumps(value) + "\n")
        process.stdin.flush()
    line = process.stdout.readline()
    if not line.endswith("\n"):
        raise UsageError(f"vLLM ended with status {process.wait()}: {_last_line(log)}")
    reply: dict[str, Any] = json.loads(line)
    if "error" in reply:
        kind, text = reply["kind"], reply["error"]
        if kind is None and "background process" in text:  # which is all that vLLM says of an error while one loads the model
            kind, text = _error_of_rank(log) or (None, text)
        expected = {error.__name__: error for error in EXPECTED}
        if kind in expected:
            raise expected[kind](text)
        raise UsageError(f"vLLM does not run this model with these options: {f'{kind}: ' if kind else ''}{text}")
    return reply


def _error_of_rank(log: IO[str]) -> tuple[str, str] | None:
    """Return the class and the text of the first error that a process of the model logged, or None."""
    log.flush()
    log.seek(0)
    return next(((match[1], match[2]) for line in log if (match := _RANKS_ERROR.match(line))), None)


def _last_line(log: IO[str]) -> str:
    log.flush()
    log.seek(0)
    lines = [line.strip() for line in log if line.strip()]
    return lines[-1] if lines else "it said nothing"


def _kill(process: "subprocess.Popen[str]") -> None:
    """Kill a process and what it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(BrokenPipeError):  # of a line that was not read
        process.__exit__(None, None, None)  # closes the pipes, and waits
