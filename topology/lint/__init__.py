"""Reads NCCL_DEBUG=INFO output of a job and says what is wrong with its use of the rails.

`parse` turns lines into records, `rules` turns records into findings. Invariant: a rule fires on evidence
in the log only, and cites the first line that shows it.
"""

from topology.lint.parse import JobLog, read_logs
from topology.lint.rules import Issue, lint

__all__ = ["Issue", "JobLog", "lint", "read_logs"]
