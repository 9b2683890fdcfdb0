"""Weights in and out: the names and shapes of other programs' ZAYA checkpoints."""
