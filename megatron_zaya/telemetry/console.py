"""Events as plain greppable lines, close to Megatron's: what batch logs get (live.py is for terminals)."""

from __future__ import annotations

from megatron_zaya.telemetry.events import (
    Communication,
    Evaluated,
    Event,
    GradientNorms,
    Loaded,
    LossSpike,
    MemoryUsed,
    MoeHealth,
    PhaseStarted,
    Profiled,
    Restarted,
    RunEnded,
    RunStarted,
    Saved,
    SaveFailed,
    SinkTrouble,
    StepDone,
    StepSkipped,
)

PERIODIC = (StepDone, MoeHealth, MemoryUsed, Communication)
"""Events of steps; a log shows them every `telemetry.log_interval` iterations."""
GIB = 1 << 30


def step_line(event: StepDone) -> str:
    """Return the one line of a step, in Megatron's field order and names."""
    replay = "" if event.router_divergence is None else f" router divergence: {event.router_divergence:.4f} |"
    return (
        f" iteration {event.iteration:8d}/{event.train_iters:8d} |"
        f" consumed samples: {event.consumed_samples:12d} |"
        f" elapsed time per iteration (ms): {event.step_time_s * 1e3:.1f} |"
        f" throughput (tokens/s): {event.tokens_per_s:.0f} |"
        f" learning rate: {event.learning_rate:.6E} |"
        f" global batch size: {event.global_batch_size:5d} |"
        f" lm loss: {event.loss:.6E} |"
        f" grad norm: {event.grad_norm:.3f} |"
        f" skip rate: {event.skip_rate:.3f} |"
        f" max expert load: {event.max_expert_load:.2f} |{replay}"
    )


def plain_line(event: Event) -> str:
    """Return the line of any event: no control characters, whatever an error message brings along."""
    line = health_line(event) if isinstance(event, PERIODIC) else news_line(event)
    return "".join(character if character.isprintable() else " " for character in line)


def health_line(event: Event) -> str:
    """Return the line of an event that belongs to a step."""
    match event:
        case StepDone():
            return step_line(event)
        case MoeHealth():
            worst = max(range(len(event.load_violation)), key=event.load_violation.__getitem__)
            return (
                f" expert load at iteration {event.iteration} | worst layer: {worst} |"
                f" load violation: {event.load_violation[worst]:.3f} |"
                f" load entropy: {event.load_entropy[worst]:.4f} |"
                f" dead experts: {sum(event.dead_experts)} |"
            )
        case MemoryUsed():
            return (
                f" memory at iteration {event.iteration} |"
                f" device peak (GiB): {event.device_peak_bytes / GIB:.2f} |"
                f" device reserved (GiB): {event.device_reserved_bytes / GIB:.2f} |"
                f" host (GiB): {event.host_bytes / GIB:.2f} |"
            )
        case Communication():
            return (
                f" waits at iteration {event.iteration} |"
                f" data (ms): {event.data_wait_s * 1e3:.1f} |"
                f" gradient reduction (ms): {event.grad_sync_s * 1e3:.1f} |"
                f" compute of the median rank (ms): {event.busy_median_s * 1e3:.1f} |"
                f" of the slowest, rank {event.slowest_rank} (ms): {event.busy_slowest_s * 1e3:.1f} |"
            )
    raise TypeError(f"no line for {event}")


def news_line(event: Event) -> str:
    """Return the line of an event that stands for itself."""
    match event:
        case RunStarted():
            origin = f"resumed from {event.resumed_from}" if event.resumed_from else "fresh start"
            return (
                f" training: iterations {event.iteration} to {event.train_iters} on {event.world_size} ranks "
                f"(data parallel {event.data_parallel_size}), {event.parameters:,} parameters, "
                f"{event.parameters_active:,} active per token; {event.optimizer}; {origin}"
            )
        case PhaseStarted():
            return (
                f" phase {event.number} of {event.phases}, {event.phase}: {event.train_iters} iterations, "
                f"{event.train_tokens:,} tokens"
            )
        case Loaded():
            older = f", {event.passed_over} damaged steps passed over" if event.passed_over else ""
            return (
                f" loaded checkpoint of iteration {event.iteration} from {event.path} in {event.time_s:.2f} s "
                f"({event.bytes_read / 1e9:.3f} GB read by the first rank{older})"
            )
        case Restarted():
            return (
                f" restart: attempt {event.attempt} goes on from iteration {event.iteration}; "
                f"earlier attempts ended by: {', '.join(event.causes)}"
            )
        case Profiled():
            return (
                f" profile of iterations {event.first_iteration} to {event.iteration} in {event.path}: "
                f"{event.step_time_s * 1e3:.1f} ms per step, exposed communication (ms): "
                f"{event.exposed_communication_s * 1e3:.1f}"
            )
        case SinkTrouble():
            return f" telemetry: {event.sink} {event.reason} ({event.missed} events missed)"
        case Evaluated():
            return (
                f" validation loss at iteration {event.iteration} | lm loss value: {event.loss:.6E} |"
                f" tokens: {event.tokens} | elapsed time (ms): {event.time_s * 1e3:.1f} |"
            )
        case Saved():
            return (
                f" saved checkpoint at iteration {event.iteration} to {event.path} in {event.time_s:.2f} s,"
                f" training held up for {event.stall_s:.3f} s"
            )
        case StepSkipped():
            return (
                f" iteration {event.iteration} skipped: loss {event.loss}, gradient norm {event.grad_norm} "
                f"({event.in_a_row} in a row, {event.in_all} in all)"
            )
        case LossSpike():
            return (
                f" iteration {event.iteration}: the loss jumped to {event.loss:.4f}, {event.deviations:.1f} deviations"
            )
        case GradientNorms():
            norms = ", ".join(f"{group} {norm:.4g}" for group, norm in event.norms.items())
            return f" iteration {event.iteration}: gradient norms: {norms}"
        case SaveFailed():
            return f" NOT saved at iteration {event.iteration}: {event.reason}; the run goes on"
        case RunEnded():
            return f" training ended after iteration {event.iteration}: {event.reason}"
    raise TypeError(f"no line for {event}")


class PlainConsole:
    """One line per event on standard output; steps every ``log_interval`` iterations, and the first and last."""

    def __init__(self, log_interval: int) -> None:
        self.log_interval = log_interval
        self.first = True
        self.shows_step = True

    def open(self) -> None:
        """Nothing to prepare."""

    def handle(self, event: Event, when: float) -> None:
        """Print the event if it is due."""
        if isinstance(event, StepDone):
            due = event.iteration % self.log_interval == 0 or event.iteration == event.train_iters
            self.shows_step, self.first = due or self.first, False
        if self.shows_step or not isinstance(event, PERIODIC):
            print(plain_line(event), flush=True)

    def close(self) -> None:
        """Nothing to release."""
