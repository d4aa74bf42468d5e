"""Objective kind `bits_per_byte`: the clearer second name of `perplexity`."""

from __future__ import annotations

from evomerge import registry
from evomerge.objectives.perplexity import PerplexityObjective

registry.register("objectives", "bits_per_byte", PerplexityObjective, module=__name__)
