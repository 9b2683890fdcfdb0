"""What can go wrong with weights from or for elsewhere. Messages are for the user: what, where, value, remedy."""

from __future__ import annotations


class ConvertError(ValueError):
    """Weights cannot be converted, or two sets of weights differ."""
