"""Keeps a job training: one controller in the batch shell, one agent per node, one process per rank.

The controller (`controller.py`) tells agents (`agent.py`) which ranks to run, watches heartbeats (`watch.py`), names
the culprit of a failure (`classify.py`, `stacks.py`), decides what to do (`policy.py`), and starts the ranks again on
healthy nodes of the same allocation; a new allocation is asked for only when too few are left (`slurm.py`). What
happened is in `events.jsonl` and in one incident report per restart (`record.py`).

Standard library only: the controller runs on the host, outside the job's container.
"""
