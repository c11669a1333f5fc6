"""Prepares the pages for Sphinx: `python -m scripts.site.pages OUT` copies and completes them.

The pages stay readable without Sphinx, so they hold none of its directives. Three things are derived here: the menu,
from the index in docs/README.md; links to folders, which lead to their README; and the reference of commands, from the
program's own help.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

from typer.main import get_command

from ingestor.cli import app

ROOT = Path(__file__).parents[2]
INDEX = "docs/README.md"
COMMANDS = "docs/reference/commands.md"
DECISIONS = "docs/decisions"
FOLDERS = ("docs", "deploy")

_SECTION = re.compile(r"^## (.+)$", re.MULTILINE)
_LINK = re.compile(r"\[([^\]]+)\]\(([^)\s]+)\)")
_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def link_folders(text: str, folder: Path) -> str:
    """Let links to a folder lead to its README.md; without one, leave their text alone."""

    def replace(match: re.Match[str]) -> str:
        words, target = match.groups()
        if "://" in target or not target.endswith("/"):
            return match[0]
        return f"[{words}]({target}README.md)" if (folder / target / "README.md").exists() else words

    parts = _FENCE.split(text)
    return "".join(part if part.startswith("```") else _LINK.sub(replace, part) for part in parts)


def menu(index: str) -> dict[str, list[str]]:
    """Return the pages that each section of the index links to, as paths from the repository's top, in its order."""
    parts = _SECTION.split(index)
    found: dict[str, list[str]] = {}
    seen = {"README.md"}
    for title, section in zip(parts[1::2], parts[2::2], strict=True):
        targets = [target for _, target in _LINK.findall(link_folders(section, (ROOT / INDEX).parent))]
        names = [(ROOT / INDEX).parent / target.partition("#")[0] for target in targets]
        pages = [str(path.resolve().relative_to(ROOT)) for path in names if path.suffix == ".md"]
        found[title] = [page for page in dict.fromkeys(pages) if page not in seen]
        seen.update(pages)
    return found


def toctree(pages: list[str], caption: str = "", options: str = ":hidden:\n") -> str:
    """Return a list of pages as Sphinx's directive."""
    head = f":caption: {caption}\n" if caption else ""
    return f"\n```{{toctree}}\n{options}{head}\n" + "".join(f"/{page}\n" for page in pages) + "```\n"


def command_reference() -> str:
    """Return the page of all commands, each with its own help."""
    group: Any = get_command(app)  # typer has a copy of click, whose types it does not export
    parts = ["# Commands\n\nThe text is that of `ingestor COMMAND --help`.\n"]
    with group.context_class(group, info_name="ingestor") as context:
        parts.append(f"\n{_help(group)}\n{_parameters(group, context)}")
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            with command.context_class(command, info_name=name, parent=context) as inner:
                usage = command.get_usage(inner).removeprefix("Usage: ")
                parts.append(f"\n## {name}\n\n```sh\n{usage}\n```\n\n{_help(command)}\n{_parameters(command, inner)}")
    return "".join(parts)


def _help(command: Any) -> str:
    return "\n\n".join(" ".join(part.split()) for part in (command.help or "").split("\n\n")) + "\n"


def _parameters(command: Any, context: Any) -> str:
    rows = [record for each in command.get_params(context) if (record := each.get_help_record(context))]
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows if "--help" not in row[0]]
    lines = [f"| `{names}` | {text} |\n" for names, text in cells]
    return "".join(["\n| option | effect |\n|---|---|\n", *lines]) if lines else ""


def prepare(out: Path) -> None:
    """Copy the pages and the files beside them to `out`, with menu, folders' links and commands."""
    shutil.rmtree(out, ignore_errors=True)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, out / folder)
    for path in [*ROOT.glob("*.md"), ROOT / ".env.example", ROOT / "LICENSE"]:
        shutil.copy(path, out)
    (out / COMMANDS).write_text(command_reference(), encoding="utf-8")
    for page in sorted(out.rglob("*.md")):
        text = link_folders(page.read_text(encoding="utf-8"), page.parent)
        page.write_text(text, encoding="utf-8")
        copy_linked_files(text, page.parent.relative_to(out), out)
    add_menu(out)


def copy_linked_files(text: str, folder: Path, out: Path) -> None:
    """Copy the files of the repository that a page links to: readers can download them."""
    for _, target in _LINK.findall(text):
        source = (ROOT / folder / target.partition("#")[0]).resolve()
        if source.is_file() and source.is_relative_to(ROOT) and source.suffix != ".md":
            copied = out / source.relative_to(ROOT)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, copied)


def add_menu(out: Path) -> None:
    """Add the sections of the index to the first page, the decisions to theirs, and the other READMEs to deploy's."""
    sections = menu((ROOT / INDEX).read_text(encoding="utf-8"))
    listed = {page for pages in sections.values() for page in pages}
    first = "".join(toctree(pages, title) for title, pages in sections.items())
    others = sorted(path.name for path in ROOT.glob("*.md") if path.name not in listed and path.name != "README.md")
    _append(out / "README.md", toctree([INDEX]) + first + toctree([COMMANDS, *others], "Project"))
    decisions = sorted(f"{DECISIONS}/{path.name}" for path in (ROOT / DECISIONS).glob("0*.md"))
    _append(out / DECISIONS / "README.md", toctree(decisions, options=":maxdepth: 1\n"))
    below = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "deploy").glob("*/README.md"))
    _append(out / "deploy/README.md", toctree(below))


def _append(page: Path, text: str) -> None:
    page.write_text(page.read_text(encoding="utf-8") + text, encoding="utf-8")


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
