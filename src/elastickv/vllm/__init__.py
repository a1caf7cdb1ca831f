"""ElasticKV as an attention backend of vLLM: quantized pages and an exact window, in caches that vLLM owns.

Importing this package loads neither vLLM nor PyTorch. vLLM finds it by the entry point `vllm.general_plugins`.
"""
