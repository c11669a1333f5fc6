"""What is not as it should be, and since when."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

from ingestor.clock import Clock
from ingestor.model import Micros
from ingestor.redaction import outside_text

Check: TypeAlias = Literal["stream", "database", "spool"]
CHECKS: tuple[Check, ...] = get_args(Check)

MOST_DETAIL = 1000
"""Characters of a reason: one of the server's with words of ours around it."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A check that fails, with its cause and with what follows from it now."""

    check: Check
    since: Micros
    detail: str


class Readiness:
    """Remembers since when each check fails."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._failing: dict[Check, Problem] = {}
        self._symptoms: dict[Check, str] = {}

    def fails(self, check: Check, detail: str, since: Micros | None = None) -> None:
        """Note that a check fails; what counts is since when it has done so without a break."""
        begun = self._clock.wall() if since is None else since
        if check in self._failing:
            begun = self._failing[check].since
        self._failing[check] = Problem(check, begun, outside_text(detail, limit=MOST_DETAIL))

    def shows(self, check: Check, symptom: str, since: Micros) -> None:
        """Note a sign that a check fails. It stands beside the cause, if one is known, and never replaces it."""
        if check not in self._failing:
            self.fails(check, "", since)
        self._symptoms[check] = symptom

    def passes(self, check: Check) -> None:
        """Note that a check passes."""
        self._failing.pop(check, None)
        self._symptoms.pop(check, None)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What fails, in the order of `CHECKS`."""
        return tuple(self._described(self._failing[check]) for check in CHECKS if check in self._failing)

    def _described(self, problem: Problem) -> Problem:
        return replace(problem, detail=f"{problem.detail} {self._symptoms.get(problem.check, '')}".strip())
