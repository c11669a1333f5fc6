from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "ingestor"

# Each may import from lower layers and from itself; the parts of one layer do not import each other.
LAYERS = [
    {"libpq", "dial"},
    {"model", "address", "files"},
    {"errors", "clock", "redaction", "retry_after"},
    {"settings", "telemetry", "chart", "network"},
    {"batch", "buffer", "stream", "protocol", "coverage", "jetstream"},
    {"store", "simulator", "embedded"},
    {"backfill", "web", "admin", "relay"},
    {"service"},
    {"demo"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
OWNERS = {
    "nats": {"jetstream"},
    "websockets": {"stream", "protocol", "simulator", "relay", "demo"},
    "asyncpg": {"store", "admin", "demo"},
    "sqlalchemy": {"admin"},
    "alembic": {"admin"},
    "exchange_calendars": {"coverage"},
    "typer": {"cli"},
    "rich": {"cli"},
    "msgspec": {"stream", "protocol", "model", "buffer", "backfill", "jetstream"},
    "sqlite3": {"buffer"},
    "httpx": {"backfill"},
    "prometheus_client": {"telemetry", "web"},
    "starlette": {"web"},
    "uvicorn": {"web"},
}


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module == "ingestor":
                found.update(f"ingestor.{alias.name}" for alias in node.names)
    return found


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if part(path) not in {"__init__", "__main__"}]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    """A module imports only from lower layers, and a library only in its own part."""
    mine = part(path)
    for name in imports(path):
        root, *rest = name.split(".")
        if root == "ingestor" and rest and rest[0] in LEVEL:
            assert rest[0] == mine or LEVEL[rest[0]] < LEVEL[mine], f"{mine} imports {rest[0]}"
        assert mine in OWNERS.get(root, {mine}), f"{mine} imports {root}"


def test_the_daemon_imports_only_its_libraries() -> None:
    """The daemon imports no library that only some commands need: it runs for months on a small machine."""
    heavy = {"sqlalchemy", "alembic", "httpx", "pandas", "nats"}
    code = f"import sys, ingestor.cli; print(*sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_contributing_names_every_module() -> None:
    """The table of CONTRIBUTING.md lists each module in the row of its folder, and no other."""
    table = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| `ingestor/")]
    named = {name for place, text in rows for name in re.findall(r"`([\w./]+)`", place + text)}
    for path in FILES:
        if path.parent.name != "cli" and not path.stem.startswith("__"):  # cli/ has a file for each command
            assert {path.stem, path.name, f"ingestor/{path.name}"} & named, f"CONTRIBUTING.md lacks {path.name}"
    stems = {path.stem for path in FILES} | {path.name for path in PACKAGE.rglob("*.*")}
    folders = {f"ingestor/{path.name}/" for path in PACKAGE.iterdir()} | {"static/", "tests/deploy/"}
    gone = {name for name in named - folders if name.removeprefix("ingestor/") not in stems}
    assert gone == {"psql"} | gone & {"Retry-After"}
