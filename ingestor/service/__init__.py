"""The service: where the stages meet."""
