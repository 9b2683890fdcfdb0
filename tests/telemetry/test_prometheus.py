"""A real Prometheus scrapes a real training run, answers every query of the dashboard, and evaluates the rules."""

from __future__ import annotations

import functools
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from megatron_zaya.telemetry.alerts import rules_file
from megatron_zaya.telemetry.dashboard import dashboard, dashboard_file
from megatron_zaya.telemetry.events import RunEnded, StepDone
from megatron_zaya.telemetry.jsonl import JsonlSink, read_events, steps_by_iteration
from megatron_zaya.telemetry.metrics import METRICS
from megatron_zaya.telemetry.prometheus import HangWatch, PrometheusSink, TextfileSink
from megatron_zaya.telemetry.stream import EventStream
from tests.ranks import free_port
from tests.telemetry.test_sinks import EVENTS, NOW, START, step
from tests.train.conftest import TINY_MODEL, text_prefix  # noqa: F401

MONITORING = Path(__file__).parents[2] / "monitoring"
RECORDED = Path(__file__).parent / "recorded"
JOB = {"SLURM_JOB_ID": "4711", "SLURM_JOB_USER": "ada", "SLURM_JOB_PARTITION": "gpu", "SLURM_CLUSTER_NAME": "lab"}
LABELS = {"run": "watched", "job_id": "4711", "job_user": "ada", "job_partition": "gpu", "cluster_name": "lab"}
BATCH, LENGTH, INTERVAL = 4, 32, 5
PATIENCE_S = 120


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


class Prometheus:
    """A server of its own on a free port."""

    def __init__(self, folder: Path, targets: dict[str, int]) -> None:
        self.port = free_port()
        config = {
            "global": {"scrape_interval": "500ms", "evaluation_interval": "500ms"},
            "rule_files": [str(MONITORING / "alerts.yaml")],
            "scrape_configs": [
                {"job_name": name, "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}
                for name, port in targets.items()
            ],
        }
        config["scrape_configs"][1]["metrics_path"] = "/amd_exporter.prom"
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        self.log = folder / "prometheus.log"
        command = ["prometheus", "--config.file", folder / "prometheus.yaml", "--storage.tsdb.path", folder / "tsdb"]
        with self.log.open("w") as log:
            listen = f"--web.listen-address=127.0.0.1:{self.port}"
            self.process = subprocess.Popen([*command, listen], stdout=log, stderr=log)

    def ask(self, path: str, **parameters: str) -> dict:
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        return json.loads(get(url))["data"]

    def query(self, expression: str) -> list[dict]:
        return self.ask("query", query=expression)["result"]


def queries() -> list[str]:
    """Return every query of the dashboard as Grafana asks it with "All" chosen."""
    found = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", [])]
    chosen = {"$run": ".*", "$job_id": ".*", "$__rate_interval": "10s"}
    return [functools.reduce(lambda text, pair: text.replace(*pair), chosen.items(), query) for query in found]


def serve_recorded_page() -> http.server.ThreadingHTTPServer:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(RECORDED))
    handler.func.log_message = lambda *args: None
    handler.func.extensions_map |= {".prom": "text/plain; version=0.0.4"}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture(scope="module")
def watched(tmp_path_factory, text_prefix):  # noqa: F811
    """A training run under observation: (its folder, its port, Prometheus); stopped in order at the end."""
    folder, port = tmp_path_factory.mktemp("watched"), free_port()
    tree = {
        "run": {"name": "watched", "dir": str(folder / "{name}"), "precision": "fp32"},
        "model": TINY_MODEL,
        "schedule": dict(train_iters=10**6, global_batch_size=BATCH, eval_interval=INTERVAL, eval_iters=1),
        "data": {"data_path": [str(text_prefix)], "seq_length": LENGTH},
        "checkpoint": {"save_interval": INTERVAL, "keep_last": 1},
        "telemetry": {"loss_curve": False, "prometheus": "http", "prometheus_port": port, "peak_tflops": 0.1},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    page = serve_recorded_page()
    prometheus = Prometheus(folder, {"zaya": port, "amd": page.server_port})
    command = [sys.executable, "-m", "megatron_zaya.pretrain", str(folder / "run.yaml")]
    with (folder / "run.log").open("w") as log:
        run = subprocess.Popen(command, env=os.environ | JOB, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield folder, port, prometheus
        run.send_signal(signal.SIGTERM)
        assert run.wait(PATIENCE_S) == 0, (folder / "run.log").read_text()
    finally:
        run.kill()
        prometheus.process.kill()
        prometheus.process.wait()
        page.shutdown()


def test_every_query_of_the_dashboard_has_data(watched):
    folder, _, prometheus = watched
    missing, deadline = queries(), time.monotonic() + PATIENCE_S
    while missing and time.monotonic() < deadline:
        time.sleep(0.5)
        try:
            missing = [query for query in missing if not prometheus.query(query)]
        except OSError:
            continue  # it still starts
    assert not missing, (missing, (folder / "run.log").read_text()[-2000:], prometheus.log.read_text()[-2000:])


def test_the_series_carry_the_job_and_its_figures(watched):
    folder, port, prometheus = watched
    families = {f.name: f for f in text_string_to_metric_families(get(f"http://127.0.0.1:{port}/metrics"))}
    ours = {name for name in families if name.startswith("zaya_")}
    assert ours <= {metric.name.removesuffix("_total") for metric in METRICS} | {"zaya_train_hang_suspected"}
    for name in ours:
        for sample in families[name].samples:
            assert {label: sample.labels[label] for label in LABELS} == LABELS
            assert sample.labels["hostname"]
    value = {sample.name: sample.value for name in ours for sample in families[name].samples}
    steps = value["zaya_train_steps_total"]
    assert value["zaya_train_step_duration_seconds_count"] == steps == value["zaya_train_iteration"]
    assert value["zaya_train_tokens_total"] == steps * BATCH * LENGTH
    deadline = time.monotonic() + PATIENCE_S
    while (record := steps_by_iteration(folder / "watched/metrics.jsonl").get(steps)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert value["zaya_train_loss"] == record["loss"]
    assert value["zaya_checkpoint_last_iteration"] % INTERVAL == 0
    layers = {sample.labels["layer"] for sample in families["zaya_moe_layer_load_violation"].samples}
    assert layers == {str(layer) for layer in range(TINY_MODEL["num_layers"])}
    joined = prometheus.query("zaya_train_loss * on (job_id) group_left sum by (job_id) (gpu_package_power)")
    assert joined, "trainer and accelerators join on job_id"


def test_it_evaluates_the_shipped_rules(watched):
    _, _, prometheus = watched
    (group,) = prometheus.ask("rules")["groups"]
    assert {rule["health"] for rule in group["rules"]} == {"ok"}, group
    assert len(group["rules"]) == len(yaml.safe_load(rules_file())["groups"][0]["rules"])
    firing = {
        alert["labels"]["alertname"] for alert in prometheus.ask("alerts")["alerts"] if alert["state"] == "firing"
    }
    assert not firing & {"ZayaNoStep", "ZayaLossNotFinite", "ZayaCheckpointTooOld", "ZayaTelemetryTrouble"}


def test_promtool_accepts_the_rules_and_each_alert_fires_when_it_should():
    subprocess.run(["promtool", "check", "rules", MONITORING / "alerts.yaml"], check=True, capture_output=True)
    tests = Path(__file__).with_name("alerts_test.yaml")
    result = subprocess.run(["promtool", "test", "rules", tests], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_alert_has_a_promtool_test():
    text = Path(__file__).with_name("alerts_test.yaml").read_text()
    names = [rule["alert"] for rule in yaml.safe_load(rules_file())["groups"][0]["rules"]]
    assert [name for name in names if name not in text] == []


@pytest.mark.parametrize(
    ("name", "made"), [("alerts.yaml", rules_file), ("grafana_dashboard.json", dashboard_file)], ids=["rules", "board"]
)
def test_the_shipped_files_are_up_to_date(name, made):
    command = "rules" if name == "alerts.yaml" else "dashboard"
    message = f"make it anew: zaya telemetry {command} > monitoring/{name}"
    assert (MONITORING / name).read_text(encoding="utf-8") == made(), message


def test_the_panels_do_not_overlap():
    taken = set()
    for panel in dashboard()["panels"]:
        g = panel["gridPos"]
        cells = {(x, y) for x in range(g["x"], g["x"] + g["w"]) for y in range(g["y"], g["y"] + g["h"])}
        assert not cells & taken, panel["title"]
        assert g["x"] + g["w"] <= 24
        taken |= cells


def test_a_port_that_is_taken_leaves_the_other_sinks_alone(tmp_path, caplog):
    port = free_port()
    with http.server.HTTPServer(("127.0.0.1", port), http.server.BaseHTTPRequestHandler):
        sinks = [PrometheusSink(LABELS, "127.0.0.1", port), JsonlSink(tmp_path / "m.jsonl")]
        stream = EventStream(sinks)
        for event in EVENTS:
            stream.emit(event)
        stream.close()
    assert f"cannot listen on 127.0.0.1:{port}" in caplog.text
    assert "telemetry.prometheus_port" in caplog.text
    assert len(steps_by_iteration(tmp_path / "m.jsonl")) == 40


@pytest.mark.parametrize("ended", [True, False], ids=["ended in order", "died"])
def test_the_textfile_goes_with_a_run_that_ends_and_stays_with_one_that_dies(tmp_path, ended):
    sink = TextfileSink(LABELS, tmp_path, interval_s=0.01)
    stream = EventStream([sink])
    for event in [START, step(1), step(2)]:
        stream.emit(event)
    deadline = time.monotonic() + 20
    while not (sink.path.exists() and "zaya_train_iteration" in sink.path.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if ended:
        stream.emit(RunEnded(2, "finished"))
    stream.close()
    assert sink.path.name == "zaya_watched_4711.prom"
    assert list(tmp_path.iterdir()) == ([] if ended else [sink.path])
    if not ended:
        families = {f.name: f for f in text_string_to_metric_families(sink.path.read_text())}
        assert families["zaya_train_iteration"].samples[0].value == 2
        assert families["zaya_train_running"].samples[0].value == 1


def test_a_hang_is_suspected_after_ten_times_the_slowest_step():
    watch = HangWatch()
    assert not watch.suspects(NOW)
    watch.handle(START, NOW)
    assert (watch.suspects(NOW + 599), watch.suspects(NOW + 601)) == (False, True)  # the first step may take long
    for seconds in (4.0, 8.0):
        slow = StepDone(**{**step(1).__dict__, "step_time_s": seconds})
        watch.handle(slow, NOW)
    assert (watch.suspects(NOW + 79), watch.suspects(NOW + 81)) == (False, True)
    watch.handle(RunEnded(2, "finished"), NOW)
    assert not watch.suspects(NOW + 10**6)


def test_the_run_wrote_its_own_record_beside(watched):
    folder, _, _ = watched
    kinds = {record["event"] for record in read_events(folder / "watched/metrics.jsonl")}
    assert {"RunStarted", "StepDone", "MoeHealth", "MemoryUsed", "Communication", "Evaluated", "Saved"} <= kinds
    assert "SinkTrouble" not in kinds


def test_the_batch_log_has_one_printable_line_for_each_step(watched):
    text = (watched[0] / "run.log").read_text()
    assert all(line.isprintable() for line in text.splitlines())
    assert [line.split("/")[0] for line in text.splitlines() if line.startswith(" iteration ")][:2] == [
        f" iteration {iteration:8d}" for iteration in (1, 2)
    ]
