"""How many tokens fit, what a request's window costs and what graphs take: the lines that are logged at the start."""

import logging
from dataclasses import dataclass

from elastickv.recipe.formats import DENSE_BYTES_PER_ELEMENT, PAGE_TOKENS
from elastickv.vllm.window_cache import WindowShape

_RUNNERS = ("vllm.v1.worker.gpu.model_runner", "vllm.v1.worker.gpu_model_runner")
_CAPTURED = "Graph capturing finished"
_log = logging.getLogger("vllm.elastickv")


@dataclass(frozen=True)
class Capacity:
    """The memory of the KV cache on one rank.

    Attributes
    ----------
    shape : of every layer's window.
    block_tokens : tokens of a block of pages.
    layers : layers with pages.
    blocks : blocks that pages and windows share, without vLLM's null block.
    longest : tokens of the longest request, for which capacities are given.
    shapes : shapes of layers that share the blocks. With several, as beside a drafter of another size, vLLM alone knows how
        many tokens fit.
    """

    shape: WindowShape
    block_tokens: int
    layers: int
    blocks: int
    longest: int
    shapes: int = 1

    @property
    def page_bytes(self) -> int:
        """Bytes of one layer's page."""
        return self.shape.block_bytes(PAGE_TOKENS)

    @property
    def dense_page_bytes(self) -> int:
        """Bytes of one layer's page in 16 bit."""
        return PAGE_TOKENS * 2 * self.shape.kv_heads * self.shape.head_size * DENSE_BYTES_PER_ELEMENT

    @property
    def block_bytes(self) -> int:
        """Bytes of one layer's block."""
        return self.shape.block_bytes(self.block_tokens)

    @property
    def dense_block_bytes(self) -> int:
        """Bytes of one layer's block with the same tokens in 16 bit."""
        return self.dense_page_bytes * self.block_tokens // PAGE_TOKENS

    @property
    def window_bytes(self) -> int:
        """Bytes of one request's window in all layers."""
        return self.shape.blocks_per_request(self.block_tokens) * self.block_bytes * self.layers

    @property
    def tokens(self) -> int:
        """Tokens of requests of the longest length that fit together with their windows."""
        of_request = -(-self.longest // self.block_tokens) + self.shape.blocks_per_request(self.block_tokens)
        return int(self.blocks / of_request * self.longest)

    @property
    def dense_tokens(self) -> int:
        """Tokens that would fit in 16 bit."""
        return self.blocks * self.block_bytes * PAGE_TOKENS // self.dense_page_bytes

    def __str__(self) -> str:
        """Return the line for the log."""
        line = (
            f"page {self.page_bytes:,} B, {self.dense_page_bytes / self.page_bytes:.2f}x smaller than in 16 bit; "
            f"window {self.shape.tokens} tokens, {self.window_bytes / 1e6:.1f} MB a request; "
        )
        if self.shapes > 1:
            return f"{line}{self.layers} layers, of {self.shapes} sizes: vLLM's own line says how many tokens fit"
        return f"{line}capacity {self.tokens:,} tokens in requests of {self.longest:,}, against {self.dense_tokens:,} in 16 bit"


class GraphMemory(logging.Filter):
    """Logs how much memory CUDA graphs took: vLLM captures them after it has allocated the KV cache, and says so in its log.

    Lets every record pass.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Return True."""
        if str(record.msg).startswith(_CAPTURED) and isinstance(record.args, tuple) and len(record.args) == 2:
            self.stop()
            _log.info("ElasticKV: graphs %.0f MB", max(0.0, float(str(record.args[1]))) * 2**30 / 1e6)
        return True

    def start(self) -> None:
        """Look at the records of vLLM's model runners. Graphs that were captured before were only to be measured."""
        self.stop()
        for name in _RUNNERS:
            logging.getLogger(name).addFilter(self)

    @staticmethod
    def stop() -> None:
        """Look at no more records: of this engine, and of one before it that captured nothing."""
        for logger in map(logging.getLogger, _RUNNERS):
            for each in [each for each in logger.filters if isinstance(each, GraphMemory)]:
                logger.removeFilter(each)
