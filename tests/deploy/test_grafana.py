"""The dashboards: whole, tied to no data source, and each question has an answer. Grafana itself does not run here."""

from __future__ import annotations

import functools
import itertools
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from ingestor.admin.maintenance import maintain
from ingestor.admin.roles import grant_analyst
from ingestor.settings import load_settings
from ingestor.store.connect import connect
from tests.deploy.grafana import (
    DASHBOARDS,
    FOLDER,
    PANELS,
    POSTGRESQL,
    PROMETHEUS,
    expanded_promql,
    expanded_sql,
    questions,
)
from tests.deploy.promql import unknown
from tests.examples import seed
from tests.servers import TestServer, with_parts
from tests.tools import need

NAME = [f"{name}-{panel['id']}" for name, panel in PANELS]
expanded = functools.partial(
    expanded_sql,
    since=datetime(2026, 11, 17, 11, tzinfo=UTC),
    until=datetime(2026, 11, 20, 11, tzinfo=UTC),
    timezone="Pacific/Auckland",
)
"""Over three days of the exchange: those of the documented queries."""

PASSWORD = "analyst-of-the-tests"


def provisioned(kind: str) -> Any:
    return yaml.safe_load((FOLDER / "provisioning" / kind / "ingestor.yaml").read_text(encoding="utf-8"))


def sources(found: Any) -> list[Any]:
    """Return what is said of data sources, wherever that is."""
    if isinstance(found, list):
        return [each for item in found for each in sources(item)]
    if not isinstance(found, dict):
        return []
    own = [found["datasource"]] if "datasource" in found else []
    return own + [each for item in found.values() for each in sources(item)]


def test_there_is_one_for_operations_and_one_for_analysts() -> None:
    assert set(DASHBOARDS) == {"operations", "analysts"}
    assert {dashboard["uid"] for dashboard in DASHBOARDS.values()} == {"ingestor-operations", "ingestor-analysts"}


@pytest.mark.parametrize(("name", "kind"), [("operations", PROMETHEUS), ("analysts", POSTGRESQL)])
def test_the_data_source_is_a_variable(name: str, kind: str) -> None:
    """Of the one type that the dashboard's questions are for, and one of that type is provisioned."""
    dashboard = DASHBOARDS[name]
    assert "id" not in dashboard, "that is the number of one Grafana's database"
    assert {(each["type"], each["uid"]) for each in sources(dashboard)} == {(kind, "${datasource}")}
    (variable,) = (each for each in dashboard["templating"]["list"] if each["type"] == "datasource")
    assert (variable["name"], variable["query"]) == ("datasource", kind)
    assert kind in {each["type"] for each in provisioned("datasources")["datasources"]}


@pytest.mark.parametrize("name", DASHBOARDS)
def test_panels_lie_side_by_side(name: str) -> None:
    """Each has a number of its own and a place within the 24 columns that no other has."""
    found = DASHBOARDS[name]["panels"]
    assert len({panel["id"] for panel in found}) == len(found)
    cells: set[tuple[int, int]] = set()
    for place in (panel["gridPos"] for panel in found):
        assert place["x"] + place["w"] <= 24
        own = set(
            itertools.product(range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"]))
        )
        assert not cells & own, place
        cells |= own
    assert len(cells) == 24 * (1 + max(y for _, y in cells)), "there is a hole"


@pytest.mark.parametrize(("name", "panel"), PANELS, ids=NAME)
def test_a_panel_says_what_it_shows(name: str, panel: dict[str, Any]) -> None:
    """A description, names for its series, and colours in the order of their bounds."""
    assert panel["title"]
    assert len(panel["description"]) > 20
    assert [target["refId"] for target in panel["targets"]] == list("ABCDE"[: len(panel["targets"])])
    if name == "operations" and panel["type"] != "table":
        assert all(target["legendFormat"] for target in panel["targets"])
    bounds = [step["value"] for step in panel["fieldConfig"]["defaults"].get("thresholds", {}).get("steps", [])]
    assert bounds[:1] in ([], [None])
    assert bounds[1:] == sorted(bounds[1:])


def test_prometheus_understands_each_expression(tmp_path: Path) -> None:
    """And a daemon has what they name."""
    found = [(each.of, expanded_promql(each.text, instance=".*")) for each in questions(PROMETHEUS)]
    assert len(found) > 20
    for of, expression in found:
        assert list(unknown(expression)) == [], of
    rules = [{"record": f"question:{number}", "expr": expression} for number, (_, expression) in enumerate(found)]
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboards", "rules": rules}]}), encoding="utf-8")
    command = [need("promtool", package="prometheus"), "check", "rules", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_only_the_daemons_of_the_variable_are_asked_for() -> None:
    """Each series of a daemon is chosen by job and instance, so that the variable holds; relays are another job."""
    for each in questions(PROMETHEUS):
        for name, selector in re.findall(r"((?:ingestor|process)_\w+)(\{[^}]*\}|)", each.text):
            if name.startswith("ingestor_relay_"):
                assert 'job="ingestor-relay"' in selector, each.of
                continue
            assert 'job="ingestor"' in selector, each.of
            assert 'instance=~"$instance"' in selector or each.of == "operations: instance", each.of


@pytest.mark.usefixtures("bundled_calendar")
async def test_each_query_has_an_answer(database: str, server: TestServer) -> None:
    """As a login that may only read the market; with the columns that its panel speaks of."""
    name = server.new_name()
    await seed(database)
    await maintain(load_settings(database_url=database), lambda _: None)
    await grant_analyst(database, name, password=PASSWORD, statement_timeout=30, report=lambda _: None)
    short = database.rpartition("/")[2].partition("?")[0]
    connection = await connect(with_parts(database, database=short, user=name, password=PASSWORD))
    answers = {}
    try:
        for each in questions(POSTGRESQL):
            rows = await connection.fetch(expanded(each.text, symbol="FPH.NZ"))
            assert rows, each.of
            assert each.columns <= set(rows[0].keys()), each.of
            answers[each.of] = [tuple(row) for row in rows]
    finally:
        await connection.close()
        await server.run(f"DROP ROLE {name}")
    assert_what_the_market_was(answers)


def assert_what_the_market_was(answers: dict[str, list[tuple[Any, ...]]]) -> None:
    """Compare some of the answers with those of docs/analysts.md."""
    assert [float(row[0]) for row in answers["analysts: Coverage"]] == [99.86]  # 2 of 1,485 minutes are missing
    assert [row[0] for row in answers["analysts: symbol"]] == ["AIR.NZ", "FPH.NZ", "MEL.NZ", "SPK.NZ"]
    assert [(row[0], float(row[1])) for row in answers["analysts: Coverage by day"]] == [
        ("2026-11-20", 100),
        ("2026-11-19", 99.59),
        ("2026-11-18", 100),
    ]
    assert [(float(row[2]), row[4]) for row in answers["analysts: Gaps"]] == [(720, "backfilled"), (120, "open")]
    assert [row[3] for row in answers["analysts: Gaps shaded"]] == ["open"]
    assert answers["analysts: Volume by symbol"][0][0] == "FPH.NZ"
    changes = {row[0]: round(row[2], 3) for row in answers["analysts: Latest prices"]}
    assert (changes["AIR.NZ"], changes["SPK.NZ"]) == (7.563, 1.965)  # question 18
    assert len(answers["analysts: ${symbol}: daily bars"]) == 3


def test_a_symbol_can_hold_nothing_but_text() -> None:
    found = expanded("SELECT ${symbol:sqlstring}", symbol="O'X")
    assert found == "SELECT 'O''X'"


def test_addresses_come_from_the_environment_and_the_secret_from_a_file() -> None:
    """Nothing of one installation is written down; the uids, by which others may link to the data sources, are."""
    found = provisioned("datasources")["datasources"]
    assert [each["uid"] for each in found] == ["ingestor-prometheus", "ingestor-market"]
    for each in found:
        for value in (each["url"], each.get("user", "$X")):
            assert re.fullmatch(r"\$[A-Z_]+", value), value
        for value in each.get("secureJsonData", {}).values():
            assert re.fullmatch(r"\$__file\{/run/secrets/[\w-]+\}", value), value


def test_the_dashboards_are_provisioned_from_files() -> None:
    (provider,) = provisioned("dashboards")["providers"]
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"
    assert provider["allowUiUpdates"] is False


def test_the_page_names_each_variable_of_the_environment() -> None:
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `([A-Z_]+)` \|", page, flags=re.MULTILINE))
    assert documented == set(re.findall(r"\$([A-Z_]+)\b", yaml.safe_dump(provisioned("datasources"))))
