"""The check of the project's language, part of `make lint`: `python -m tests.language [FILE ...]`.

It reads every text that people read: pages, docstrings, comments, messages, names of log events. It fails on words
that the glossary replaced and on sentences that open with a headless relative ("What the server refuses is kept").
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SUFFIXES = {
    *(".py", ".md", ".sql", ".js", ".html", ".css"),
    *(".yaml", ".yml", ".toml", ".json", ".conf", ".service", ".timer", ""),
}
SKIPPED = {"tests/language.py", "LICENSE", "benchmarks/results.json", "benchmarks/quick.json"}

RETIRED = {
    "judge[sd]?|judging|judge?ments?": "classify, decide; retry policy",
    "lookout|look-out": "coverage monitor",
    "pulses?": "liveness deadline, beat",
    "sift(s|ed|ing)?": "quarantine",
    "mend(s|ed|ing)?": "fix, repair",
    "ledgers?": "gap store, coverage",
    "overviews?": "status",
    "anew": "again",
    "for ?ever": "indefinitely, without end",
    "vouch(es|ed|ing)?": "cover, guarantee",
    "heard": "received, covered",
    "excus(e|es|ed|ing)": "exclude",
    "a person must act": "requires operator action",
    "nobody|somebody|whoever|whomever|whosoever": "name the actor",
    "troubles?": "failure, error",
    "told": "reported, logged, returned",
    "in vain": "without success",
    "goodbyes?": "close",
    "dear(er|est)": "more expensive",
    "(is|are|was|were|be|been|stays?) away": "is unavailable",
    "adopt[-_](timescale|label)": "convert-to-hypertable, set-bar-label",
}
NAMES = re.compile('run_forever|serve_forever|"nobody"')
"""Names that are not ours: methods of the standard library, and a user of the system."""

RETIRED_WORDS = [
    (re.compile(rf"(?<![A-Za-z])(?:{words})(?![A-Za-z])", re.IGNORECASE), better) for words, better in RETIRED.items()
]
HEADLESS = re.compile(r"(?:What|Who|Whom|Whose|Whoever|Whatever|Whichever|Where|Wherever)\b")
END = re.compile(r"(?<=[.!?])[\"')*_]*\s+(?=[\"'(*_]*[A-Z0-9`])")


def blocks_of_markdown(text: str) -> Iterator[tuple[int, str]]:
    """Yield each paragraph, list item and table cell with its line."""
    fenced = False
    start, lines = 1, list[str]()
    for number, line in enumerate([*text.splitlines(), ""], 1):
        mark = line.strip()
        if mark.startswith("```"):
            fenced = not fenced
        begins = bool(re.match(r"([-*+]|\d+\.|#+|>)\s", mark)) or mark.startswith("|")
        if fenced or not mark or mark.startswith("```") or begins:
            if lines:
                yield start, " ".join(lines)
            start, lines = number, []
        if fenced or not mark or mark.startswith("```"):
            continue
        if mark.startswith("|"):
            yield from ((number, cell.strip()) for cell in mark.strip("|").split("|"))
            continue
        start = start if lines else number
        lines.append(re.sub(r"^([-*+]|\d+\.|#+|>)\s+", "", mark))


def blocks_of_python(text: str) -> Iterator[tuple[int, str]]:
    """Yield each docstring, message and comment with its line."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.count(" ") > 1:
            for paragraph in node.value.split("\n\n"):
                yield node.lineno, " ".join(paragraph.split())
    yield from blocks_of_comments(
        (token.start[0], token.string)
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    )


def blocks_of_comments(comments: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Yield the comments of consecutive lines as one."""
    start, last, words = 0, -1, list[str]()
    for number, comment in comments:
        if number != last + 1:
            if words:
                yield start, " ".join(words)
            start, words = number, []
        last = number
        words.append(re.sub(r"^(#+|--|//|/?\*+|<!--)\s*|\s*(\*/|-->)$", "", comment.strip()))
    if words:
        yield start, " ".join(words)


def blocks(path: Path, text: str) -> Iterator[tuple[int, str]]:
    """Yield the passages of a file that are sentences, each with its line."""
    if path.suffix == ".md":
        yield from blocks_of_markdown(text)
    elif path.suffix == ".py":
        yield from blocks_of_python(text)
    else:
        mark = {".sql": r"--", ".js": r"//|/?\*"}.get(path.suffix, r"#|/?\*|<!--")
        found = re.compile(rf"^\s*(?:{mark})\s")
        lines = enumerate(text.splitlines(), 1)
        yield from blocks_of_comments((number, line) for number, line in lines if found.match(line))


def sentences(passage: str) -> list[str]:
    """Split a passage into sentences."""
    passage = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", passage)
    return [part.strip("\"'(*_ ") for part in END.split(passage) if part.strip()]


def is_headless(sentence: str) -> bool:
    """Return whether a sentence opens with a relative without a head. A question may open so."""
    return bool(HEADLESS.match(sentence)) and not sentence.rstrip("\"')*_ ").endswith("?") and " " in sentence


def files() -> list[Path]:
    """Return the project's own files: tracked, and read by people."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.splitlines() if Path(name).suffix in SUFFIXES and name not in SKIPPED]


def main(names: list[str]) -> int:
    """Print each fault as FILE:LINE, and return the exit status."""
    total, headless, retired = 0, 0, 0
    for path in [Path(name).resolve() for name in names] or files():
        name, text = path.relative_to(ROOT), path.read_text(encoding="utf-8")
        for number, line in enumerate(text.splitlines(), 1):
            own = NAMES.sub("", line)
            for words, better in RETIRED_WORDS:
                for match in words.finditer(own):
                    retired += 1
                    print(f'{name}:{number}: "{match.group()}" is retired: {better}')
        for number, passage in blocks(path, text):
            for sentence in sentences(passage):
                total += 1
                if is_headless(sentence):
                    headless += 1
                    print(f"{name}:{number}: headless opening: {sentence[:70]}")
    print(f"{total} sentences: {headless} headless openings ({headless / max(total, 1):.2%}), {retired} retired words")
    return 1 if headless or retired else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
