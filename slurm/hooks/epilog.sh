#!/usr/bin/env bash
# Example for Epilog in slurm.conf: ends what a job left behind, so that the next one finds the node clean.
set -u
export PATH=/usr/local/bin:/usr/bin:/bin

if [ -n "${SLURM_JOB_USER:-}" ] && [ "$SLURM_JOB_USER" != root ]; then
    # Only when this user has no other job on the node.
    if ! squeue --noheader --nodelist "$(hostname -s)" --user "$SLURM_JOB_USER" --states RUNNING -o %A |
        grep -qv "^${SLURM_JOB_ID:-0}$"; then
        pkill -KILL -u "$SLURM_JOB_USER" || true
    fi
fi
rm -rf /dev/shm/zaya-agent-*
exit 0
