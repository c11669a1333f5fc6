"""Argument parsing of all commands: errors in our wording without secrets, help without Python types."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from typer.core import TyperCommand, TyperGroup

from ingestor.redaction import redact
from ingestor.settings import plain_words


class _PlainFlags:
    """Shows no value type in the help of a flag."""

    def get_params(self, ctx: Any) -> Any:
        """Return the parameters including the help option. Called by the library."""
        params = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return params


class Command(_PlainFlags, TyperCommand):
    """One command."""


class Group(_PlainFlags, TyperGroup):
    """The commands. Errors do not repeat a secret that the user typed."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Parse the arguments before the command. Called by the library."""
        with _redacted_usage_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        """Parse the command's arguments and run it. Called by the library."""
        with _redacted_usage_errors():
            return super().invoke(ctx)


@contextlib.contextmanager
def _redacted_usage_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        usage: Any = error  # the library exports no common base of its errors
        if hasattr(usage, "format_message"):
            usage.message = redact(plain_words(usage.message))
        raise
