"""The runbook: its commands are run as they stand, with other addresses; the others are held to what is there."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from typer.main import get_command

from ingestor.cli import app
from ingestor.simulator.server import TOKEN
from tests.chaos.soak import market
from tests.deploy.test_container import free_port
from tests.servers import TestServer, with_parts
from tests.tools import ALL_TOOLS, LONG, need

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/how-to/operate.md").read_text(encoding="utf-8")
BLOCKS: list[str] = re.findall(r"^```sh\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
NEEDS = ("# needs systemd", "# needs a cluster", "# needs Docker")
RUN = [block for block in BLOCKS if not block.startswith("# needs")]
VALIDATED = [block for block in BLOCKS if block.startswith("# needs")]


class Place:
    """Maps the runbook's folders, addresses and names to those of this test."""

    def __init__(self, admin_url: str, stream_url: str, directory: Path) -> None:
        parts = urlsplit(admin_url)
        self._replacements = {
            "/etc/ingestor": f"{directory}/etc",
            "/opt/ingestor": f"{directory}/opt",
            "/var/lib/ingestor": f"{directory}/spool",
            "127.0.0.1:9464": f"127.0.0.1:{free_port()}",
            "db.example.org/market": f"{parts.hostname}:{parts.port}/ingestor_runbook",
            "DATABASE market": "DATABASE ingestor_runbook",
            "market_lost": "ingestor_runbook_lost",
            "pk_your_token_goes_here": TOKEN,
            "ingestor_owner": "ingestor_runbook_owner",
            "ROLE ingestor ": "ROLE ingestor_runbook_writer ",
            "//ingestor:": "//ingestor_runbook_writer:",
            "python3 -m venv": f"{sys.executable} -m venv",
        }
        port = self._replacements["127.0.0.1:9464"].rpartition(":")[2]
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("INGESTOR_")},
            "ADMIN_URL": admin_url,
            "ADMIN_MARKET_URL": with_parts(admin_url, database="ingestor_runbook"),
            "INGESTOR_STREAM_URL": stream_url,
            "INGESTOR_REST_URL": stream_url.replace("ws://", "http://").removesuffix("/ws"),
            "INGESTOR_EXCHANGE_CALENDAR": "always",
            "INGESTOR_HTTP_PORT": port,
        }
        self.directory = directory
        for name in ("requirements.lock", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, directory)
        for name in ("ingestor", "migrations"):
            shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))

    def run(self, block: str) -> None:
        """Run a block of commands; each of them must work."""
        for old, new in self._replacements.items():
            block = block.replace(old, new)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=self.directory,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=600,  # one of them installs everything
            check=False,
        )
        log = self.directory / "daemon.log"
        assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}{log.read_text() if log.exists() else ''}"


@pytest.mark.skipif(not ALL_TOOLS, reason=LONG)
@pytest.mark.timeout(900)
async def test_the_commands_work(plain: TestServer, tmp_path: Path) -> None:
    """From an empty server to a restored database."""
    for tool in ("psql", "pg_dump", "pg_restore"):
        need(tool, package="postgresql-client")
    need("curl", package="curl")
    with market(50, tmp_path) as feed:
        place = Place(plain.url, await feed.url(), tmp_path)
        try:
            for block in RUN:
                await asyncio.to_thread(place.run, block)
        finally:
            for name in ("ingestor_runbook", "ingestor_runbook_lost"):
                await plain.run(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
            for name in ("ingestor_runbook_writer", "ingestor_runbook_owner"):
                await plain.run(f"DROP ROLE IF EXISTS {name}")


@pytest.mark.parametrize("block", VALIDATED, ids=lambda block: block.split("\n")[1])
def test_the_others_name_what_is_there(block: str) -> None:
    """They say what they need, and each folder, unit, job and command of ours exists."""
    assert block.startswith(NEEDS)
    for path in re.findall(r"deploy/[\w./-]+", block):
        if not path.startswith("deploy/kubernetes/secrets/"):  # which a person puts there
            assert (ROOT / path.rstrip(".")).exists(), path
    units = {path.name for path in (ROOT / "deploy/systemd").iterdir()}
    assert set(re.findall(r"ingestor[\w-]*\.(?:service|timer)", block)) <= units
    manifests = "\n".join(path.read_text() for path in (ROOT / "deploy/kubernetes").rglob("*.yaml"))
    for kind, name in re.findall(r"(statefulset|job)[ /]([\w-]+)", block):
        assert re.search(rf"kind: {kind}\b.*?name: {name}\n", manifests, flags=re.IGNORECASE | re.DOTALL), name
    assert subprocess.run(["bash", "-n", "-c", block], check=False).returncode == 0


def test_commands_in_the_text_are_commands_of_ours() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for command, options in re.findall(r"`?ingestor ([a-z][a-z-]+)((?: --?[\w-]+(?: \w+)?)*)", TEXT):
        if command in commands:
            known = {option for parameter in commands[command].params for option in parameter.opts}
            assert set(re.findall(r"--[\w-]+", options)) <= known, (command, options)


def test_links_lead_somewhere() -> None:
    """In this page and in the others of the documentation."""
    for page in (ROOT / "docs").rglob("*.md"):
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
