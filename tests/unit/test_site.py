"""The site is made of the pages as they are: the menu of the index, and the commands of the program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer.main import get_command

from ingestor.cli import app
from scripts.site.pages import ROOT, command_reference, link_folders, menu, prepare

INDEX = ROOT / "docs/README.md"
GROUP: Any = get_command(app)


def test_the_index_lists_every_page() -> None:
    """A page of docs/ is in the menu once; decisions are listed by their own page."""
    listed = [page for pages in menu(INDEX.read_text(encoding="utf-8")).values() for page in pages]
    pages = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")}
    decisions = {page for page in pages if page.startswith("docs/decisions/0")}
    assert len(listed) == len(set(listed))
    assert pages - decisions - {"docs/README.md"} <= set(listed)


def test_links_to_folders(tmp_path: Path) -> None:
    """A link to a folder leads to its README, or to nowhere; examples and other links stay as they are."""
    (tmp_path / "with").mkdir()
    (tmp_path / "with/README.md").touch()
    text = "[a](with/), [b](without/) and [c](page.md)\n```sh\necho [a](with/)\n```\n[d](https://example.org/x/)\n"
    expected = "[a](with/README.md), b and [c](page.md)\n```sh\necho [a](with/)\n```\n[d](https://example.org/x/)\n"
    assert link_folders(text, tmp_path) == expected


def test_every_command_and_option() -> None:
    """The reference has a section for each command, with each of its options."""
    page = command_reference()
    context = GROUP.context_class(GROUP, info_name="ingestor")
    for name in GROUP.list_commands(context):
        _, _, section = page.partition(f"\n## {name}\n")
        section = section.partition("\n## ")[0]
        command = GROUP.get_command(context, name)
        assert (command.help or "").split("\n")[0][:40] in section
        for option in command.params:
            assert option.opts[0] in section or option.human_readable_name in section
    assert "None" not in page


def test_the_prepared_pages(tmp_path: Path) -> None:
    """Pages are copied with the files that they link to; only the copies have Sphinx's directives."""
    prepare(tmp_path / "out")
    assert "```{toctree}" in (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert (tmp_path / "out/docs/reference/gaps.schema.json").exists()
    assert (tmp_path / "out/ingestor/stream/frames.py").exists()
    assert not any("{toctree}" in page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md"))
