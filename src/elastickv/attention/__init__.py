"""Decode attention: the float64 reference and the exact merge of partial results."""

from elastickv.attention.reference import Partial, attend, merge

__all__ = ["Partial", "attend", "merge"]
