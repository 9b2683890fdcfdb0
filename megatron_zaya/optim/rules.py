"""Which parameter is trained by which optimizer: one table, first match counts. Torch-free.

Muon orthogonalises matrices that map one hidden space to another; everything else (lookup tables, convolutions,
vectors) goes to AdamW, as in the published run (arXiv 2511.17127). A parameter that no line names is an error.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, replace
from typing import Literal

Algorithm = Literal["muon", "adamw"]


@dataclass(frozen=True)
class Rule:
    """One line of the table."""

    pattern: str
    """Of the parameter's name in the whole model."""
    algorithm: Algorithm
    weight_decay: bool
    why: str
    row_parts: int = 1
    """Muon: logical matrices stored one below the other; leading dimensions stack matrices anyway."""


RULES = (
    Rule("embedding.word_embeddings.weight", "adamw", True, "lookup table (and tied head): its rows are tokens"),
    Rule("output_layer.weight", "adamw", True, "head: its rows are tokens"),
    Rule("*.depthwise_weight", "adamw", True, "convolution"),
    Rule("*.grouped_weight", "adamw", True, "convolution"),
    Rule("*norm.weight", "adamw", False, "norm"),
    Rule("*.temperature", "adamw", False, "attention temperature"),
    Rule("*bias", "adamw", False, "bias"),
    Rule("*_scale", "adamw", False, "residual or router-state scaling"),
    Rule("input_scaling.scale", "adamw", False, "input scaling"),
    Rule("*.linear_v", "muon", True, "two matrices: values of this token, values of the token before", row_parts=2),
    Rule("*.linear_[qk]", "muon", True, "matrix"),
    Rule("*.linear_proj.weight", "muon", True, "matrix"),
    Rule("*.experts.linear_fc1", "muon", True, "one matrix per expert, gate and up apart"),
    Rule("*.experts.linear_fc2", "muon", True, "one matrix per expert"),
    Rule("*.router.linear_*.weight", "muon", True, "matrix"),
)


def rule_for(name: str, optimizer: str) -> Rule:
    """Return the rule of a parameter.

    Args:
        name: its name in the whole model.
        optimizer: `optimizer.optimizer` of the run file; "adam" sends everything to AdamW, with the same decay.

    Raises:
        LookupError: no line of the table names it.
    """
    for rule in RULES:
        if fnmatch.fnmatchcase(name, rule.pattern):
            return rule if optimizer == "muon" else replace(rule, algorithm="adamw")
    raise LookupError(
        f"parameter {name!r} has no optimizer rule; add a line to RULES in megatron_zaya/optim/rules.py that says "
        "whether it is a matrix for Muon or goes to AdamW"
    )
