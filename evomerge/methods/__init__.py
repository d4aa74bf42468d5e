"""Merge methods, one file each; what a method author needs is re-exported here."""

from evomerge.methods._apply import merge_tensor, torch_dtype
from evomerge.methods._core import EXTENSION, Inputs, Method, Param, PerExpert, Range, method
from evomerge.methods._masks import keep_largest, keep_mask
from evomerge.methods._sums import fixed_dot, fixed_norm1

__all__ = [
    "EXTENSION",
    "Inputs",
    "Method",
    "Param",
    "PerExpert",
    "Range",
    "fixed_dot",
    "fixed_norm1",
    "keep_largest",
    "keep_mask",
    "merge_tensor",
    "method",
    "torch_dtype",
]
