"""The pipeline, simulated event by event in the order of `schedule.passes`: who works when, and who waits."""

from __future__ import annotations

from typing import NamedTuple

from megatron_zaya.plan.layer_time import StageTime
from megatron_zaya.plan.schedule import passes
from megatron_zaya.plan.shape import Layout


class Event(NamedTuple):
    """One pass of one micro-batch through one virtual stage, when it happens."""

    rank: int
    forward: bool
    microbatch: int
    stage: int
    start_s: float
    length_s: float


Timeline = list[Event]


def timeline(layout: Layout, microbatches: int, times: list[StageTime], hop_s: float) -> Timeline:
    """Return every pass of a step. A pass starts when its rank is free and its input has arrived."""
    pp = layout.pp
    orders = [passes(pp, layout.vp, microbatches, rank, layout.schedule) for rank in range(pp)]
    done: dict[tuple[bool, int, int], float] = {}
    clock, position = [0.0] * pp, [0] * pp
    events: Timeline = []
    while any(position[rank] < len(orders[rank]) for rank in range(pp)):
        before = len(events)
        for rank in range(pp):
            while position[rank] < len(orders[rank]):
                forward, micro, chunk = orders[rank][position[rank]]
                stage = chunk * pp + rank
                arrival = _arrival(done, forward, micro, stage, layout.stages, hop_s)
                if arrival is None:
                    break
                length = times[stage].forward_s if forward else times[stage].backward_s
                start = max(clock[rank], arrival)
                clock[rank] = done[forward, micro, stage] = start + length
                events.append(Event(rank, forward, micro, stage, start, length))
                position[rank] += 1
        assert len(events) > before, "a schedule whose passes wait for each other"
    return events


def _arrival(
    done: dict[tuple[bool, int, int], float], forward: bool, micro: int, stage: int, stages: int, hop_s: float
) -> float | None:
    """Return when the input of a pass is there; None if the pass that makes it has not run."""
    if forward:
        if stage == 0:
            return 0.0
        ready = done.get((True, micro, stage - 1))
    elif stage == stages - 1:
        return done.get((True, micro, stage))
    else:
        ready = done.get((False, micro, stage + 1))
    return None if ready is None else ready + hop_s


def simulate(layout: Layout, microbatches: int, times: list[StageTime], hop_s: float) -> tuple[float, list[float]]:
    """Return the length of the passes of a step and the idle time of each pipeline rank.

    Many micro-batches repeat the same pattern: beyond some turns the rest is extrapolated.
    """
    pp = layout.pp
    if pp == 1:
        return microbatches * busy_s(layout, times, 0), [0.0]
    turns = 2 * pp
    if microbatches > turns + pp:
        short, _ = simulate(layout, turns, times, hop_s)
        longer, _ = simulate(layout, turns + pp, times, hop_s)
        end = short + (microbatches - turns) / pp * (longer - short)
    else:
        end = max(event.start_s + event.length_s for event in timeline(layout, microbatches, times, hop_s))
    idle = [end - microbatches * busy_s(layout, times, rank) for rank in range(pp)]
    if layout.schedule == "zb1p":  # weight gradients fill two thirds of the bubble (arXiv 2401.10241, section 2)
        saved = 2 / 3 * min(idle)
        end, idle = end - saved, [rank_idle - saved for rank_idle in idle]
    return end, idle


def busy_s(layout: Layout, times: list[StageTime], rank: int) -> float:
    """Return the time that a pipeline rank works for one micro-batch."""
    return sum(times[s].forward_s + times[s].backward_s for s in range(rank, layout.stages, layout.pp))
