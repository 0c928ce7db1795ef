"""Shards that others made: GNU tar, bsdtar, webdataset's ShardWriter, img2dataset, DALI's wds2idx; and what is none."""

import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, cpu_environment
from PIL import Image

from pipeline.sources import scan
from pipeline.sources.index import index_tar, read_index, sample_key
from pipeline.sources.manifest import Source
from pipeline.sources.opening import open_source
from pipeline.sources.storage import Storage


def picture(number: int, kind: str = "JPEG") -> bytes:
    """A picture that can be told from the others by its bytes."""
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), number * 7 % 256, np.uint8)).save(stream, kind)
    return stream.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], **options: object) -> Path:
    with tarfile.open(path, "w", **options) as tar:  # type: ignore[call-overload]
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def contents(source: Source) -> list[tuple[str, bytes, bytes | None]]:
    """(key, image bytes, label bytes) of every sample in order, read the way training reads them."""
    storage, found = Storage(), []
    for manifest in source.manifests:
        for i, shard in enumerate(manifest.shards):
            url, text = manifest.shard_url(i), storage.read_bytes(manifest.index_url(i))
            index = read_index(text, samples=shard.samples, size=shard.bytes)
            for row in range(shard.samples):
                image = storage.read(url, int(index.offsets[row]), int(index.sizes[row]), bytes=shard.bytes).tobytes()
                label = None
                if index.label_offsets[row] >= 0:
                    where = int(index.label_offsets[row]), int(index.label_sizes[row])
                    label = storage.read(url, *where, bytes=shard.bytes).tobytes()
                found.append((sample_key(text, row), image, label))
    return found


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_of_every_format(tmp_path: Path, cache: Path, format: int) -> None:
    """Long names, names that are not ASCII, names with spaces, folders; upper-case and mixed extensions."""
    names = ["a.JPG", "deep/er/b.Jpeg", "ordner/bär 1.png", "c.webp", "x" * 90 + "/" + "y" * 60 + ".jpg", "100%.jpg"]
    if format != tarfile.USTAR_FORMAT:
        names.append("/".join(["long" * 30] * 3) + ".jpg")
    kinds = {"png": "PNG", "webp": "WEBP"}
    expected = [(n, picture(i, kinds.get(n.rpartition(".")[2].lower(), "JPEG"))) for i, n in enumerate(names)]
    write_tar(tmp_path / "shard.tar", expected, format=format)
    found = contents(open_source(str(tmp_path)))
    assert [(key, image) for key, image, _ in found] == [(n.rpartition(".")[0], image) for n, image in expected]
    with tarfile.open(tmp_path / "shard.tar") as tar:
        assert {(m.offset_data, m.size) for m in tar} == {
            (c.offset, c.size) for s in index_tar(tmp_path / "shard.tar") for c in s
        }


def test_members_in_any_order_and_more_than_one_a_key(tmp_path: Path, cache: Path) -> None:
    """`tar` writes a folder in the order of its directory: a sample's members may lie far apart, the image last."""
    members = [("s/1.json", b"{}"), ("s/0.txt", b"hello"), ("s/1.cls", b"4"), ("s/0.cls", b"3"), ("._1.jpg", b"mac")]
    members += [
        ("s/1.seg.png", picture(9, "PNG")),
        ("s/1.jpg", picture(1)),
        ("s/0.jpg", picture(0)),
        ("s/2.png", picture(2, "PNG")),
    ]
    members += [("README", b"no extension"), ("s/3.txt", b"no image"), (".hidden.jpg", picture(5))]
    write_tar(tmp_path / "shard.tar", members)
    assert contents(open_source(str(tmp_path))) == [
        ("s/1", picture(1), b"4"),
        ("s/0", picture(0), b"3"),
        ("s/2", picture(2, "PNG"), None),
    ]


def test_a_key_that_comes_twice_is_two_samples(tmp_path: Path, cache: Path) -> None:
    """As after `cat` or `tar -A` of two shards that both count from zero."""
    write_tar(tmp_path / "shard.tar", [("0.jpg", picture(0)), ("0.cls", b"0"), ("0.jpg", picture(1)), ("0.cls", b"1")])
    assert contents(open_source(str(tmp_path))) == [("0", picture(0), b"0"), ("0", picture(1), b"1")]


def test_further_images_of_a_key_are_mentioned(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "shard.tar", [("holiday.2020.jpg", picture(0)), ("holiday.2021.jpg", picture(1))])
    assert open_source(str(tmp_path)).samples == 1
    assert "1 images" in capsys.readouterr().err


@pytest.mark.parametrize("program", ["tar", "bsdtar"])
@pytest.mark.parametrize("format", ["ustar", "gnu", "pax"])
@pytest.mark.process
def test_tar_programs(tmp_path: Path, cache: Path, program: str, format: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"no {program}")
    if program == "tar" and "GNU" not in subprocess.run(["tar", "--version"], capture_output=True, text=True).stdout:
        pytest.skip("tar is not GNU tar")
    folder = tmp_path / "images" / "Größe" / ("name" * 20)
    folder.mkdir(parents=True)
    expected = {}
    for i in range(12):
        (folder / f"{i:03d}.JPEG").write_bytes(picture(i))
        (folder / f"{i:03d}.cls").write_text(str(i))
        expected[f"Größe/{'name' * 20}/{i:03d}"] = (picture(i), str(i).encode())
    (tmp_path / "shards").mkdir()
    format = {"gnu": "gnutar"}.get(format, format) if program == "bsdtar" else format
    subprocess.run(
        [program, f"--format={format}", "-cf", tmp_path / "shards/0.tar", "Größe"], cwd=tmp_path / "images", check=True
    )
    found = {key: (image, label) for key, image, label in contents(open_source(str(tmp_path / "shards")))}
    assert found == expected


@pytest.mark.process
def test_links_hold_no_data(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "a.jpg").symlink_to("elsewhere.jpg")
    subprocess.run(["tar", "-cf", tmp_path / "shard.tar", "a.jpg"], cwd=tmp_path, check=True)
    with pytest.raises(ValueError, match="--dereference"):
        open_source(str(tmp_path))


def test_shard_writer(tmp_path: Path, cache: Path) -> None:
    from webdataset import ShardWriter

    with ShardWriter(str(tmp_path / "part-%06d.tar"), maxcount=10, verbose=0) as sink:
        for i in range(25):
            sink.write({"__key__": f"key{i}", "json": {"i": i}, "jpg": picture(i), "cls": i})
    source = open_source(str(tmp_path))
    assert [s.samples for s in source.manifests[0].shards] == [10, 10, 5]
    assert contents(source) == [(f"key{i}", picture(i), str(i).encode()) for i in range(25)]


def test_img2dataset_layout(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its folder also has a .parquet and a _stats.json for each tar; a tar is empty when every download failed."""
    for shard in range(3):
        members = []
        for i in range(4 if shard != 1 else 0):
            key = f"{shard:05d}{i:04d}"
            members += [(f"{key}.jpg", picture(i)), (f"{key}.txt", b"a caption"), (f"{key}.json", b'{"width": 8}')]
        write_tar(tmp_path / f"{shard:05d}.tar", members)
        (tmp_path / f"{shard:05d}_stats.json").write_text(json.dumps({"successes": 4}))
        (tmp_path / f"{shard:05d}.parquet").write_bytes(b"PAR1")
    source = open_source(str(tmp_path))
    assert [key for key, _, _ in contents(source)] == [f"{s:05d}{i:04d}" for s in (0, 2) for i in range(4)]
    assert "1 tars" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["shard.tar.gz", "shard.tgz", "shard.tar"])
def test_compressed_is_refused_with_the_remedy(tmp_path: Path, cache: Path, name: str) -> None:
    tar = write_tar(tmp_path / "plain", [("0.jpg", picture(0))])
    (tmp_path / name).write_bytes(gzip.compress(tar.read_bytes()))
    for data in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=r"compressed.*gunzip"):
            open_source(str(data))


def test_splits_side_by_side_are_told(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """timm's layout. Each time, not only when the manifest is built; and the remedy that is named works."""
    (tmp_path / "_info.json").write_text("{}")
    for i, name in enumerate(["train-0000", "train-0001", "validation-00"]):
        write_tar(tmp_path / f"imagenet-{name}.tar", [(f"{i}.jpg", picture(i)), (f"{i}.cls", b"1")])
    for _ in range(2):
        assert open_source(str(tmp_path)).samples == 3
        said = capsys.readouterr().err
        assert said.count("warning") == 1 and "holds several splits (2 of '-train-', 1 of '-validation-')" in said
        remedy = said.partition("such as '")[2].partition("'")[0]
        assert open_source(remedy).samples == 2
        assert open_source(f"{tmp_path}/*-validation-*.tar").samples == 1
        assert "splits" not in capsys.readouterr().err


@pytest.mark.parametrize("names", [["train-0", "train-1"], ["a-train-0", "a-training_1"], ["restraint-0", "testing-0"]])
def test_one_split_is_not_told(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str], names: list[str]
) -> None:
    for i, name in enumerate(names):
        write_tar(tmp_path / f"{name}.tar", [(f"{i}.jpg", picture(i))])
    assert open_source(str(tmp_path)).samples == 2
    assert "splits" not in capsys.readouterr().err


def test_damaged_tars_are_refused(tmp_path: Path, cache: Path) -> None:
    whole = write_tar(tmp_path / "shard.tar", [(f"{i}.jpg", picture(i)) for i in range(20)]).read_bytes()
    for damaged, reason in [
        (whole[:7000], "cut short"),
        (b"", "empty"),
        (b"<html>not found</html>" * 100, "no valid header"),
        (whole.replace(b"1.jpg", b"X.jpg", 1), "no valid header"),
    ]:
        (tmp_path / "shard.tar").write_bytes(damaged)
        with pytest.raises(ValueError, match=reason):
            open_source(str(tmp_path))
        assert not (tmp_path / "manifest.json").exists()


@pytest.mark.process
def test_own_idx_files_are_left_alone(tmp_path: Path, cache: Path) -> None:
    """wds2idx lists samples without an image too. We read such an index, but we do not write over it."""
    from wds2idx import IndexCreator

    write_tar(
        tmp_path / "shard.tar", [("0.txt", b"no image"), ("1.jpg", picture(1)), ("2.jpg", picture(2)), ("2.cls", b"7")]
    )
    creator = IndexCreator(str(tmp_path / "shard.tar"), str(tmp_path / "shard.idx"), verbose=False)
    creator.create_index()
    creator.close()
    theirs = (tmp_path / "shard.idx").read_bytes()
    index = read_index(theirs, samples=2)
    assert index.label_sizes.tolist() == [-1, 1]
    assert sample_key(theirs, 0) == "1"
    source = open_source(str(tmp_path))
    assert contents(source) == [("1", picture(1), None), ("2", picture(2), b"7")]
    assert (tmp_path / "shard.idx").read_bytes() == theirs
    begun = Path(source.manifests[0].index_url(0)).stat().st_mtime_ns
    assert open_source(str(tmp_path)).fingerprint == source.fingerprint
    assert Path(source.manifests[0].index_url(0)).stat().st_mtime_ns == begun  # not built again
    assert str(cache) in source.manifests[0].index_url(0)


def test_dali_reads_our_index(tmp_path: Path, cache: Path) -> None:
    from nvidia.dali import fn, pipeline_def

    members = [(n, picture(i)) for i, n in enumerate(["a b/ä 0.jpg", "a b/1.jpg", "c/2.jpg"])]
    write_tar(tmp_path / "shard.tar", members, format=tarfile.GNU_FORMAT)
    open_source(str(tmp_path))

    @pipeline_def(batch_size=3, num_threads=1, device_id=None)
    def read() -> object:
        paths = {"paths": [str(tmp_path / "shard.tar")], "index_paths": [str(tmp_path / "shard.idx")]}
        return fn.readers.webdataset(**paths, ext=["jpg"], missing_component_behavior="error")

    pipe = read()
    pipe.build()
    (images,) = pipe.run()
    assert [np.asarray(images.at(i)).tobytes() for i in range(3)] == [content for _, content in members]


@pytest.mark.process
def test_built_once_by_many_processes(tmp_path: Path, cache: Path) -> None:
    """Four processes open the same new folder; all see the same thing, and a second opening indexes nothing."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(9):
        write_tar(folder / f"{shard}.tar", [(f"{shard}-{i}.jpg", picture(i)) for i in range(5)])
    program = (
        f"from pipeline.manifest import open_source; print(open_source({str(folder)!r}, progress=False).fingerprint)"
    )
    command = [sys.executable, "-c", program]
    children = [
        subprocess.Popen(command, cwd=REPOSITORY, env=cpu_environment(), stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    printed = {child.communicate(timeout=60)[0] for child in children}
    assert all(child.returncode == 0 for child in children)
    assert len(printed) == 1
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert open_source(str(folder)).samples == 45
    assert (folder / "manifest.json").stat().st_mtime_ns == before


def test_read_only_folder_is_indexed_in_the_cache(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    write_tar(folder / "0.tar", [("0.jpg", picture(0))])
    access = os.access  # the tests may run as root, who may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder and access(path, mode))
    source = open_source(str(folder))
    assert contents(source) == [("0", picture(0), None)]
    assert [p.name for p in folder.iterdir()] == ["0.tar"]
    assert open_source(str(folder)).fingerprint == source.fingerprint
    write_tar(folder / "1.tar", [("1.jpg", picture(1))])  # a folder that has changed is noticed
    assert open_source(str(folder)).samples == 2


def test_interrupted_indexing_goes_on(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for shard in range(6):
        write_tar(tmp_path / f"{shard}.tar", [(f"{shard}.jpg", picture(shard))])
    whole = (tmp_path / "4.tar").read_bytes()
    (tmp_path / "4.tar").write_bytes(whole[:600])
    with pytest.raises(ValueError, match=r"4.tar is cut short"):
        open_source(str(tmp_path), workers=1)
    (tmp_path / "4.tar").write_bytes(whole)
    write_tar(tmp_path / "1.tar", [("1.jpg", picture(1)), ("7.jpg", picture(7))])  # it changed meanwhile
    indexed: list[str] = []
    monkeypatch.setattr(scan, "index_tar", lambda tar, kinds: indexed.append(tar.name) or index_tar(tar, kinds))
    assert open_source(str(tmp_path), workers=1).samples == 7
    assert indexed == ["1.tar", "4.tar"]  # a damaged tar does not stop those after it
    assert not (tmp_path / ".scanned.jsonl").exists()


def test_tars_in_several_folders(tmp_path: Path, cache: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "0.tar", [(f"{folder}.jpg", picture(0))])
    source = open_source(f"{tmp_path}/{{a,b}}/0.tar")
    assert [s.path for s in source.manifests[0].shards] == ["a/0.tar", "b/0.tar"]
    assert [key for key, _, _ in contents(source)] == ["a", "b"]
    assert not list(tmp_path.glob("*/*.idx"))


def test_an_index_of_somebody_else_is_kept_however_old_it_is(tmp_path: Path, cache: Path) -> None:
    write_tar(tmp_path / "0.tar", [("0.jpg", picture(0)), ("1.jpg", picture(1))])
    own = b"v1.2 1\njpg 512 100 0.jpg\n"
    (tmp_path / "0.idx").write_bytes(own)
    os.utime(tmp_path / "0.idx", (0, 0))
    assert open_source(str(tmp_path), workers=1).samples == 2
    assert (tmp_path / "0.idx").read_bytes() == own
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.idx", "0.tar", "cache"]
