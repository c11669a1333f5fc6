"""The buffer: one FIFO between the stream, which must not wait, and the database, which may be slow."""
