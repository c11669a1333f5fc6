"""How all commands read their arguments: errors in our words and without a secret, and help without Python's types."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from typer.core import TyperCommand, TyperGroup

from ingestor.redaction import redact
from ingestor.settings import plain_words


class _PlainFlags:
    """A flag takes no value, so its help names no type of one."""

    def get_params(self, ctx: Any) -> Any:
        """Return the parameters, and the option for help. Called by the library."""
        params = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return params


class Command(_PlainFlags, TyperCommand):
    """One command."""


class Group(_PlainFlags, TyperGroup):
    """The commands, whose errors do not repeat a secret that somebody has typed."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Read the arguments that stand before the command. Called by the library."""
        with _in_our_words():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        """Read the command's arguments, and run it. Called by the library."""
        with _in_our_words():
            return super().invoke(ctx)


@contextlib.contextmanager
def _in_our_words() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        usage: Any = error  # the library's own errors have no common name that is public
        if hasattr(usage, "format_message"):
            usage.message = redact(plain_words(usage.message))
        raise
