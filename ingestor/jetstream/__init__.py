"""The replicated buffer: a NATS JetStream stream between `ingestor run` and `ingestor write`.

Only this package imports `nats`, and it is imported only if INGESTOR_BUFFER_URL is set.
"""
