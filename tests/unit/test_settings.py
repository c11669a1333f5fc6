from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from ingestor import settings
from ingestor.errors import ConfigurationError
from ingestor.settings import Settings, load_settings, parse_duration, parse_size, variable, written_default

ROOT = Path(__file__).parents[2]
SECRET = "tk_secret_1234567890"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("50ms", 0.05),
        ("10s", 10),
        ("5m", 300),
        ("2h", 7200),
        ("14d", 1209600),
        ("7", 7),
        ("0.5", 0.5),
        (" 1.5 s ", 1.5),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    """Durations are seconds, or a number with a unit."""
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "-1s", "1x", "1 m 5 s", "inf", "nan", "1e3", "١s"])
def test_bad_durations(text: str) -> None:
    """Any other duration is refused."""
    with pytest.raises(ValueError, match="not a duration"):
        parse_duration(text)


@pytest.mark.parametrize(("text", "size"), [("65536", 65536), ("64MiB", 2**26), ("1gib", 2**30), ("512 KiB", 2**19)])
def test_sizes(text: str, size: int) -> None:
    """Sizes are bytes, or a number with a binary unit."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["64MB", "-1", "1.5GiB", "", "x"])
def test_bad_sizes(text: str) -> None:
    """Decimal units would be off by a few per cent, so they are refused."""
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("BATCH_MAX_ROWS", "many", "integer"),
        ("BATCH_MAX_ROWS", "0", "greater than or equal to 1"),
        ("PING_INTERVAL", "1 minute", "not a duration"),
        ("MEMORY_MAX_BYTES", "64MB", "not a size"),
        ("STREAM_URL", "https://stream.financefeast.io/ws", "wss://"),
        ("STREAM_URL", "ws://stream.financefeast.io/ws", "unencrypted"),
        ("STREAM_URL", "ws://127.0.0.1.example.com/ws", "unencrypted"),
        ("STREAM_URL", "ws://10.0.0.1/ws", "unencrypted"),
        ("STREAM_URL", f"wss://user:{SECRET}@host/ws", "must not contain"),
        ("STREAM_URL", f"wss://host/ws?token={SECRET}", "must not contain"),
        ("STREAM_URL", "wss://host:port/ws", "not a WebSocket address"),
        ("DATABASE_URL", f"mysql://user:{SECRET}@host/db", "not a PostgreSQL address"),
        ("DATABASE_URL", f"postgresql://user:{SECRET}/x@host/db", "percent-encoded"),
        ("TOKEN", f"{SECRET} x", "visible ASCII"),
        ("TOKEN", f'"{SECRET}', "quotation mark at one end"),
        ("EXCHANGE_TIMEZONE", "Auckland", "IANA"),
        ("EXCHANGE_CALENDAR", "XNYS", "XNZE"),
        ("LOG_LEVEL", "loud", "debug"),
    ],
)
def test_a_problem_names_its_variable(monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str) -> None:
    """One line names the variable and the fault, and never the value of a secret."""
    monkeypatch.setenv(f"INGESTOR_{name}", value)
    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    (problem,) = caught.value.problems
    assert problem.startswith(f"INGESTOR_{name}: ")
    assert words in problem
    assert not re.search(r"(?i)value error|assertion failed|input should|unable to", problem)
    assert SECRET not in problem
    assert caught.value.exit_code == 78


def test_every_problem_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """All problems are reported at once, one line for each."""
    monkeypatch.setenv("INGESTOR_HEARTBEAT", "x")
    monkeypatch.setenv("INGESTOR_LOG_LEVEL", "x")
    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "INGESTOR_HEARTBEAT",
        "INGESTOR_LOG_LEVEL",
    ]


@pytest.mark.parametrize("url", ["ws://localhost:5005/ws", "ws://127.0.0.1/ws", "ws://[::1]:5/ws", "ws://127.8.8.8/ws"])
def test_loopback_may_be_unencrypted(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """The simulator on this machine needs no certificate."""
    monkeypatch.setenv("INGESTOR_STREAM_URL", url)
    assert load_settings().stream_url == url


def test_secrets_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither repr nor str nor a dump shows a secret."""
    monkeypatch.setenv("INGESTOR_TOKEN", SECRET)
    monkeypatch.setenv("INGESTOR_DATABASE_URL", f"postgresql://u:{SECRET}@h/d")
    loaded = load_settings()
    assert SECRET not in f"{loaded!r} {loaded} {loaded.model_dump()} {loaded.model_dump_json()}"
    assert loaded.read_token() == SECRET


def test_missing_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing secret is reported only by a command that needs it, with the remedy."""
    loaded = load_settings()
    for read, name in ((loaded.read_token, "INGESTOR_TOKEN"), (loaded.read_database_url, "INGESTOR_DATABASE_URL")):
        with pytest.raises(ConfigurationError, match=f"{name} is not set.*{name}_FILE"):
            read()


def test_token_file_is_read_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A token can be rotated while the daemon runs."""
    file = tmp_path / "token"
    file.write_text("first\n")
    monkeypatch.setenv("INGESTOR_TOKEN_FILE", str(file))
    loaded = load_settings()
    assert loaded.read_token() == "first"
    file.write_text("second")
    assert loaded.read_token() == "second"


@pytest.mark.parametrize("content", [None, b"", b"two words", b"\xff\xfe"])
def test_bad_token_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None) -> None:
    """A missing, empty or malformed file is named; its content is not shown."""
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setenv("INGESTOR_TOKEN_FILE", str(file))
    with pytest.raises(ConfigurationError, match="INGESTOR_TOKEN_FILE") as caught:
        load_settings().read_token()
    assert "two words" not in str(caught.value)


def test_a_secret_given_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value and a file for the same secret are refused as ambiguous."""
    monkeypatch.setenv("INGESTOR_TOKEN", SECRET)
    monkeypatch.setenv("INGESTOR_TOKEN_FILE", "/run/secrets/token")
    with pytest.raises(ConfigurationError, match="INGESTOR_TOKEN and INGESTOR_TOKEN_FILE are both set"):
        load_settings()


def test_dotenv(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The environment takes precedence over a `.env` in the working directory."""
    (tmp_path / ".env").write_text("INGESTOR_HEARTBEAT=3s\nINGESTOR_INSTANCE=here\nOTHER=1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INGESTOR_INSTANCE", "there")
    assert (load_settings().heartbeat, load_settings().instance) == (3, "there")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("x", "x"),
        ("x # a comment", "x"),
        ("x#y", "x#y"),
        ("'x # y'", "x # y"),
        ('"x"', "x"),
        ("a$b${HOME}$(id)", "a$b${HOME}$(id)"),
        ('"a${INGESTOR_HEARTBEAT}"', "a${INGESTOR_HEARTBEAT}"),
        ("x\nINGESTOR_INSTANCE=y", "y"),
    ],
)
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("before", ["", "\ufeff", "\ufeffexport "])
def test_values_of_dotenv(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, written: str, meant: str, line_end: str, before: str
) -> None:
    """A `.env` of any editor is read: `$` is literal, and the first variable counts."""
    text = f"{before}INGESTOR_INSTANCE={written}\nINGESTOR_HEARTBEAT=3s\n".replace("\n", line_end)
    (tmp_path / ".env").write_bytes(text.encode())
    monkeypatch.chdir(tmp_path)
    assert (load_settings().instance, load_settings().heartbeat) == (meant, 3)


@pytest.mark.parametrize(
    ("written", "meant"),
    [("'x'", "x"), ('"x"', "x"), ("x\r", "x"), (' "x" ', "x"), ("a$b${HOME}", "a$b${HOME}"), ("a'b", "a'b")],
)
def test_values_of_the_environment(monkeypatch: pytest.MonkeyPatch, written: str, meant: str) -> None:
    """Quotation marks that docker keeps around a value, and white space, are removed; `$` is literal."""
    monkeypatch.setenv("INGESTOR_INSTANCE", written)
    monkeypatch.setenv("INGESTOR_HEARTBEAT", '"3s"')
    monkeypatch.setenv("INGESTOR_TOKEN", f"'{SECRET}'\r")
    assert (load_settings().instance, load_settings().heartbeat, load_settings().read_token()) == (meant, 3, SECRET)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("INGESTOR_HEARTBEAT=3s".encode("utf-16"), "UTF-16"),
        ("INGESTOR_HEARTBEAT=3s".encode("utf-16-le"), "NUL"),
        (b"\nINGESTOR_TOKEN='tk_secret\n", "line 2 .*quotation mark"),
        (b"A=1\n\nINGESTOR_TOKEN tk_secret\n", "line 3 "),
        (b"A=1\nINGESTOR_TOKEN\n", "line 2 has no ="),
        (b"A=\xff\n", "not UTF-8"),
        (b"#" * 2**17, "larger than 64 KiB"),
    ],
)
def test_a_dotenv_that_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes, words: str
) -> None:
    """The error names the line and the fault, and not the content."""
    (tmp_path / ".env").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match=f"\\.env cannot be used: .*{words}") as caught:
        load_settings()
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [f"{SECRET}\r\n", f"\ufeff{SECRET}", f'"{SECRET}"\n', f"'{SECRET}'", f"\n {SECRET} \n\n"]
)
def test_secret_files_as_editors_leave_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str) -> None:
    """A byte-order mark, line ends and quotation marks are not part of a secret."""
    file = tmp_path / "token"
    file.write_bytes(content.encode())
    monkeypatch.setenv("INGESTOR_TOKEN_FILE", str(file))
    assert load_settings().read_token() == SECRET


@pytest.mark.parametrize("kind", ["empty", "two lines", "UTF-16", "NUL", "larger", "a directory", "not a regular"])
def test_secret_files_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str) -> None:
    """Any unusable file is read within a size limit and at once, and the error names the fault."""
    file = tmp_path / "file"
    if kind == "a directory":
        file.mkdir()
    elif kind == "not a regular":
        os.mkfifo(file)
    else:
        contents = {"empty": b"\r\n", "two lines": b"a\nb", "NUL": b"a\0b", "larger": bytes(2**17)}
        file.write_bytes(contents.get(kind, SECRET.encode("utf-16")))
    monkeypatch.setenv("INGESTOR_TOKEN_FILE", str(file))
    with pytest.raises(ConfigurationError, match=kind.replace("two lines", "more than one line")) as caught:
        load_settings().read_token()
    assert str(caught.value).startswith(f"INGESTOR_TOKEN_FILE: {file} cannot be ")


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a home directory, a path is requested only if one is needed."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setenv("INGESTOR_SPOOL_DIR", "~/spool")
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    loaded = load_settings()
    with pytest.raises(ConfigurationError, match=r"INGESTOR_SPOOL_DIR: ~ .*no home directory\. Set"):
        loaded.state_path("spool")


def test_unknown_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt variable is reported."""
    monkeypatch.setenv("INGESTOR_TOKN", "x")
    monkeypatch.setenv("INGESTOR_HEARTBEAT", "5")
    assert "INGESTOR_TOKN" in settings.unknown_variables()
    assert "INGESTOR_HEARTBEAT" not in settings.unknown_variables()


def test_env_example_holds_every_variable() -> None:
    """`.env.example` has each variable once, with its default, behind its own line of explanation."""
    lines = (ROOT / ".env.example").read_text(encoding="utf-8").splitlines()
    found = [(lines[i - 1], line) for i, line in enumerate(lines) if re.match(r"#? ?INGESTOR_", line)]
    expected = [
        (f"# {_sentence(name)}", f"#INGESTOR_{name.upper()}={written_default(name)}") for name in Settings.model_fields
    ]
    assert found == expected


def test_reference_page_holds_every_variable() -> None:
    """The reference page has a row for each variable, with its default and the same line on it."""
    text = (ROOT / "docs" / "reference" / "settings.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `INGESTOR_")]
    assert rows == [
        f"| `{variable(name)}` | {f'`{written_default(name)}`' if written_default(name) else ''} | {_sentence(name)} |"
        for name in Settings.model_fields
    ]


def _sentence(name: str) -> str:
    description = Settings.model_fields[name].description
    assert description is not None
    return description[0].upper() + description[1:] + "."
