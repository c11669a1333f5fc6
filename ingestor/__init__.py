"""Keeps a Financefeast stream alive and puts every tick into PostgreSQL, exactly once."""

__version__ = "0.1.0"
