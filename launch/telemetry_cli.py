"""`zaya telemetry`: what a monitoring system needs of this project, made from the table of metrics."""

from __future__ import annotations

import typer

app = typer.Typer(no_args_is_help=True, help="For Prometheus and Grafana: dashboard, alert rules, list of metrics.")


@app.command()
def dashboard() -> None:
    """Print the Grafana dashboard (JSON); monitoring/grafana_dashboard.json is this."""
    from megatron_zaya.telemetry.dashboard import dashboard_file

    print(dashboard_file(), end="")


@app.command()
def rules() -> None:
    """Print the alert rules for Prometheus (YAML); monitoring/alerts.yaml is this."""
    from megatron_zaya.telemetry.alerts import rules_file

    print(rules_file(), end="")


@app.command()
def metrics() -> None:
    """Print the table of metrics as Markdown."""
    from megatron_zaya.telemetry.metrics import markdown_table

    print(markdown_table(), end="")
