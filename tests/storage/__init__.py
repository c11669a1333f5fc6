"""Fills a database with a year of ticks, and measures what it takes: bytes, and time for every documented query."""
