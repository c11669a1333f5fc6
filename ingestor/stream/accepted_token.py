"""Remembers across restarts that an endpoint has accepted a token. The file reveals neither of them."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from pathlib import Path


class AcceptedToken:
    """A small file beside the spool: a random key, and the keyed hash of endpoint and token.

    A missing, unreadable or damaged file counts as not accepted.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def matches(self, endpoint: str, token: str) -> bool:
        """Return whether this endpoint has accepted this token before."""
        try:
            key, _, digest = self._path.read_text(encoding="ascii").strip().partition(":")
            return hmac.compare_digest(digest, _digest(bytes.fromhex(key), endpoint, token))
        except (OSError, ValueError):
            return False

    def write(self, endpoint: str, token: str) -> None:
        """Record the acceptance, unless the file has it already. Raises OSError."""
        if self.matches(endpoint, token):
            return
        key = secrets.token_bytes(32)
        temporary = self._path.with_suffix(".new")
        temporary.touch(mode=0o600)
        temporary.write_text(f"{key.hex()}:{_digest(key, endpoint, token)}\n", encoding="ascii")
        temporary.replace(self._path)


def _digest(key: bytes, endpoint: str, token: str) -> str:
    return hashlib.blake2b(f"{endpoint}\0{token}".encode(), key=key).hexdigest()
