"""The pauses of commits, as a table."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from ingestor.model import SECOND, Micros

BEGIN, END = "<!-- cluster:begin -->", "<!-- cluster:end -->"


@dataclass(frozen=True)
class Episode:
    """One fault, with the longest time without a commit that it caused, in seconds."""

    path: str
    kind: str
    pause: float


def longest_pause(commits: Sequence[Micros], begin: Micros, end: Micros) -> float:
    """Return the longest time between two commits of which one lies between `begin` and `end`, in seconds."""
    first = max(0, bisect_left(commits, begin) - 1)
    around = commits[first : bisect_right(commits, end) + 1]
    gaps = [later - earlier for earlier, later in pairwise(around)]
    return max(gaps, default=end - begin) / SECOND


def table(episodes: Sequence[Episode]) -> str:
    """Return a Markdown table of all kinds of faults."""
    pauses: dict[tuple[str, str], list[float]] = defaultdict(list)
    for episode in episodes:
        pauses[episode.path, episode.kind].append(episode.pause)
    rows = ["| path | fault | times | pause of commits, median | longest |", "|---|---|---|---|---|"]
    rows += [
        f"| {path} | {kind} | {len(found)} | {median(found):.1f} s | {max(found):.1f} s |"
        for (path, kind), found in pauses.items()
    ]
    return "\n".join(rows)


def write_page(page: Path, text: str) -> None:
    """Replace what stands between the page's marks."""
    old = page.read_text(encoding="utf-8")
    before, _, rest = old.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
