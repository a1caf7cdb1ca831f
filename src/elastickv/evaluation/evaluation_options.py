"""The options of an evaluation and of a calibration, in a module that needs no PyTorch: the command line shows them."""

from dataclasses import dataclass, field

from elastickv.evaluation.exact_tokens import ExactTokens
from elastickv.evaluation.generations.continuation_options import ContinuationOptions
from elastickv.evaluation.suggestion import Tolerance

CALIBRATION_TOKENS = 16384
REFERENCE = "reference:"  # before a recipe: its formats in PyTorch, without kernels
PARTS_METHOD = "our pages in 16 bit"  # the selection of a recipe alone: a reference, which no cache offers


@dataclass(frozen=True)
class EvaluationOptions:
    """What to evaluate.

    Attributes
    ----------
    ratios : values of C.
    contexts : tokens of a window; its last `scored` are scored; empty for no windows.
    window_count : windows of each context, spread over the texts.
    scored : tokens of each window that are scored.
    needle_lengths : tokens of the prompts that hide a pass key; empty to skip retrieval.
    needle_depths : depths at each length, evenly from the beginning to the end.
    needle_texts : number of texts that serve as haystacks, each with one prompt per depth.
    greedy_tokens : tokens decoded greedily after each window's prefill; 0 to skip.
    generation : long texts after each window's prefill.
    reference : whether Transformers' quantized cache is measured too.
    formats : KV formats to measure: names of published ones, recipes, or recipes behind `reference:`.
    exact_tokens : sinks and window of all these formats; None for each format's own.
    stored_bits : budgets of stored bits an element, within which a calibration chooses formats by layer.
    selections : names of published selections to measure at each ratio above 1.
    parts : ratios whose recipes are measured in parts too: formats alone, selection alone.
    tasks : names of tasks to measure.
    task_lengths : tokens of a task's prompt and answer together.
    task_items : items of each task and length.
    task_batch : items that are decoded together.
    datasets : paths of files of questions.
    tolerance : loss within which a ratio is suggested; None for no suggestion.
    """

    ratios: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    contexts: tuple[int, ...] = (2048, 4096)
    window_count: int = 8
    scored: int = 96
    needle_lengths: tuple[int, ...] = (1024, 3500)
    needle_depths: int = 5
    needle_texts: int = 1
    greedy_tokens: int = 16
    generation: ContinuationOptions = field(default_factory=ContinuationOptions)
    reference: bool = False
    formats: tuple[str, ...] = ()
    exact_tokens: ExactTokens | None = None
    stored_bits: tuple[float, ...] = ()
    selections: tuple[str, ...] = ()
    parts: tuple[float, ...] = ()
    tasks: tuple[str, ...] = ()
    task_lengths: tuple[int, ...] = (4096,)
    task_items: int = 20
    task_batch: int = 8
    datasets: tuple[str, ...] = ()
    tolerance: Tolerance | None = None
