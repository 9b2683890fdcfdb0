"""The view of a run on a terminal: a bar to the end of the run or phase, and two lines of figures; news scroll above.

Fits into 80 columns; a wider terminal gets a longer bar.
"""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from megatron_zaya.telemetry.console import PERIODIC, plain_line
from megatron_zaya.telemetry.events import Event, PhaseStarted, RunStarted, Saved, StepDone


def figures(step: StepDone, saved: int | None) -> Text:
    """Return the two lines below the bar."""
    mfu = f"MFU {step.mfu:.1%}" if step.mfu is not None else f"{step.tflops:.3g} TFLOP/s"
    learning = f"loss {step.loss:.4f}  grad norm {step.grad_norm:.3f}  lr {step.learning_rate:.2e}"
    speed = f"{step.tokens_per_s:,.0f} tokens/s  {mfu}"
    experts = f"busiest expert {step.max_expert_load:.2f}  skipped {step.skip_rate:.1%}  dead {step.dead_experts}"
    checkpoint = f"checkpoint {saved}" if saved is not None else "no checkpoint yet"
    lines = (f"{learning}  {speed}", f"{step.step_time_s:.3g} s/step  {experts}  {checkpoint}")
    return Text("\n".join(lines), no_wrap=True, overflow="ellipsis")


class LiveConsole:
    """The sink of a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self.console,
            expand=True,
        )
        self.title = "iteration"
        self.task: TaskID | None = None
        self.step: StepDone | None = None
        self.saved: int | None = None

    def open(self) -> None:
        """Prepare the view; it appears with the run."""
        self.live = Live(get_renderable=self.view, console=self.console, refresh_per_second=4)

    def view(self) -> RenderableType:
        """Return what stands at the bottom of the terminal."""
        return Group(self.progress, figures(self.step, self.saved)) if self.step else self.progress

    def handle(self, event: Event, when: float) -> None:
        """Update the view, or print the event above it."""
        if isinstance(event, StepDone) and self.task is not None:
            self.step = event
            self.progress.update(self.task, completed=event.iteration)
        if isinstance(event, PERIODIC):
            return
        if isinstance(event, Saved):
            self.saved = event.iteration
        if isinstance(event, PhaseStarted):
            self.title = f"phase {event.number}/{event.phases} {event.phase}"
        self.console.print(Text(plain_line(event)))
        if isinstance(event, RunStarted):
            self.task = self.progress.add_task(self.title, total=event.train_iters, completed=event.iteration)
            self.live.start()

    def close(self) -> None:
        """Leave the last view standing and restore the terminal."""
        self.live.stop()
