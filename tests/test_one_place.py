"""What two paths must agree on is written once: decoding, renaming, progress, ending a command, trying again.

Read from the source, whatever names the imports give (`from PIL.Image import open as look`). Every rule has controls:
made-up lines that break it must be seen, and lines that look alike must not.
"""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.packing import fetch
from pipeline.packing.survey import ListedImage
from pipeline.sources import remote

REPOSITORY = Path(__file__).resolve().parent.parent
TOP = ("train", "recipe", "checkpoint")
PACKAGES = ("pipeline", "model", "trainer", "transfer")
HOME = {  # policy -> the one file that holds it
    "decoding": "pipeline/pixels/decode.py",
    "renaming": "pipeline/files.py",
    "progress": "pipeline/progress.py",
    "ending": "pipeline/command.py",
    "retrying": "pipeline/sources/remote.py",
}
# (policy, file) -> why it is bound to have its own.
EXCEPTIONS = {
    ("ending", "train.py"): "a rank that failed ends with 1 and tells the others why; not moved to command() yet",
}

DECODERS = {  # functions and classes that turn encoded bytes or a path into pixels
    "PIL.Image.open",
    "PIL.ImageFile.Parser",
    "cv2.imread",
    "cv2.imdecode",
    "imageio",
    "matplotlib.image.imread",
    "matplotlib.pyplot.imread",
    "pillow_heif",
    "skimage.io",
    "tifffile",
    "torchvision.io",
}
RENAMES = {"os.rename", "os.renames", "os.replace", "shutil.move", "pathlib.Path.rename", "pathlib.Path.replace"}
BARS = {"tqdm", "rich.progress", "progressbar", "alive_progress"}
ENDINGS = {"sys.exit", "SystemExit", "exit", "quit"}
RETRIERS = {"tenacity", "backoff", "retrying", "urllib3.util.Retry", "urllib3.util.retry"}


def aliases(tree: ast.AST) -> dict[str, str]:
    """Name in this module -> what it stands for, `PIL.Image.open` and the like."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                first = name.name.partition(".")[0]
                found[name.asname or first] = name.name if name.asname else first
        elif isinstance(node, ast.ImportFrom):
            found |= {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}
    return found


def full_name(node: ast.AST, known: dict[str, str]) -> str:
    """`PIL.Image.open` for `I.open` after `from PIL import Image as I`; "" when it begins with no name."""
    if isinstance(node, ast.Name):
        return known.get(node.id, node.id)
    if isinstance(node, ast.Attribute) and (owner := full_name(node.value, known)):
        return f"{owner}.{node.attr}"
    if isinstance(node, ast.Call) and full_name(node.func, known) == "getattr" and len(node.args) > 1:
        attribute = node.args[1]
        if isinstance(attribute, ast.Constant) and (owner := full_name(node.args[0], known)):
            return f"{owner}.{attribute.value}"
    return ""


@functools.cache
def used_names(tree: ast.AST) -> list[tuple[str, int]]:
    """Everything that is imported, named or called, in full, with its line."""
    return list(find_names(tree))


def find_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    known = aliases(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((name.name, node.lineno) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            for name in node.names:
                yield (f"{node.module}.{name.name}" if name.name != "*" else f"{node.module}.", node.lineno)
        elif isinstance(node, ast.Name | ast.Attribute | ast.Call) and (name := full_name(node, known)):
            yield name, node.lineno


def uses(tree: ast.AST, forbidden: set[str]) -> set[int]:
    """Lines that name one of `forbidden`, something in it, or import everything beside it (`from os import *`)."""
    lines = set()
    for name, line in used_names(tree):
        for thing in forbidden:
            if name == thing or name.startswith(f"{thing}.") or (name.endswith(".") and thing.startswith(name)):
                lines.add(line)
    return lines


def decoding(tree: ast.AST) -> set[int]:
    lines = uses(tree, DECODERS)
    for name, line in used_names(tree):  # PIL.PngImagePlugin.PngImageFile and the like
        parts = name.split(".")
        if parts[0] == "PIL" and len(parts) > 1 and parts[1].endswith("ImagePlugin"):
            lines.add(line)
    return lines


def renaming(tree: ast.AST) -> set[int]:
    """Path.rename and Path.replace take one argument. str.replace takes two; dataclasses.replace, datetime.replace and
    the like take keywords; what is called by a module's name is that module's own function."""
    lines, known = uses(tree, RENAMES), aliases(tree)
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or node.attr not in ("rename", "replace"):
            continue
        if isinstance(node.value, ast.Name) and node.value.id in known:
            continue  # a module or class, which `uses` has looked at
        call = called.get(id(node))
        if call is None or [k.arg for k in call.keywords] == ["target"] or (len(call.args) == 1 and not call.keywords):
            lines.add(node.lineno)
    return lines


def progress(tree: ast.AST) -> set[int]:
    return uses(tree, BARS)


def ending(tree: ast.AST) -> set[int]:
    return uses(tree, ENDINGS)


def retrying(tree: ast.AST) -> set[int]:
    """A pause in a counted loop, or in the answer to an error. Waiting for another process is neither: a `while`, with
    `except BlockingIOError` where that process holds a lock."""
    lines, known = uses(tree, RETRIERS), aliases(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.For) and isinstance(node.iter, ast.Call):
            counted = full_name(node.iter.func, known) in ("range", "itertools.count", "itertools.repeat")
            inside: list[ast.stmt] = node.body if counted else []
        elif isinstance(node, ast.ExceptHandler) and full_name(node.type or node, known) != "BlockingIOError":
            inside = node.body
        else:
            continue
        for call in (below for statement in inside for below in ast.walk(statement) if isinstance(below, ast.Call)):
            name = full_name(call.func, known)
            method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
            if name in ("time.sleep", "asyncio.sleep") or (method == "wait" and call.args):  # Event.wait(seconds)
                lines.add(call.lineno)
    return lines


RULES = {"decoding": decoding, "renaming": renaming, "progress": progress, "ending": ending, "retrying": retrying}


@functools.cache
def sources() -> dict[str, ast.AST]:
    """Path in the repository -> what is written there, of the product. Benchmarks measure other programs' ways too, so
    they are free."""
    paths = [REPOSITORY / f"{name}.py" for name in TOP]
    paths += [path for package in PACKAGES for path in sorted((REPOSITORY / package).rglob("*.py"))]
    return {path.relative_to(REPOSITORY).as_posix(): ast.parse(path.read_text()) for path in paths}


@pytest.mark.parametrize("policy", RULES)
def test_one_place(policy: str) -> None:
    faults = [
        f"{file}:{line}"
        for file, tree in sources().items()
        if file != HOME[policy] and (policy, file) not in EXCEPTIONS
        for line in sorted(RULES[policy](tree))
    ]
    assert faults == [], f"{policy} belongs in {HOME[policy]}"


@pytest.mark.parametrize("policy", RULES)
def test_the_place_itself_is_seen(policy: str) -> None:
    """Else the rule sees nothing, or the policy has moved."""
    assert RULES[policy](sources()[HOME[policy]])


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        ("decoding", "from PIL import Image\nImage.open(p)"),
        ("decoding", "from PIL import Image as I\nwith I.open(p) as f: pass"),
        ("decoding", "from PIL.Image import open"),
        ("decoding", "from PIL.Image import open as look\nlook(p)"),
        ("decoding", "from PIL.Image import *"),
        ("decoding", "import PIL.Image\nPIL.Image.open(p)"),
        ("decoding", "import PIL.Image as I\nmap(I.open, paths)"),
        ("decoding", "def f():\n    from PIL import Image\n    return getattr(Image, 'open')(p)"),
        ("decoding", "from PIL import PngImagePlugin"),
        ("decoding", "from PIL.JpegImagePlugin import JpegImageFile"),
        ("decoding", "from PIL import ImageFile\nImageFile.Parser()"),
        ("decoding", "import cv2\ncv2.imread(p)"),
        ("decoding", "from torchvision.io import decode_image"),
        ("renaming", "import os\nos.replace(a, b)"),
        ("renaming", "import os as system\nsystem.rename(a, b)"),
        ("renaming", "from os import replace"),
        ("renaming", "from os import rename as move\nmove(a, b)"),
        ("renaming", "from os import *"),
        ("renaming", "import shutil\nshutil.move(a, b)"),
        ("renaming", "path.rename(other)"),
        ("renaming", "path.with_suffix('.tmp').replace(path)"),
        ("renaming", "path.replace(target=other)"),
        ("renaming", "done = path.replace\ndone(other)"),
        ("renaming", "from pathlib import Path\nPath.rename(a, b)"),
        ("renaming", "import pathlib as p\np.Path(a).replace(b)"),
        ("progress", "from tqdm import tqdm"),
        ("progress", "import tqdm.auto as t"),
        ("progress", "def f():\n    from tqdm.auto import trange as r"),
        ("progress", "from rich.progress import track"),
        ("ending", "import sys\nsys.exit(2)"),
        ("ending", "import sys as s\ns.exit(2)"),
        ("ending", "from sys import exit as leave\nleave()"),
        ("ending", "raise SystemExit(2)"),
        ("ending", "raise SystemExit"),
        ("ending", "try: f()\nexcept SystemExit: pass"),
        ("ending", "exit(1)"),
        ("retrying", "import time\nfor i in range(4):\n    time.sleep(i)"),
        ("retrying", "import time as t\nfor i in range(4):\n    if i:\n        t.sleep(1)"),
        ("retrying", "from time import sleep as nap\nfor i in range(4):\n    nap(1)"),
        ("retrying", "from itertools import count\nimport time\nfor i in count():\n    time.sleep(1)"),
        ("retrying", "import time\nwhile True:\n    try: f()\n    except OSError:\n        time.sleep(1)"),
        ("retrying", "for i in range(3):\n    if stop.wait(2**i): break"),
        ("retrying", "from tenacity import retry"),
        ("retrying", "import backoff"),
    ],
)
def test_each_rule_sees_its_breach(policy: str, text: str) -> None:
    assert RULES[policy](ast.parse(text))


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        ("decoding", "from PIL import Image\nImage.new('RGB', s)\nopen(p)\nPath(p).open()\nImage.fromarray(a)"),
        ("renaming", "'a.b'.replace('.', '-')"),
        ("renaming", "from dataclasses import replace\nreplace(s, path=p)"),
        ("renaming", "moment.replace(tzinfo=zone)"),
        ("renaming", "from pipeline import files\nfiles.rename(a, b)"),
        ("progress", "from pipeline.progress import Progress\nfrom rich import print"),
        ("ending", "import os\nos._exit(1)\nparser.exit()\nsys.stdout.flush()"),
        ("retrying", "import time\nwhile not done():\n    time.sleep(1)"),
        ("retrying", "import time\nfor process in processes:\n    process.wait()\n    time.sleep(1)"),
        ("retrying", "import time\nwhile True:\n    try: lock()\n    except BlockingIOError:\n        time.sleep(1)"),
        ("retrying", "for last in remote.tries(url):\n    f()"),
    ],
)
def test_what_looks_alike_is_let_be(policy: str, text: str) -> None:
    assert not RULES[policy](ast.parse(text))


def test_packing_and_training_ask_a_server_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"packing": 0, "training": 0}

    class Silent:
        def _strip_protocol(self, path: str) -> str:
            return path

        def cat_ranges(self, paths: list[str], *_: object, on_error: str) -> list[OSError]:
            asked["packing"] += 1
            return [OSError("no answer") for _ in paths]

    def request() -> bytes:
        asked["training"] += 1
        raise OSError("no answer")

    monkeypatch.setattr(remote, "TRIES", 3)
    monkeypatch.setattr(remote, "reading_from", lambda *_: (Silent(), ""))
    said = r"^http://x/a: given up after 3 tries, the last: OSError: no answer$"
    with pytest.raises(OSError, match=said):
        list(fetch.fetch([ListedImage("http://x/a", 0, 5, "a")]))
    with pytest.raises(OSError, match=said):
        remote.retry("http://x/a", request)
    assert asked == {"packing": 3, "training": 3}
