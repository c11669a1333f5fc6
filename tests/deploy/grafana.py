"""The queries of a Grafana dashboard as its data sources send them: variables and macros are replaced."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "deploy/grafana"
DASHBOARDS = {
    path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("dashboards/*.json"))
}

PANELS = [(name, panel) for name, dashboard in DASHBOARDS.items() for panel in dashboard["panels"]]
"""Each with the name of its dashboard."""

PROMETHEUS, POSTGRESQL = "prometheus", "grafana-postgresql-datasource"


@dataclass(frozen=True, slots=True)
class Question:
    """The queries of a panel, a variable or an annotation, with the columns that its settings speak of."""

    of: str
    text: str
    columns: frozenset[str] = frozenset()


def questions(kind: str) -> Iterator[Question]:
    """Yield what is asked of one kind of data source."""
    key = {PROMETHEUS: "expr", POSTGRESQL: "rawSql"}[kind]
    for name, dashboard in DASHBOARDS.items():
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                if key in target:
                    yield Question(f"{name}: {panel['title']}", target[key], _columns(panel))
        for each in dashboard["annotations"]["list"]:
            if each["datasource"]["type"] == kind:
                yield Question(f"{name}: {each['name']}", each[key] if key in each else each["target"][key])
        for variable in dashboard["templating"]["list"]:
            if variable["type"] == "query" and variable["datasource"]["type"] == kind:
                query = variable["query"]
                yield Question(f"{name}: {variable['name']}", query if isinstance(query, str) else query["query"])


def _columns(panel: dict[str, Any]) -> frozenset[str]:
    matchers = (override["matcher"] for override in panel["fieldConfig"]["overrides"])
    named = {matcher["options"] for matcher in matchers if matcher["id"] == "byName"}
    if panel["type"] == "candlestick":
        named |= {"time", *panel["options"]["fields"].values()}
    if panel["type"] == "barchart":
        named.add(panel["options"]["xField"])
    return frozenset(named)


def expanded_promql(text: str, *, instance: str) -> str:
    """Return an expression as Prometheus gets it.

    `label_values(series, label)` is Grafana's own, and leads to a question for that series.
    """
    if found := re.fullmatch(r"label_values\((.+), \w+\)", text):
        text = found[1]
    text = text.replace("$__rate_interval", "1m").replace("$instance", instance)
    assert "$" not in text, text
    return text


def expanded_sql(text: str, *, since: datetime, until: datetime, **variables: str) -> str:
    """Return a query as PostgreSQL gets it, with as much of Grafana's language as the dashboards use.

    `$__timeFilter(column)` is a comparison on both sides, `$__timeFrom()` and `$__timeTo()` are text in quotes, and
    `${name:sqlstring}` is a variable as text in quotes, in which quotes are doubled.
    """
    low, high = (f"'{at:%Y-%m-%dT%H:%M:%SZ}'" for at in (since, until))
    text = re.sub(r"\$__timeFilter\(([\w.]+)\)", rf"\1 BETWEEN {low} AND {high}", text)
    text = text.replace("$__timeFrom()", low).replace("$__timeTo()", high)
    for name, value in variables.items():
        quoted = value.replace("'", "''")
        text = text.replace(f"${{{name}:sqlstring}}", f"'{quoted}'")
    assert "$" not in text, text
    return text
