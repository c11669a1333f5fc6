"""What happens, told to people and to machines: log lines, counts, and what is not as it should be."""
