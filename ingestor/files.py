"""Small text files that an operator writes: `.env`, and files with a secret. Reads are bounded.

Errors never quote the content, which may be a secret.
"""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

from dotenv.parser import parse_stream

MAX_FILE_BYTES = 2**16
"""Maximum size of a file. A larger one is probably the wrong file."""

_QUOTES = ("'", '"')


class FileTextError(ValueError):
    """A file cannot be used. The message says why; it completes a sentence that begins with the file's name."""


def read_text(path: Path) -> str:
    """Return a file's text without a byte-order mark. Raises FileTextError, and OSError if it can't be opened."""
    with open(path, "rb", opener=_open) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise FileTextError("it is not a regular file, which could be read again")
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise FileTextError(f"it is larger than {MAX_FILE_BYTES // 2**10} KiB")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise FileTextError("it is UTF-16 text; save it as UTF-8")
    if b"\0" in data:
        raise FileTextError("it contains a NUL character; save it as UTF-8 text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise FileTextError("it is not UTF-8 text") from None


def read_secret(path: Path) -> str:
    """Return the only line of a file without surrounding white space and quotes. Raises as `read_text`."""
    text = unquoted(read_text(path))
    if not text:
        raise FileTextError("it is empty")
    if len(text.splitlines()) > 1:
        raise FileTextError("it has more than one line")
    return text


def read_env(path: Path) -> dict[str, str]:
    """Return the variables of a `.env` file. A `$` is not expanded. The last of equal names counts.

    Single quotes keep everything literally; within double quotes a backslash escapes; without quotes a `#` behind a
    space begins a comment. Raises as `read_text`.
    """
    found: dict[str, str] = {}
    for binding in parse_stream(io.StringIO(read_text(path), newline="")):
        line = binding.original.line + _blank_lines(binding.original.string)
        if binding.error:
            raise FileTextError(f"line {line} is not NAME=VALUE, or a quotation mark is missing in it")
        if binding.key is not None:
            if binding.value is None:
                raise FileTextError(f"line {line} has no =")
            found[binding.key] = binding.value
    return found


def unquoted(text: str) -> str:
    """Return a value without surrounding white space and one surrounding pair of quotation marks.

    `docker --env-file` and Kubernetes keep quotation marks that a shell or systemd would remove. Raises
    FileTextError if there is a mark at one end only.
    """
    text = text.strip()
    if not text or (text[0] not in _QUOTES and text[-1] not in _QUOTES):
        return text
    if len(text) == 1 or text[0] != text[-1]:
        raise FileTextError("has a quotation mark at one end only; remove it")
    return text[1:-1]


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # opening a FIFO without a writer would block


def _blank_lines(text: str) -> int:
    """Return the number of leading blank lines, which the parser attributes to the next binding."""
    return len(text[: len(text) - len(text.lstrip())].splitlines())
