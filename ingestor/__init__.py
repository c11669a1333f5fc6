"""Keeps a Financefeast stream alive and stores every tick in PostgreSQL exactly once."""

__version__ = "0.1.0"
