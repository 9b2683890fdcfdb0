"""Parts of benchmarks/checkpoint.py: the state, the methods compared, the limits of the machine, the report."""
