"""What an evaluation reads: windows of texts, and prompts that hide pass keys."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from elastickv.errors import UsageError
from elastickv.evaluation.evaluation_options import EvaluationOptions
from elastickv.evaluation.needle import Case, cases
from elastickv.evaluation.texts import Text, Window, windows
from elastickv.transformers.tokenization import text_prefix


@dataclass(frozen=True)
class EvaluationInputs:
    """Windows and prompts.

    Attributes
    ----------
    windows : context -> windows of so many tokens.
    pass_keys : for each length the prompts with a key at each depth.
    haystacks : number of the first texts that hide pass keys.
    """

    windows: dict[int, list[Window]]
    pass_keys: list[list[Case]]
    haystacks: int

    @classmethod
    def of(cls, texts: Sequence[Text], tokenizer: Any, options: EvaluationOptions) -> "EvaluationInputs":
        """Return the inputs that options ask for.

        Raises
        ------
        UsageError : if the options ask for nothing, or a text is too short.
        """
        if not (options.ratios or options.formats or options.stored_bits):
            raise UsageError("nothing is measured: give values of C in `compress`, or `formats`, or `stored_bits`")
        if not (options.contexts or options.needle_lengths or options.tasks or options.datasets):
            raise UsageError("nothing is measured: give `context`, `needle`, `tasks` or `dataset`")
        if options.tolerance is not None and not options.contexts:
            raise UsageError("`tolerance` is of windows, and there are none: give their tokens in `context`")
        if options.generation.tokens and not options.contexts:
            raise UsageError("`generate` continues windows, and there are none: give their tokens in `context`")
        haystacks = options.needle_texts if options.needle_lengths else 0
        return cls(
            {context: _windows(texts, tokenizer, options, context) for context in options.contexts},
            [
                [
                    case
                    for seed, text in enumerate(texts[:haystacks])
                    for case in cases(tokenizer, text.content, length, _depths(options.needle_depths), seed)
                ]
                for length in options.needle_lengths
            ],
            haystacks,
        )


def _windows(texts: Sequence[Text], tokenizer: Any, options: EvaluationOptions, context: int) -> list[Window]:
    if context <= options.scored + max(1, len(text_prefix(tokenizer))):
        raise UsageError(f"`context`={context} leaves nothing before the {options.scored} scored tokens: give a longer one")
    return windows(texts, tokenizer, context, options.window_count)


def _depths(count: int) -> list[float]:
    return [i / max(1, count - 1) for i in range(count)]
