"""Paged storage of keys and values: what a back end must offer, the quantisers, and the float64 twin of both."""

from elastickv.kvcache.editable import EditableCache
from elastickv.kvcache.layer import LayerCache, StoredHead
from elastickv.kvcache.oracle import Oracle
from elastickv.kvcache.reference import ReferenceCache

__all__ = ["EditableCache", "LayerCache", "Oracle", "ReferenceCache", "StoredHead"]
