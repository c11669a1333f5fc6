"""Readiness: the checks that fail, and since when."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

from ingestor.clock import Clock
from ingestor.model import Micros
from ingestor.redaction import outside_text

Check: TypeAlias = Literal["stream", "database", "spool"]
CHECKS: tuple[Check, ...] = get_args(Check)

MAX_DETAIL = 1000
"""Characters of a detail at most: room for a server's text and our own words."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A failing check with the beginning of its failure, its cause and its symptom."""

    check: Check
    since: Micros
    detail: str


class Readiness:
    """Records since when each check fails, and why."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._failing: dict[Check, Problem] = {}
        self._symptoms: dict[Check, str] = {}

    def fails(self, check: Check, detail: str, since: Micros | None = None) -> None:
        """Record a failing check. `since` (default: now) counts only if the check did not fail before."""
        if check in self._failing:
            begun = self._failing[check].since
        elif since is not None:
            begun = since
        else:
            begun = self._clock.wall()
        self._failing[check] = Problem(check, begun, outside_text(detail, limit=MAX_DETAIL))

    def shows(self, check: Check, symptom: str, since: Micros) -> None:
        """Record a symptom of a failing check. It is shown beside the cause and never replaces it."""
        if check not in self._failing:
            self.fails(check, "", since)
        self._symptoms[check] = symptom

    def passes(self, check: Check) -> None:
        """Record that a check passes."""
        self._failing.pop(check, None)
        self._symptoms.pop(check, None)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """The failing checks, in the order of `CHECKS`."""
        return tuple(self._described(self._failing[check]) for check in CHECKS if check in self._failing)

    def _described(self, problem: Problem) -> Problem:
        return replace(problem, detail=f"{problem.detail} {self._symptoms.get(problem.check, '')}".strip())
