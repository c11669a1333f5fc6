"""Backfill: fetches bars of gaps from the provider's REST API, and compares its bars with ours."""
