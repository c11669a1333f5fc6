"""Hostile passwords in hostile addresses are shown by no command and in no output."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch
from urllib.parse import quote, quote_plus

import httpx
import pytest
import structlog
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ingestor import redaction
from ingestor.address import AddressError, parse_database_address, redact_url
from ingestor.redaction import outside_text, redact, register_secret
from ingestor.service.daemon import Daemon
from ingestor.service.process import StopRequest
from ingestor.settings import load_settings
from ingestor.telemetry.log import configure
from tests.clocks import HANG_SECONDS
from tests.commands import ingestor_in_process

EXAMPLES = int(os.environ.get("INGESTOR_TEST_EXAMPLES", "1"))
"""The factor for the number of examples: for fuzzing by hand."""

MARK = "Qz"
"""Begins each part of a password and occurs nowhere else, so that a shown part is found."""

pytestmark = pytest.mark.timeout(120 * EXAMPLES)

AWKWARD = [
    *"@:/?#%&=+,;[]'\"\\ \t\n$!{}<>|~^`-_.*()",
    "%40",
    "%2f",
    "%zz",
    "é",
    "株",
    "😀",
    "\u202e",
    "ß",
    "@@",
    "://",
    "\\n",
]

COMMANDS = {
    "check": [],
    "migrate": [],
    "gaps": [],
    "chart": ["AIR.NZ"],
    "backfill": [],
    "reconcile": ["--date=2026-11-20"],
    "replay": ["ticks.jsonl"],
    "maintain": [],
    "grant-analyst": ["a", "--no-password"],
}

DEAD = "127.0.0.1:1"
ADDRESSES = [
    f"postgresql://user@server:{{}}@{DEAD}/db",
    f"postgresql+asyncpg://user:{{}}@{DEAD}/db?sslmode=disable",
    f"postgres://user:{{}}@{DEAD},127.0.0.1:2/db",
    f"postgresql://user:{{0}}@h.invalid,user:{{0}}@{DEAD}/db",
    f"postgresql://:{{}}@{DEAD}",
    f"postgresql://user:{{}}@{DEAD}/db?password={{0}}&sslpassword={{0}}".replace("{}", "{0}"),
    f"postgresql://user@{DEAD}/db?password={{}}",
    f"postgresql://user@{DEAD}/db?application_name=a@b&sslpassword={{}}",
    "postgresql:///db?host=127.0.0.1&port=1&user=user@server&password={}",
    "postgresql://user:{}@/db?host=127.0.0.1&port=1",
    "postgresql://user:{}@[::1]:1/db",
    "postgresql://user:{}@127.0.0.1:port/db",
    "postgresql://user:{}@[127.0.0.1:1/db",
    f"postgresql://user:{{}}@{DEAD}/db?sslmode=bogus",
    f"mysql://user:{{}}@{DEAD}/db",
    f"user:{{}}@{DEAD}/db",
]

pieces = st.lists(st.sampled_from(AWKWARD) | st.characters(codec="utf-8", exclude_characters="\0"), max_size=3).map(
    "".join
)
passwords = st.lists(pieces, min_size=1, max_size=4).map(
    lambda found: "".join(f"{MARK}{number}{each}" for number, each in enumerate(found))
)
"""Passwords of two characters to some twenty."""

encodings = st.sampled_from([str, lambda text: quote(text, safe=""), quote, quote_plus])


def is_shown(password: str, text: str) -> bool:
    """Return whether a part of the password is visible, in any case or encoding."""
    encoded = base64.b64encode(password.encode()).decode()
    return MARK.lower() in text.lower() or (len(encoded) > 8 and encoded.rstrip("=")[:-2] in text)


@pytest.fixture(autouse=True, scope="module")
def _own_log() -> Iterator[None]:
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.captureWarnings(capture=False)
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    structlog.reset_defaults()


@settings(max_examples=500 * EXAMPLES, deadline=None)
@given(password=passwords, encode=encodings, address=st.sampled_from(ADDRESSES))
def test_every_address_is_shown_without_its_password(password: str, encode: Callable[[str], str], address: str) -> None:
    """No address shows its password, valid or not; the driver reads a valid one as it is meant."""
    url = address.format(encode(password))
    assert not is_shown(password, redact_url(url))
    try:
        parsed = parse_database_address(url)
    except AddressError as error:
        words = str(error)
    else:
        again = parse_database_address(parsed.driver_url)
        assert again.driver_url == parsed.driver_url
        assert len(again.hosts) == len(parsed.hosts)
        words = repr(parsed)
    assert not is_shown(password, words)


@settings(max_examples=300 * EXAMPLES, deadline=None)
@given(
    password=passwords.filter(lambda text: len(text) >= redaction.SHORTEST), before=st.integers(0, 60), data=st.data()
)
def test_a_secret_in_a_text_from_outside(password: str, before: int, data: st.DataObject) -> None:
    """The secret is redacted however it was quoted, and wherever the text is cut."""
    with patch.object(redaction, "_registry", redaction.Registry()):
        register_secret(password)
        forms: list[Callable[[str], str]] = [
            str,
            repr,
            ascii,
            json.dumps,
            quote,
            quote_plus,
            lambda text: json.dumps(text, ensure_ascii=False),
        ]
        quoted = data.draw(st.sampled_from(forms))(password)
        for text in (f"{'x' * before}{quoted}", f"{quoted}y{quoted}"):
            assert not is_shown(password, redact(text))
            shown = outside_text(text, limit=60)
            assert not is_shown(password, shown)
            assert len(shown) <= 60
            assert shown.isprintable()


@pytest.mark.usefixtures("bundled_calendar")
@settings(
    max_examples=30 * EXAMPLES,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # a command is too slow for shrinking
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    password=passwords,
    encode=encodings,
    address=st.sampled_from(ADDRESSES),
    command=st.sampled_from(sorted(COMMANDS)),
    way=st.sampled_from(["URL", "file", ".env", "PGPASSWORD", "PGPASSFILE", "proxy", "passfile"]),
    level=st.sampled_from(["debug", "info", "warning", "error"]),
    form=st.sampled_from(["json", "console"]),
)
def test_no_command_shows_a_password(
    tmp_path: Path,
    password: str,
    encode: Callable[[str], str],
    address: str,
    command: str,
    way: str,
    level: str,
    form: str,
) -> None:
    """No command shows a password, however it was given."""
    url = address.format(encode(password))
    plain = f"postgresql://user@{DEAD}/db"
    file = tmp_path / "secret"
    Path("ticks.jsonl").write_text("{}\n")
    environment = {
        "INGESTOR_TOKEN": "tk_12345678901234567",
        "INGESTOR_STREAM_URL": "ws://127.0.0.1:1/ws",
        "INGESTOR_DATABASE_URL": plain,
        "INGESTOR_LOG_LEVEL": level,
        "INGESTOR_LOG_FORMAT": form,
    }
    match way:
        case "URL":
            environment["INGESTOR_DATABASE_URL"] = url
        case "file":
            file.write_text(url, encoding="utf-8")
            environment |= {"INGESTOR_DATABASE_URL": "", "INGESTOR_DATABASE_URL_FILE": str(file)}
        case ".env":
            environment["INGESTOR_DATABASE_URL"] = ""
            Path(".env").write_text(f"INGESTOR_DATABASE_URL={json.dumps(url, ensure_ascii=False)}\n", encoding="utf-8")
        case "PGPASSWORD":
            environment["PGPASSWORD"] = password
        case "proxy":
            proxy = f"http://user@corp:{encode(password)}@{DEAD}"
            environment |= {"https_proxy": proxy, "INGESTOR_STREAM_URL": "wss://h.invalid/ws", "no_proxy": ""}
        case _:
            escaped = password.replace("\\", "\\\\").replace(":", "\\:")
            file.write_text(f"*:*:*:*:{escaped}\n", encoding="utf-8")
            file.chmod(0o600)
            if way == "PGPASSFILE":
                environment["PGPASSFILE"] = str(file)
            else:
                environment["INGESTOR_DATABASE_URL"] = f"{plain}?passfile={file}"
    with patch.object(redaction, "_registry", redaction.Registry()):
        try:
            status, output, errors = ingestor_in_process(command, *COMMANDS[command], **environment)
        finally:
            Path(".env").unlink(missing_ok=True)
    assert status in {69, 78}, output + errors
    assert not is_shown(password, output + errors)
    assert "Traceback" not in errors


@settings(
    max_examples=4 * EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    password=passwords,
    encode=encodings,
    address=st.sampled_from(ADDRESSES[:10]),
    form=st.sampled_from(["json", "console"]),
)
def test_the_daemon_shows_no_password(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    password: str,
    encode: Callable[[str], str],
    address: str,
    form: str,
) -> None:
    """Without a database, neither the log nor a page nor the service manager shows the password."""
    url = address.format(encode(password))
    with patch.object(redaction, "_registry", redaction.Registry()), contextlib.suppress(AddressError):
        parse_database_address(url)
        configure("debug", "json" if form == "json" else "console")
        shown = asyncio.run(_daemon_output(url, tmp_path))
        log = "".join(capfd.readouterr())
        assert "database_write_failed" in log
        assert not is_shown(password, shown)
        assert not is_shown(password, log)


async def _daemon_output(url: str, directory: Path) -> str:
    request = StopRequest()
    daemon = Daemon(
        load_settings(
            token="tk_12345678901234567", stream_url="ws://127.0.0.1:1/ws", database_url=url, spool_dir=directory
        )
    )
    running = asyncio.create_task(daemon.run(request))
    async with asyncio.timeout(HANG_SECONDS):
        while not (
            daemon.http.is_bound and daemon.telemetry.counts.write_failures and daemon.telemetry.counts.reconnects
        ):
            await asyncio.sleep(0.01)
    async with httpx.AsyncClient(base_url=daemon.http.url, trust_env=False) as client:
        pages = [(await client.get(path)).text for path in ("/", "/healthz", "/readyz", "/metrics", "/status")]
    request()
    request()
    await running
    return "".join([*pages, daemon.status.line()])
