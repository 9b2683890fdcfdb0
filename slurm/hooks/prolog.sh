#!/usr/bin/env bash
# Example for Prolog in slurm.conf: refuses a node on which an earlier job left GPU processes or a full /dev/shm.
# Exit status 1 drains the node and requeues the job in held state, so it fails only for what a restart cannot cure.
set -u
export PATH=/usr/local/bin:/usr/bin:/bin:/opt/rocm/bin

if command -v amd-smi >/dev/null && amd-smi process --csv 2>/dev/null | grep -q ',python'; then
    echo "print slurm: GPU processes of an earlier job are still running on $(hostname -s)"
    exit 1
fi
free=$(df --output=avail -k /dev/shm | tail -n 1)
if [ "$free" -lt $((8 * 1024 * 1024)) ]; then
    rm -rf /dev/shm/zaya-agent-* # scratch folders of agents that were killed
fi
exit 0
