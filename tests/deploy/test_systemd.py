"""The units of deploy/systemd, checked by systemd's own tools and held against the code that they start."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command

from ingestor.cli import app
from ingestor.errors import EXIT_CONFIGURATION
from ingestor.service.daemon import WATCH_INTERVAL
from ingestor.settings import Settings, parse_duration, parse_size, variable, written_default
from ingestor.store.follower import LEAVE_SECONDS
from ingestor.telemetry.liveness import LIVENESS_GRACE_SECONDS
from ingestor.web.server import CLOSE_TIMEOUT
from tests.tools import need

UNITS = Path(__file__).parents[2] / "deploy/systemd"
SERVICES = sorted(path.name for path in UNITS.glob("*.service"))
TIMERS = sorted(path.name for path in UNITS.glob("*.timer"))
PROGRAM = "/opt/ingestor/bin/ingestor"
MOST_EXPOSED = 1.5
RELAY = "ingestor-relay.service"
WRITER = "ingestor-write.service"


def analyze(*arguments: str, path: Path) -> subprocess.CompletedProcess[str]:
    command = need("systemd-analyze", package="systemd")
    return subprocess.run([command, *arguments], capture_output=True, text=True, cwd=path, check=False)


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """A copy of the units, as they are installed; their program is there."""
    copy = tmp_path / "system"
    shutil.copytree(UNITS, copy, symlinks=True)
    program = tmp_path / "ingestor"
    program.touch(mode=0o755)
    for unit in copy.glob("*.service"):
        unit.write_text(unit.read_text().replace(PROGRAM, str(program)))
    return copy


def directives(name: str) -> list[tuple[str, str]]:
    """The settings of a unit and of its drop-ins, as (name, value)."""
    drop_ins = UNITS / ("ingestor.service.d" if name == "ingestor.service" else "ingestor-.service.d")
    text = "\n".join(path.read_text() for path in (UNITS / name, *sorted(drop_ins.glob("*.conf"))))
    return re.findall(r"^(\w+)=(.*)$", text, flags=re.MULTILINE)


def value(unit: str, directive: str) -> str:
    """The last value of a setting."""
    return dict(directives(unit))[directive]


def test_the_units_are_there() -> None:
    """The daemon, a relay, a writer of the replicated buffer, the schema, and three jobs with their timers."""
    jobs = ["backfill", "gaps", "maintain"]
    others = ["ingestor-migrate.service", "ingestor-relay.service", WRITER]
    assert sorted(["ingestor.service", *others, *(f"ingestor-{job}.service" for job in jobs)]) == SERVICES
    assert [f"ingestor-{job}.timer" for job in jobs] == TIMERS


def test_systemd_understands_them(units: Path) -> None:
    """Not a word of complaint."""
    found = analyze("verify", "--man=no", *(f"./{name}" for name in (*SERVICES, *TIMERS)), path=units)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


def test_systemd_would_complain(units: Path) -> None:
    """A word that it does not know is found, also in the sandbox that the units share."""
    sandbox = units / "ingestor-.service.d/sandbox.conf"
    sandbox.write_text(sandbox.read_text().replace("ProtectHome=", "ProtectHouse="))
    found = analyze("verify", "--man=no", "./ingestor-gaps.service", path=units)
    assert "ProtectHouse" in found.stderr


def test_what_is_changed_for_the_daemon_is_for_it_alone(units: Path) -> None:
    """As `systemctl edit ingestor.service` does: a word that no job may have, in the daemon's own folder."""
    (units / "ingestor.service.d/override.conf").write_text("[Service]\nRestart=always\nWatchdogSec=120\n")
    found = analyze("verify", "--man=no", *(f"./{name}" for name in SERVICES), path=units)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


@pytest.mark.parametrize("name", SERVICES)
def test_the_sandbox_is_tight(units: Path, name: str) -> None:
    """And it is the shared drop-in that makes it so."""
    limit = f"--threshold={round(MOST_EXPOSED * 10)}"
    found = analyze("security", "--offline=yes", limit, f"./{name}", path=units)
    assert found.returncode == 0, found.stdout
    level = re.search(r"Overall exposure level for \S+: ([\d.]+)", found.stdout)
    assert level is not None
    assert float(level[1]) <= MOST_EXPOSED
    shutil.rmtree(units / "ingestor-.service.d")
    shutil.rmtree(units / "ingestor.service.d")
    assert analyze("security", "--offline=yes", limit, f"./{name}", path=units).returncode != 0


@pytest.mark.parametrize("name", TIMERS)
def test_timers_have_a_time(name: str) -> None:
    """They make up for what a machine slept through, and start a service of ours."""
    found = analyze("calendar", value(name, "OnCalendar"), path=UNITS)
    assert found.returncode == 0, found.stderr
    assert value(name, "Persistent") == "true"
    assert name.replace(".timer", ".service") in SERVICES


@pytest.mark.parametrize("name", SERVICES)
def test_what_is_started_is_a_command_of_ours(name: str) -> None:
    """With options that it takes."""
    program, command, *options = value(name, "ExecStart").removeprefix("-").split()
    assert program == PROGRAM
    commands = get_command(app).commands  # type: ignore[attr-defined]
    known = {option for parameter in commands[command].params for option in parameter.opts}
    assert {option for option in options if option.startswith("--")} <= known


@pytest.mark.parametrize("name", SERVICES)
def test_variables_are_settings_and_secrets_are_files(name: str) -> None:
    """Each secret comes as a credential of its own."""
    known = {variable(setting) for setting in Settings.model_fields}
    given = dict(
        assignment.split("=", 1)
        for directive, text in directives(name)
        if directive == "Environment"
        for assignment in text.split()
    )
    ours = {key: text for key, text in given.items() if key.startswith("INGESTOR_")}
    assert set(ours) <= known
    assert not {variable("token"), variable("database_url")} & set(ours)
    credentials = {text.split(":")[0] for directive, text in directives(name) if directive == "LoadCredential"}
    files = {key: text for key, text in ours.items() if key.endswith("_FILE")}
    assert {text.removeprefix("%d/") for text in files.values()} == credentials


@pytest.mark.parametrize("name", ["ingestor.service", RELAY, WRITER])
def test_a_person_must_act_on_one_status_only(name: str) -> None:
    """Every other status is retried indefinitely."""
    assert value(name, "RestartPreventExitStatus") == str(EXIT_CONFIGURATION)
    assert value(name, "Restart") == "always"
    assert value(name, "StartLimitIntervalSec") == "0"


def test_times_fit_those_of_the_daemon() -> None:
    """The stop may drain and then wait for the spool; the watchdog is slower than a loop's grace and than its food."""
    stop = parse_duration(written_default("stop_timeout"))
    assert parse_duration(value("ingestor.service", "TimeoutStopSec")) >= 2 * stop + 5
    assert parse_duration(value("ingestor.service", "WatchdogSec")) >= max(LIVENESS_GRACE_SECONDS, 10 * WATCH_INTERVAL)


def test_memory_has_room_for_what_may_wait() -> None:
    """Twice what may wait in memory, and 128 MiB for everything else."""
    waiting = 2 * parse_size(written_default("memory_max_bytes"))
    high, most = (
        parse_size(value("ingestor.service", name).replace("M", "MiB")) for name in ("MemoryHigh", "MemoryMax")
    )
    assert waiting + 128 * 2**20 <= high < most


def test_the_spool_is_where_the_state_is() -> None:
    directory = value("ingestor.service", "StateDirectory")
    given = [text for directive, text in directives("ingestor.service") if directive == "Environment"]
    assert f"{variable('spool_dir')}=%S/{directory}" in given


def test_a_relay_has_room_and_time() -> None:
    """Its memory holds what its page promises for all clients; the watchdog and the stop are slower than its loops."""
    clients = int(written_default("relay_max_clients"))
    high, most = (parse_size(value(RELAY, name).replace("M", "MiB")) for name in ("MemoryHigh", "MemoryMax"))
    assert 80 * 2**20 + clients * 2**19 <= high < most
    assert parse_duration(value(RELAY, "WatchdogSec")) >= 10 * WATCH_INTERVAL
    assert parse_duration(value(RELAY, "TimeoutStopSec")) >= 2 * CLOSE_TIMEOUT + LEAVE_SECONDS + 10


def test_tls_of_a_relay_is_a_drop_in(units: Path) -> None:
    """The page's drop-in gives the relay's unit a certificate, and systemd understands it."""
    page = (UNITS.parents[1] / "docs/how-to/subscribe.md").read_text(encoding="utf-8")
    (drop_in,) = re.findall(r"^```ini\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    folder = units / f"{RELAY}.d"
    folder.mkdir()
    (folder / "override.conf").write_text(drop_in)
    found = analyze("verify", "--man=no", f"./{RELAY}", path=units)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
    credentials = re.findall(r"^LoadCredential=(\S+):/etc/ingestor/", drop_in, flags=re.MULTILINE)
    given = dict(text.split("=", 1) for text in re.findall(r"\bINGESTOR_\w+=\S+", drop_in))
    assert set(given) == {variable("relay_host"), variable("relay_tls_cert"), variable("relay_tls_key")}
    assert {given[variable("relay_tls_cert")], given[variable("relay_tls_key")]} == {
        f"%d/{name}" for name in credentials
    }
