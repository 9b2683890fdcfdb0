"""What to do after a failure: which node to leave out, and whether another attempt makes sense. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from launch.supervise import classify
from launch.supervise.classify import Cause
from launch.supervise.job import Policy

PROOF = frozenset({classify.NODE, classify.DEVICE})  # one failure of these proves the node broken
SUSPICION = frozenset({classify.NETWORK, classify.HOST_MEMORY, classify.HANG})
REMEDY = {
    classify.INPUT: "correct the input and submit again",
    classify.DEVICE_MEMORY: "lower schedule.micro_batch_size, or spread the model over more ranks",
    classify.NUMERICAL: "lower optimizer.lr, look at the data of that step, or set schedule.nan_policy: skip",
    classify.DISK: "free space, or move run.dir",
    classify.USER_CODE: "see the traceback in the rank's log",
    classify.HOST_MEMORY: "lower data.num_workers, or ask for more memory",
    classify.NETWORK: "see the node's links: zaya preflight",
    classify.DEVICE: "have the device checked; the node is left out until its line in excluded.json is removed",
    classify.NODE: "have the node checked; it is left out until its line in excluded.json is removed",
    classify.HANG: "see the stacks",
}


@dataclass(frozen=True)
class Failure:
    """One failed attempt, for the policy: its cause, and the furthest iteration that its ranks reported."""

    cause: Cause
    iteration: int
    silent: bool = False
    """A hang in which the culprit did not answer."""
    part: str = ""
    """The phase of the run; iterations count anew in each."""


@dataclass(frozen=True)
class Decision:
    """Go on or stop, why, and the host to leave out from now on (empty: none)."""

    go_on: bool
    reason: str
    exclude: str = ""


def decide(failures: Sequence[Failure], policy: Policy) -> Decision:
    """Judge the newest failure in the light of those before it."""
    newest = failures[-1]
    category, host = newest.cause.category, newest.cause.host
    if category in (classify.INPUT, classify.DEVICE_MEMORY):
        return Decision(False, f"another attempt would fail alike; {REMEDY[category]}")
    exclude = host if _to_exclude(failures, policy) else ""
    if len(failures) > policy.max_restarts:
        return Decision(False, f"{len(failures)} failures are more than max_restarts={policy.max_restarts}", exclude)
    stuck = failures_without_progress(failures)
    if stuck > policy.max_restarts_without_progress:
        return Decision(
            False,
            f"{stuck} attempts in a row did not get beyond iteration {max(f.iteration for f in failures)} "
            f"(max_restarts_without_progress={policy.max_restarts_without_progress}); {REMEDY[category]}",
            exclude,
        )
    return Decision(True, f"{host} is left out" if exclude else "the same nodes start again", exclude)


def _to_exclude(failures: Sequence[Failure], policy: Policy) -> bool:
    newest = failures[-1]
    if newest.cause.category in PROOF or newest.silent:
        return True
    blamed = Counter(f.cause.host for f in failures if f.cause.category in SUSPICION)
    suspicious = newest.cause.category in SUSPICION and bool(newest.cause.host)
    return suspicious and blamed[newest.cause.host] >= policy.blames_before_exclusion


def failures_without_progress(failures: Sequence[Failure]) -> int:
    """Return how many of the newest failures in a row came before any new iteration was reached."""
    best: dict[str, int] = {}
    stuck = 0
    for failure in failures:
        reached = best.get(failure.part, -1)
        stuck = 1 if failure.iteration > reached else stuck + 1
        best[failure.part] = max(reached, failure.iteration)
    return stuck
