"""A small serving engine: requests in scattered blocks, stored, attended to and gathered; needs a GPU."""

import itertools
import math

import numpy as np

from elastickv.kvcache.quantize import stored_values
from elastickv.recipe import AttentionShape
from elastickv.recipe.formats import PAGE_TOKENS


class Engine:
    """Requests whose blocks are scattered, and the plain numbers that were stored in them."""

    def __init__(
        self, lengths, recipe, head_dim, kv_heads, group, window=128, window_block=8, dtype="bf16", seed=0, list_capacity=0
    ):
        import torch

        from elastickv.backends.cuda.block_kernels import BlockKernels
        from elastickv.backends.cuda.device import CudaDevice

        self.torch, self.recipe, self.dtype = torch, recipe, dtype
        self.kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
        self.dim, self.kv_heads, self.group, self.window, self.size = head_dim, kv_heads, group, window, window_block
        torch.manual_seed(seed)
        self.keys = [self.random(n, kv_heads) for n in lengths]
        self.values = [self.random(n, kv_heads) for n in lengths]
        self.device = CudaDevice(0)
        shape = AttentionShape(4 * len(lengths), kv_heads * group, kv_heads, head_dim)
        self.kernels = BlockKernels(self.device, shape, dtype, recipe, window, list_capacity)
        self.slab = self.kernels.slab.n_bytes
        self.page_table = self.table(lengths, PAGE_TOKENS)
        self.window_table = self.table(lengths, window_block)
        self.pages = torch.zeros(int(self.page_table.max()) + 1, kv_heads, self.slab, dtype=torch.uint8, device="cuda")
        # What no step has written is NaN: reading it shows.
        self.recent = torch.full(
            (int(self.window_table.max()) + 1, kv_heads, window_block, 2 * head_dim), math.nan, dtype=self.kind, device="cuda"
        )
        self.first = torch.zeros(len(lengths), dtype=torch.int32, device="cuda")
        self.bad = torch.full((len(lengths),), -1, device="cuda")

    def random(self, *shape):
        return self.torch.randn(*shape, self.dim, device="cuda").to(self.kind)

    def table(self, lengths, size):
        """Blocks in random order; block 0 belongs to nobody."""
        counts = [-(-n // size) for n in lengths]
        order = self.torch.randperm(sum(counts)).int() + 1
        table = self.torch.zeros(len(lengths), max(counts) + 1, dtype=self.torch.int32)
        for row, end, count in zip(table, itertools.accumulate(counts), counts, strict=True):
            row[:count] = order[end - count : end]
        return table.cuda()

    def arguments(self):
        from elastickv.backends.cuda.block_arguments import BlocksArguments

        return BlocksArguments(
            pages=self.pages.data_ptr(),
            window=self.recent.data_ptr(),
            page_table=self.page_table.data_ptr(),
            window_table=self.window_table.data_ptr(),
            page_stride=self.pages.stride(0),
            window_stride=self.recent.stride(0) * 2,
            kv_heads=self.kv_heads,
            slab_bytes=self.slab,
            page_columns=self.page_table.shape[1],
            window_columns=self.window_table.shape[1],
            window_shift=self.size.bit_length() - 1,
        )

    def view(self, tensor):
        from elastickv.kvcache.tensor_view import TensorView

        return TensorView(tensor.data_ptr(), self.dtype, tuple(tensor.shape), tensor.stride())

    def rows(self, before, after):
        parts = [[each[n:m] for each, n, m in zip(of, before, after, strict=True)] for of in (self.keys, self.values)]
        self.step = [self.torch.cat(each).contiguous() for each in parts]
        return self.rows_of_step()

    def rows_of_step(self):
        from elastickv.backends.cuda.block_arguments import StepRows

        return StepRows.of(*map(self.view, self.step))

    def store(self, before, after, layer=0):
        """Store tokens before[i] to after[i] of each request. Tokens that leave the window in the step get no block."""
        torch = self.torch
        starts = torch.tensor([0, *itertools.accumulate(m - n for n, m in zip(before, after, strict=True))], dtype=torch.int32)
        slots = []
        for i, (n, m) in enumerate(zip(before, after, strict=True)):
            tokens = torch.arange(n, m, device="cuda")
            own = self.window_table[i][tokens // self.size].long() * self.size + tokens % self.size
            slots.append(torch.where(tokens < m - self.window - self.size, tokens % self.size, own))
        self.inputs = (torch.tensor(after, dtype=torch.int32).cuda(), starts.cuda(), torch.cat(slots).cuda(), self.bad)
        self.device.follow(torch.cuda.current_stream().cuda_stream)
        longest = max(m - n for n, m in zip(before, after, strict=True))
        rows = self.rows(before, after)
        self.kernels.store(self.arguments(), rows, *(each.data_ptr() for each in self.inputs), len(after), longest, layer)
        return rows

    def decode(self, before, after):
        """Store and attend with the tokens of a step."""
        rows = self.store(before, after)
        return self.attend(rows, self.inputs[0], [m - n for n, m in zip(before, after, strict=True)])

    def attend(self, rows, lengths, counts, **others):
        """Attend with `counts[i]` tokens of each request."""
        query = self.random(sum(counts), self.kv_heads * self.group)
        output = self.torch.full_like(query, math.nan)
        addresses = output.data_ptr(), lengths.data_ptr(), self.first.data_ptr()
        owners = self.torch.arange(len(counts)).repeat_interleave(self.torch.tensor(counts)).int().cuda()
        uniform, ragged = counts[0] if len(set(counts)) == 1 else 0, {}
        if not uniform:
            ragged = {"starts": self.inputs[1].data_ptr(), "row_requests": owners.data_ptr()}
        self.kernels.decode(self.arguments(), rows, self.view(query), *addresses, uniform, **ragged, **others)
        self.torch.cuda.synchronize()
        return query, output

    def gather(self, first_request, first, count, exact):
        """Return keys and values of count[i] tokens from first[i] on of some requests, one after the other."""
        from elastickv.backends.cuda.block_arguments import GatherRows

        torch, ends = self.torch, list(itertools.accumulate(count))
        start = [end - n for end, n in zip(ends, count, strict=True)]
        parts = {"first": first, "count": count, "start": start, "exact_first": exact}
        sent = {name: torch.tensor(numbers, dtype=torch.int32).cuda() for name, numbers in parts.items()}
        rows = GatherRows(**{name: each.data_ptr() for name, each in sent.items()}, first_request=first_request)
        shape = ends[-1], self.kv_heads, self.dim
        keys, values = (torch.full(shape, math.nan, dtype=self.kind, device="cuda") for _ in range(2))
        addresses = keys.data_ptr(), values.data_ptr()
        self.kernels.gather(self.arguments(), rows, *addresses, len(count), max(count))
        torch.cuda.synchronize()
        return keys, values

    def numbers(self, request, cold, value):
        """The keys or values of a request, (tokens, kv_heads, head_dim) float64, of which the first `cold` are in pages."""
        rows, pages = (self.values if value else self.keys)[request], -(-cold // PAGE_TOKENS) * PAGE_TOKENS
        exact = rows.float().cpu().numpy().astype(np.float64)
        fmt = self.recipe.value_format if value else self.recipe.key_format
        for head in range(self.kv_heads if cold else 0):
            whole = rows[:pages, head].float().cpu().numpy()
            exact[:cold, head] = stored_values(whole, fmt, bool(value), self.recipe.v_group(self.dim))[:cold]
        return exact

    def expected(self, request, length, query, unread=None):
        """Float64 attention of one query, (query heads, head_dim), with `length` tokens.

        `unread` are the pages that a KV head does not read, one list for each.
        """
        cold = max(length - self.window, int(self.first[request]), 0)
        keys, values = (self.numbers(request, cold, value)[:length] for value in range(2))
        q = query.double().cpu().numpy().reshape(self.kv_heads, self.group, self.dim)
        scores = np.einsum("hgd,khd->hgk", q, keys) / math.sqrt(self.dim)
        for head, pages in enumerate(unread or ()):
            for page in pages:
                scores[head, :, page * PAGE_TOKENS : (page + 1) * PAGE_TOKENS] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return np.einsum("hgk,khd->hgd", weights / weights.sum(-1, keepdims=True), values).reshape(-1, self.dim)

    def errors(self, query, output, after, count=1):
        """Relative L2 error of every row of a decode."""
        for row, (q, o) in enumerate(zip(query, output, strict=True)):
            request, number = divmod(row, count)
            expected = self.expected(request, after[request] - count + 1 + number, q)
            yield np.linalg.norm(o.double().cpu().numpy() - expected) / np.linalg.norm(expected)
