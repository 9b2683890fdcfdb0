"""The `zaya` command line and everything between the operator and the rank process. Torch-free at import."""
