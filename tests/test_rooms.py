"""Who may import whom, read from the source: what keeps each room usable alone, and the whole free of circles.

Imports inside functions count. Every rule has a control: a made-up import that breaks it must be seen.
"""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("pipeline", "model", "trainer", "transfer")
TOP = ("train", "recipe", "checkpoint")
DOORS = {"make_shards", "loader", "labelled", "preview", "order", "manifest", "statistics"}
COMMON = {"files", "progress", "permutation", "command"}  # which import no room, and which every room may import
ROOMS = {"packing", "sources", "reading", "pixels"}
SHARED_NAMES = {"order", "manifest"}  # a door and its room's file may share these, nothing else may share a name

# Area of a module -> the areas of ours that it may import. An area is a room, "doors", "common" or a top-level name.
MAY_IMPORT = {
    "common": {"common"},
    "pixels": {"pixels", "common"},
    "sources": {"sources", "pixels", "common"},
    "reading": {"reading", "sources", "pixels", "common"},
    "packing": {"packing", "sources", "pixels", "common"},
    "doors": {"doors", "packing", "sources", "reading", "pixels", "common"},
    "model": {"model"},
    "recipe": {"common"},
    "checkpoint": {"common"},
}
MAY_IMPORT["trainer"] = MAY_IMPORT["doors"] | {"trainer", "recipe", "checkpoint", "model"}
MAY_IMPORT["transfer"] = MAY_IMPORT["trainer"] | {"transfer"}
MAY_IMPORT["train"] = MAY_IMPORT["transfer"]
ONLY_FILES = {"recipe", "checkpoint"}  # of the common modules they may import pipeline.files alone
PURE = {"pipeline.permutation", "pipeline.reading.order", "pipeline.pixels.views"}  # usable without torch or DALI


def sources() -> dict[str, str]:
    """Module name -> text of all of our modules."""
    paths = [REPOSITORY / f"{name}.py" for name in TOP]
    paths += [path for package in PACKAGES for path in sorted((REPOSITORY / package).rglob("*.py"))]
    found = {}
    for path in paths:
        name = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
        found[name] = path.read_text()
    return found


def area(module: str) -> str:
    """Where a module of ours belongs; "" for a library."""
    parts = module.split(".")
    if parts[0] in TOP:
        return parts[0]
    if parts[0] not in PACKAGES:
        return ""
    if parts[0] != "pipeline":
        return parts[0]
    if len(parts) == 1:
        return "common"  # the package itself, which is empty
    if parts[1] in ROOMS:
        return parts[1]
    return "common" if parts[1] in COMMON else "doors"


def imported(text: str, modules: set[str], *, top_level: bool = False) -> set[str]:
    """Modules that `text` imports; `from pipeline import order` counts as pipeline.order."""
    names: set[str] = set()
    tree = ast.parse(text)
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert node.module is not None
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in modules else node.module for name in below}
    return names


def faults_of(name: str, text: str, modules: set[str]) -> list[str]:
    """What `name` imports and may not."""
    mine, faults = area(name), []
    for other in imported(text, modules):
        theirs = area(other)
        if theirs and theirs not in MAY_IMPORT[mine]:
            faults.append(f"{name} ({mine}) imports {other} ({theirs})")
        if mine in ONLY_FILES and theirs == "common" and other != "pipeline.files":
            faults.append(f"{name} imports {other}; of pipeline it may import pipeline.files alone")
        if other.split(".")[0] == "accelerate" and name != "train":
            faults.append(f"{name} imports accelerate, which train.py alone owns")
        if other == "train":
            faults.append(f"{name} imports an entry point")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and area(node.module or "") and any(a.name == "main" for a in node.names):
            faults.append(f"{name} imports the main of {node.module}")
    return faults


def circles(texts: dict[str, str]) -> list[list[str]]:
    """Groups of modules that import each other, directly or round about (Tarjan's strongly connected components)."""
    edges = {name: imported(text, set(texts)) & set(texts) - {name} for name, text in texts.items()}
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in edges[name]:
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group = []
            while not group or group[-1] != name:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for name in edges:
        if name not in index:
            visit(name)
    return found


def doubled_names(modules: set[str]) -> set[str]:
    """File names that stand in two places of ours, apart from a door and its room's file."""
    leaves = [name.split(".")[-1] for name in modules if name not in PACKAGES and not name.endswith(tuple(ROOMS))]
    return {leaf for leaf in leaves if leaves.count(leaf) > 1} - SHARED_NAMES


def test_no_module_imports_what_it_may_not() -> None:
    texts = sources()
    assert [fault for name, text in texts.items() for fault in faults_of(name, text, set(texts))] == []


def test_no_circles() -> None:
    assert circles(sources()) == []


def test_every_module_of_pipeline_is_a_door_common_or_in_a_room() -> None:
    top = {name.split(".")[1] for name in sources() if name.count(".") == 1 and name.startswith("pipeline.")}
    assert top == DOORS | COMMON | ROOMS


def test_no_two_files_share_a_name() -> None:
    assert doubled_names(set(sources())) == set()


def test_rooms_say_what_they_are_for() -> None:
    texts = sources()
    for name in ("pipeline", *(f"pipeline.{room}" for room in ROOMS), "model", "trainer", "transfer"):
        said = ast.get_docstring(ast.parse(texts[name])) or ""
        assert len(said.split()) > 20, f"{name}/__init__.py does not say what it is for"


@pytest.mark.parametrize("name", sorted(PURE))
def test_arithmetic_stays_pure(name: str) -> None:
    texts = sources()
    packages = {module.split(".")[0] for module in imported(texts[name], set(texts), top_level=True)}
    assert not packages & {"torch", "nvidia", "PIL", "fsspec"}, f"{name} is arithmetic"


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("pipeline.files", "from pipeline.sources.storage import Storage"),
        ("pipeline.progress", "def f():\n    from pipeline.pixels import views"),
        ("pipeline.pixels.graph", "from pipeline.reading.reader import Reader"),
        ("pipeline.pixels.graph", "import pipeline.sources.index"),
        ("pipeline.sources.check", "from pipeline.reading import reader"),
        ("pipeline.sources.check", "from pipeline.packing.fetch import fetch"),
        ("pipeline.sources.check", "from pipeline.manifest import open_source"),
        ("pipeline.reading.reader", "from pipeline.packing import plan"),
        ("pipeline.packing.plan", "from pipeline.reading.order import Order"),
        ("pipeline.loader", "def f():\n    from model.moco import MoCo"),
        ("pipeline.loader", "import recipe"),
        ("pipeline.loader", "from accelerate import Accelerator"),
        ("pipeline.loader", "from trainer import metrics"),
        ("model.moco", "from pipeline.files import is_remote"),
        ("model.moco", "from recipe import Recipe"),
        ("recipe", "from pipeline.sources.manifest import Source"),
        ("recipe", "from pipeline.progress import bar"),
        ("checkpoint", "import model.moco"),
        ("trainer.build", "from transfer import knn"),
        ("trainer.build", "def f():\n    import transfer.knn"),
        ("trainer.build", "from accelerate import Accelerator"),
        ("transfer.knn", "import train"),
        ("train", "from pipeline.preview import main"),
    ],
)
def test_each_rule_sees_its_breach(name: str, line: str) -> None:
    texts = sources()
    assert faults_of(name, line, set(texts))


def test_circles_are_seen_inside_functions() -> None:
    texts = {"a": "import b", "b": "def f():\n    import c", "c": "from a import x", "d": "import a"}
    assert circles(texts) == [["a", "b", "c"]]


def test_doubled_names_are_seen() -> None:
    assert doubled_names({"pipeline.order", "pipeline.reading.order", "model.ranks", "transfer.ranks"}) == {"ranks"}


def test_the_rules_see_something() -> None:
    assert {"pipeline.reading.order", "pipeline.packing.shard", "train", "trainer.log"} <= set(sources())
