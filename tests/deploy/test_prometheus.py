"""The alerts: each fires where it should, is silent where it must be, asks for what there is, and is explained."""

from __future__ import annotations

import asyncio
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.promql import unknown
from tests.integration.test_operations import seen
from tests.recording import recording
from tests.servers import execute_all
from tests.tools import need
from tests.unit.test_metrics import KNOWN, relay_metrics, scraped

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy/prometheus/ingestor.rules.yaml"
CASES = sorted((ROOT / "deploy/prometheus/tests").glob("*.yaml"))
PAGE = ROOT / "docs/how-to/alerts.md"


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def rules(kind: str) -> list[dict[str, Any]]:
    return [rule for group in load(RULES)["groups"] for rule in group["rules"] if kind in rule]


ALERTS = {rule["alert"]: rule for rule in rules("alert")}


def promtool(*arguments: str, text: str | None = None) -> None:
    """Run promtool, with this text as its input; it must have nothing to say against it."""
    done = subprocess.run(
        [need("promtool", package="prometheus"), *arguments],
        input=text,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr


def sections() -> dict[str, str]:
    """Return the page's sections about alerts, by their names."""
    parts = re.split(r"^### (\w+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_the_rules_are_valid() -> None:
    """Prometheus accepts the rules, and the configuration that reads them."""
    promtool("check", "config", str(RULES.with_name("prometheus.yml")))


async def test_the_metrics_follow_the_conventions(writer_url: str) -> None:
    """All that there can be, and what a daemon answers: names, units, types and help as Prometheus wants them."""
    promtool("check", "metrics", text=scraped(KNOWN))
    promtool("check", "metrics", text=relay_metrics())
    async with recording(writer_url) as (market, daemon), seen(daemon) as window:
        market.trade(1)
        answer = await window.client.get("/metrics")
    await asyncio.to_thread(promtool, "check", "metrics", text=answer.text)


def test_alerts_fire_and_are_silent() -> None:
    """Over series that are made up: nights, restarts, one of two instances, counters that restart."""
    promtool("test", "rules", *map(str, CASES))


def test_recorded_series_are_evaluated_first_in_each_test() -> None:
    """Else promtool takes groups in any order, so what is recorded could be that of the step before."""
    order = [group["name"] for group in load(RULES)["groups"]]
    assert order[0] == "ingestor-recorded"
    assert [load(path)["group_eval_order"] for path in CASES] == [order] * len(CASES)


def test_each_alert_is_tested_both_ways() -> None:
    """A rule that can't fire, or can't be silent, would pass half a test."""
    tried: dict[str, set[bool]] = {}
    for path in CASES:
        for case in load(path)["tests"]:
            for test in case["alert_rule_test"]:
                tried.setdefault(test["alertname"], set()).add(bool(test["exp_alerts"]))
    assert tried == {name: {True, False} for name in ALERTS}


def test_only_what_a_daemon_tells_is_asked_for() -> None:
    """In the rules, and in the series of their tests, which would hide a name that is wrong in both."""
    series = [each["series"] for path in CASES for case in load(path)["tests"] for each in case["input_series"]]
    for expression in (*(rule["expr"] for rule in (*rules("record"), *rules("alert"))), *series):
        assert list(unknown(expression)) == [], expression
    assert list(unknown('ingestor_wrong + ingestor_ready{check="x"} + ingestor_ready{reason="x"}')) == [
        "ingestor_wrong",
        'ingestor_ready{check="x"}',
        "ingestor_ready{reason}",
    ]


def test_relays_are_a_job_of_their_own() -> None:
    """No alert about daemons counts a relay, nor the other way round; the configurations scrape both by these names."""
    for group in load(RULES)["groups"]:
        for rule in group["rules"]:
            jobs = set(re.findall(r'job="([^"]+)"', rule["expr"]))
            names = re.findall(r"\bingestor_\w+", rule["expr"])
            if group["name"] == "ingestor-buffer":  # a recorder and a writer both report on the stream
                assert jobs <= {"ingestor-write"}
                assert all(name.startswith(("ingestor_buffer_", "ingestor_writer_")) for name in names)
            elif group["name"] == "ingestor-relay":
                assert jobs <= {"ingestor-relay"}
                assert all(name.startswith("ingestor_relay_") for name in names)
            else:
                assert jobs <= {"ingestor"}
                assert not any(name.startswith(("ingestor_relay_", "ingestor_writer_")) for name in names)
    for path in (RULES.with_name("prometheus.yml"), ROOT / "deploy/docker/prometheus.yaml"):
        found = {job["job_name"]: job["static_configs"][0]["targets"] for job in load(path)["scrape_configs"]}
        assert found.keys() == {"ingestor", "ingestor-relay"}


def test_what_is_recorded_is_used() -> None:
    expressions = "\n".join(rule["expr"] for rule in rules("alert"))
    names = {rule["record"] for rule in rules("record")}
    assert names == set(re.findall(r"\binstance:\w+:\w+", expressions))


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_what_to_do(name: str) -> None:
    """How urgent it is, in one line and in a few, with the way to its section, which is as urgent."""
    rule = ALERTS[name]
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    assert rule["annotations"]["runbook"] == f"{PAGE.relative_to(ROOT)}#{name.lower()}"
    assert len(rule["annotations"]["summary"]) < 100
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert sections()[name].lstrip().startswith(f"**{rule['labels']['severity'].capitalize()}.**")


def test_each_section_is_about_an_alert() -> None:
    """In the order of the rules."""
    assert list(sections()) == list(ALERTS)


def test_expressions_of_the_page_name_what_there_is() -> None:
    found = re.findall(r"^```promql\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert found
    for expression in found:
        assert list(unknown(expression)) == [], expression


async def test_the_queries_of_the_page_run(writer_url: str) -> None:
    """As the daemon's own login, which the operator on call has."""
    found = re.findall(r"^```sql\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert len(found) > 3
    await execute_all(writer_url, *found)
