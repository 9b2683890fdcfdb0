"""The per-rank entry: `python -m megatron_zaya.pretrain run.yaml [section.key=value ...]`.

Parse, agree, build, train, close. Exit status: 0 finished or stopped by a signal with a checkpoint, 2 the user's input
cannot work (one message on standard error), 1 a failure of training.
"""

from __future__ import annotations

import faulthandler
import hashlib
import signal
import sys

from ckpt.errors import CheckpointError
from launch.agreement import agree, gather_facts
from launch.env import LaunchError, RankContext, read_rank_env
from megatron_zaya.compat import import_megatron
from megatron_zaya.config import ConfigError, RunConfig, dump_config, load_config
from megatron_zaya.data.errors import DataError
from megatron_zaya.preconditions import check_run, unfinished_phases
from megatron_zaya.telemetry.heartbeat import Heartbeat
from megatron_zaya.train.errors import TrainingError


def _answer_stack_requests(env: RankContext) -> None:
    """Let SIGUSR2 write the stacks of all threads, from C, so that it works while Python is stuck."""
    if env.supervision.stacks_file is not None:
        file = env.supervision.stacks_file.open("w", encoding="utf-8")
        faulthandler.register(signal.SIGUSR2, file=file, all_threads=True)


def _agree(env: RankContext, config: RunConfig) -> None:
    """Compare the nodes before anything expensive; a world within one node cannot disagree."""
    if env.nodes > 1:
        digest = hashlib.sha256(dump_config(config).encode()).hexdigest()[:12]
        agree(env, gather_facts(env, {"run file (digest)": digest, "hosts": " ".join(env.hosts)}))


def main(argv: list[str]) -> int:
    """Run one rank."""
    if not argv:
        print("usage: python -m megatron_zaya.pretrain run.yaml [section.key=value ...]", file=sys.stderr)
        return 2
    env = read_rank_env()
    heartbeat = Heartbeat(env.supervision.heartbeat_file)
    heartbeat.beat("rendezvous")
    _answer_stack_requests(env)
    config = load_config(argv[0], argv[1:])
    check_run(config, env.world_size, env.local_world_size)
    env.bind()
    _agree(env, config)

    heartbeat.beat("imports")
    import_megatron()
    # torch and Megatron-Core are imported only now: a mistake in the input is reported in a second.
    from megatron_zaya.train.loop import train
    from megatron_zaya.train.report import phase_started
    from megatron_zaya.train.setup import build_callbacks, build_job, distributed_world, release_job

    heartbeat.beat("join")
    with distributed_world(config, env) as device:
        for phase in unfinished_phases(config):
            heartbeat.beat("build")
            job = build_job(phase, env, device)
            if config.phases:
                job.events.emit(phase_started(config, phase))
            try:
                reason = train(job, build_callbacks(phase, env))
            finally:
                job.events.close()
            release_job(job)  # the next phase may have another layout
            if reason != "finished":
                break
    return 0


def run() -> int:
    """Run one rank and turn the user's errors into one message."""
    try:
        return main(sys.argv[1:])
    except (ConfigError, DataError, LaunchError, CheckpointError) as error:
        print(f"zaya: {error}", file=sys.stderr)
        return 2
    except TrainingError as error:
        print(f"zaya: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(run())
