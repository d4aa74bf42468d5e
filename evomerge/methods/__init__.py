"""Merge methods, one file each; what a method author needs is re-exported here."""

from evomerge.methods._apply import Merge, merge_tensor, torch_dtype
from evomerge.methods._core import Method, Param, method
from evomerge.methods._inputs import Family, Inputs, Target
from evomerge.methods._masks import keep_largest, keep_mask
from evomerge.methods._ranges import EXTENSION, PerExpert, Range
from evomerge.methods._sums import fixed_dot, fixed_norm1
from evomerge.methods._tables import Tables

__all__ = [
    "EXTENSION",
    "Family",
    "Inputs",
    "Merge",
    "Method",
    "Param",
    "PerExpert",
    "Range",
    "Tables",
    "Target",
    "fixed_dot",
    "fixed_norm1",
    "keep_largest",
    "keep_mask",
    "merge_tensor",
    "method",
    "torch_dtype",
]
