"""Telemetry: log lines, metrics, readiness and liveness."""
