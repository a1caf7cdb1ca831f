"""A CUDA device without a GPU: memory is addresses only, and launches are recorded with their packed arguments."""

from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from elastickv.backends.cuda import block_launch, launch


@dataclass(frozen=True)
class Memory:
    pointer: int
    n_bytes: int


@dataclass(frozen=True)
class Launch:
    """One launch; `arguments` are (C type, value) in the kernel's order."""

    source: str
    kernel: str
    grid: tuple
    threads: int
    shared_bytes: int
    arguments: tuple
    in_order: bool = False

    @property
    def values(self):
        """Values by the names that `launch.py` and `block_launch.py` declare."""
        function = vars(launch).get(self.kernel) or vars(block_launch)[self.kernel]
        declared = list(launch.kernel_arguments(function))
        assert [ctype for _, ctype in declared] == [ctype for ctype, _ in self.arguments]
        return {name: value for (name, _), (_, value) in zip(declared, self.arguments, strict=True)}


class RecordingDevice:
    """Stands in for `CudaDevice`."""

    def __init__(self, arch="90", multiprocessors=132):
        self.arch, self.multiprocessors, self.free_bytes = arch, multiprocessors, 60 << 30
        self.stream = SimpleNamespace(sync=lambda: None, handle=0)
        self.launches, self._next, self.ordered = [], 1 << 32, False
        self.variants = []  # of all launches

    def allocate(self, n_bytes, fill=None):
        memory = Memory(self._next, max(n_bytes, 16))
        self._next += memory.n_bytes + 256
        return memory

    def fill(self, memory, word):
        pass

    def upload(self, memory, array, offset=0):
        pass

    def download(self, memory, shape, dtype, offset=0):
        return np.zeros(shape, dtype)

    def copy(self, target, source, n_bytes):
        pass

    def kernel(self, variant, name):
        pass

    def blocks_per_multiprocessor(self, variant, name):
        return 2

    def clusters_at_once(self, variant, name, blocks):
        return 1 << 20

    def launch(self, variant, name, grid, arguments):
        self.variants.append(variant)
        packed = tuple((type(argument), argument.value) for argument in arguments)
        self.launches.append(Launch(variant.source, name, grid, variant.threads, variant.shared_bytes, packed, self.ordered))

    @contextmanager
    def in_order(self):
        self.ordered = True
        yield
        self.ordered = False

    def take(self):
        """Return the launches recorded since the last call."""
        recorded, self.launches = self.launches, []
        return recorded
