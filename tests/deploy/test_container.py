"""The container's recipe and the composition, as far as they can be tried without building an image.

The commands of the stages that build are run in a clean folder; the services of ours are run as processes, with
the commands, variables and secrets of compose.yaml, against a real server.
"""

from __future__ import annotations

import asyncio
import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from typer.main import get_command

from ingestor import __version__
from ingestor.cli import app
from ingestor.settings import Settings, parse_hosts, variable, written_default
from tests.clocks import HANG_SECONDS
from tests.recording import COUNT
from tests.servers import TestServer, query
from tests.tools import ALL_TOOLS, LONG, need

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "deploy/docker"
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if service["image"].startswith("ingestor:")}
LOGINS = """
SELECT DISTINCT usename FROM pg_stat_activity
WHERE application_name = 'ingestor' AND datname = current_database() AND pid <> pg_backend_pid()
"""
INSTRUCTION = re.compile(r"^([A-Z]+) (.*)$")


def instructions() -> list[list[tuple[str, str]]]:
    """The Dockerfile's stages, each as its instructions."""
    text = re.sub(r"\\\n\s*", "", (DOCKER / "Dockerfile").read_text())
    stages: list[list[tuple[str, str]]] = []
    for match in map(INSTRUCTION.match, text.splitlines()):
        if match is not None:
            if match[1] == "FROM":
                stages.append([])
            stages[-1].append((match[1], match[2]))
    return stages


@pytest.mark.skipif(not ALL_TOOLS, reason=LONG)
def test_the_first_stage_builds_what_the_second_needs(tmp_path: Path) -> None:
    """Its commands, in a clean folder with what the context lets in, make an environment that runs anywhere."""
    build, _ = instructions()
    place = tmp_path / "src"
    place.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL"))}
    for word, rest in build:
        if word == "COPY":
            *sources, target = rest.split()
            for source in sources:
                copy(ROOT / source, place / target, is_folder=(ROOT / source).is_dir())
        elif word == "RUN":
            command = re.sub(r"(?<![\w/])(/build|/opt/ingestor|/dist)", rf"{tmp_path}\1", rest)
            command = command.replace("python -m venv", f"{sys.executable} -m venv").replace(
                f"venv {tmp_path}/opt", f"venv --symlinks {tmp_path}/opt"
            )
            subprocess.run(["sh", "-euc", command], cwd=place, env=environment, check=True, capture_output=True)
    program = tmp_path / "opt/ingestor/bin/ingestor"
    shutil.rmtree(place)
    shown = subprocess.run([program, "--version"], cwd="/", env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout == f"ingestor {__version__}\n"
    missing = subprocess.run([program.parent / "python", "-m", "pip"], cwd="/", capture_output=True, check=False)
    assert missing.returncode == 1


def copy(source: Path, target: Path, *, is_folder: bool) -> None:
    if is_folder:
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)


def test_the_context_lets_in_what_is_copied_and_no_more() -> None:
    """A secret of the working directory can't slip into an image."""
    lines = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    allowed = {line.removeprefix("!") for line in lines if line.startswith("!")}
    copied = {source for word, rest in instructions()[0] if word == "COPY" for source in rest.split()[:-1]}
    assert "*" in lines
    assert copied == allowed


def test_the_image_is_careful() -> None:
    """It runs as an unprivileged user, checks its liveness, and starts the daemon by default."""
    _, final = instructions()
    words = dict(final)
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", words["USER"])
    assert [word for word, _ in final if word in {"COPY", "ADD"}] == ["COPY"]
    assert str(Settings.model_fields["http_port"].default) in words["HEALTHCHECK"]
    assert words["EXPOSE"] == str(Settings.model_fields["http_port"].default)
    assert (words["ENTRYPOINT"], words["CMD"]) == ('["ingestor"]', '["run"]')
    given = dict(part.split("=", 1) for part in words["ENV"].split())
    ours = {name for name in given if name.startswith("INGESTOR_")}
    assert ours <= {variable(name) for name in Settings.model_fields}
    assert words["VOLUME"] == given[variable("spool_dir")]


class Health(http.server.BaseHTTPRequestHandler):
    """Answers with its server's status."""

    def do_GET(self) -> None:
        self.send_response(self.server.status if self.path == "/healthz" else 404)  # type: ignore[attr-defined]
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_the_image_knows_whether_it_is_alive() -> None:
    """It asks on the configured port, never through a proxy; only 200 is alive."""
    words = dict(instructions()[1])
    command = json.loads(words["HEALTHCHECK"].partition("CMD ")[2])
    with http.server.HTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {
            **os.environ,
            "http_proxy": "http://127.0.0.1:1",
            variable("http_port"): str(server.server_port),
        }
        found = []
        for server.status in (200, 503):  # type: ignore[attr-defined]
            found.append(subprocess.run([sys.executable, *command[1:]], env=environment, check=False).returncode)
        server.shutdown()
    gone = subprocess.run([sys.executable, *command[1:]], env=environment, stderr=subprocess.DEVNULL, check=False)
    assert (*found, gone.returncode) == (0, 1, 1)


@pytest.mark.parametrize(("job", "service"), [("ingestor", "ingestor"), ("ingestor-relay", "relay")])
def test_prometheus_asks_by_a_name_that_the_process_knows(job: str, service: str) -> None:
    """Or it would be answered 421, as a page is that lets its own name lead to the daemon."""
    found = {
        each["job_name"]: each for each in yaml.safe_load((DOCKER / "prometheus.yaml").read_text())["scrape_configs"]
    }
    hosts = parse_hosts(SERVICES[service]["environment"]["INGESTOR_HTTP_HOSTS"])
    targets = {target for each in found[job]["static_configs"] for target in each["targets"]}
    assert targets == {f"{host}:9464" for host in hosts}


def test_the_relay_answers_where_the_image_asks() -> None:
    """The image's check of health asks at the daemon's port, so the relay of the composition listens there."""
    asked = str(SERVICES["relay"]["environment"]["INGESTOR_RELAY_HTTP_PORT"])
    assert asked == written_default("http_port")
    assert SERVICES["relay"]["ports"] == [f"127.0.0.1:{port}:{port}" for port in (written_default("relay_port"),)]


@pytest.mark.parametrize("name", SERVICES)
def test_services_are_confined(name: str) -> None:
    """No privileges, a root that can't be written to, ports for this machine alone."""
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is (name != "timescaledb")
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert re.search(r":v?\d+\.\d+\.\d+", service["image"]), "a version, so that an upgrade is a decision"
    assert set(service.get("depends_on", {})) <= set(SERVICES)


@pytest.mark.parametrize("name", OURS)
def test_our_services_use_what_there_is(name: str) -> None:
    """Commands, options and variables of ours; and secrets that are made, as files."""
    service = OURS[name]
    assert service["image"] == f"ingestor:{__version__}"
    command, *options = service["command"]
    known = {option for each in get_command(app).commands[command].params for option in each.opts}  # type: ignore[attr-defined]
    assert {option for option in options if option.startswith("--")} <= known
    environment = service.get("environment", {})
    assert set(environment) <= {variable(setting) for setting in Settings.model_fields}
    assert not {variable("token"), variable("database_url")} & set(environment)
    for key, value in environment.items():
        if key.endswith("_FILE"):
            assert value.removeprefix("/run/secrets/") in service["secrets"]


def test_everything_that_is_mounted_is_there(tmp_path: Path) -> None:
    """Files and folders of the repository, and secrets that `make-secrets` makes."""
    made = make_secrets(tmp_path)
    assert {path.name for path in made.iterdir()} == set(COMPOSE["secrets"])
    used = {secret for service in SERVICES.values() for secret in service.get("secrets", [])}
    assert used == set(COMPOSE["secrets"])
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or (DOCKER / source).exists(), source


def test_grafana_gets_the_variables_of_its_provisioning() -> None:
    """Each variable that the data sources name has a value, and the password's file is mounted."""
    asked = (ROOT / "deploy/grafana/provisioning/datasources/ingestor.yaml").read_text()
    assert set(re.findall(r"\$([A-Z]\w+)", asked)) <= set(SERVICES["grafana"]["environment"])
    for secret in re.findall(r"\$__file\{/run/secrets/([\w-]+)\}", asked):
        assert secret in SERVICES["grafana"]["secrets"]
    for path in re.findall(
        r"path: (/\S+)", (ROOT / "deploy/grafana/provisioning/dashboards/ingestor.yaml").read_text()
    ):
        assert any(volume.split(":")[1] == path for volume in SERVICES["grafana"]["volumes"])


def make_secrets(place: Path) -> Path:
    """Run the script in a folder of its own, twice: the second time changes nothing."""
    shutil.copy(DOCKER / "make-secrets", place)
    subprocess.run([place / "make-secrets"], check=True, capture_output=True)
    found = {path: path.read_text() for path in (place / "secrets").iterdir()}
    subprocess.run([place / "make-secrets"], check=True, capture_output=True)
    assert found == {path: path.read_text() for path in (place / "secrets").iterdir()}
    assert (place / "secrets").stat().st_mode & 0o077 == 0
    return place / "secrets"


class Composition:
    """The services of ours as processes of this machine; what leads to a container leads to where it is here."""

    def __init__(self, database: str, secrets: Path, place: Path) -> None:
        self._parts = urlsplit(database)
        self._secrets = secrets
        self._place = place
        self.port = free_port()
        self.running: list[subprocess.Popen[bytes]] = []
        for secret in secrets.iterdir():
            secret.chmod(0o600)
            text = secret.read_text().replace("@timescaledb:5432/market", f"@{self.host}/{self._parts.path[1:]}")
            if secret.name == "owner-url":
                text = database
            secret.write_text(text)

    @property
    def host(self) -> str:
        return f"{self._parts.hostname}:{self._parts.port}"

    def environment(self, name: str) -> dict[str, str]:
        given = {
            key: str(value).replace("/run/secrets", str(self._secrets)).replace(":5005", f":{self.port}")
            for key, value in SERVICES[name].get("environment", {}).items()
        }
        state = {variable("spool_dir"): str(self._place / name), variable("http_port"): "0"}
        ports = {variable("relay_port"): "0", variable("relay_http_port"): "0"}
        return {**os.environ, **state, **given, **ports}

    def start(self, name: str, *more: str) -> subprocess.Popen[bytes]:
        """Start a service of ours."""
        command = [sys.executable, "-m", "ingestor", *SERVICES[name]["command"], *more]
        with (self._place / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(command, env=self.environment(name), cwd=self._place, stdout=log, stderr=log)
        self.running.append(process)
        return process

    def make_logins(self) -> int:
        """Do what the step `logins` does."""
        script = self._place / "logins.sql"
        script.write_text((DOCKER / "logins.sql").read_text().replace("/run/secrets", str(self._secrets)))
        (command,) = SERVICES["logins"]["command"]
        arguments = re.search(r"psql (.*)", command)
        assert arguments is not None
        psql = need("psql", package="postgresql-client")
        options = [
            option
            for option in arguments[1].split()
            if not option.startswith(("--host", "--username", "--dbname", "--file"))
        ]
        url = (self._secrets / "owner-url").read_text()
        return subprocess.run([psql, *options, f"--file={script}", url], check=False).returncode

    def stop(self) -> None:
        for process in self.running:
            process.terminate()
        for process in self.running:
            process.wait(30)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


@pytest.fixture
def composition(plain: TestServer, tmp_path: Path) -> Iterator[Composition]:
    """Everything but what others have made."""
    name = plain.new_name()
    url = asyncio.run(plain.create(name))
    found = Composition(url, make_secrets(tmp_path), tmp_path)
    yield found
    found.stop()
    asyncio.run(plain.drop(name))
    asyncio.run(plain.run("DROP ROLE IF EXISTS ingestor"))
    asyncio.run(plain.run("DROP ROLE IF EXISTS grafana"))
    asyncio.run(plain.run("DROP ROLE IF EXISTS relay"))


@pytest.mark.skipif(not ALL_TOOLS, reason=LONG)
def test_the_composition_works(composition: Composition) -> None:
    """In its order: the daemon first, which ends while it has no login; ticks arrive by the one that was made."""
    assert SERVICES["ingestor"]["restart"] == "unless-stopped"
    daemon = composition.start("ingestor")
    composition.start("simulator", "--port", str(composition.port))
    assert composition.start("migrate").wait(60) == 0
    assert daemon.wait(60) == 78
    assert composition.make_logins() == 0
    assert composition.make_logins() == 0
    composition.start("ingestor")  # as Docker does
    owner = (composition._secrets / "owner-url").read_text()
    asyncio.run(filled(owner))
    composition.start("relay")
    asyncio.run(follows(composition._place / "relay.log"))
    (login,) = asyncio.run(query(owner, LOGINS))
    assert login == ("ingestor",)
    reader = (composition._secrets / "reader-password").read_text()
    grafana = f"postgresql://grafana:{reader}@{composition.host}{urlsplit(owner).path}"
    assert asyncio.run(query(grafana, "SHOW default_transaction_read_only")) == [("on",)]
    assert asyncio.run(query(grafana, COUNT))[0][0] > 0


async def follows(log: Path) -> None:
    """Wait until a relay follows the log of commits."""
    async with asyncio.timeout(HANG_SECONDS):
        while "relay_following" not in log.read_text():
            await asyncio.sleep(0.1)


async def filled(url: str) -> None:
    """Wait until there are ticks."""
    async with asyncio.timeout(HANG_SECONDS):
        while (await query(url, COUNT))[0][0] == 0:
            await asyncio.sleep(0.1)
