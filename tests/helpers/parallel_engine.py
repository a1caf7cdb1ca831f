"""An engine split over processes: `python -m tests.helpers.parallel_engine FOLDER RANKS` prints its answers as JSON."""

import json
import os
import sys


def main():
    os.environ.update(
        VLLM_NO_USAGE_STATS="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind", HF_HUB_OFFLINE="1"
    )
    from vllm import LLM, SamplingParams

    from tests.helpers.serving_scenarios import LENGTHS, RECIPE, WINDOW, random_prompts

    options = {"elastickv": {"format": RECIPE, "window": WINDOW}}
    llm = LLM(
        model=sys.argv[1],
        tensor_parallel_size=int(sys.argv[2]),
        additional_config=options,
        dtype="float32",
        block_size=32,
        max_model_len=1024,
        max_num_seqs=4,
        skip_tokenizer_init=True,
        enforce_eager=True,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in random_prompts(LENGTHS)]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    print("ANSWERS" + json.dumps([list(output.outputs[0].token_ids) for output in outputs]), flush=True)


if __name__ == "__main__":
    main()
