"""Words whose keys or values cannot be stored, in a model that has them, and what an engine says of them."""

import logging
import math
from contextlib import contextmanager

from tests.helpers.served_llama import Sizes
from tests.helpers.serving_scenarios import random_prompts

NAN, INFINITE, LARGE = 509, 510, 511  # words that random prompts do not have
POSITION = 70
NOT_FINITE, TOO_LARGE = "a NaN or an infinity in keys or values", "a key beyond the range of the page format"
WHY = "its logits are NaN"


def with_bad_words(weights):
    """Return the weights with three bad words: one is NaN, one infinite, and one has huge keys and usual values.

    The last differs from others in one channel, which only the keys of the first layer read. The model chooses none of them by
    itself.
    """
    sizes, made = Sizes(), {name: tensor.clone() for name, tensor in weights.items()}
    embedding = made["model.embed_tokens.weight"]
    embedding[:, -1] = 0
    embedding[NAN], embedding[INFINITE] = math.nan, math.inf
    embedding[LARGE] = 0
    embedding[LARGE, -1] = 1
    made["lm_head.weight"][[NAN, INFINITE, LARGE]] = 0
    for name, tensor in made.items():
        if tensor.dim() == 2 and tensor.shape[1] == sizes.hidden and "embed" not in name:
            tensor[:, -1] = 0
    # The norm before attention makes the channel 16 times its weight.
    made["model.layers.0.self_attn.k_proj.weight"][:, -1] = 1e5
    return made


def with_bad_word(word):
    prompt = random_prompts([100], seed=7)[0]
    return [*prompt[:POSITION], word, *prompt[POSITION + 1 :]]


@contextmanager
def errors():
    """Keep the messages that are logged as errors. vLLM takes other handlers away when an engine starts."""
    messages = []

    class Kept(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    handler, logger = Kept(logging.ERROR), logging.getLogger("vllm.elastickv")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


def named(position, reason=NOT_FINITE):
    return (
        f"ElasticKV: layer model.layers.0.self_attn.attn has {reason} at position {position} of a request, "
        "which ends with an error"
    )


def ends(engine):
    """Step to the end; return the outputs by name."""
    ended = {}
    while engine.engine.has_unfinished_requests():
        ended |= engine.step()
    return ended


def ended_by_error(output):
    """Return the tokens of an output that ended by an error."""
    (part,) = output.outputs
    assert part.finish_reason == "error"
    return part.token_ids
