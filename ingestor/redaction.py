"""Redacts secrets. All text from outside goes through `outside_text` before it is shown.

Settings register a secret when they read it, before anything can fail on it. From then on `redact` finds it in every
text, however the text was quoted. It also redacts the password of any address in a text, known or not, even if the
password is too short to be searched for.
"""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import ssl
import unicodedata
from collections.abc import Mapping
from enum import Enum
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ingestor.address import HIDDEN, TEMPLATE_HOSTS, TEMPLATE_USERINFO, secrets_of, without_scheme

SHORTEST = 4
"""Characters that a registered secret has at least; redacting a shorter one would garble every line."""

LIMIT = 500
"""Characters of a text from outside that are shown."""

_SHORTEST_BASE64 = 8
_CUT = "…"

_MOST = 2**14
"""Characters of a text from outside that are processed, so that a hostile server can't keep the process busy."""

_LONGEST_FORM = 12
"""Characters that one character of a secret takes at most: a pair of surrogates, quoted twice."""

# An address within a text. `Path` drops the second slash of an address.
_URL = re.compile(r"\b(postgres(?:ql)?(?:\+\w+)?|https?|wss?|socks\w{0,2}):(/+)(\S{0,2000})@", re.IGNORECASE)


class Registry:
    """The registered secrets, and the pattern that finds them. There is one for the process."""

    def __init__(self) -> None:
        self.longest = 0
        """The length of the longest secret, in characters."""
        self._secrets: set[str] = set()
        self._pattern: re.Pattern[str] | None = None  # compiled when it is needed

    def add(self, secret: str) -> None:
        """Register a secret, unless it is too short."""
        if len(secret) >= SHORTEST and secret not in self._secrets:
            self._secrets.add(secret)
            self.longest = max(self.longest, len(secret))
            self._pattern = None

    def redact(self, text: str) -> str:
        """Return the text without the registered secrets."""
        if not self._secrets:
            return text
        if self._pattern is None:
            self._pattern = self._compiled()
        return self._pattern.sub(HIDDEN, text)

    def _compiled(self) -> re.Pattern[str]:
        longest_first = sorted(self._secrets, key=lambda each: (-len(each), each))
        forms = [form for each in longest_first for form in _patterns(each)]
        # The lookahead makes it fast: at nearly every position, no form of any secret begins.
        first = "".join(sorted({re.escape(each) for _, firsts in forms for each in firsts}))
        return re.compile(f"(?=[{first}])(?:{'|'.join(form for form, _ in forms)})", re.IGNORECASE)


_registry = Registry()


def register_secret(secret: str) -> None:
    """Redact a secret in every text from now on, even after it was rotated."""
    _registry.add(secret)
    _registry.add(secret.strip())


def register_url(url: str) -> None:
    """Redact the passwords of an address from now on, even if the address is malformed.

    A password that equals the user's name is redacted only within an address, since the name itself is shown.
    """
    user = without_scheme(url).partition(":")[0]
    for secret in secrets_of(url):
        if secret != user:
            # Register a short one together with its user, as a header of basic authentication holds it.
            register_secret(secret if len(secret) >= SHORTEST else f"{user}:{secret}")


def register_password_file(path: Path) -> None:
    """Register the passwords of a `.pgpass` or `.pg_service.conf`, if the file is there."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        fields = re.split(r"(?<!\\):", line, maxsplit=4)
        if len(fields) == 5 and not line.startswith("#"):
            register_secret(re.sub(r"\\(.)", r"\1", fields[4]))
            register_secret(fields[4])
        elif match := re.match(r"\s*\w*password\s*[=:]\s*(.*)", line):
            register_secret(match[1])


def redact(text: str) -> str:
    """Return a text without registered secrets and without the passwords of the addresses in it."""
    text = _registry.redact(text)
    return _URL.sub(_without_password, text) if "@" in text else text


def redact_values(value: Any, *, keys: bool = False) -> Any:
    """Return nested dictionaries and lists with each text redacted, and with `keys` the keys too.

    Redact before formatting, because a format may quote or cut a secret. Members of enumerations stay as they are, and
    other objects become texts.
    """
    if value is None or isinstance(value, int | float):
        return value
    if isinstance(value, Enum):
        return value
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {
            redact(name) if keys and isinstance(name, str) else name: redact_values(each, keys=keys)
            for name, each in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [redact_values(each, keys=keys) for each in value]
    return redact(str(value))


def outside_text(text: object, *, limit: int = LIMIT) -> str:
    """Return a text from outside redacted, then escaped to one visible line, then cut to `limit` characters.

    The order matters: a secret that is cut or escaped first would not be found. Idempotent.
    """
    whole = str(text)
    clean = redact(whole[:_MOST])
    if len(whole) > _MOST:  # it may end within a secret now
        clean = clean[: max(0, len(clean) - _LONGEST_FORM * _registry.longest)]
    visible = "".join(map(_visible, clean[: limit + 1]))
    return visible if len(visible) <= limit else visible[: limit - 1] + _CUT


def system_words(error: OSError) -> str:
    """Return the system's description of an error, without the address that libraries add to it."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate is not valid: {outside_text(error.verify_message)}"
    if isinstance(error, TimeoutError):
        return "there was no answer in time"
    if isinstance(error, socket.gaierror):
        return outside_text(error.strerror or "its name is not known")
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {outside_text(getattr(error, 'reason', None) or error.strerror or type(error).__name__)}"
    # asyncio puts the address into `strerror`. An error that stands for several has no number.
    return os.strerror(error.errno) if error.errno else f"no connection ({type(error).__name__})"


def _without_password(match: re.Match[str]) -> str:
    scheme, slashes, userinfo = match.groups()
    if userinfo == TEMPLATE_USERINFO and match.string.startswith(TEMPLATE_HOSTS, match.end()):
        return match[0]
    user, colon, _ = userinfo.partition(":")
    if not scheme.lower().startswith("postgres"):  # elsewhere the user may be an API key
        return f"{scheme}:{slashes}{HIDDEN}@"
    return f"{scheme}:{slashes}{user}:{HIDDEN}@" if colon else match[0]


def _visible(character: str) -> str:
    """Return a character, escaped if it is invisible, ends the line, or changes the direction of text."""
    if character == " " or unicodedata.category(character)[0] not in "CZ":
        return character
    return character.encode("unicode_escape").decode("ascii")


def _patterns(secret: str) -> list[tuple[str, set[str]]]:
    """Return patterns of a secret, each with the characters that can begin a match.

    They find the secret in every quoted form, and in texts that mix forms.
    """
    forms = [_forms(character) for character in secret]
    plain = "".join(f"(?:{'|'.join(re.escape(form) for form in each)})" for each in forms)
    return [(plain, {form[0] for form in forms[0]}), *((re.escape(each), {each[0]}) for each in _base64_forms(secret))]


def _forms(character: str) -> list[str]:
    """Return the forms of a character: plain, percent-encoded, and as JSON, Python, HTML and SQL quote it."""
    code = ord(character)
    escaped = {character.encode("unicode_escape").decode("ascii"), json.dumps(character)[1:-1]}
    encoded = character.encode("utf-8", "surrogatepass")
    utf16 = character.encode("utf-16-be", "surrogatepass").hex()
    forms = {
        character,
        "".join(f"%{byte:02x}" for byte in encoded),
        "".join(f"\\x{byte:02x}" for byte in encoded),
        "".join(f"\\u{utf16[start : start + 4]}" for start in range(0, len(utf16), 4)),
        "".join(f"\\\\u{utf16[start : start + 4]}" for start in range(0, len(utf16), 4)),
        quote(character, safe="", errors="surrogateescape"),
        escape(character),
        f"&#{code};",
        f"&#x{code:x};",
        encoded.decode("latin-1"),  # UTF-8 read as Latin-1
        *escaped,
        *(each.replace("\\", "\\\\") for each in escaped),
    }
    if not character.isalnum():
        forms |= {f"\\{character}", f"\\\\{character}", f"\\\\\\{character}"}
    if character in "'\"\\":
        forms.add(2 * character)
    if character == "\\":
        forms.add(4 * character)
    if character == " ":
        forms.add("+")
    if character == "'":
        forms.add("&apos;")
    return sorted(forms, key=len, reverse=True)


def _base64_forms(secret: str) -> list[str]:
    """Return the part of a secret's base64 that does not depend on its neighbours, for each of three alignments.

    A header `Authorization: Basic` contains it.
    """
    data = secret.encode("utf-8", "surrogatepass")
    found = set()
    for before in range(3):
        padded = bytes(before) + data
        text = base64.b64encode(padded).decode("ascii")
        inner = text[(before * 8 + 5) // 6 : len(padded) * 8 // 6]
        found |= {inner, inner.translate(str.maketrans("+/", "-_"))}
    return sorted(each for each in found if len(each) >= _SHORTEST_BASE64)
