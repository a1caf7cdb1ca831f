"""Paged storage of keys and values: what a backend implements, the quantizers, and the float64 reference of both."""

from elastickv.kvcache.oracle import Oracle
from elastickv.kvcache.protocol import LayerCache, StoredHead
from elastickv.kvcache.reference import ReferenceCache
from elastickv.kvcache.tensor_view import TensorView

__all__ = ["LayerCache", "Oracle", "ReferenceCache", "StoredHead", "TensorView"]
