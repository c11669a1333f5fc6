from __future__ import annotations

import asyncio
import gzip
import json
import os
import re
import signal
from collections.abc import AsyncIterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from typer.testing import CliRunner

from ingestor.cli import app
from ingestor.cli._output import Console
from ingestor.cli.demo import report_subscriber
from ingestor.demo import running as running_demo
from ingestor.simulator.server import TOKEN, Simulator
from ingestor.store.connect import driver_url
from tests.clocks import HANG_SECONDS
from tests.commands import ingestor, ingestor_in_process, start
from tests.processes import children, is_alive
from tests.recording import until
from tests.servers import TestServer, query, with_parts

PASSWORD = "unmistakable-5Qz"
TICK = {"date": "2026-03-02T10:00:00", "price": 0.5, "volume": 100, "symbol": "AIR.NZ"}


def line(**fields: Any) -> bytes:
    return json.dumps({"type": "price", "data": {**TICK, **fields}}).encode()


@pytest.fixture
async def login(server: TestServer) -> AsyncIterator[str]:
    """Yield the URL of a daemon's login with a distinctive password."""
    name = server.new_name()
    await server.run(f"CREATE ROLE {name} LOGIN PASSWORD '{PASSWORD}' IN ROLE market_write")
    yield name
    await server.run(f"DROP ROLE {name}")


COMMANDS = (
    "run",
    "demo",
    "simulate",
    "migrate",
    "check",
    "gaps",
    "chart",
    "backfill",
    "reconcile",
    "replay",
    "maintain",
    "grant-analyst",
    "relay",
    "relay-token",
)


async def test_help() -> None:
    """Each command is listed and has its own help."""
    status, listing, _ = await ingestor("--help")
    assert status == 0
    for command in COMMANDS:
        found = CliRunner().invoke(app, [command, "--help"])  # a process for each would take seconds
        assert command in listing
        assert found.exit_code == 0
        assert "Usage" in found.output


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_for_people(command: str) -> None:
    """Help shows a type only for options with a value, and never a Python type."""
    found = CliRunner().invoke(app, [*filter(None, [command]), "--help"], env={"COLUMNS": "300"})
    assert not re.search(r"<bool>|list\[|<str>.*(duration|day)", found.output)
    flag = re.search(r"^│ *--help +-h +(.*?) *│$", found.output, flags=re.MULTILINE)
    assert flag is not None
    assert flag[1] == "Show this message and exit."


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("chart AIR.NZ --width 2m", "--width.*'2m' is not one of '1m', '5m', '15m', '1h', '1d'"),
        ("gaps --format png", "--format.*'png' is not one of"),
        ("demo --rate x", "--rate.* must be a valid number"),
        ("demo --rate 0", "--rate.* must be greater than or equal to 0.1"),
        ("simulate --port 99999", "--port.* must be less than or equal to 65535"),
        ("simulate --seed 1.5", "--seed.* must be a valid integer"),
        ("simulate --session x", "--session.* not a duration; write seconds"),
        ("simulate --fault x", "--fault x: there is no fault 'x'"),
        ("reconcile --date x", "--date.* neither a day .2026-11-20. nor an instant"),
        ("replay /nonexistent", "'file'.* does not exist"),
        ("chart AIR.NZ --output /", "--output.* is a directory"),
        ("wrong", "No such command 'wrong'"),
    ],
)
def test_wrong_arguments(arguments: str, words: str) -> None:
    """Each wrong argument is reported in the project's words, without a library's."""
    status, _, errors = ingestor_in_process(*arguments.split(), COLUMNS="300", TERMINAL_WIDTH="300")
    assert status in {2, 78}
    assert re.search(words, errors), errors
    assert not re.search(r"Value error|Assertion failed|Input should|unable to parse|pydantic|Traceback", errors)


async def test_version_and_wrong_option() -> None:
    """`--version` prints the version; a wrong option ends with 2."""
    assert (await ingestor("--version"))[:2] == (0, "ingestor 0.1.0\n")
    assert (await ingestor("run", "--wrong"))[0] == 2


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, ["INGESTOR_TOKEN is not set", "INGESTOR_DATABASE_URL is not set"]),
        ({"TOKEN": TOKEN}, ["INGESTOR_DATABASE_URL is not set"]),
        ({"HEARTBEAT": "x", "LOG_LEVEL": "y"}, ["INGESTOR_HEARTBEAT: ", "INGESTOR_LOG_LEVEL: "]),
        ({"TOKEN": TOKEN, "DATABASE_URL": "postgresql://h/d", "SPOOL_DIR": "/proc/x"}, ["INGESTOR_SPOOL_DIR"]),
    ],
)
async def test_wrong_settings(environment: dict[str, str], words: list[str]) -> None:
    """A missing or malformed setting is reported in one line by name, with exit status 78."""
    status, _, errors = await ingestor("run", **environment)
    lines = errors.splitlines()
    assert status == 78
    assert len(lines) == len(words), lines
    assert all(text.startswith("ingestor: ") for text in lines)
    assert all(word in text for word, text in zip(words, lines, strict=True))


@pytest.mark.parametrize(
    ("command", "expected"),
    [("migrate", 69), ("replay", 69), ("check", 78), ("gaps", 69), ("chart", 69), ("backfill", 69), ("reconcile", 69),
     ("maintain", 69), ("grant-analyst", 69)],
)  # fmt: skip
async def test_a_dead_database_shows_no_password(command: str, expected: int, tmp_path: Path) -> None:
    """An unreachable database is reported in one line, with the password in neither encoded nor decoded form."""
    (tmp_path / "ticks.jsonl").write_bytes(line())
    needed = {
        "replay": ["ticks.jsonl"],
        "chart": ["AIR.NZ"],
        "grant-analyst": ["a", "--no-password"],
        "reconcile": ["--date=2026-11-20"],
    }
    arguments = [command, *needed.get(command, [])]
    url = "postgresql://someone:un%40mistakable-5Qz@127.0.0.1:1/d"
    status, output, errors = await ingestor(*arguments, DATABASE_URL=url, STREAM_URL="ws://127.0.0.1:1/ws", TOKEN=TOKEN)
    assert status == expected
    assert "cannot be reached" in output + errors
    assert "5Qz" not in output + errors
    assert "Traceback" not in errors


async def in_process(*arguments: str, **environment: str) -> tuple[int, str, str]:
    """Run a command as `ingestor` does, without a process of its own."""
    variables = {f"INGESTOR_{name}": value for name, value in environment.items()}
    return await asyncio.to_thread(partial(ingestor_in_process, *arguments, **variables))


@pytest.mark.parametrize("way", ["variables", "service"])
@pytest.mark.parametrize("command", ["gaps", "check", "migrate"])
async def test_the_variables_of_psql(
    command: str, way: str, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Host, port, user, password and database of `PG…` variables, or of a service file, complete an empty URL."""
    parts = urlsplit(driver_url(database))
    found = {
        "host": parts.hostname,
        "port": parts.port,
        "user": parts.username,
        "password": unquote(parts.password or ""),
        "dbname": parts.path[1:],
    }
    if way == "service":
        file = tmp_path / "services"
        file.write_text("[market]\n" + "".join(f"{name}={value}\n" for name, value in found.items() if value))
        monkeypatch.setenv("PGSERVICEFILE", str(file))
        monkeypatch.setenv("PGSERVICE", "market")
    else:
        for name, value in found.items():
            monkeypatch.setenv({"dbname": "PGDATABASE"}.get(name, f"PG{name.upper()}"), str(value or ""))
    async with Simulator(port=0, rate=0) as simulator:
        stream = {"TOKEN": TOKEN, "STREAM_URL": simulator.stream_url, "REST_URL": simulator.rest_url}
        status, output, errors = await in_process(command, DATABASE_URL="postgresql://", **stream)
    assert (status, errors) == (0, ""), output
    assert parts.password is None or parts.password not in output


@pytest.mark.usefixtures("bundled_calendar")
@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        *product(["gaps", "check", "migrate", "maintain", "chart AIR.NZ"], ["password", "database", "role"]),
        ("run", "password"),
    ],
)
async def test_a_wrong_login_requires_operator_action(
    command: str, wrong: str, login: str, server: TestServer, database: str
) -> None:
    """A wrong password, an unknown database or an unknown role ends every command with 78, the cause and no secret."""
    if wrong == "password" and server.edition != "plain":
        pytest.skip("a server named by a URL may not require a password")
    url = with_parts(
        server.url,
        database="no_such_database" if wrong == "database" else urlsplit(database).path[1:],
        user="no_such_role" if wrong == "role" else login,
        password=f"{PASSWORD}-wrong" if wrong == "password" else PASSWORD,
    )
    async with Simulator(port=0, rate=0) as simulator:
        stream = {"TOKEN": TOKEN, "STREAM_URL": simulator.stream_url, "REST_URL": simulator.rest_url}
        # The daemon needs a process of its own: it handles signals.
        status, output, errors = await (ingestor if command == "run" else in_process)(
            *command.split(), DATABASE_URL=url, **stream
        )
    assert status == 78, output + errors
    words = {"password": "password authentication failed", "database": "no_such_database", "role": "no_such_role"}
    assert words[wrong] in output + errors
    assert PASSWORD not in output + errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("form", ["json", "auto"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_run(login: str, database: str, server: TestServer, number: signal.Signals, form: str) -> None:
    """The daemon records until it is stopped, ends with 0, and shows no secret."""
    async with Simulator(port=0, rate=200) as simulator:
        name = urlsplit(database).path.lstrip("/")
        process = await start(
            "run",
            TOKEN=TOKEN,
            DATABASE_URL=with_parts(server.url, database=name, user=login, password=PASSWORD),
            STREAM_URL=simulator.stream_url,
            LOG_LEVEL="debug",
            LOG_FORMAT=form,
        )
        await until(database, "SELECT count(*) > 50 FROM market.ticks", True)
        command_line = await asyncio.to_thread(Path(f"/proc/{process.pid}/cmdline").read_text)
        await simulator.stop_market()
        process.send_signal(number)
        output, errors = await asyncio.wait_for(process.communicate(), HANG_SECONDS)
    assert process.returncode == 0, errors
    assert await query(database, "SELECT end_reason, rejected FROM ingest.stream_sessions") == [("stopped", 0)]
    assert await query(database, "SELECT count(*) FROM market.ticks") == [(simulator.ticks_sent,)]
    for text in (output.decode(), errors.decode(), command_line):
        assert TOKEN not in text
        assert PASSWORD not in text
    events = [json.loads(text)["event"] for text in errors.decode().splitlines()]
    assert {"started", "authenticated", "committed", "stopping", "session_ended", "stopped"} <= set(events)


async def test_run_with_a_refused_token(writer_url: str) -> None:
    """A token that was never accepted ends the daemon with 78 and one line without the token."""
    async with Simulator(port=0, rate=0) as simulator:
        status, _, errors = await ingestor(
            "run", TOKEN="tk_wrong_token_00001", DATABASE_URL=writer_url, STREAM_URL=simulator.stream_url
        )
    assert status == 78
    assert "INGESTOR_TOKEN" in errors
    assert "tk_wrong" not in errors


async def test_check(writer_url: str, empty_database: str) -> None:
    """`check` accepts a prepared database, and names what an unprepared one lacks."""
    async with Simulator(port=0, rate=0) as simulator:
        stream = {"TOKEN": TOKEN, "STREAM_URL": simulator.stream_url, "REST_URL": simulator.rest_url}
        status, output, errors = await ingestor("check", **stream, DATABASE_URL=writer_url)
        assert status == 0, output + errors
        assert [text.split()[1] for text in output.splitlines()] == [
            "settings",
            "token",
            "endpoint",
            "rest",
            "disk",
            "database",
            "clock",
            "schema",
            "agreement",
            "calendar",
            "bars",
            "relays",
        ]
        status, output, _ = await ingestor("check", **stream, DATABASE_URL=empty_database)
        assert status == 78
        assert "ingestor migrate" in output
    status, output, _ = await ingestor("check", **stream, DATABASE_URL="postgresql://u:hunter2@127.0.0.1:1/d")
    assert status == 78
    assert "cannot be reached" in output
    assert "hunter2" not in output
    assert TOKEN not in output


@pytest.mark.parametrize("packed", [False, True])
async def test_replay(writer_url: str, database: str, tmp_path: Path, packed: bool) -> None:
    """Repeated replays store each message once and keep rejections; a replay covers no time."""
    content = b"\n".join([line(), line(), b"", b"nonsense", b'"' + b"x" * 2**20 + b'"', line(symbol="SPK.NZ")])
    file = tmp_path / ("ticks.jsonl.gz" if packed else "ticks.jsonl")
    file.write_bytes(gzip.compress(content) if packed else content)
    status, output, errors = await ingestor("replay", str(file), DATABASE_URL=writer_url)
    assert status == 0, errors
    assert "5 messages: 3 ticks new, 0 were there already, 2 rejected" in output
    status, output, _ = await ingestor("replay", str(file), DATABASE_URL=writer_url)
    assert "5 messages: 0 ticks new, 3 were there already, 2 rejected" in output
    assert await query(database, "SELECT count(*), sum(occurrence) FROM market.ticks") == [(3, 4)]
    sessions = await query(
        database, "SELECT DISTINCT kind, endpoint, covered_until, end_reason FROM ingest.stream_sessions"
    )
    assert sessions == [("replay", file.name, None, "finished")]
    reasons = "SELECT reason, raw_bytes > 2^20, length(raw) FROM ingest.rejected_messages ORDER BY session_id, position"
    assert await query(database, reasons) == [("not_json", False, 8), ("message_too_big", True, 2**16)] * 2


async def test_replay_of_a_damaged_file(writer_url: str, database: str, tmp_path: Path) -> None:
    """A truncated file is an error; the messages before the end are stored."""
    file = tmp_path / "ticks.jsonl.gz"
    whole = gzip.compress(b"\n".join(line(volume=n) for n in range(50_000)))
    file.write_bytes(whole[: len(whole) // 2])
    status, _, errors = await ingestor("replay", str(file), DATABASE_URL=writer_url)
    assert status == 69
    assert "cannot be read" in errors
    assert await query(database, "SELECT count(*) > 0 FROM market.ticks") == [(True,)]


async def test_replay_without_a_schema(empty_database: str, tmp_path: Path) -> None:
    """An unprepared database is reported to need `ingestor migrate`."""
    (tmp_path / "ticks.jsonl").write_bytes(line())
    status, _, errors = await ingestor("replay", str(tmp_path / "ticks.jsonl"), DATABASE_URL=empty_database)
    assert status == 78
    assert "ingestor migrate" in errors


async def test_demo() -> None:
    """The demo writes every tick, relays each to a late subscriber, proves it by SQL, and leaves no process running."""
    status, output, errors = await ingestor("demo", "--duration", "2s", "--rate", "300")
    assert "its status page is at http://127.0.0.1:" in output
    assert status == 0, output + errors
    assert "every tick once" in output
    assert "each stored tick once" in output
    assert output.count('  {"type":"price","data":{"date":') == 3
    assert output.rstrip().endswith("Nothing is left running.")


async def test_demo_is_stopped(tmp_path: Path) -> None:
    """Ctrl-C or a closed terminal ends the demo with its summary, exit status 0 and no process left."""
    process = await start("demo", "--duration", "1h")
    assert process.stdout is not None
    while b"ticks written" not in await asyncio.wait_for(process.stdout.readline(), HANG_SECONDS):
        pass
    started = children(process.pid)
    assert started
    # Under nohup the signal stays ignored.
    process.send_signal(signal.SIGTERM if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else signal.SIGHUP)
    output, errors = await asyncio.wait_for(process.communicate(), HANG_SECONDS)
    assert process.returncode == 0, errors
    assert not any(is_alive(pid) for pid in started)
    assert b"every tick once" in output
    assert b"each stored tick once" in output


async def test_demo_compares_the_subscriber(capsys: pytest.CaptureFixture[str]) -> None:
    """If the late subscriber got another number of ticks than are stored, the demo reports a problem."""
    async with running_demo(rate=500, seed=1, seconds=1.0, faults=[]) as demo:
        subscriber = demo.subscribe()
        async with asyncio.timeout(HANG_SECONDS):
            while not subscriber.ticks:
                await asyncio.sleep(0.01)
        await demo.close_market()
        await demo.stop()
        (stored,) = await demo.query("SELECT count(*)::int AS rows FROM market.ticks")
        await subscriber.receive_all(stored["rows"])
        await demo.query(
            "DELETE FROM market.ticks WHERE (symbol, time, price, volume, occurrence) IN "
            "(SELECT symbol, time, price, volume, occurrence FROM market.ticks LIMIT 1)"
        )
        problems = await report_subscriber(Console(width=200), demo)
    assert problems == [
        f"The subscriber of the relay got {stored['rows']:,} ticks, but {stored['rows'] - 1:,} are stored."
    ]
    assert "they differ" in capsys.readouterr().out


if "INGESTOR_TEST_RECORDED" in os.environ:

    async def test_recorded_trades(writer_url: str, database: str) -> None:
        """Recorded trades are stored with their known counts, and a second replay adds none."""
        file = os.environ["INGESTOR_TEST_RECORDED"]
        sql = (
            "SELECT symbol, count(*), sum(volume)::bigint, min(time)::text, max(time)::text "
            "FROM market.ticks GROUP BY symbol ORDER BY symbol"
        )
        expected = [
            ("BTCUSDT.1S", 2001, 8617000000, "2021-01-08 00:00:00+00", "2021-01-08 00:00:46+00"),
            ("BTCUSDT.BN", 2001, 8707159600, "2021-01-08 00:00:00.278+00", "2021-01-08 00:00:46.355+00"),
            ("XBTUSDT.KR", 1000, 9310181737, "2025-11-10 17:23:53.971745+00", "2025-11-11 00:13:55.982278+00"),
        ]
        for new in (": 5,002 ticks new, 0 were there already, 0", ": 0 ticks new, 5,002 were there already, 0"):
            status, output, errors = await ingestor("replay", file, DATABASE_URL=writer_url)
            assert status == 0, errors
            assert new in output
            assert await query(database, sql) == expected
        counts = (
            "SELECT count(*), count(*) FILTER (WHERE occurrence = 1), count(*) FILTER (WHERE occurrence > 1), "
            "max(occurrence) FROM market.ticks"
        )
        assert await query(database, counts) == [(5002, 4038, 964, 25)]
        assert await query(database, "SELECT count(*) FROM ingest.rejected_messages") == [(0,)]
