"""The per-rank entry: `python -m megatron_zaya.pretrain run.yaml [section.key=value ...]`.

Parse, build, train, close. Exit status: 0 finished or stopped by a signal with a checkpoint, 2 the user's input
cannot work (one message on standard error), 1 a failure of training.
"""

from __future__ import annotations

import sys

from ckpt.steps import CheckpointError
from launch.env import LaunchError, read_rank_env
from megatron_zaya.compat import quiet_megatron
from megatron_zaya.config import ConfigError, load_config
from megatron_zaya.data.errors import DataError
from megatron_zaya.preconditions import check_run
from megatron_zaya.train.errors import TrainingError


def main(argv: list[str]) -> int:
    """Run one rank."""
    if not argv:
        print("usage: python -m megatron_zaya.pretrain run.yaml [section.key=value ...]", file=sys.stderr)
        return 2
    env = read_rank_env()
    config = load_config(argv[0], argv[1:])
    check_run(config, env.world_size)

    quiet_megatron()
    # torch and Megatron-Core are imported only now: a mistake in the input is reported in a second.
    from megatron_zaya.train.loop import train
    from megatron_zaya.train.setup import build_callbacks, build_job, distributed_world

    with distributed_world(config, env) as device:
        job = build_job(config, env, device)
        try:
            train(job, build_callbacks(config))
        finally:
            job.events.close()
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
