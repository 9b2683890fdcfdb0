"""`python -m topology`: the same commands as `zaya topology`."""

from topology.cli import app

app(prog_name="topology")
