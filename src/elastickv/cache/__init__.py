"""Paged storage of keys and values: what a back end must offer, the quantisers, and the float64 twin of both."""

from elastickv.cache.editable import EditableCache
from elastickv.cache.layer import LayerCache, StoredHead
from elastickv.cache.oracle import Oracle
from elastickv.cache.reference import ReferenceCache

__all__ = ["EditableCache", "LayerCache", "Oracle", "ReferenceCache", "StoredHead"]
