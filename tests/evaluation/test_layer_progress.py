"""A pass over a long prompt says how many layers it has run."""

import torch

from elastickv.evaluation.calibrate import LEAST_TOKENS, calibrate
from elastickv.evaluation.layer_progress import layer_progress
from elastickv.evaluation.prefill import prefill
from elastickv.evaluation.texts import Text
from tests.helpers.tiny_models import TEXT, tiny_llama


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def test_every_layer_of_every_row_is_reported():
    model, seen = tiny_llama(layers=3).model, []
    prefill(model, [range(8), range(8)], 8, 1, lambda *step: seen.append(step))
    assert seen == [(layer, 6) for layer in range(1, 7)] and hooks(model) == 0


def test_passes_beyond_those_that_were_announced_are_not_reported():
    model, seen = tiny_llama().model, []
    with torch.inference_mode(), layer_progress(model, lambda *step: seen.append(step)):
        for _ in range(3):
            model(input_ids=torch.arange(4)[None])
    assert seen == [(1, 2), (2, 2)] and hooks(model) == 0


def test_a_model_without_a_list_of_layers_is_run_without_a_word():
    model = tiny_llama().model
    model.config.num_hidden_layers = 7
    with torch.inference_mode(), layer_progress(model, lambda *_: 1 / 0):
        model.model.embed_tokens(torch.arange(4)[None])
    assert hooks(model) == 0


def test_calibration_reports_layers_and_not_only_windows():
    seen = []
    calibrate(tiny_llama(), Text("letters", TEXT), 2 * LEAST_TOKENS, lambda *step: seen.append(step))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
