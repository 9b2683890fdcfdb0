"""The controller and real agents on this machine, with ranks that need no torch: every way down, and back."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launch.ports import CONTROLLER, job_port
from launch.supervise.job import Job, Policy
from launch.supervise.record import exclude, read_events, read_excluded

REPOSITORY = Path(__file__).parents[2]
POLICY = Policy(
    connect_timeout_s=20, node_timeout_s=4, start_timeout_s=15, hang_timeout_s=1.5, save_timeout_s=5, settle_s=0.5,
    straggler_steps=5,
)  # fmt: skip


def make_job(
    folder: Path, faults: str = "", *, nodes: int = 2, per_node: int = 1, spares: int = 1, iterations: int = 6
):
    steps = folder / "steps"
    steps.mkdir(parents=True)
    return Job(
        name="toy",
        folder=folder / "launch",
        workdir=REPOSITORY,
        nodes=nodes,
        ranks_per_node=per_node,
        command=[sys.executable, "-m", "tests.launch.toy_rank", str(steps), str(iterations), faults],
        agent_command=[sys.executable, "-m", "launch.supervise.agent"],
        hosts=[f"h{number}" for number in range(nodes + spares)],
        token="secret",
        policy=POLICY,
    )


def start(job: Job) -> subprocess.Popen:
    job.write()
    command = [sys.executable, "-m", "launch.supervise", str(job.folder), "--local"]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen, timeout_s: float = 60) -> tuple[int, str]:
    out = process.communicate(timeout=timeout_s)[0]
    return process.returncode, out


def run(job: Job) -> tuple[int, str, list[dict]]:
    status, out = finish(start(job))
    return status, out, read_events(job.folder / "events.jsonl")


def of_kind(events: list[dict], kind: str) -> list[dict]:
    return [event for event in events if event["event"] == kind]


def test_a_run_without_faults(tmp_path):
    status, out, events = run(make_job(tmp_path, per_node=2, spares=0))
    assert status == 0, out
    assert [e["event"] for e in events] == ["job_started", "attempt_started", "training", "job_finished"]
    assert events[-1]["iteration"] == 6
    assert oct((tmp_path / "launch/job.json").stat().st_mode)[-3:] == "600"


@pytest.mark.parametrize(
    ("fault", "category", "reason", "excluded"),
    [
        ("crash", "user code", "ValueError: a wrong shape", []),
        ("device", "device", "HIP error", ["h1"]),
        ("nan", "numerical", "the loss is nan", []),
        ("network", "network", "Connection closed by peer", []),
        ("kill", "host memory", "SIGKILL", []),
        ("hang", "hang", "it is in fail (tests/launch/toy_rank.py", []),
        ("stop", "hang", "it did not answer; the process is T (stopped)", ["h1"]),
    ],
)
def test_a_fault_is_named_and_the_job_goes_on(tmp_path, fault, category, reason, excluded):
    status, out, events = run(make_job(tmp_path, f"{fault}:rank=1,iteration=3,attempt=0"))
    assert status == 0, out
    (incident,) = of_kind(events, "incident")
    assert (incident["category"], incident["rank"], incident["host"]) == (category, 1, "h1")
    assert reason in incident["reason"]
    assert incident["iteration"] == 3
    attempts = of_kind(events, "attempt_started")
    assert attempts[1]["hosts"] == (["h0", "h2"] if excluded else ["h0", "h1"])
    assert list(read_excluded(tmp_path / "launch")) == excluded
    report = Path(incident["report"]).read_text()
    assert "rank 1 on h1" in report and reason.split(" (")[0] in report
    assert of_kind(events, "training")[1]["recovered_after_s"] > 0
    assert events[-1] | {"time": 0} == {"event": "job_finished", "time": 0, "iteration": 6}


def test_a_dead_node_is_replaced_by_a_spare_in_its_place(tmp_path):
    import psutil

    job = make_job(tmp_path, iterations=40)
    process = start(job)
    log = job.folder / "events.jsonl"
    while not read_events(log, "training"):
        time.sleep(0.1)
    agents = [p for p in psutil.Process(process.pid).children() if "h0" in p.cmdline()]
    agents[0].kill()  # its rank dies with it
    status, out = finish(process)
    assert status == 0, out
    events = read_events(log)
    assert of_kind(events, "incident")[0]["category"] == "node"
    assert of_kind(events, "attempt_started")[1]["hosts"] == ["h2", "h1"], "rank 0 moved to the spare"
    assert of_kind(events, "training")[1]["recovered_after_s"] > 0


def test_a_fault_that_comes_again_and_again_ends_the_job(tmp_path):
    faults = ";".join(f"crash:rank=0,iteration=1,attempt={attempt}" for attempt in range(9))
    job = make_job(tmp_path, faults)
    job = replace(job, policy=replace(POLICY, max_restarts_without_progress=1))
    status, _, events = run(job)
    assert status == 1
    assert len(of_kind(events, "attempt_started")) == 2
    assert "2 attempts in a row did not get beyond iteration 1" in events[-1]["reason"]
    assert len(list((job.folder / "incidents").iterdir())) == 2


def test_wrong_input_is_not_tried_again(tmp_path):
    status, _, events = run(make_job(tmp_path, "input:rank=0,iteration=1,attempt=0"))
    assert status == 2
    assert len(of_kind(events, "attempt_started")) == 1
    assert "model.num_layer: unknown key" in of_kind(events, "incident")[0]["reason"]


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGUSR1, 75), (signal.SIGTERM, 0)])
def test_a_signal_saves_and_the_next_start_goes_on(tmp_path, number, expected):
    job = make_job(tmp_path, iterations=60)
    process = start(job)
    while not read_events(job.folder / "events.jsonl", "training"):
        time.sleep(0.1)
    process.send_signal(number)
    status, out = finish(process)
    assert status == expected, out
    saved = int((tmp_path / "steps/saved").read_text())
    assert 0 < saved < 60
    status, out = finish(start(job))
    assert status == 0, out
    log = read_events(job.folder / "events.jsonl")
    assert [e["attempt"] for e in of_kind(log, "attempt_started")] == [0, 1]
    assert of_kind(log, "job_finished")[0]["iteration"] == 60


def test_a_bad_node_fails_its_check_and_is_left_out_before_anything_starts(tmp_path):
    check = tmp_path / "check.sh"
    check.write_text(
        '#!/bin/sh\ntr "\\0" " " </proc/$PPID/cmdline | grep -q "host h0" && { echo "7 of 8 GPUs"; exit 1; }\nexit 0\n'
    )
    check.chmod(0o755)
    status, out, events = run(replace(make_job(tmp_path), preflight_command=[str(check)]))
    assert status == 0, out
    assert of_kind(events, "node_excluded")[0]["said"] == ["7 of 8 GPUs"]
    assert [e["hosts"] for e in of_kind(events, "attempt_started")] == [["h2", "h1"]]


def test_too_few_healthy_nodes_end_the_job_with_their_names(tmp_path):
    job = make_job(tmp_path)
    job.folder.mkdir()
    for host in ("h0", "h2"):
        exclude(job.folder, host, "broken")
    status, _, events = run(job)
    assert status == 1
    assert events[-1]["event"] == "too_few_nodes"
    assert (events[-1]["healthy"], events[-1]["excluded"]) == (["h1"], ["h0", "h2"])


def test_a_node_that_does_not_answer_and_a_clock_that_is_off_are_left_out(tmp_path):
    agent = tmp_path / "agent.py"
    agent.write_text(
        "import sys, time\n"
        "if 'h1' in sys.argv: sys.exit('no route to the controller')\n"
        "real = time.time\n"
        "if 'h2' in sys.argv: time.time = lambda: real() + 30\n"
        "from launch.supervise.agent import main\n"
        "sys.exit(main())\n"
    )
    job = make_job(tmp_path, nodes=1, spares=2)
    job = replace(
        job,
        hosts=["h1", "h2", "h0"],
        agent_command=["env", f"PYTHONPATH={REPOSITORY}", sys.executable, str(agent)],
    )
    status, out, events = run(job)
    assert status == 0, out
    (absent,) = of_kind(events, "nodes_absent")
    assert (absent["hosts"], absent["said"]) == (["h1"], ["no route to the controller"])
    (late,) = of_kind(events, "node_excluded")
    assert (late["host"], late["why"]) == ("h2", "clock") and "check chrony" in late["said"][0]
    assert [e["hosts"] for e in of_kind(events, "attempt_started")] == [["h0"]]


def test_a_second_controller_of_the_same_job_is_refused(tmp_path):
    job = make_job(tmp_path)
    job.write()
    port = job_port(77, CONTROLLER)
    environment = {**os.environ, "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n[0-2]"}
    with socket.create_server(("", port)):
        command = [sys.executable, "-m", "launch.supervise", str(job.folder)]
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert f"port {port} on" in done.stderr and "another controller of this job" in done.stderr


def test_a_straggler_is_reported_once(tmp_path):
    status, out, events = run(make_job(tmp_path, "slow:rank=1", nodes=3, spares=0, iterations=14))
    assert status == 0, out
    (slow,) = of_kind(events, "straggler")
    assert (slow["rank"], slow["host"], slow["busy_s"], slow["median_s"]) == (1, "h1", 0.3, 0.05)


def test_a_stranger_is_not_an_agent(tmp_path):
    import asyncio

    from launch.supervise.controller import Controller
    from launch.supervise.wire import encode

    async def knock() -> tuple[dict, bytes]:
        fleet = Controller(make_job(tmp_path), local=True).fleet
        server = await asyncio.start_server(fleet.accept, "127.0.0.1", 0)
        async with server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write(encode({"type": "hello", "token": "guessed", "host": "h0"}))
            return fleet.agents, await reader.read()

    agents, answer = asyncio.run(knock())
    assert (agents, answer) == ({}, b"")


def test_the_controller_needs_the_standard_library_only():
    code = "import json, launch.supervise.controller, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert not {"torch", "numpy", "pydantic", "yaml"} & set(json.loads(done.stdout))
