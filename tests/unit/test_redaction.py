from __future__ import annotations

import ast
import base64
import html
import json
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest

from ingestor.address import FORM
from ingestor.model import EndReason
from ingestor.redaction import (
    outside_text,
    redact,
    redact_values,
    register_password_file,
    register_secret,
    register_url,
    system_words,
)
from ingestor.store.refusal import WRITE
from ingestor.telemetry.unexpected import redact_tracebacks

PACKAGE = Path(__file__).parents[2] / "ingestor"
PASSWORD = "p\"a\\s's w&ö😀/rd%<+"

QUOTED: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "percent-encoded": lambda text: quote(text, safe=""),
    "percent-encoded in small letters": lambda text: quote(text, safe="").lower(),
    "percent-encoded but for slashes": quote,
    "percent-encoded in part": lambda text: text.replace("/", "%2F").replace("w", "%77"),
    "in a form": quote_plus,
    "in JSON": json.dumps,
    "in JSON with its letters": lambda text: json.dumps(text, ensure_ascii=False),
    "in JSON within JSON": lambda text: json.dumps(json.dumps(text)),
    "in Python": repr,
    "in Python's ASCII": ascii,
    "in a list of Python's": lambda text: repr([text]),
    "in bytes of Python's": lambda text: repr(text.encode()),
    "in Python within JSON": lambda text: json.dumps(repr(text)),
    "in HTML": html.escape,
    "in SQL": lambda text: text.replace("'", "''"),
    "in capitals": str.upper,
    "in small letters": str.lower,
    "as Latin-1": lambda text: text.encode().decode("latin-1"),
}


@pytest.mark.parametrize("form", QUOTED)
@pytest.mark.parametrize("secret", [PASSWORD, "tk_secret_1234567890", "user@corp", "it's", "a b c", "\\\\srv\\x\n"])
def test_a_secret_is_found_in_every_form(secret: str, form: str) -> None:
    """No part of a secret is left, however a text quotes it."""
    register_secret(secret)
    written = QUOTED[form](secret)
    shown = redact(f"before {written} after")
    assert shown.startswith("before ")
    assert shown.endswith(" after")
    left = shown.removeprefix("before ").removesuffix(" after").replace("[hidden]", "")
    assert set(left) <= set("b[]'\"\\"), left


@pytest.mark.parametrize("user", ["", "u", "us", "use"])
@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
def test_a_header_with_a_password(user: str, encode: Callable[[bytes], bytes]) -> None:
    """Basic authentication is base64 of user and password: the rest does not reveal the password."""
    register_secret("correct?horse>battery")
    header = encode(f"{user}:correct?horse>battery".encode()).decode()
    shown = redact(f"Authorization: Basic {header}")
    assert "[hidden]" in shown
    left = shown.removeprefix("Authorization: Basic ").partition("[hidden]")
    assert len(left[0]) <= 4 * (len(user) + 3) // 3 + 1
    assert len(left[2]) <= 4


def test_the_longest_secret_first() -> None:
    """If two secrets share a beginning, no part of the longer one is left."""
    for secret in ("secret", "secret-and-more", "and-more"):
        register_secret(secret)
    assert redact("secret-and-more secret and-more") == "[hidden] [hidden] [hidden]"


def test_short_values_are_no_secrets() -> None:
    """An empty or tiny secret would garble every line; in an address its position redacts it."""
    for text in ("", "1", "abc"):
        register_secret(text)
    assert redact("abc 1") == "abc 1"
    assert (
        redact("postgresql://u:1@h/d and http://abc@proxy:1")
        == "postgresql://u:[hidden]@h/d and http://[hidden]@proxy:1"
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at postgresql://u@s:p@s@h:5/d: no", "at postgresql://u@s:[hidden]@h:5/d: no"),
        ("'wss://u:p@h/ws'", "'wss://[hidden]@h/ws'"),
        ("postgresql:/u:p@h/d cannot be read", "postgresql:/u:[hidden]@h/d cannot be read"),
        ("postgresql://u@h/d", "postgresql://u@h/d"),
        ("postgresql://u:[hidden]@h/d", "postgresql://u:[hidden]@h/d"),
        ("https://h/a mail a@b", "https://h/a mail a@b"),
    ],
)
def test_addresses_in_a_text(text: str, shown: str) -> None:
    """A password in an address is redacted without registration."""
    assert redact(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        WRITE,
        f"not an address; write {FORM}",
        "write http://USER:PASSWORD@HOST:PORT",
        "postgresql://USER:PASSWORD@HOST/DATABASE",
    ],
)
def test_templates_are_shown(text: str) -> None:
    """A template in a message of ours is shown as written, since it holds no secret."""
    assert redact(text) == outside_text(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://USER:PASSWORD@db.example.org/market",  # a lazy operator's own
        "postgresql://USER:PASSWORD@HOST:PORT:hunter2@db/market",
        "postgresql://USER:hunter2@HOST:PORT/DATABASE",
        "postgresql://other:PASSWORD@HOST:PORT/DATABASE",
        "https://USER:PASSWORD@proxy.example.org",
    ],
)
def test_only_templates_are_shown(text: str) -> None:
    """Everything that is not exactly a template is redacted, and so is a registered password in a template."""
    assert "[hidden]" in redact(text)
    assert "hunter2" not in redact(text)
    register_secret("PASSWORD")
    assert "PASSWORD" not in redact(FORM)


def test_the_passwords_of_an_address() -> None:
    """Passwords are redacted as written and as decoded; a user's name is shown although it equals the password."""
    register_url("postgresql://user@server:pa%2Fss%40word@h/d?sslpassword=other+one")
    register_url("postgresql://someone:broken/secret@h/d")
    register_url("http://key-of-proxy@h:1")
    register_url("postgresql://postgres:postgres@h/d")
    for secret in ("pa%2Fss%40word", "pa/ss@word", "other+one", "other one", "broken/secret", "key-of-proxy"):
        assert redact(f"x {secret} y") == "x [hidden] y"
    assert redact("user postgres") == "user postgres"


def test_password_files(tmp_path: Path) -> None:
    """The values in PostgreSQL's own files are secret; comments are not."""
    file = tmp_path / "pgpass"
    file.write_text("#hostname:port:database:username:password\nh:5432:*:u:se\\:cret\\\\1\n")
    service = tmp_path / "service.conf"
    service.write_text("[a]\nhost=h\npassword=other-secret\n")
    for path in (file, service, tmp_path / "missing", tmp_path):
        register_password_file(path)
    assert redact("password se:cret\\1 other-secret") == "password [hidden] [hidden]"


def test_outside_text_is_redacted_before_it_is_cut() -> None:
    """A secret at the edge is redacted completely, wherever the edge is; a second pass changes nothing."""
    register_secret(PASSWORD)
    register_secret("tk_secret_1234567890")
    for secret in (PASSWORD, "tk_secret_1234567890", json.dumps(PASSWORD)):
        for before in range(180, 205):
            shown = outside_text("x" * before + secret + "y" * 50, limit=200)
            assert len(shown) <= 200
            assert set(shown) <= set('xy[hiden]…"'), shown
            assert outside_text(shown, limit=200) == shown


def test_outside_text_is_one_visible_line() -> None:
    """Line breaks, terminal commands, changes of direction and invisible characters are escaped."""
    hostile = "a\nb\r\x1b[31mc\u202ed\u2066e\u200bf\x00g\x85h\u2028i\ud800j\tk l\xad"
    shown = outside_text(hostile)
    assert shown == ("a\\nb\\r\\x1b[31mc\\u202ed\\u2066e\\u200bf\\x00g\\x85h\\u2028i\\ud800j\\tk l\\xad")
    assert outside_text("Māori, ü, 株 and 😀") == "Māori, ü, 株 and 😀"


def test_a_huge_text_costs_little() -> None:
    """Only the beginning of a huge text is read, and a secret at the cut is not shown in part."""
    secret = "s3cret" * 40
    register_secret(secret)
    shown = outside_text(secret * 5000 + "http://" * 200_000 + "@", limit=10**6)
    assert set(shown) <= set("[hidden]")
    assert len(outside_text("http://" * 200_000)) == 500


def test_values_before_they_are_formatted() -> None:
    """Text at any depth is redacted; numbers and enumeration members are kept."""
    register_secret("tk_secret")
    found = redact_values(
        {
            "a": ["tk_secret", ("x tk_secret", {"tk_secret": 1})],
            "b": ValueError("tk_secret"),
            "c": EndReason.STALL,
            "d": 1.5,
        }
    )
    assert found == {
        "a": ["[hidden]", ["x [hidden]", {"tk_secret": 1}]],
        "b": "[hidden]",
        "c": EndReason.STALL,
        "d": 1.5,
    }
    assert redact_values({"tk_secret": None}, keys=True) == {"[hidden]": None}


def test_system_errors_hold_no_address() -> None:
    """Text that a library adds to a system error is left out."""
    for error, words in (
        (ConnectionRefusedError(111, "Connect call failed ('p4ss', 1)"), "Connection refused"),
        (OSError("Multiple exceptions: p4ss"), "no connection (OSError)"),
        (TimeoutError("p4ss"), "there was no answer in time"),
    ):
        assert system_words(error) == words


@pytest.fixture
def _hooks() -> Iterator[None]:
    """Restore Python's own hooks for errors."""
    assert logging.lastResort is not None
    before = (
        sys.excepthook,
        threading.excepthook,
        sys.unraisablehook,
        logging.lastResort.formatter,
        warnings.showwarning,
    )
    yield
    sys.excepthook, threading.excepthook, sys.unraisablehook, logging.lastResort.formatter, warnings.showwarning = (
        before
    )


@pytest.mark.usefixtures("_hooks")
def test_tracebacks_hold_no_secret(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracebacks of process, thread, destructor, library's logger and warning hide secrets, with all causes."""
    monkeypatch.setattr(logging.root, "handlers", [])
    redact_tracebacks()
    register_secret("tk_secret")
    try:
        try:
            raise ValueError("inner tk_secret")
        except ValueError as inner:
            raise KeyError("outer tk_secret") from inner
    except KeyError as error:
        caught = error
    sys.excepthook(KeyError, caught, caught.__traceback__)
    thread = threading.Thread(target=int, args=("tk_secret",))
    thread.start()
    thread.join()
    logging.getLogger("asyncio").error("Task exception was never retrieved: %s", "tk_secret", exc_info=caught)
    warnings.showwarning("tk_secret", UserWarning, __file__, 1)
    sys.unraisablehook(_Unraisable(caught))  # type: ignore[arg-type]
    shown = capsys.readouterr().err
    assert "tk_secret" not in shown.replace('("tk_secret', "").replace('"inner tk_secret', "").replace(
        '"outer tk_secret', ""
    )
    assert shown.count("KeyError: 'outer [hidden]'") == 3
    assert "inner [hidden]" in shown
    assert "literal for int() with base 10: '[hidden]'" in shown
    assert "UserWarning: [hidden]" in shown


class _Unraisable:
    def __init__(self, error: BaseException) -> None:
        self.err_msg, self.object = None, "tk_secret"
        self.exc_type, self.exc_value, self.exc_traceback = type(error), error, error.__traceback__


# Attributes of errors that are numbers or texts of the system.
PLAIN = {"strerror", "errno", "sqlstate", "verify_code", "status_code", "reason", "close_code", "message", "exit_code"}


def own_errors() -> set[str]:
    """Return the errors of this package, whose messages are our own or redacted."""
    return {
        node.name
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and node.name.endswith("Error")
    }


def unredacted_texts(function: ast.AST, name: str) -> Iterator[str]:
    """Yield the places where the text of an error is formatted without a function of `ingestor.redaction`."""

    def is_text(node: ast.AST) -> bool:
        match node:
            case ast.Name():
                return node.id == name
            case ast.Attribute(value=ast.Name(id=base)):
                return base == name and node.attr not in PLAIN
            case ast.Subscript(value=value) | ast.FormattedValue(value=value):
                return is_text(value)
            case ast.BoolOp(values=values):
                return any(map(is_text, values))
            case ast.Call(func=ast.Name(id="str" | "repr"), args=[argument]):
                return is_text(argument)
        return False

    for node in ast.walk(function):
        if isinstance(node, ast.FormattedValue | ast.Call) and is_text(node):
            yield ast.unparse(node)


def test_text_from_outside_goes_through_one_function() -> None:
    """Messages of the package contain the text of a foreign error only after redaction."""
    ours, found = own_errors(), []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler) and node.name and node.type is not None:
                kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
                if {ast.unparse(kind) for kind in kinds} <= ours:
                    continue
                found += [f"{path.name}:{node.lineno}: {each}" for each in unredacted_texts(node, node.name)]
    assert found == []
