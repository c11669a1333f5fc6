"""Backfill: asks the provider's REST API for what was not heard, and compares what was."""
