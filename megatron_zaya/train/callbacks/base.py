"""The interface of a callback. Every rank has the same callbacks, in the same order: they may communicate."""

from __future__ import annotations

from megatron_zaya.train.state import TrainingJob


class Callback:
    """Override what is needed."""

    def after_step(self, job: TrainingJob) -> None:
        """Run after each optimizer step, on every rank."""

    def at_end(self, job: TrainingJob) -> None:
        """Run once when the loop ends normally or on a signal, on every rank."""
