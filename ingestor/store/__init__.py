"""The store: PostgreSQL, with or without TimescaleDB. One transaction for what is taken from the buffer."""
