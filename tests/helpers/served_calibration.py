"""A calibration of the tiny served model by which its two KV heads read different shares of their pages."""

from elastickv.recipe import ModelCalibration
from tests.helpers.served_llama import Sizes

SHARES = (1.0, 1 / 2, 1 / 4, 1 / 8)
# Errors of one share after the other: of a head that needs none of its pages, and of one that needs half of them. No larger
# share loses less, so that what these leave of a budget goes to nothing else.
LOW_ERRORS, HIGH_ERRORS = (0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.4, 0.9)


def write_calibration(file, model, first=LOW_ERRORS, second=HIGH_ERRORS, smoothing=None):
    """Write a calibration of the model in a folder; return the options of ElasticKV that name it.

    Parameters
    ----------
    first, second : errors of the KV heads at each of `SHARES`; layers after the first have them in the other order.
    smoothing : [layer][KV head][channel], with which keys are rotated; None: they are not.
    """
    from transformers import AutoConfig

    from elastickv.vllm.checkpoint_fingerprint import checkpoint_fingerprint

    sizes = Sizes()
    heads = [(first, second) if layer == 0 else (second, first) for layer in range(sizes.layers)]
    keys = {"int4": ((0.1,) * sizes.kv_heads,) * sizes.layers}
    if smoothing is not None:
        keys["int4+rotated"] = ((0.01,) * sizes.kv_heads,) * sizes.layers
    calibration = ModelCalibration(
        model="random", fingerprint=checkpoint_fingerprint(model, AutoConfig.from_pretrained(model)),
        layers=tuple(range(sizes.layers)), query_heads=sizes.heads, kv_heads=sizes.kv_heads, head_dim=sizes.head_dim,
        text="none", tokens=1, queries=1,
        pages={1: {share: tuple(tuple(head[at] for head in layer) for layer in heads) for at, share in enumerate(SHARES)}},
        keys=keys, values={"int4/64": keys["int4"]}, smoothing=smoothing,
    )  # fmt: skip
    file.write_text(calibration.dumps(), encoding="utf-8")
    return {"calibration": str(file)}
