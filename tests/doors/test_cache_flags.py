"""The cache for remote shards is named once, where a source is opened, and everything that reads the source uses it."""

import ast
import runpy
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

from pipeline.command import add_cache_flags, cache_arguments
from pipeline.labelled import eval_batches, read_labels, train_batches
from pipeline.loader import Loader
from pipeline.preview import preview
from pipeline.reading.order import make_order
from pipeline.reading.quality import shuffle_quality
from pipeline.sources import storage
from pipeline.sources.cache import FOLDER
from pipeline.sources.manifest import Source
from pipeline.sources.opening import open_source
from recipe import Recipe

COMMANDS = (
    "pipeline.loader", "pipeline.manifest", "pipeline.order", "pipeline.preview", "pipeline.statistics",
    "transfer.compare", "transfer.embed", "transfer.finetune", "transfer.gallery", "transfer.knn", "transfer.linear",
    "transfer.neighbours", "transfer.report",
)  # fmt: skip
OPENED_BY = {
    "trainer/build.py": "the recipe has both as fields",
    "transfer/pictures.py": "a tar in a temporary folder, which is its cache",
}
SMALL: dict[str, Any] = {"image_size": 32, "batch_size": 10, "num_threads": 1}

READERS: dict[str, Callable[[Source], object]] = {
    "loader": lambda source: next(Loader(source, **SMALL)),
    "evaluation": lambda source: next(eval_batches(source, resize=36, **SMALL)),
    "training": lambda source: next(train_batches(source, **SMALL)),
    "labels": lambda source: next(read_labels(source)),
    "quality": lambda source: shuffle_quality(source, make_order(source, 10, 0), steps=2),
}


@pytest.mark.parametrize("reader", READERS)
def test_what_reads_a_source_uses_its_cache(
    shards_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "usual"))
    limits = []
    made = storage.Cache

    def cache(folder: Path, limit: int) -> storage.Cache:
        limits.append((folder, limit))
        return made(folder, limit)

    monkeypatch.setattr(storage, "Cache", cache)
    source = open_source(f"local://{shards_dir}", cache_dir=str(tmp_path / "mine"), cache_bytes=123_456_789)
    READERS[reader](source)
    assert set(limits) == {(tmp_path / "mine", 123_456_789)}
    assert list((tmp_path / "mine" / FOLDER).glob("*.tar"))
    assert not (tmp_path / "usual").exists()


def test_the_preview_has_a_cache(shards_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "usual"))
    arguments = ["--data", f"local://{shards_dir}", "--output", str(tmp_path / "views.png"), "--count", "2"]
    monkeypatch.setattr(sys, "argv", ["preview", *arguments, "--cache_dir", str(tmp_path / "mine"), "--cache_gb", "1"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(REPOSITORY / "pipeline" / "preview.py"), run_name="__main__")
    assert ended.value.code == 0
    assert list((tmp_path / "mine" / FOLDER).glob("*.tar"))
    assert not (tmp_path / "usual").exists()
    assert (tmp_path / "views.png").stat().st_size
    with pytest.raises(ValueError, match=r"raise --cache_gb"):
        preview(f"local://{shards_dir}", tmp_path / "views.png", cache_dir=str(tmp_path / "other"), cache_bytes=1000)


def test_size_in_gib() -> None:
    parser = ArgumentParser()
    add_cache_flags(parser)
    assert cache_arguments(parser.parse_args([])) == {}
    given = parser.parse_args(["--cache_dir", "/nvme", "--cache_gb", "1.5"])
    assert cache_arguments(given) == {"cache_dir": "/nvme", "cache_bytes": 3 << 29}
    assert cache_arguments(Recipe(data="d", out="o", cache_gb=2)) == {"cache_bytes": 2 << 30}
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"--cache_gb .* must be a number of GiB"):
            cache_arguments(Namespace(cache_dir=None, cache_gb=wrong))


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            yield node.func.id if isinstance(node.func, ast.Name) else node.func.attr, node


def test_every_command_that_reads_a_source_has_both_flags() -> None:
    """Every call of open_source in a file with a command says which cache, and the two flags are added in one place."""
    flagged, readers = [], []
    for folder in ("pipeline", "transfer", "trainer"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            name = str(path.relative_to(REPOSITORY))
            found = list(calls(path))
            names = [called for called, _ in found]
            own = [ast.unparse(call) for _, call in found if call.args and "'--cache_" in ast.unparse(call.args[0])]
            assert not own or name == "pipeline/command.py", f"{name}: {own}"
            if name == "transfer/arguments.py":  # a function for the flags of each command
                functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
                flagged += [f"transfer.{f.name}" for f in functions if "add_cache_flags(" in ast.unparse(f)]
            elif "add_cache_flags" in names and name != "pipeline/command.py":
                flagged.append(name.removesuffix(".py").replace("/", "."))
            for call in (node for called, node in found if called == "open_source"):
                assert any(k.arg is None or k.arg == "cache_dir" for k in call.keywords), f"{name}: {ast.unparse(call)}"
                readers.append(name)
    assert {name.removesuffix(".py").replace("/", ".") for name in readers if name not in OPENED_BY} <= set(flagged)
    assert sorted(flagged) == sorted(COMMANDS)


def test_the_monitor_of_a_training_is_limited_like_it(shards_dir: Path, tmp_path: Path) -> None:
    from trainer.build import open_sources_rank0_first

    far = f"local://{shards_dir}"
    r = Recipe(data=far, out="o", knn_data=far, knn_every=1, cache_dir=str(tmp_path), cache_gb=0.5)
    for source in open_sources_rank0_first(r, 0, None).values():
        assert (source.cache.folder, source.cache.limit) == (str(tmp_path), 1 << 29)
