"""Is this node fit to train, and are these nodes together? Checked before a GPU hour is spent.

Tier 1 (`node.py`) looks at one node without asking any other: what its tools say (`collect.py`, `parse.py`) against the
site's limits (`limits.py`, `checks.py`). Tier 2 measures: products, memory, collectives
(`megatron_zaya/preflight/measure.py`), judged here by `judge.py`. Verdicts are JSON, one per node.
"""
