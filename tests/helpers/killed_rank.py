"""A rank of a split model that is killed while it generates: `python -m tests.helpers.killed_rank FOLDER BACKEND`.

It is started once for each rank, with the variables that torchrun sets. Rank 1 ends; rank 0 writes to FOLDER/0.json what its
`generate` raises, after how many seconds, and what a second one with the same cache says.
"""

import gc
import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path

PROMPT, BEFORE, TOKENS = 300, 6, 40


def main():
    import torch
    import transformers as tf

    import elastickv.transformers as ekv
    from tests.helpers.model_matrix import prompt
    from tests.helpers.ranks import split

    folder, backend, rank = Path(sys.argv[1]), sys.argv[2], int(os.environ["RANK"])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(backend)
    made = split(folder / "model")
    began = [0.0]

    def end_a_rank(ids, scores):
        if ids.shape[1] == PROMPT + BEFORE:
            began[0] = time.monotonic()
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        return scores

    cache = ekv.ElasticCache.for_model(made, 2)

    def error_of(tokens, processors):
        inputs = {name: tensor.to(made.device) for name, tensor in prompt(1, tokens).items()}
        options = {"max_new_tokens": TOKENS, "do_sample": False, "logits_processor": tf.LogitsProcessorList(processors)}
        try:
            made.generate(**inputs, **options, past_key_values=cache)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "none"

    said = {"error": error_of(PROMPT, [end_a_rank]), "seconds": time.monotonic() - began[0]}
    said["again"] = error_of(PROMPT + TOKENS, [])
    (folder / f"{rank}.json").write_text(json.dumps(said))
    gc.collect()
    sys.exit("a rank was lost")


if __name__ == "__main__":
    main()
