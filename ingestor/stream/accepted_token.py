"""Remembers, across restarts, that an endpoint has accepted a token, without knowing either."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from pathlib import Path


class AcceptedToken:
    """A small file beside the spool: a random key, and the hash of endpoint and token under it.

    Raises OSError where the file can't be written. A file that can't be read, or is damaged, means no.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def matches(self, endpoint: str, token: str) -> bool:
        """Whether this endpoint has accepted this token before."""
        try:
            key, _, digest = self._path.read_text(encoding="ascii").strip().partition(":")
            return hmac.compare_digest(digest, _digest(bytes.fromhex(key), endpoint, token))
        except (OSError, ValueError):
            return False

    def write(self, endpoint: str, token: str) -> None:
        """Remember that it did; nothing is written where that is known already."""
        if self.matches(endpoint, token):
            return
        key = secrets.token_bytes(32)
        temporary = self._path.with_suffix(".new")
        temporary.touch(mode=0o600)
        temporary.write_text(f"{key.hex()}:{_digest(key, endpoint, token)}\n", encoding="ascii")
        temporary.replace(self._path)


def _digest(key: bytes, endpoint: str, token: str) -> str:
    return hashlib.blake2b(f"{endpoint}\0{token}".encode(), key=key).hexdigest()
