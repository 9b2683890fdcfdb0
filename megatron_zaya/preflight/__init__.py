"""Measurements of tier 2 of the preflight: the part that needs torch. Judged by `launch/preflight/judge.py`."""
