"""Writes the Grafana dashboard: `python -m deploy.grafana > deploy/grafana-dashboard.json`."""

import json
from typing import Any

_WIDTH, _HEIGHT = 8, 8
_RATE = "[$__rate_interval]"


def _quantiles(name: str) -> list[tuple[str, str]]:
    return [(f"p{q}", f"histogram_quantile(0.{q}, sum by (le) (rate({name}_bucket{_RATE})))") for q in (50, 90, 99)]


PANELS: tuple[tuple[str, str, list[tuple[str, str]]], ...] = (
    ("Ranks alive", "short", [("alive", "moejax_ranks_alive"), ("started", "moejax_ranks")]),
    (
        "Losses prepared for",
        "percentunit",
        [("{{loss}}", "moejax_lattice_coverage"), ("certificate holds", "moejax_certificate_holds")],
    ),
    (
        "Recoveries and ranks that came back",
        "short",
        [
            ("{{cause}}: {{outcome}}", f"increase(moejax_recoveries_total{_RATE})"),
            ("rejoin {{outcome}}", f"increase(moejax_rejoins_total{_RATE})"),
        ],
    ),
    (
        "Mean recovery by phase",
        "s",
        [
            (
                "{{phase}}",
                "sum by (phase) (increase(moejax_recovery_phase_seconds_sum[1h]))"
                " / sum by (phase) (increase(moejax_recovery_phase_seconds_count[1h]))",
            )
        ],
    ),
    ("Stall if a rank died now", "s", [("rank {{rank}}", "moejax_rank_loss_stall_seconds")]),
    (
        "Alarms: compiles after ready, masked experts",
        "short",
        [("compiles", "moejax_compiles_after_ready_total"), ("masked", "moejax_masked_experts")],
    ),
    (
        "Tokens per second",
        "short",
        [
            ("generated", f"rate(vllm:generation_tokens_total{_RATE})"),
            ("prompt", f"rate(vllm:prompt_tokens_total{_RATE})"),
        ],
    ),
    ("Requests", "short", [("running", "vllm:num_requests_running"), ("waiting", "vllm:num_requests_waiting")]),
    (
        "Ended per second",
        "short",
        [("{{finished_reason}}", f"sum by (finished_reason) (rate(vllm:request_success_total{_RATE}))")],
    ),
    ("Time to first token", "s", _quantiles("vllm:time_to_first_token_seconds")),
    ("Between two tokens", "s", _quantiles("vllm:inter_token_latency_seconds")),
    ("Whole request", "s", _quantiles("vllm:e2e_request_latency_seconds")),
    ("Cache in use", "percentunit", [("pages", "vllm:kv_cache_usage_perc")]),
    (
        "Prompt tokens found in the prefix cache",
        "percentunit",
        [("hits", f"rate(vllm:prefix_cache_hits_total{_RATE}) / rate(vllm:prefix_cache_queries_total{_RATE})")],
    ),
    ("Busiest expert over the mean", "short", [("layer {{layer}}", "moejax_expert_imbalance")]),
    (
        "Time of a step",
        "s",
        [
            ("step", f"rate(moejax_step_seconds_total{_RATE}) / rate(moejax_steps_total{_RATE})"),
            ("programs", f"rate(moejax_program_seconds_total{_RATE}) / rate(moejax_steps_total{_RATE})"),
        ],
    ),
    (
        "Padding of steps",
        "percentunit",
        [("padding", f"1 - rate(moejax_rows_filled_total{_RATE}) / rate(moejax_rows_total{_RATE})")],
    ),
)


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    source = {"type": "prometheus", "uid": "${source}"}
    panels = []
    for at, (title, unit, series) in enumerate(PANELS):
        panels.append(
            {
                "id": at + 1,
                "type": "timeseries",
                "title": title,
                "datasource": source,
                "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
                "gridPos": {"h": _HEIGHT, "w": _WIDTH, "x": _WIDTH * (at % 3), "y": _HEIGHT * (at // 3)},
                "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
                "targets": [
                    {"refId": chr(ord("A") + i), "datasource": source, "expr": query, "legendFormat": legend}
                    for i, (legend, query) in enumerate(series)
                ],
            }
        )
    return {
        "title": "moejax",
        "uid": "moejax",
        "schemaVersion": 39,
        "tags": ["moejax", "llm"],
        "time": {"from": "now-30m", "to": "now"},
        "refresh": "5s",
        "templating": {
            "list": [{"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}],
        },
        "annotations": {
            "list": [
                {
                    "name": "re-plans",
                    "datasource": source,
                    "enable": True,
                    "expr": "changes(moejax_epoch[10s]) > 0",
                    "iconColor": "red",
                    "titleFormat": "new epoch",
                }
            ]
        },
        "panels": panels,
    }


def main() -> None:
    """Print it."""
    print(json.dumps(dashboard(), indent=1))


if __name__ == "__main__":
    main()
