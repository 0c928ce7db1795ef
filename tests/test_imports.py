"""The rules of who may import whom, read from the source: they are what keeps each part usable alone."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
OURS = ("pipeline", "model", "trainer", "transfer", "train", "recipe", "checkpoint")
SOURCES = sorted(
    path
    for path in [*REPOSITORY.glob("*.py"), *(p for folder in OURS[:4] for p in (REPOSITORY / folder).glob("*.py"))]
    if path.stem != "__init__"
)
ENTRY_POINTS = {"train", "pipeline.make_shards"}
# Pure arithmetic: testable by a property, usable without torch or DALI.
ONLY_NUMPY = {"pipeline.order", "pipeline.views"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)


def imported(path: Path) -> set[str]:
    """Modules that the file imports anywhere in it; `from pipeline import order` counts as pipeline.order."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            folder = REPOSITORY / Path(*node.module.split("."))
            names |= {f"{node.module}.{a.name}" if folder.is_dir() else node.module for a in node.names}
    return names


def package(name: str) -> str:
    return name.split(".")[0]


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_import_rules(path: Path) -> None:
    name, imports = module_name(path), imported(path)
    assert not imports & ENTRY_POINTS - {name}, "nobody imports an entry point"
    packages = {package(i) for i in imports}
    match package(name):
        case "pipeline":
            forbidden = {"model", "recipe", "checkpoint", "transfer", "accelerate"}
        case "model":
            forbidden = {"pipeline", "recipe", "checkpoint", "transfer", "accelerate", "nvidia", "webdataset"}
        case "transfer":
            forbidden = {"trainer"}
        case "recipe" | "checkpoint":
            forbidden = {"pipeline", "model", "trainer", "transfer"}
        case _:
            forbidden = set()
    assert not packages & forbidden, f"{name} must not import {sorted(packages & forbidden)}"
    if name != "train":
        assert "accelerate" not in packages, "train.py is the only owner of the Accelerator"


@pytest.mark.parametrize("name", sorted(ONLY_NUMPY))
def test_arithmetic_stays_pure(name: str) -> None:
    tree = ast.parse((REPOSITORY / f"{name.replace('.', '/')}.py").read_text())
    top_level = {
        package(alias.name if isinstance(node, ast.Import) else str(node.module))
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert not top_level & {"torch", "nvidia", "PIL", "fsspec"}, f"{name} is arithmetic: {sorted(top_level)}"


def test_the_rules_see_something() -> None:
    assert len(SOURCES) > 10
    assert "pipeline.order" in {module_name(p) for p in SOURCES}
