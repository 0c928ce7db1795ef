"""Sentences have a subject and a verb: none begins with "Of" or "What", in docstrings, comments, help and documents."""

import re
from pathlib import Path

import pytest
from conftest import REPOSITORY

FOLDERS = ("pipeline", "model", "trainer", "transfer", "benchmarks", "examples", "docs", "launch", "recipes", "shards")
SUFFIXES = {".py", ".md", ".yaml", ".sh", ".sbatch"}
RIDDLE = re.compile(r"""(?:^\#*|[.:]|["#])\ *(?:\#+\ )?\b(?:Of|What)\ [a-z].*""")
# Notes of measurements, and questions.
EXEMPT = {REPOSITORY / "benchmarks" / "NOTES.md"}
FILES = sorted(
    {path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*") if path.suffix in SUFFIXES}
    | {path for path in REPOSITORY.iterdir() if path.suffix in SUFFIXES} - EXEMPT
)


def riddles(text: str) -> list[str]:
    """The sentences that begin so; a question ends with its mark."""
    found = (match[0] for line in text.splitlines() if (match := RIDDLE.search(line)))
    return [sentence for sentence in found if not sentence.rstrip().endswith("?")]


def test_no_sentence_is_a_riddle() -> None:
    found = {str(path.relative_to(REPOSITORY)): riddles(path.read_text()) for path in FILES if path not in EXEMPT}
    assert {path: lines for path, lines in found.items() if lines} == {}
    assert len(FILES) > 100


@pytest.mark.parametrize(
    "line",
    [
        '    """What is done to an image."""',
        "# Of a PNG this reads every byte.",
        "left alone. What else lies there is kept.",
        "## What is proven",
        "What lies beside images goes along.",
    ],
)
def test_riddles_are_seen(line: str) -> None:
    assert riddles(line)


def test_other_sentences_pass() -> None:
    for line in ("# Says what a file is", "one of what follows", "## What now?", Path("What/x").name, "Offers a list"):
        assert not riddles(line)
