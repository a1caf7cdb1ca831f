"""The cache of one layer on a CUDA device."""

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from elastickv.backends.cuda import launch
from elastickv.backends.cuda.arguments import DecodeArguments, FeedbackArguments, SelectArguments, StoreArguments
from elastickv.backends.cuda.device import CudaDevice, DeviceMemory
from elastickv.backends.cuda.editing import CudaEditing
from elastickv.backends.cuda.kernel_selection import TYPES, Variant, fixed_blocks, selecting_blocks
from elastickv.backends.cuda.readback import Contents, raise_non_finite
from elastickv.backends.cuda.storage import DeviceLayout, Scratch, Storage
from elastickv.backends.cuda.tensor_arguments import StagedTokens, query_arguments, token_rows
from elastickv.backends.feedback import Feedback
from elastickv.kvcache.checks import check_anchor, check_marked, check_room
from elastickv.kvcache.hadamard import rotated, rotated_head
from elastickv.kvcache.protocol import Lengths, StoredHead
from elastickv.kvcache.tensor_view import Float32, Tensor, TensorView
from elastickv.recipe import PAGE_TOKENS, AttentionShape, Recipe, regions

if TYPE_CHECKING:
    from typing_extensions import Self

_NUMBERS = itertools.count()


class CudaCache(CudaEditing):
    """A `LayerCache` in device memory. `stored_recipe` is a recipe of equal results that says how its tokens are stored."""

    def __init__(
        self,
        device: CudaDevice,
        shape: AttentionShape,
        capacity: int,
        dtype: str,
        recipe: Recipe,
        anchor_offset: int,
        stored_recipe: Recipe,
        variant: Variant,
        blocks: int,
        layout: DeviceLayout,
        scratch: Scratch,
        resized: Callable[["CudaCache", int, int], "CudaCache"],
    ) -> None:
        self._describe(shape, capacity, dtype, recipe, anchor_offset)
        self.stored_recipe, self.variant, self.blocks = stored_recipe, variant, blocks
        self._storing, self._editing = variant.storing(recipe.rotate), variant.editing(recipe.rotate)
        self._device, self._scratch, self._resized = device, scratch, resized
        self.storage = Storage(device, layout)
        self._store_arguments = StoreArguments.of(self.storage, stored_recipe)
        self._select_arguments = SelectArguments.of(shape, self.storage, scratch, stored_recipe, anchor_offset)
        self._number = next(_NUMBERS)
        self._lengths = np.zeros(shape.batch, np.int64)
        self._step = -1
        self._anchor: int | None = None  # step of the last anchor that was decoded
        self._marked: tuple[NDArray[np.int64], int, int | None] | None = None
        self._overwritten = False  # whether the marked state, at first that of no tokens, was overwritten
        fixed = variant.fixed()
        equal = fixed_blocks(shape.batch * shape.kv_heads * variant.passes(shape.group), device.multiprocessors)
        self._fixed = (fixed, equal) if fixed and equal else None
        self._fractions: tuple[float, ...] = ()
        self._decoding = (variant, blocks)
        self.launch_key = (self._number, False)  # changes with the memory or the kernel of `enqueue_step`
        self.longest = 0
        self._put_fractions([recipe.fraction(head) for head in range(shape.kv_heads)])
        self._restart(self._lengths)

    @property
    def lengths(self) -> NDArray[np.int64]:
        return self._lengths

    @property
    def step(self) -> int:
        return self._step

    @property
    def room(self) -> int:
        """Tokens that every sequence can still take."""
        return self.capacity - self.longest

    def _prefill(self, keys: Tensor, values: Tensor, lengths: Lengths) -> None:
        self._overwritten = True
        self._restart(np.zeros(self.shape.batch, np.int64))
        self._extend(keys, values, lengths)

    def _fill_random(self, lengths: Lengths, seed: int) -> None:
        self._overwritten = True
        self._restart(lengths)
        heads = self.storage.layout.heads
        for fill in (launch.fill_random, *((launch.fill_pages,) if self.variant.paged else ())):
            fill(
                self._device,
                self._storing,
                int(max(lengths)),
                store=self._store_arguments,
                state=self.storage.state,
                heads=heads,
                seed=seed % (1 << 64),
            )
        self._device.stream.sync()

    def _restart(self, lengths: NDArray[np.int64]) -> None:
        """Set the lengths to `lengths`, all tokens finite, and the step to before the first."""
        self._set_lengths(lengths, all_finite=True)

    def _set_lengths(self, lengths: NDArray[np.int64], all_finite: bool = False) -> None:
        """Set the lengths to `lengths` and the step to before the first."""
        self._lengths, self._step, self._anchor = np.array(lengths, np.int64), -1, None
        if self.storage.layout.listed:
            self._device.fill(self.storage.listed, 0)
        self._put_state(all_finite)
        self._choose()

    def _put_state(self, all_finite: bool) -> None:
        """Upload lengths and step to the device."""
        storage, heads = self.storage, self.storage.layout.heads
        self._device.upload(storage.lengths, self._lengths.astype(np.int32))
        launch.set_state(
            self._device,
            self._storing,
            state=storage.state,
            lengths=storage.lengths,
            kv_heads=self.shape.kv_heads,
            heads=heads,
            step=self._step,
            bad=storage.bad,
            all_finite=all_finite,
        )

    def _choose(self) -> None:
        """Choose the kernel and blocks of a decode: a fixed split if every KV head has equal work."""
        alike = len(set(self._fractions)) <= 1 and len(set(self._lengths.tolist())) <= 1
        fixed = self._fixed if alike else None
        self._decoding, self.launch_key = fixed or (self.variant, self.blocks), (self._number, fixed is not None)
        self._decode_arguments = DecodeArguments.of(
            self.shape, self.storage, self._scratch, self.stored_recipe, self.anchor_offset, self._decoding[0]
        )
        self.longest = int(self._lengths.max(initial=0))

    def _append(self, keys: Float32, values: Float32) -> None:
        tokens = StagedTokens(self._device, keys[:, :, None], values[:, :, None])
        self._launch_append_rows(tokens.keys, tokens.values, None, 1.0)
        self._device.stream.sync()
        self.advance(1)

    def _launch_append_rows(self, keys: TensorView, values: TensorView, queries: TensorView | None, query_scale: float) -> None:
        storage, shape = self.storage, self.shape
        launch.append_rows(
            self._device,
            self._storing,
            storage.layout.heads,
            store=self._store_arguments,
            state=storage.state,
            capacity=self.capacity,
            tokens=token_rows(keys, values),
            kv_heads=shape.kv_heads,
            queries=query_arguments(queries, storage.queries, shape.group, query_scale),
        )

    def _enqueue_step(
        self, keys: TensorView, values: TensorView, queries: TensorView, scale: float, outputs: TensorView, lse: TensorView
    ) -> None:
        self._launch_append_rows(keys, values, queries, scale)
        self.launch_decode(self.storage.queries, outputs.address, lse.address, True, outputs.dtype)

    def launch_feedback(self, outputs: DeviceMemory, queries: DeviceMemory, tables: DeviceMemory, feedback: Feedback) -> None:
        """Queue the append of the token that `feedback` makes of `outputs`, and write the next `queries`."""
        launch.append(
            self._device,
            self._storing,
            self.storage.layout.heads,
            store=self._store_arguments,
            state=self.storage.state,
            capacity=self.capacity,
            feedback=FeedbackArguments.of(outputs, queries, self.shape.group, tables, feedback),
        )

    def _expect_decode(self, step: int) -> None:
        self.expect_decodes(step, step)

    def _decode(self, queries: Float32) -> tuple[Float32, Float32]:
        dims = (self.shape.batch, self.shape.query_heads, self.shape.head_dim)
        self.upload_queries(self.storage.queries, queries)
        self.launch_decode(self.storage.queries, self.storage.outputs, self.storage.lse)
        outputs = self._device.download(self.storage.outputs, dims, np.float32)
        return outputs, self._device.download(self.storage.lse, dims[:2], np.float32)

    def upload_queries(self, target: DeviceMemory, queries: Float32) -> None:
        """Copy queries from the host for `launch_decode`, rotated as the keys are."""
        rows = np.asarray(queries, np.float32)
        self._device.upload(target, rotated(rows) if self.recipe.rotates_keys else rows)

    @property
    def kernels_to_decode(self) -> int:
        """Kernels that a decode launches."""
        return 1 + (self.recipe.selection == "pages") + self.recipe.rotates_values

    def load(self) -> None:
        """Load every kernel of a step, which is not allowed during a capture."""
        self._device.kernel(self._decoding[0], "decode")
        self._device.kernel(self._storing, "append")
        if self.recipe.selection == "pages":
            self._device.kernel(self.variant.selecting(), "select")
        if self.recipe.rotates_values:
            self._device.kernel(self.variant.rotating(), "rotate_rows")

    def _launch_select(self, queries: DeviceMemory, after_append: bool) -> None:
        layout, device = self.storage.layout, self._device
        blocks = selecting_blocks(layout.page_capacity, layout.heads, device.multiprocessors)
        variant = self.variant.selecting()
        launch.select(
            device, variant, blocks, layout.heads, query=queries, cache=self._select_arguments, after_append=after_append
        )

    def launch_decode(
        self,
        queries: DeviceMemory,
        outputs: DeviceMemory | int,
        lse: DeviceMemory | int,
        after_append: bool = False,
        output_dtype: str = "fp32",
    ) -> None:
        """Queue a decode of queries that are rotated as the keys are; outputs are rotated back.

        `after_append`: since the last one, one token was appended and other caches' kernels were queued.
        """
        if self.recipe.selection == "pages":
            self._launch_select(queries, after_append)
        variant, blocks = self._decoding
        launch.decode(
            self._device,
            variant,
            blocks,
            query=queries,
            output=self.storage.outputs if self.recipe.rotates_values else outputs,
            lse=lse,
            cache=self._decode_arguments,
            output_type=TYPES["fp32" if self.recipe.rotates_values else output_dtype],
        )
        if self.recipe.rotates_values:
            launch.rotate_rows(
                self._device,
                self.variant.rotating(),
                source=self.storage.outputs,
                output=outputs,
                rows=self.shape.batch * self.shape.query_heads,
                output_type=TYPES[output_dtype],
            )

    def expect_decodes(self, first: int, last: int) -> None:
        """Note that steps `first` to `last` are decoded; RuntimeError if the first reuses what was never computed."""
        check_anchor(self.recipe, first, self.anchor_offset, self._anchor)
        self._anchor = last - self.recipe.steps_since_refresh(last, self.anchor_offset)

    def rollback_step(self) -> None:
        """Enqueue what undoes a step that was not committed: enqueued again, it then does the same."""
        self._put_state(all_finite=False)

    def check_room(self, tokens: int) -> None:
        """Raise UsageError if a sequence can't take `tokens` more."""
        check_room(self._lengths, tokens, self.capacity)

    def commit_step(self) -> None:
        """Count the token of the enqueued step."""
        self.advance(1)

    def advance(self, steps: int) -> None:
        """Count `steps` tokens that the device has appended to every sequence."""
        self._lengths = self._lengths + steps
        self._step += steps
        self.longest += steps

    def _empty_like(self, batch: int, capacity: int) -> "Self":
        return cast("Self", self._resized(self, batch, capacity))

    def stored(self, row: int, kv_head: int) -> StoredHead:
        """Return the stored tokens of one KV head of one sequence, with a rotation undone."""
        held = self._contents.of(row * self.shape.kv_heads + kv_head, int(self._lengths[row]))
        if self.recipe.is_dense:
            keys, values = (
                np.concatenate(p) for p in ((held.cold_keys, held.exact_keys), (held.cold_values, held.exact_values))
            )
            return StoredHead(keys[:0], values[:0], keys, values)
        return rotated_head(held, self.recipe)

    def pages_read(self, row: int, kv_head: int) -> NDArray[np.int64] | None:
        """Return the numbers of the cold pages that the last decode read; None where the recipe selects none."""
        if self.recipe.selection != "pages":
            return None
        head = row * self.shape.kv_heads + kv_head
        cold = regions(int(self._lengths[row]), self.recipe.sinks, self.recipe.window).cold // PAGE_TOKENS
        return self._contents.pages_read(head, cold)

    @property
    def _contents(self) -> Contents:
        return Contents(self._device, self.storage, self.shape.head_dim, self.stored_recipe, self.dtype, self.variant.paged)

    def mark(self) -> None:
        """Save the current state for `rewind`."""
        self.storage.save()
        self._device.stream.sync()
        self._marked, self._overwritten = (self._lengths.copy(), self._step, self._anchor), False

    def rewind(self) -> None:
        """Return to the marked state, or to an empty one, dropping everything appended since."""
        check_marked(not self._overwritten)
        if self._marked is None:
            self._restart(np.zeros(self.shape.batch, np.int64))
            return
        self.storage.restore()
        self._device.stream.sync()
        lengths, self._step, self._anchor = self._marked
        self._lengths = lengths.copy()
        self._choose()

    def raise_non_finite(self) -> None:
        """Raise NonFiniteError, naming sequence, KV head and position, if a NaN or infinity was ever stored."""
        words = self._device.download(self.storage.bad, (self.shape.batch, self.shape.kv_heads), np.uint32)
        raise_non_finite(words, self.recipe)
