"""The HTTP endpoints of a running daemon: liveness, readiness, metrics, and the status page."""
