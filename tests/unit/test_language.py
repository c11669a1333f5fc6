"""The check of the project's language finds its faults. Words are joined here, so that it does not find this file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import language
from tests.language import is_headless, main, sentences

WHAT, WHO = "Wh" + "at", "Wh" + "o"
RETIRED = "he" + "ard"


@pytest.fixture(autouse=True)
def _root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the check read files of the test."""
    monkeypatch.setattr(language, "ROOT", tmp_path)


def faults(path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Check a file with this text; return its faults, without the path."""
    path.write_text(text, encoding="utf-8")
    status = main([str(path)])
    *found, _ = capsys.readouterr().out.splitlines()
    assert status == bool(found)
    return [line.partition(":")[2] for line in found]


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        (f"{WHAT} the server refuses is kept.", True),
        (f"{WHO}ever reads this decodes it", True),
        (f"{WHAT} does the server refuse?", False),
        (f"**{WHO} reads this?**", False),
        (f"The server keeps {WHAT.lower()} it refuses.", False),
        (WHAT, False),
    ],
)
def test_headless_openings(sentence: str, expected: bool) -> None:
    """A sentence may not open with a relative without a head; a question and a single word may."""
    (only,) = sentences(sentence)
    assert is_headless(only) is expected


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("page.md", "| term | meaning |\n|---|---|\n| tick | a trade that was {} |\n", 3),
        ("page.md", "```\nSELECT {}\n```\n", 2),
        ("module.py", 'def run() -> None:\n    """Return the ticks that were {}."""\n', 2),
        ("module.py", "RUNS = 3\n# as often as it was {}\n", 2),
        ("module.py", "def _{}(count: int) -> None: ...\n", 1),
        ("module.py", "was_{}_twice = True\n", 1),
        ("query.sql", "SELECT {}_minutes\n", 1),
    ],
)
def test_retired_words(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, line: int) -> None:
    """A retired word is found in table cells, code blocks, docstrings, comments and identifiers, with its line."""
    (found,) = faults(tmp_path / name, text.format(RETIRED), capsys)
    assert found.startswith(f'{line}: "{RETIRED}" is retired: ')


def test_parts_of_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A word that contains a retired one is allowed."""
    assert not faults(tmp_path / "page.md", f"The over{RETIRED} ticks.\n", capsys)


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [
        ("page.md", "# Title\n\nThe first sentence. {} follows it\nis wrong.\n", [3]),
        ("page.md", "- {} is listed is wrong.\n- Right.\n", [1]),
        ("page.md", "| term | {} it means is a cell |\n", [1]),
        ("page.md", "Text:\n\n```\n{} is in a code block is no sentence.\n```\n\n{} follows is one.\n", [7]),
        ("module.py", '"""Right.\n\n{} is in the second paragraph is wrong.\n"""\n', [1]),
        ("module.py", "# {} is in a comment\n# of two lines is wrong.\n", [1]),
        ("module.py", 'raise ValueError("{} is in a message is wrong")\n', [1]),
        ("query.sql", "SELECT 1;\n-- {} is in a comment is wrong.\n", [2]),
        ("unit.service", "[Unit]\n# {} is in a comment is wrong.\n", [2]),
    ],
)
def test_headless_passages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, lines: list[int]
) -> None:
    """Each passage of prose is checked, with its line; a fenced code block is no prose."""
    found = faults(tmp_path / name, text.replace("{}", WHAT), capsys)
    assert [int(fault.partition(":")[0]) for fault in found] == lines
    assert all("headless opening" in fault for fault in found)
