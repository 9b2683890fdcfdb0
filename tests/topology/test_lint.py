"""One hand-written log excerpt per lint rule (`nccl_logs/<rule>.log`), in the library's own words.

Modelled on the public reports: https://github.com/NVIDIA/nccl/issues/2345 (cross-rail rings and trees),
2385 (relays: the number in brackets is the proxy rank), 1671 (odd channels), 1933 (cross NIC),
https://github.com/ROCm/mori/issues/370 (NIC order), https://github.com/meta-pytorch/torchcomms/pull/760
(uneven rows), https://github.com/ROCm/rocm-systems/pull/8321 (RCCL 2.28).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from topology.errors import TopologyError
from topology.lint import Issue, JobLog, lint, read_logs
from topology.lint.parse import parse_lines
from topology.lint.rules import Expected


def issues(text: str, expected: Expected | None = None) -> dict[str, Issue]:
    log = JobLog()
    parse_lines(text.strip().splitlines(), "job.log", log)
    return {issue.rule: issue for issue in lint(log, expected)}


LOGS = Path(__file__).with_name("nccl_logs")
EXCERPTS = {path.stem: path.read_text() for path in sorted(LOGS.glob("*.log"))}
HEALTHY = EXCERPTS.pop("healthy")


def test_a_healthy_log_is_clean() -> None:
    assert issues(HEALTHY) == {}


@pytest.mark.parametrize("rule", EXCERPTS)
def test_each_rule_fires_on_its_excerpt_and_cites_its_evidence(rule: str) -> None:
    found = issues(EXCERPTS[rule])
    assert rule in found, sorted(found)
    issue = found[rule]
    assert issue.source.startswith("https://github.com/")
    if issue.where is not None:
        assert issue.where.text in EXCERPTS[rule]


def test_rules_that_are_about_rails_stay_quiet_where_rails_meet() -> None:
    joined = Expected(rails_apart=False)
    for rule in ("cross-rail-edge", "cross-rail-ring", "cross-rail-graph", "cross-nic", "relay-off"):
        assert rule not in issues(EXCERPTS[rule], joined), rule


def test_a_relay_that_ends_on_the_right_rail_is_no_error() -> None:
    found = issues("n0:1:2 [0] NCCL INFO NCCL_PXN_DISABLE set by environment to 0.\n" + EXCERPTS["relay"])
    assert {issue.severity for issue in found.values()} == {"note"}
    assert "1 of 1 network connections are relayed" in found["relay"].message


def test_relays_with_four_channels_per_peer_are_a_trap() -> None:
    text = EXCERPTS["relay"] + "n0:1:2 [0] NCCL INFO NCCL_NCHANNELS_PER_NET_PEER set by environment to 4.\n"
    assert issues(text)["version-trap"].severity == "error"


def test_old_rocm_is_a_trap_and_new_is_not() -> None:
    old = "n0:1:2 [0] NCCL INFO RCCL version 2.18.6+hip6.1 HEAD:abc\n"
    assert "rail-optimised" in issues(old)["version-trap"].message
    assert "version-trap" not in issues(old.replace("hip6.1", "hip6.4"))


def test_labels_of_srun_and_several_files_are_understood(tmp_path: Path) -> None:
    sender, receiver = EXCERPTS["cross-rail-edge"].strip().splitlines()
    (tmp_path / "a.log").write_text(f"  7: {sender}\nsome other output\n")
    (tmp_path / "b.log").write_text(f"  8: {receiver}\n")
    found = lint(read_logs([tmp_path / "a.log", tmp_path / "b.log"]))
    edge = next(issue for issue in found if issue.rule == "cross-rail-edge")
    assert edge.where is not None and edge.where.file.endswith("a.log") and edge.where.line == 1


def test_logs_without_nccl_output_say_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_text("hello\n")
    with pytest.raises(TopologyError, match="NCCL_DEBUG=INFO"):
        read_logs([path])
    with pytest.raises(TopologyError, match="cannot read"):
        read_logs([tmp_path / "absent.log"])
