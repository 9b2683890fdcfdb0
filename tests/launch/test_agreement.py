"""Disagreement between nodes is found and named, over real sockets, within the deadline."""

from __future__ import annotations

import re
import socket
import threading
import time

import pytest

from launch.agreement import agree, compare, gather_facts
from launch.env import LaunchError, RankContext
from launch.ports import own_ports

HOSTS = ("n0", "n1", "n2")


def contexts(world_size: int = 6) -> list[RankContext]:
    port = own_ports(2)
    return [
        RankContext(rank, world_size, rank % 2, 2, hosts=HOSTS, master_addr="127.0.0.1", master_port=port)
        for rank in range(world_size)
    ]


def run(facts: list[dict], ranks: list[RankContext], deadline_s: float = 20.0) -> dict[int, str]:
    """Let the ranks that have facts agree, each in a thread; rank -> its error, or an empty string."""
    answers: dict[int, str] = {}

    def one(context: RankContext, own: dict) -> None:
        try:
            agree(context, own, deadline_s)
            answers[context.rank] = ""
        except LaunchError as error:
            answers[context.rank] = str(error)

    threads = [threading.Thread(target=one, args=pair) for pair in zip(ranks, facts, strict=False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(deadline_s + 30)
    return answers


def facts_of(ranks: list[RankContext], **job: str) -> list[dict]:
    records = [gather_facts(context, {"run file": "abc"} | job, {"NCCL_CROSS_NIC": "0"}) for context in ranks]
    for record in records:
        record["host"] = HOSTS[record["rank"] // 2]
    return records


def test_equal_ranks_agree_quickly():
    ranks = contexts()
    start = time.monotonic()
    assert set(run(facts_of(ranks), ranks).values()) == {""}
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("run file", "def", r"run file is 'abc' on 5 of 6 ranks, but 'def' on n2 \(rank 5\)"),
        ("torch", "2.9.0", r"torch is .* on 5 of 6 ranks, but '2.9.0' on n2"),
        ("NCCL_CROSS_NIC", None, r"NCCL_CROSS_NIC is '0' on 5 of 6 ranks, but '\(not set\)' on n2"),
    ],
)
def test_the_odd_one_is_named_on_every_rank(name, value, message):
    ranks = contexts()
    facts = facts_of(ranks)
    facts[5]["equal"].pop(name)
    if value:
        facts[5]["equal"][name] = value
    answers = run(facts, ranks)
    assert len(answers) == 6
    assert all(re.search(message, text) for text in answers.values()), answers


def test_an_absent_host_is_named_within_the_deadline():
    ranks = contexts()
    start = time.monotonic()
    answers = run(facts_of(ranks)[:4], ranks, deadline_s=2.0)
    assert time.monotonic() - start < 6
    assert "n2: no answer from ranks 4,5 within 2 s" in answers[0]
    assert answers[3] == answers[0], "who could be reached hears the same"


def test_a_rank_given_twice_and_a_clock_that_is_off():
    ranks = contexts()
    facts = facts_of(ranks)
    facts[3]["rank"] = 2
    assert "rank 2 was given twice" in run(facts, ranks, deadline_s=2.0)[0]
    late = facts_of(ranks)
    late[4]["skew_s"] = -33.0
    assert compare(late) == [
        "the clock of n2 (rank 4) is 33.0 s behind rank 0's (more than 5 s): check chrony or ntpd there"
    ]


def test_a_port_in_use_and_a_name_that_does_not_resolve():
    ranks = contexts()
    with (
        socket.create_server(("", ranks[0].agreement_port)),
        pytest.raises(LaunchError, match=f"port {ranks[0].agreement_port} on .* in use"),
    ):
        agree(ranks[0], facts_of(ranks)[0], 1.0)
    lost = RankContext(1, 2, 0, 1, master_addr="no-such-host.invalid", master_port=ranks[0].master_port)
    with pytest.raises(LaunchError, match=r"cannot resolve 'no-such-host\.invalid'"):
        agree(lost, facts_of(ranks)[0], 5.0)
