#!/usr/bin/env bash
# Example for Prolog in slurm.conf: refuses a node on which an earlier job left GPU processes or a full /dev/shm.
# Exit status 1 drains the node and requeues the job in held state, so it fails only for what a restart cannot cure.
set -u
export PATH=/usr/local/bin:/usr/bin:/bin:/opt/rocm/bin
least_mib=4096

refuse() {
    logger -t zaya-prolog -- "$1" || true
    echo "zaya-prolog: $1" >&2
    exit 1
}

if command -v amd-smi >/dev/null && amd-smi process --csv 2>/dev/null | grep -q ',python'; then
    refuse "GPU processes of an earlier job are still running on $(hostname -s)"
fi
free_mib() { df --output=avail -m /dev/shm | tail -n 1 | tr -d ' '; }
if [ "$(free_mib)" -lt "$least_mib" ] && ! pgrep -f launch.supervise.agent >/dev/null; then
    rm -rf /dev/shm/zaya-agent-* # scratch of agents that were killed
fi
[ "$(free_mib)" -ge "$least_mib" ] || refuse "$(free_mib) MiB of /dev/shm are free on $(hostname -s), $least_mib are needed"
exit 0
