"""Fills a database with a year of ticks, and measures its bytes and the time of every documented query."""
