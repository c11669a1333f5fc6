"""Benchmarks of the daemon against its peers and limits, measured alternately in one run: `make bench`."""
