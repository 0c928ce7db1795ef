"""Manifests and source cards: what is written is read again, what is wrong is said with numbers and a remedy."""

import json
import os
import shutil
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, cpu_environment

from pipeline import manifest
from pipeline.sources.index import Component, format_index, index_tar, read_index, sample_key
from pipeline.sources.manifest import Manifest, Shard, Source, load_manifest, save_manifest
from pipeline.sources.opening import open_source
from pipeline.sources.scan import read_index_text
from pipeline.sources.storage import Storage, storage_for

CARDS = sorted((REPOSITORY / "shards").glob("*.yaml"))


@pytest.fixture
def folder(shards_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the shards that may be spoilt."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Path(shutil.copytree(shards_dir, tmp_path / "copy"))


def everything(source: Source) -> int:
    """Reads each shard and index; returns the images' bytes."""
    storage, total = storage_for(source), 0
    for part in source.manifests:
        for i, shard in enumerate(part.shards):
            index = read_index(read_index_text(part, i, storage), samples=shard.samples, size=shard.bytes)
            for offset, size in zip(index.offsets.tolist(), index.sizes.tolist()):
                total += len(storage.read(part.shard_url(i), offset, size, bytes=shard.bytes))
    return total


def describe(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline.manifest", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, env=cpu_environment(), capture_output=True, text=True, timeout=120)


# --- files ------------------------------------------------------------------------------------------------------------


def test_manifest_file(tmp_path: Path) -> None:
    shards = tuple(Shard(f"part/ä {i}.tar", 10 + i, 1000 * i + 512, "xxh3_64:0123456789abcdef") for i in range(5))
    manifest = Manifest(str(tmp_path), shards, ("cat", "dog"))
    save_manifest(manifest, tmp_path / "manifest.json")
    assert load_manifest(tmp_path / "manifest.json") == manifest
    assert manifest.offsets.tolist() == [0, 10, 21, 33, 46, 60]
    assert manifest.index_url(2) == f"{tmp_path}/part/ä 2.idx"
    text = (tmp_path / "manifest.json").read_text()
    assert json.loads(text)["samples"] == 60
    assert len(text.splitlines()) == 7  # one line a shard: diffs and greps are of use
    # The same data elsewhere is the same data; other data is not.
    elsewhere = Manifest("/elsewhere", shards, ("cat", "dog"))
    assert elsewhere.fingerprint == manifest.fingerprint
    assert Manifest(str(tmp_path), shards[::-1]).fingerprint != manifest.fingerprint


def test_manifest_of_shards_elsewhere(tmp_path: Path) -> None:
    manifest = Manifest("s3://bucket/x", (Shard("0.tar", 1, 512),), index_root=str(tmp_path))
    save_manifest(manifest, tmp_path / "manifest.json")
    assert load_manifest(tmp_path / "manifest.json") == manifest
    assert manifest.shard_url(0) == "s3://bucket/x/0.tar"
    assert manifest.index_url(0) == f"{tmp_path}/0.idx"
    signed = Manifest("https://host/x", (Shard("https://host/x/0.tar?key=1", 1, 512),))
    assert signed.index_url(0) == "https://host/x/0.idx?key=1"


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda head: head.pop("shards"), "not a manifest"),
        (lambda head: head["shards"][0].pop("path"), "not a manifest"),
        (lambda head: head["shards"][0].update(bytes="x"), "not a manifest"),
        (lambda head: head.update(format=2), "format 2, this program reads 1"),
        (lambda head: head["shards"].pop(), "does not add up"),
        (lambda head: head["shards"][0].update(samples=0), "does not add up"),
    ],
)
def test_manifests_that_are_wrong(folder: Path, spoil: object, message: str) -> None:
    path = folder / "manifest.json"
    head = json.loads(path.read_text())
    spoil(head)  # type: ignore[operator]
    path.write_text(json.dumps(head))
    with pytest.raises(ValueError, match=message):
        open_source(str(folder))
    path.write_text("{")
    with pytest.raises(ValueError, match=r"not a manifest.*delete it"):
        open_source(str(folder))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda head: head["shards"][0].update(samples=10**30),
        lambda head: head["shards"][0].update(samples=float("inf")),
        lambda head: head["shards"][0].update(bytes=-1),
        lambda head: head["shards"][0].update(path=["a.tar"]),
        lambda head: head["shards"][0].update(path=""),
        lambda head: head["shards"][0].update(path="."),
        lambda head: head["shards"][0].update(path="shard-000000.tar/"),
        lambda head: head["shards"][0].update(path="a\0b.tar"),
        lambda head: head["shards"][0].update(path="\ud800.tar"),
        lambda head: head["shards"][0].update(path="x" * 5000),
        lambda head: head["shards"][0].update(samples="15"),
        lambda head: head["shards"][0].update(samples=15.5),
        lambda head: head["shards"][0].update(samples=True),
        lambda head: head["shards"][0].update(checksum="x" * 1000),
        lambda head: head.update(shards={}),
        lambda head: head.update(root="\ud800"),
        lambda head: head.update(root="/a\0"),
        lambda head: head["shards"][0].update(checksum=5),
        lambda head: head.update(root=5),
        lambda head: head.update(classes=5),
        lambda head: head.update(path="a", samples=1, bytes=1),
        lambda head: head.update(more=[]) or head["more"].append("DEEP"),
    ],
)
def test_a_strange_manifest_is_one_line_that_names_it(
    folder: Path, spoil: Callable[[dict[str, object]], object]
) -> None:
    path = folder / "manifest.json"
    head = json.loads(path.read_text())
    spoil(head)
    path.write_text(json.dumps(head).replace('"DEEP"', "[" * 200_000 + "]" * 200_000))
    with pytest.raises(ValueError, match=r"copy/manifest.json is not a manifest \(.*delete it") as caught:
        open_source(str(folder))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
@pytest.mark.parametrize("name", ["manifest.json", "shard-000002.idx", "shard-000002.tar"])
def test_what_is_no_file_is_not_read(folder: Path, name: str, make: Callable[[Path], object]) -> None:
    """A pipe would be waited for without end, a device fill the memory."""
    (folder / name).unlink()
    make(folder / name)
    begun = time.monotonic()
    with pytest.raises(ValueError, match=rf"copy/{name} is no file but a folder, a pipe or a device"):
        everything(open_source(str(folder)))
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize("text", ["junk", "[]", "null", "[[1, 2, 3], [4]]", "[" * 100_000, '[["a", {}, "b"], [1]]'])
def test_a_strange_journal_of_a_scan(folder: Path, text: str) -> None:
    (folder / "manifest.json").unlink()
    (folder / ".scanned.jsonl").write_text(f"{text}\n")
    with pytest.raises(ValueError, match=r"copy/\.scanned\.jsonl is damaged or not of this program: delete it"):
        open_source(str(folder))
    assert (folder / ".scanned.jsonl").read_text() == f"{text}\n"
    (folder / ".scanned.jsonl").write_bytes(b"cut sh\xff")  # its writer was killed
    assert open_source(str(folder)).samples == 60


@pytest.mark.parametrize("manifest_there", [True, False])
def test_damaged_tars_are_named_all_at_once(folder: Path, manifest_there: bool) -> None:
    """One an attempt would cost a whole indexing each. The others are indexed, and not again after the repair."""
    if not manifest_there:
        (folder / "manifest.json").unlink()
    for index in folder.glob("*.idx"):
        index.unlink()
    tars = sorted(folder.glob("*.tar"))
    whole = [tar.read_bytes() for tar in tars]
    tars[0].write_bytes(whole[0][:5000])
    tars[2].write_bytes(b"junk" * 1000)
    with pytest.raises(ValueError, match=r"2 tars in .* cannot be used: .*00000.tar is cut.*00002.tar is not a tar"):
        open_source(str(folder))
    assert sorted(p.name for p in folder.glob("*.idx")) == ["shard-000001.idx", "shard-000003.idx"]
    begun = (folder / "shard-000001.idx").stat().st_mtime_ns
    for tar, content in zip(tars, whole):
        tar.write_bytes(content) if tar.read_bytes() != content else None
    assert open_source(str(folder)).samples == 60
    assert (folder / "shard-000001.idx").stat().st_mtime_ns == begun
    assert not (folder / ".scanned.jsonl").exists()


@pytest.mark.parametrize(
    "way", ["../{}/secret.tar", "part/../../{}/secret.tar", "{root}/{}/secret.tar", "memory://secret.tar"]
)
def test_a_manifest_leads_nowhere_else(folder: Path, tmp_path: Path, way: str) -> None:
    """Shards of another folder are read only where the user names them, and nothing is written beside them."""
    secret = tmp_path / "secret"
    secret.mkdir()
    shutil.copy(folder / "shard-000000.tar", secret / "secret.tar")
    head = json.loads((folder / "manifest.json").read_text())
    path = way.format("secret", root=tmp_path)
    head["shards"][0]["path"] = path
    (folder / "manifest.json").write_text(json.dumps(head))
    with pytest.raises(
        ValueError, match=r"copy/manifest.json names .*secret.tar, which is outside .*copy: .*YAML card"
    ):
        open_source(str(folder))
    # Named by the user, with `..` or not, it is read; its index goes into the cache.
    for data in (f"{folder}/../secret/secret.tar", f"{folder}/{{../secret/secret,shard-000001}}.tar"):
        assert open_source(data).samples in (15, 30)
    assert [p.name for p in secret.iterdir()] == ["secret.tar"]
    indexes = {p.parent.parent for p in tmp_path.rglob("secret.idx")} | {
        p.parent.parent.parent for p in tmp_path.rglob("secret/secret.idx")
    }
    assert all("manifests" in p.parts for p in indexes), indexes


def test_indexes_of_a_folder_that_cannot_be_written_to(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = (folder / "shard-000002.idx").read_bytes()
    (folder / "shard-000002.idx").unlink()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder)
    source = open_source(str(folder))
    assert not (folder / "shard-000002.idx").exists()
    assert read_index_text(source.manifests[0], 2, Storage()) == whole


def test_index_text(tmp_path: Path) -> None:
    """Any number of members a sample; labels and images in any order; names that would break DALI's parser."""
    samples = [
        [Component("cls", 512, 1, "a.cls"), Component("jpg", 1536, 70_000_000_000, "a.jpg")],
        [Component("JPEG", 80, 20, "dir x/ä%\n.JPEG")],
        [Component("json", 1, 2, "c.json"), Component("png", 3, 4, "c.png"), Component("jpg", 5, 6, "c.jpg")],
    ]
    (tmp_path / "a.idx").write_bytes(format_index(samples))
    content = (tmp_path / "a.idx").read_bytes()
    index = read_index(content, samples=3)
    assert index.offsets.tolist() == [1536, 80, 5]
    assert index.sizes.tolist() == [70_000_000_000, 20, 6]
    assert index.label_offsets.tolist() == [512, -1, -1]
    assert [sample_key(content, i) for i in range(3)] == ["a", "dir x/ä%\n", "c"]
    assert content.count(b"\n") == 4
    with pytest.raises(ValueError, match=r"3 samples, the manifest says 4"):
        read_index(content, samples=4)
    with pytest.raises(ValueError, match="belongs to another tar"):
        read_index(content, size=1000)
    for damaged in (
        content[:-1],
        content[:40],
        b"",
        b"v1.1 3\n",
        content.replace(b" 80 ", b" 8x "),
        content + b"x 1\n",
    ):
        with pytest.raises(ValueError, match="delete it"):
            read_index(damaged)


def test_index_of_many_samples_against_a_plain_parser() -> None:
    rng = np.random.default_rng(0)
    extensions = ("jpg", "cls", "txt")

    def component(i: int, extension: str) -> Component:
        return Component(extension, int(rng.integers(1 << 40)), int(rng.integers(1 << 20)), f"{i}.{extension}")

    samples = [[component(i, extension) for extension in extensions[: i % 3 + 1]] for i in range(1000)]
    index = read_index(format_index(samples))
    assert index.offsets.tolist() == [s[0].offset for s in samples]
    assert index.sizes.tolist() == [s[0].size for s in samples]
    assert index.label_sizes.tolist() == [s[1].size if len(s) > 1 else -1 for s in samples]


def write_large(folder: Path, count: int) -> Path:
    names = (f"part-{i // 1000:03d}/shard-{i:06d}.tar" for i in range(count))
    shards = tuple(Shard(name, 10_000, 10**9 + i, f"xxh3_64:{i:016x}") for i, name in enumerate(names))
    save_manifest(Manifest(str(folder), shards), folder / "manifest.json")
    return folder / "manifest.json"


@pytest.mark.slow
def test_a_billion_samples_are_a_manifest_of_100_000_lines(tmp_path: Path) -> None:
    path = write_large(tmp_path, 100_000)
    assert path.stat().st_size < 15e6
    begun = time.process_time()
    manifest = load_manifest(path)
    assert manifest.samples == 1_000_000_000
    assert len(manifest.fingerprint) == 32
    assert time.process_time() - begun < 5  # 0.4 s


def test_memory_of_a_manifest(tmp_path: Path) -> None:
    path = write_large(tmp_path, 5_000)
    tracemalloc.start()
    manifest = load_manifest(path)
    assert manifest.samples == 50_000_000
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 600 * 5_000  # bytes a shard: 60 MB for 100,000
    assert peak < 1500 * 5_000


# --- opening ----------------------------------------------------------------------------------------------------------


def test_ways_to_name_local_data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = open_source(str(folder))
    manifest = whole.manifests[0]
    assert whole.samples == 60
    assert (whole.lanes, whole.chunk_shards) == (1, None)
    assert whole.names == ("copy",)
    monkeypatch.setenv("HOME", str(folder.parent))
    (folder / "shard-000002.idx").unlink()
    assert open_source("~/copy").fingerprint == whole.fingerprint
    assert whole.classes == ("class_0", "class_1", "class_2")
    for data in (f"{folder}/", f"file://{folder}", f"{folder}/shard-{{000000..000003}}.tar", f"{folder}/*.tar"):
        assert open_source(data).fingerprint == whole.fingerprint
    one = open_source(f"{folder}/shard-000001.tar")
    assert one.manifests[0].shards == manifest.shards[1:2]
    assert one.names == ("copy",)
    (folder / "manifest.json").unlink()
    some = open_source(f"{folder}/shard-{{000001,000002}}.tar")
    assert [s.samples for s in some.manifests[0].shards] == [15, 15]
    assert some.manifests[0].shard_url(0) == str(folder / "shard-000001.tar")
    assert not (folder / "manifest.json").exists()  # of two shards of four


AWKWARD = [
    "with [brackets]",
    "{braces}",
    "{a,b}",
    "{open",
    "star*",
    "what?",
    "ends.tar",
    "ends.yaml",
    "ends.tar.gz",
    "$HOME",
]


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("tar", ["a.tar", "{0..1}[x]*?.tar"])
def test_a_path_that_exists_is_no_pattern(folder: Path, tmp_path: Path, name: str, tar: str) -> None:
    """As --data, in a card, in a card in such a folder, with a pattern below it; the folder, and a tar in it."""
    awkward = tmp_path / name
    awkward.mkdir()
    shutil.copy(folder / "shard-000000.tar", awkward / tar)
    shutil.copy(folder / "shard-000001.tar", awkward / f"{tar[:-4]}~.tar")
    assert open_source(str(awkward / tar)).samples == 15
    source = open_source(str(awkward))
    assert source.samples == 30 and source.names == (name,)
    storage = Storage()
    for i in range(2):
        assert storage.read_bytes(source.manifests[0].index_url(i)) == (folder / f"shard-00000{i}.idx").read_bytes()
    assert open_source(f"{awkward}/").fingerprint == source.fingerprint
    assert open_source(f"file://{awkward}").fingerprint == source.fingerprint
    assert open_source(f"{awkward}/*.tar").samples == 30
    card = awkward / "card.yaml"
    for data, samples in ((f"../{name}", 30), (tar, 15), ("*.tar", 30), (f"../{name}/{tar}", 15)):
        card.write_text(json.dumps({"sources": [{"data": data}]}))
        assert open_source(str(card)).samples == samples, data


def test_patterns_that_are_not_there(folder: Path, tmp_path: Path) -> None:
    """Braces that expand to themselves ended in a RecursionError."""
    for data in ("{a}", "[v2]", "{open", "star*", "what?", "{copy}"):
        with pytest.raises(FileNotFoundError, match=r"nothing matches|no such folder"):
            open_source(str(tmp_path / data))
    assert open_source(f"{tmp_path}/[c]opy").samples == 60


def test_a_pattern_longer_than_a_name_can_be(folder: Path) -> None:
    """The system answers "File name too long", not "there is no such file"."""
    pattern = f"{{{','.join(f'shard-{i:06d}' for i in range(4, 600))}}}.tar"
    with pytest.raises(FileNotFoundError, match=r"no such shard: .*shard-000004.tar"):
        open_source(f"{folder}/{pattern}")
    card = folder / "long.yaml"
    card.write_text(json.dumps({"sources": [{"data": pattern}]}))
    with pytest.raises(FileNotFoundError, match=r"source 1: no such shard: .*shard-000004.tar"):
        open_source(str(card))
    with pytest.raises(FileNotFoundError, match="no such folder: ~nobody-at-all"):
        open_source("~nobody-at-all")


def test_a_card_that_would_fill_the_memory(tmp_path: Path) -> None:
    """30 levels of merges of eight aliases each: 10^27 values when they are written out."""
    lines = ["sources:", "- data: a", "  name: &n0 {b: c}"]
    lines += [f"- &n{i} {{<<: [{', '.join([f'*n{i - 1}'] * 8)}]}}" for i in range(1, 31)]
    (tmp_path / "card.yaml").write_text("\n".join(lines))
    started = time.monotonic()
    with pytest.raises(ValueError, match="it uses an alias"):
        open_source(str(tmp_path / "card.yaml"))
    assert time.monotonic() - started < 1


def test_folders_as_one_source(folder: Path, tmp_path: Path) -> None:
    """Parts that were packed by several machines: each a folder with its manifest."""
    shutil.copytree(folder, tmp_path / "part-0")
    shutil.copytree(folder, tmp_path / "part-1")
    source = open_source(f"{tmp_path}/part-{{0..1}}")
    assert open_source(f"{tmp_path}/part-*").fingerprint == source.fingerprint
    (manifest,) = source.manifests
    assert [s.path for s in manifest.shards[3:5]] == ["part-0/shard-000003.tar", "part-1/shard-000000.tar"]
    assert manifest.samples == 120
    assert Path(manifest.shard_url(7)).exists() and Path(manifest.index_url(7)).exists()
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*part-2"):
        open_source(f"{tmp_path}/part-{{0..2}}")


def test_local_data_that_is_not_there(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_source(str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match=r"no such shard: .*shard-000004.tar"):
        open_source(f"{folder}/shard-{{000003..000007}}.tar")
    with pytest.raises(FileNotFoundError, match="nothing matches"):
        open_source(f"{folder}/none*.tar")
    with pytest.raises(ValueError, match=r"holds no shards itself, but .*/copy do"):
        open_source(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no shards.*make_shards"):
        open_source(str(tmp_path / "empty"))


def test_a_missing_shard_is_noticed_at_once(folder: Path) -> None:
    (folder / "shard-000002.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 4 shards .* missing, the first is .*shard-000002.tar"):
        open_source(str(folder))


def test_more_shards_than_the_manifest_has(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(folder / "shard-000000.tar", folder / "shard-000009.tar")
    assert open_source(str(folder)).samples == 60
    assert "1 tars in" in capsys.readouterr().err


def test_missing_indexes_are_built(folder: Path) -> None:
    before = (folder / "shard-000001.idx").read_bytes()
    (folder / "shard-000001.idx").unlink()
    open_source(str(folder))
    assert (folder / "shard-000001.idx").read_bytes() == before
    (folder / "shard-000001.idx").unlink()
    with (folder / "shard-000001.tar").open("ab") as tar:
        tar.write(bytes(10240))
    with pytest.raises(ValueError, match=r"shard-000001.tar has 15 samples in .*manifest says 15"):
        open_source(str(folder))


# --- cards ------------------------------------------------------------------------------------------------------------


def test_card(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE", str(tmp_path))
    card = tmp_path / "mix.yaml"
    card.write_text(
        "sources:\n"
        "  - {data: copy, weight: 3, name: all}\n"
        '  - {data: "$WHERE/copy/shard-{000000..000001}.tar", weight: 1, name: half}\n'
        "lanes: 2\nchunk_shards: 1\n"
    )
    source = open_source(str(card))
    assert source.names == ("all", "half")
    assert source.weights == (0.75, 0.25)
    assert source.id_offsets.tolist() == [0, 60, 90]
    assert (source.samples, source.lanes, source.chunk_shards) == (90, 2, 1)
    # Without weights, size counts.
    card.write_text("sources: [{data: copy, name: a}, {data: copy/shard-000000.tar, name: b}]\nchunk_shards: all")
    source = open_source(str(card))
    assert source.weights == (0.8, 0.2)
    assert source.chunk_shards is None


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "a card is `sources:`"),
        ("sources: []", "a card is `sources:`"),
        ("sources: copy", "a card is `sources:`"),
        ("sources: [{data: copy}]\nlane: 4", "unknown key lane; known are chunk_shards, lanes, sources"),
        (
            "sources: [{data: copy, grey16_range: [4095, 0]}]",
            "grey16_range 4095 0: from 0 to 65535, the first",
        ),
        ("sources: [{data: copy, grey16_range: 4095}]", "source 1: grey16_range 4095: it must be two whole numbers"),
        (
            "sources: [{data: copy, wieght: 1}]",
            "source 1: unknown key wieght; known are anonymous, data, grey16",
        ),
        ("sources: [{weight: 1}]", "source 1: needs `data:`"),
        ("sources: [{data: copy, weight: 0}]", "weight 0 must be a number above 0"),
        ("sources: [{data: copy, weight: -1}]", "weight -1 must be"),
        ("sources: [{data: copy, weight: .nan}]", "weight nan must be"),
        ("sources: [{data: copy, weight: true}]", "weight True must be"),
        ("sources: [{data: copy, weight: 1, name: a}, {data: copy, name: b}]", "1 of 2 sources have a weight"),
        ("sources: [{data: copy}, {data: copy}]", "must differ"),
        ("sources: [{data: copy}]\nlanes: 0", "lanes 0 must be a whole number from 1"),
        ("sources: [{data: copy}]\nchunk_shards: 1.5", "chunk_shards 1.5 must be"),
        ("sources: [{data: other.yaml}]", "is a card itself"),
        ("sources: [{data: $NOT_SET_AT_ALL/x}]", "environment variable"),
        ("sources: [{data: none}]", "source 1: no such folder: .*none"),
        ("sources: " + "[" * 5000, "card.yaml is not a card: it is nested too deeply"),
        ("sources: 2020-99-99", "card.yaml is not YAML: month must be in"),
        ("sources: [{data: copy, weight: 1" + "0" * 400 + "}]", "card.yaml, source 1: weight 1000.* must be"),
        ("sources: [{data: copy, name: [a]}]", "card.yaml, source 1: name must be"),
        ("sources: [{data: copy, anonymous: true}]", "source 1: `anonymous: true` is for a URL"),
        ("sources: [{data: 's3://a/b', anonymous: maybe}]", "source 1: `anonymous: true` is for a URL"),
        ("sources: [&a {data: copy}, *a]", "card.yaml is not a card: it uses an alias"),
        ("sources: [{data: copy}", "is not YAML"),
    ],
)
def test_cards_that_are_wrong(folder: Path, tmp_path: Path, text: str, message: str) -> None:
    card = tmp_path / "card.yaml"
    card.write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_source(str(card))
    with pytest.raises(FileNotFoundError, match="no such card"):
        open_source(str(tmp_path / "none.yaml"))
    card.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"card.yaml is not YAML"):
        open_source(str(card))


@pytest.mark.parametrize("card", CARDS, ids=lambda path: path.stem)
def test_published_cards(card: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each card of the repository is valid; what it lacks is only the data, and it says where to fill it in."""
    from pipeline.sources.card import read_card

    for variable in ("IN1M", "IN22K", "YFCC100M", "IG1B"):
        monkeypatch.setenv(variable, str(folder))
    assert read_card(card).sources
    assert card.read_text().count("#") > 4


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.process
def test_command(folder: Path) -> None:
    result = describe(folder, "--check")
    assert result.returncode == 0, result.stderr
    assert "60" in result.stdout
    assert "checked 4 shards, 60 samples: 0 faults" in result.stdout
    result = describe(folder / "none")
    assert result.returncode == 2
    assert result.stderr.startswith("error: no such folder") and result.stderr.count("\n") == 1


@pytest.mark.process
def test_check_finds_every_fault(folder: Path) -> None:
    """One line each: other bytes, too few bytes, an index of another tar, an image that does not decode."""
    tars = sorted(folder.glob("*.tar"))
    content = bytearray(tars[0].read_bytes())
    content[3000] ^= 1
    tars[0].write_bytes(content)
    os.truncate(tars[1], tars[1].stat().st_size - 512)
    tars[2].with_suffix(".idx").write_bytes(tars[0].with_suffix(".idx").read_bytes())
    result = describe(folder, "--check")
    assert result.returncode == 1, result.stderr
    lines = result.stdout.splitlines()
    assert [sum(t.name in line or t.stem in line for line in lines) for t in tars] == [1, 1, 1, 0]
    assert "checksum" in lines[3] and "cut short" in lines[4] and lines[4].count(str(tars[1])) == 1
    assert "3 faults" in lines[-1]

    # Shards without checksums: what is inside is still looked at.
    bad = index_tar(tars[3])[4]
    image = next(c for c in bad if c.extension != "cls")
    content = bytearray(tars[3].read_bytes())
    content[image.offset : image.offset + image.size] = bytes(image.size)
    for path in folder.iterdir():
        if path != tars[3]:
            path.unlink()
    tars[3].write_bytes(content)
    result = describe(folder, "--check")
    assert result.returncode == 1, result.stderr
    assert f"{image.name}: not an image" in result.stdout
    assert "1 fault (shards without a checksum to compare with: 1)" in result.stdout


def test_check_asks_the_place_not_the_cache(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was fetched when all was well says nothing about what lies there now."""
    arguments = ["manifest", f"local://{folder}", "--check", "--cache_dir", str(folder.parent / "cache")]
    for faults in ("0 faults", "1 fault"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", arguments)
            assert manifest.main() == (faults != "0 faults")
        output = capsys.readouterr().out
        assert (
            f"checked 4 shards, 60 samples: {faults}" in output and "4 lanes, each shuffling all its shards" in output
        )
        tar = folder / "shard-000002.tar"
        tar.write_bytes(bytes(600) + tar.read_bytes()[600:])
    assert not list((folder.parent / "cache").glob("check-*"))
