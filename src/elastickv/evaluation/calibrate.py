"""Calibration: run exact attention over a text and measure every layer's errors from its inputs."""

from collections.abc import Callable, Sequence

import torch

from elastickv.errors import UsageError
from elastickv.evaluation.attention_inputs import observed
from elastickv.evaluation.evaluation_options import CALIBRATION_TOKENS
from elastickv.evaluation.layer_errors import LayerErrors, LayerInputs, hessians, key_smoothing, layer_errors
from elastickv.evaluation.layer_progress import Progress
from elastickv.evaluation.sensitivity.layer_sensitivity import FRACTION, PAGES, RoundedLayer, layer_losses
from elastickv.evaluation.texts import Text, windows
from elastickv.kvcache.gptq import hessian_text
from elastickv.recipe.calibration import (
    FRACTIONS,
    SENSITIVITY_FORMATS,
    HeadErrors,
    HessianTexts,
    ModelCalibration,
    Smoothing,
    sensitivity_errors,
)
from elastickv.recipe.recipe import DEFAULT_SINKS, DEFAULT_WINDOW
from elastickv.recipe.regions import PAGE_TOKENS
from elastickv.transformers.model_loading import Loaded, fingerprint
from elastickv.transformers.model_support import sizes_of
from elastickv.transformers.tokenization import text_prefix, text_tokens

SCHEDULES = (1, 2, 4, 8, 16)
WINDOW_TOKENS = 4096
RUN = 64
RUNS = 4
LEAST_TOKENS = 2 * (DEFAULT_SINKS + DEFAULT_WINDOW + 8 * PAGE_TOKENS)
DEFAULT_TOKENS = CALIBRATION_TOKENS


def calibrate(loaded: Loaded, text: Text, tokens: int = DEFAULT_TOKENS, progress: Progress | None = None) -> ModelCalibration:
    """Measure the error of every KV head of a model at each fraction of its pages and in each format.

    The text is read in windows of up to 4096 tokens (or the model's own limit, if lower); 256 positions of the second
    half of each are scored. The sensitivities of the layers are measured on the same windows, of float32 models: rounding to 16
    bits changes the predictions more than a single layer in 4 bits.

    Parameters
    ----------
    tokens : number of tokens of the text, from its beginning.
    progress : called with (layers measured, layers of all windows).

    Raises
    ------
    UsageError : if there are too few tokens, or the model has no layer that can be measured.
    """
    config = loaded.model.config.get_text_config(decoder=True)
    width = min(WINDOW_TOKENS, tokens, getattr(config, "max_position_embeddings", None) or WINDOW_TOKENS)
    if width < LEAST_TOKENS:
        raise UsageError(f"`tokens`={tokens}: windows of {width} tokens are too short; {LEAST_TOKENS} are needed")
    prefix = text_prefix(loaded.tokenizer)
    own = width - len(prefix)
    available = len(text_tokens(loaded.tokenizer, text.content))
    if available < own:
        raise UsageError(f"text {text.name} has {available} tokens and {own} are needed: give a longer one or fewer `tokens`")
    rows = windows([text], loaded.tokenizer, width, max(1, min(tokens // width, available // own)))
    positions = _positions(width)
    measured: dict[int, list[LayerErrors]] = {}
    smooth: dict[int, Smoothing] = {}
    costs: dict[int, list[torch.Tensor]] = {}  # of keys, summed over windows; of values
    elastic = sizes_of(loaded.model).elastic
    sensitive = loaded.model.dtype == torch.float32
    total = len(rows) * len(elastic) * (2 if sensitive else 1)
    heads: tuple[int, int, int] | None = None

    def measure(layer: int, inputs: LayerInputs) -> None:
        nonlocal heads
        sizes = (len(inputs.queries), len(inputs.keys), inputs.keys.shape[-1])
        if heads not in (None, sizes):
            raise UsageError(f"layers of {loaded.name} differ in their heads ({heads} and {sizes}): it cannot be calibrated")
        heads = sizes
        if layer not in smooth:  # the first window decides
            smooth[layer] = key_smoothing(inputs)
        of_keys, of_values = hessians(inputs)
        costs[layer] = [costs[layer][0] + of_keys if layer in costs else of_keys, of_values]
        measured.setdefault(layer, []).append(layer_errors(inputs, FRACTIONS, SCHEDULES, RUN, smooth[layer], costs[layer]))
        if progress is not None:
            progress(sum(map(len, measured.values())), total)

    with torch.inference_mode(), observed(loaded.model, positions, measure):
        for row in rows:
            ids = torch.tensor([row.ids], device=loaded.model.device)
            loaded.model(input_ids=ids, use_cache=False, logits_to_keep=1)
    if heads is None:
        raise UsageError(f"model {loaded.name} has no layer with attention over the whole context: nothing to calibrate")
    layers = tuple(sorted(measured))
    sample = measured[layers[0]][0]

    def texts(number: int) -> tuple[HessianTexts, ...]:
        return tuple(tuple(map(hessian_text, costs[layer][number].double().cpu().numpy())) for layer in layers)

    def mean(pick: Callable[[LayerErrors], Sequence[float]]) -> HeadErrors:
        return tuple(
            tuple(_rounded(sum(column) / len(column)) for column in zip(*map(pick, measured[layer]), strict=True))
            for layer in layers
        )

    keys = {name: mean(lambda e, name=name: e.keys[name]) for name in sample.keys}  # type: ignore[misc]
    values = {name: mean(lambda e, name=name: e.values[name]) for name in sample.values}  # type: ignore[misc]
    sensitivity = None
    if sensitive:
        report = None if progress is None else (lambda done, of: progress(total - of + done, total))
        storage = {layer: RoundedLayer(smooth[layer], costs[layer]) for layer in layers}
        losses = layer_losses(loaded.model, [row.ids for row in rows], storage, report)
        tables, head_dim = {"keys": keys, "values": values}, heads[2]
        errors = {name: tables[name.partition("/")[0]][sensitivity_errors(name, head_dim)] for name in SENSITIVITY_FORMATS}
        errors[PAGES] = mean(lambda measured_errors: measured_errors.pages[1][FRACTION])
        sensitivity = {changed: _per_error(losses[changed], errors[changed]) for changed in losses}

    return ModelCalibration(
        model=loaded.name,
        fingerprint=fingerprint(loaded.model),
        layers=layers,
        query_heads=heads[0],
        kv_heads=heads[1],
        head_dim=heads[2],
        text=text.name,
        tokens=width * len(rows),
        queries=len(positions) * len(rows),
        pages={r: {f: mean(lambda e, r=r, f=f: e.pages[r][f]) for f in FRACTIONS} for r in SCHEDULES},  # type: ignore[misc]
        keys=keys,
        values=values,
        prefix=prefix,
        smoothing=tuple(smooth[layer] for layer in layers),
        sensitivity=sensitivity,
        hessians={"keys": texts(0), "values": texts(1)},
    )


def _per_error(losses: Sequence[float], errors: HeadErrors) -> tuple[float, ...]:
    """Return each layer's loss for a unit of its error, all heads together; 0 where there is no error."""
    sums = map(sum, errors)
    return tuple(_rounded(loss / error) if error > 0 else 0.0 for loss, error in zip(losses, sums, strict=True))


def _rounded(error: float) -> float:
    """Return an error rounded to six digits, to keep the file short."""
    return float(f"{error:.6g}")


def _positions(width: int) -> list[int]:
    """Return runs of consecutive positions that end evenly spaced in the second half of a window."""
    run = min(RUN, width // (2 * RUNS))
    ends = [width - (RUNS - 1 - i) * (width // (2 * RUNS)) for i in range(RUNS)]
    return [position for end in ends for position in range(end - run, end)]
