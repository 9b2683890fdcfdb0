"""Everything a job needs from one placement: Slurm, launchers, environment, expectations, pictures.

Invariant: each emitter is a pure function from a `Placement` to text or data; only `bundle` writes files.
"""
