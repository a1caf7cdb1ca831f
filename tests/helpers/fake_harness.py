"""The parts of lm-evaluation-harness 0.4.13 that the adapter builds on, for environments without it."""

import sys
from types import ModuleType, SimpleNamespace

REGISTERED = {}


class HFLM:
    """Holds model and tokenizer; generates as `lm_eval.models.huggingface.HFLM` does, without its options."""

    def __init__(self, pretrained, tokenizer, batch_size=1, max_length=None):
        self.model, self.tokenizer = pretrained, tokenizer
        self.batch_size, self._max_length, self.device = batch_size, max_length, pretrained.device
        self.partial = []
        self.cache_hook = SimpleNamespace(add_partial=lambda *values: self.partial.append(values))

    @property
    def max_length(self):
        return self._max_length or self.model.config.max_position_embeddings

    def _model_generate(self, context, max_length, stop, **generation):
        return self.model.generate(input_ids=context, max_length=max_length, pad_token_id=0, use_cache=True, **generation)


def _register_model(*names):
    def decorate(model):
        REGISTERED.update(dict.fromkeys(names, model))
        return model

    return decorate


def install(monkeypatch):
    """Make `import lm_eval` find these parts."""
    modules = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.registry", "lm_eval.models")}
    modules["lm_eval.api.registry"].register_model = _register_model
    modules["lm_eval.models.huggingface"] = ModuleType("lm_eval.models.huggingface")
    modules["lm_eval.models.huggingface"].HFLM = HFLM
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
