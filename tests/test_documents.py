"""What the documents point at exists: links, files, commands with the flags shown, make targets, extras."""

import ast
import contextlib
import io
import re
import runpy
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from conftest import REPOSITORY, commands

import recipe

DOCUMENTS = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "launch/README.md")),
    REPOSITORY / "benchmarks/README.md",
    REPOSITORY / "benchmarks/gpu_kit/README.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
]
COMMANDS = commands()
FLAG = re.compile(r"(?<![\w-])--([a-z][a-z_]*)")
PROGRAM = re.compile(
    r"(?:python3?|accelerate launch|torchrun)\s[^|;&]*?-m (?:-- )?((?:pipeline|transfer)\.\w+)"
    r"|(?:python3?|bash|sbatch|accelerate launch) ([\w/]+\.(?:py|sh|sbatch))"
    r"|(launch/[\w.]+)(?= .*--)"
)


def inline(text: str) -> list[str]:
    """Code spans of the prose, which may go on over the end of a line."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    prose = "\n".join("" if line.startswith("    ") else line for line in prose.split("\n"))
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def command_lines(text: str) -> list[str]:
    """Lines of code blocks, without comments, joined to the next where they end in a backslash; and code spans."""
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = [line for line in joined.split("\n") if line.startswith("    ")]
    return [re.sub(r"\s#\s.*", "", line).strip() for line in lines] + inline(text)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def broken_links(text: str, folder: Path) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = folder / name
        headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE) if anchor and path.exists() else []
        if not path.exists() or (anchor and anchor not in map(slug, headings)):
            yield target


def missing_files(text: str) -> Iterator[str]:
    """Code spans that look like files of the repository's folders."""
    for span in inline(text):
        is_name = re.fullmatch(r"([\w-]+)/[\w./-]+\.(py|md|sh|yaml|sbatch|txt)", span)
        if is_name and (REPOSITORY / is_name[1]).is_dir() and not (REPOSITORY / span).exists():
            yield span


@cache
def flags(program: str) -> frozenset[str]:
    """Those that a module or script of ours takes. Of a script outside the product: its string constants."""
    if program in ("train.py", "launch/torchrun.sh", "launch/slurm.sbatch", "benchmarks/cifar10.sh"):
        return frozenset(FLAG.findall(recipe.parser().format_help()))
    path = REPOSITORY / program if "/" in program else REPOSITORY / f"{program.replace('.', '/')}.py"
    if path.relative_to(REPOSITORY).parts[0] not in ("pipeline", "transfer"):
        constants = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        return frozenset(c.removeprefix("--") for c in constants if isinstance(c, str) and re.fullmatch("--[a-z_]+", c))
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        patch.setattr(sys, "argv", [program, "--help"])
        patch.setattr(sys, "path", [str(REPOSITORY), *sys.path])
        runpy.run_path(str(path), run_name="__main__")  # as `python -m` does, without a process
    return frozenset(FLAG.findall(printed.getvalue()))


def unknown_commands(text: str) -> Iterator[str]:
    """Programs of ours that do not exist, or do not take a flag that is shown with them."""
    for line in command_lines(text):
        for match in PROGRAM.finditer(line):
            program = next(filter(None, match.groups()))
            given = FLAG.findall(re.split(r"[|;&]", line[match.end() :])[0])
            if program not in COMMANDS and not (REPOSITORY / program).is_file():
                yield program
            elif given:
                yield from (f"{program} --{flag}" for flag in given if flag not in flags(program))
        for target in re.findall(r"(?:^|\s)make ([a-z]+)(?=\s|$)", line):
            if f"\n{target}:" not in (REPOSITORY / "Makefile").read_text():
                yield f"make {target}"
        for extra in re.findall(r"-e '\.\[(\w+)\]'", line):
            project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
            if extra not in project["optional-dependencies"]:
                yield f".[{extra}]"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_what_a_document_names_exists(document: Path) -> None:
    text = document.read_text()
    assert list(broken_links(text, document.parent)) == []
    assert list(missing_files(text)) == []
    assert list(unknown_commands(text)) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_flags_in_prose_exist_somewhere(document: Path) -> None:
    known = {"help", "check"} | flags("train.py")
    known |= {"signal", "nproc_per_node", "num_processes", "multi_gpu"}  # the launchers' own
    programs = [*COMMANDS, *(str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "benchmarks").rglob("*.py"))]
    known |= frozenset().union(*map(flags, programs))
    spans = [span for span in inline(document.read_text()) if not PROGRAM.search(span)]
    assert {flag for span in spans for flag in FLAG.findall(span)} - known == set()


def test_the_demo_gives_flags_that_exist() -> None:
    script = re.sub(r"^", "    ", (REPOSITORY / "demo.sh").read_text(), flags=re.MULTILINE)
    assert sum(PROGRAM.search(line) is not None for line in command_lines(script)) >= 8
    assert list(unknown_commands(script)) == []


def test_the_readme_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 200


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("    python -m pipeline.loder --data D", "pipeline.loder"),
        ("    python -m pipeline.order --data D --batchsize 3", "pipeline.order --batchsize"),
        ("    python pipeline/make_shards.py A B --shorter_side 3", "pipeline/make_shards.py --shorter_side"),
        ("    accelerate launch train.py --config c.yaml \\\n        --learning_rate 3", "train.py --learning_rate"),
        ("    accelerate launch -m transfer.lineal --run R", "transfer.lineal"),
        ("    launch/torchrun.sh --confg c.yaml", "launch/torchrun.sh --confg"),
        ("Run `python benchmarks/scales.py` first.", "benchmarks/scales.py"),
        ("Run `python benchmarks/scale.py --fodler X`.", "benchmarks/scale.py --fodler"),
        ("    make everything", "make everything"),
        ("`pip install -e '.[s4]'`", ".[s4]"),
    ],
)
def test_a_wrong_command_is_seen(line: str, fault: str) -> None:
    assert list(unknown_commands(line)) == [fault]


def test_a_wrong_link_is_seen() -> None:
    text = "[a](docs/nothing.md) [b](README.md#no-such-heading) [c](https://example.com) `tests/test_nothing.py`"
    assert list(broken_links(text, REPOSITORY)) == ["docs/nothing.md", "README.md#no-such-heading"]
    assert list(missing_files(text)) == ["tests/test_nothing.py"]
