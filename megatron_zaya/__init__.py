"""ZAYA models on Megatron-Core. Importing this package imports no torch; its subpackages do."""

__version__ = "0.1.0"
