"""The relay: serves recorded and live ticks by Stream API v1, each tick once, from any moment on record."""
