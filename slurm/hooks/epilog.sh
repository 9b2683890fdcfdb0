#!/usr/bin/env bash
# Example for Epilog in slurm.conf: ends what a job left behind, so that the next one finds the node clean.
set -u
export PATH=/usr/local/bin:/usr/bin:/bin

rm -rf "/dev/shm/zaya-agent-${SLURM_JOB_ID:?}-"* # scratch of an agent that was killed
user=${SLURM_JOB_USER:-root}
if [ "$user" != root ]; then
    # Only when this user has no other job on the node; a Slurm that does not answer leaves everybody alone.
    jobs=$(squeue --noheader --nodelist "${SLURMD_NODENAME:-$(hostname -s)}" --user "$user" --states RUNNING -o %A) || exit 0
    if ! grep -qv "^$SLURM_JOB_ID$" <<<"${jobs:-$SLURM_JOB_ID}"; then
        pkill -KILL -u "$user" || true
    fi
fi
exit 0
