"""What bridges Megatron-Core versions and a missing accelerator. Nothing else in the project patches anything."""

import warnings


def quiet_megatron() -> None:
    """Hide the warnings that Megatron-Core repeats on every rank about what is not installed.

    `zaya doctor` says the same once, with the consequence.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.core.*")
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\..* is deprecated", category=FutureWarning)
