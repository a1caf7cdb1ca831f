"""Progress within a forward pass: a pass over a long prompt takes minutes on a CPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Progress = Callable[[int, int], None]


@contextmanager
def layer_progress(model: Any, progress: Progress | None, passes: int = 1) -> Iterator[None]:
    """Call `progress` with (layers done, layers of all passes) after each decoder layer; removes its hooks on exit.

    Nothing is reported of layers beyond `passes`, of a model whose layers are not found, or on another device than the CPU,
    where a pass is short and hooks would end up in captured graphs.
    """
    layers = _decoder_layers(model)
    if progress is None or layers is None or model.device.type != "cpu":
        yield
        return
    done, total = 0, passes * len(layers)

    def count(*_: Any) -> None:
        nonlocal done
        done += 1
        if done <= total:
            progress(done, total)

    hooks = [layer.register_forward_hook(count) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _decoder_layers(model: Any) -> Any:
    """Return the list of a model's decoder layers, None if there is none of their number."""
    number = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = (module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    return next((layers for layers in lists if len(layers) == number), None)
