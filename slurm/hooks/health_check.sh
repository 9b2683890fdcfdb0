#!/usr/bin/env bash
# Example for HealthCheckProgram in slurm.conf: drains a node that tier 1 of the preflight fails.
# Slurm starts it with an empty environment, so everything is set here. Install as a root-owned file; adapt three lines.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/opt/rocm/bin
export SLURM_CONF=/etc/slurm/slurm.conf
python=/opt/zaya/bin/python limits=/etc/slurm/zaya-limits.json verdicts=/var/log/zaya-preflight

node=$(hostname -s)
if ! reason=$("$python" -m launch.preflight.node --limits "$limits" --out "$verdicts" 2>&1); then
    scontrol update "nodename=$node" state=drain "reason=preflight: $(tail -n 1 <<<"$reason" | cut -c 1-120)"
fi
exit 0 # a failing health check must not fail slurmd
