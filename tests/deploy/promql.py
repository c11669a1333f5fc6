"""Compares the names in Prometheus expressions with the metrics of a daemon and a relay."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

from tests.http import samples
from tests.unit.test_metrics import KNOWN, buffer_metrics, relay_metrics, scraped

TARGET = {"job", "instance", "namespace"}
"""Labels that Prometheus gives, not the daemon."""

STATES = {"state", "check"}
"""Labels of which each value is known beforehand."""

_SELECTOR = re.compile(r"(?<![\w:])((?:ingestor|process)_\w+)(?![\w:])(?:\{([^}]*)\})?")
_MATCHER = re.compile(r"""(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)\"""")


@cache
def exported() -> dict[str, dict[str, set[str]]]:
    """Return the values of each label of each series that a daemon, a relay or a writer has, by its name."""
    found: dict[str, dict[str, set[str]]] = {}
    for name, labels in [
        each for text in (scraped(KNOWN), relay_metrics(), buffer_metrics()) for each in samples(text)
    ]:
        known = found.setdefault(name, {})
        for label, value in labels:
            known.setdefault(label, set()).add(value)
    return found


def unknown(expression: str) -> Iterator[str]:
    """Yield what an expression names and neither has: a series, a label, a state or a check."""
    known = exported()
    for name, matchers in _SELECTOR.findall(expression):
        if name not in known:
            yield name
            continue
        for label, _, value in _MATCHER.findall(matchers):
            if label in TARGET:
                continue
            if label not in known[name]:
                yield f"{name}{{{label}}}"
            elif label in STATES and value not in known[name][label]:
                yield f'{name}{{{label}="{value}"}}'
