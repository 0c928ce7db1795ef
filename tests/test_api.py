"""What docs/api.md names is there, and takes the arguments that stand there, in their order."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
from conftest import REPOSITORY

API = REPOSITORY / "docs" / "api.md"
SIGNATURE = re.compile(r"^    ((?:pipeline|transfer)[.\w]+)\((.*)\)$", re.MULTILINE)
NAMED = SIGNATURE.findall(API.read_text())


def faults(name: str, arguments: str) -> list[str]:
    """How the object differs from what the document says of it. Further arguments must have a default."""
    module, _, attribute = name.rpartition(".")
    found = list(inspect.signature(getattr(importlib.import_module(module), attribute)).parameters.values())
    wanted, keyword_only = [], False
    for argument in arguments.split(", "):
        keyword_only |= argument == "*"
        wanted += [] if argument == "*" else [(argument, keyword_only)]
    there = {p.name: p for p in found}
    problems = [f"{n} is gone" for n, _ in wanted if n not in there]
    problems += [
        f"{n} may no longer be given by position"
        for n, keyword in wanted
        if n in there and not keyword and there[n].kind is inspect.Parameter.KEYWORD_ONLY
    ]
    by_position = [p.name for p in found if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    order = [n for n, keyword in wanted if not keyword]
    problems += [f"the order is {by_position}"] if by_position[: len(order)] != order else []
    names = {n for n, _ in wanted}
    return problems + [f"{p.name} has no default" for p in found if p.name not in names and p.default is p.empty]


@pytest.mark.parametrize(("name", "arguments"), NAMED, ids=[name for name, _ in NAMED])
def test_what_is_public_is_as_the_document_says(name: str, arguments: str) -> None:
    assert faults(name, arguments) == []


def test_the_document_names_the_loader() -> None:
    assert {"pipeline.loader.Loader", "pipeline.manifest.open_source", "pipeline.labelled.eval_batches"} <= dict(
        NAMED
    ).keys()
    text = API.read_text()
    from pipeline.loader import Batch, Loader

    for method in re.findall(r"`loader\.(\w+)\(", text):
        assert hasattr(Loader, method), method
    assert hasattr(Batch, "views")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("source, *, imagesize", ["imagesize is gone"]),
        ("views, source", ["views may no longer be given by position", "the order is ['source']"]),
    ],
)
def test_a_breach_is_seen(arguments: str, says: list[str]) -> None:
    found = faults("pipeline.loader.Loader", arguments)
    assert found[: len(says)] == says
    assert "batch_size has no default" in found


def test_the_own_loop_stays_short() -> None:
    """About twenty lines between making the loader and closing it: else it shows something else."""
    text = Path(REPOSITORY / "examples" / "own_loop.py").read_text()
    loop = text[text.index("    losses = []") : text.index("    loader.close()")]
    assert len(loop.splitlines()) <= 20
