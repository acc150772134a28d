"""What an operator watches, for Prometheus. Labels come from small fixed sets, never from a request."""

from __future__ import annotations

import functools

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

BROKEN = ("gone", "slow", "stopped", "file")  # why an answer ended early
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """Counters of one server; `text` is what GET /metrics answers."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("qdeploy_http_requests", "Requests answered.", ["kind", "status"], registry=registry)
        self.sent = Counter("qdeploy_http_sent_bytes", "Body bytes sent.", ["kind"], registry=registry)
        self.seconds = Histogram(
            "qdeploy_http_request_seconds", "From request to last byte.", ["kind"], registry=registry, buckets=SECONDS
        )
        self.connections = Gauge("qdeploy_http_connections", "Connections open.", registry=registry)
        self.refused = Counter("qdeploy_http_refused_connections", "Connections over the limit.", registry=registry)
        self.broken = Counter("qdeploy_http_broken_answers", "Answers that ended early.", ["reason"], registry=registry)
        self.lost_lines = Gauge("qdeploy_lost_log_lines", "Log lines that could not be written.", registry=registry)
        self.reports = Counter("qdeploy_reports", "Reports of devices, by answer.", ["status"], registry=registry)
        self.devices = Gauge("qdeploy_devices", "Devices that have reported.", registry=registry)
        for reason in BROKEN:
            self.broken.labels(reason)

        self._by_kind = functools.cache(lambda kind: (self.sent.labels(kind), self.seconds.labels(kind)))
        self._by_status = functools.cache(self.requests.labels)

    def answered(self, kind: str, status: int, sent: int, seconds: float) -> None:
        """Count one request."""
        self._by_status(kind, status).inc()
        bytes_sent, times = self._by_kind(kind)
        bytes_sent.inc(sent)
        times.observe(seconds)

    def figures(self) -> dict[str, float]:
        """What the fleet page shows, summed over labels: counts and bytes since the start, connections open now."""
        found = {}
        for name in ("requests", "sent", "connections", "refused", "broken", "reports", "lost_lines"):
            rows = [sample for metric in getattr(self, name).collect() for sample in metric.samples]
            found[name] = sum(row.value for row in rows if not row.name.endswith("_created"))
        return found

    def text(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)
