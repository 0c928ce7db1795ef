"""make_shards takes what other programs wrote: `tests/foreign/` holds small files of img2dataset and of datasets, made
once by `tests/foreign/make_foreign.py`. And tables of our own, where a case needs more rows."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from test_make_shards_inputs import labelled, make, read_shards

from pipeline.make_shards import make_shards
from pipeline.packing import tables
from pipeline.packing.prepare import Options

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

FOREIGN = REPOSITORY / "tests" / "foreign"
CLASSES = ["square", "circle", "bar"]


def files_of(dest: Path) -> dict[str, bytes]:
    """What a command leaves, but for the time and place of it."""
    kept = {p.relative_to(dest).as_posix(): p.read_bytes() for p in dest.rglob("*") if p.is_file()}
    summary = json.loads(kept.pop("make_shards.json"))
    del summary["job"]["src"]
    return kept | {"summary": json.dumps(summary).encode()}


@pytest.fixture(scope="module")
def drawn() -> list[bytes]:
    """The five images of tests/foreign, as they were drawn."""
    return [path.read_bytes() for path in sorted((FOREIGN / "img2dataset_files").glob("*/*.jpg"))]


@pytest.mark.parametrize("layout", ["files", "webdataset", "parquet"])
def test_img2dataset(layout: str, drawn: list[bytes], tmp_path: Path) -> None:
    counts = make(FOREIGN / f"img2dataset_{layout}", tmp_path / "d")
    samples = read_shards(tmp_path / "d").values()
    assert Counter(sample["jpg"] for sample in samples) == Counter(drawn)
    assert counts["packed"] == counts["found"] == 5 and counts["classes"] == 0
    for sample in samples:
        about, i = json.loads(sample["json"]), drawn.index(sample["jpg"])
        assert about["caption"] == f"a {CLASSES[about['rating'] % 3]}"
        assert about["rating"] == i + (i >= 2)  # the third line is a dead link
        if layout != "parquet":
            assert sample["txt"].decode() == about["caption"]
    if layout == "parquet":
        assert counts["remarks"] == {"rows have no image": [1, "000002 in 00000.parquet"]}


def test_hugging_face_tables(drawn: list[bytes], tmp_path: Path) -> None:
    counts = make(FOREIGN / "datasets", tmp_path / "d")
    expected = Counter((image, CLASSES[i % 3]) for i, image in enumerate(drawn))
    assert labelled(tmp_path / "d") == expected
    assert counts["classes"] == 3
    keys = sorted(read_shards(tmp_path / "d"))
    assert keys == [f"{i:09d}-{i}" for i in range(5)]  # 0.jpg, as the table names it
    for sample in read_shards(tmp_path / "d").values():
        i = drawn.index(sample["jpg"])
        assert int(sample["cls"]) == i % 3  # the numbers are the table's
        assert json.loads(sample["json"]) == {"width": 56 + 4 * i}
    for src in (FOREIGN / "datasets" / "train-*.parquet", FOREIGN / "datasets" / "train-00000-of-00002.parquet"):
        make(src, tmp_path / "again")
        assert labelled(tmp_path / "again").items() <= expected.items()
        shutil.rmtree(tmp_path / "again")


def test_columns_of_any_name(drawn: list[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = FOREIGN / "two_images.parquet"
    make(table, tmp_path / "d", label_key="fine_label")
    assert labelled(tmp_path / "d") == Counter((image, CLASSES[i % 3]) for i, image in enumerate(drawn))
    assert "mask in two_images.parquet" in capsys.readouterr().out  # JSON holds no bytes, and it says so
    assert {frozenset(json.loads(sample["json"])) for sample in read_shards(tmp_path / "d").values()} == {
        frozenset({"tags", "note"})
    }
    make(table, tmp_path / "lists", label_key="tags", image_key="mask")
    samples = list(read_shards(tmp_path / "lists").values())
    assert all("png" in sample for sample in samples)
    assert sorted(tuple(json.loads(sample["labels.json"])) for sample in samples) == [(0, 1)] * 2 + [(1, 2)] * 2 + [
        (2, 0)
    ]
    for keys, said in [
        ({"image_key": "note"}, r"has no images in `note` \(--image_key\); there are some in picture, mask"),
        ({"label_key": "nothing"}, r"has no column `nothing` \(--label_key\); it has picture, mask, fine_label"),
    ]:
        with pytest.raises(ValueError, match=said):
            make(table, tmp_path / "e", **keys)
    assert not (tmp_path / "e").exists()


def test_a_list_as_pandas_writes_it(image_folder: Path, tmp_path: Path) -> None:
    """Its column of row numbers has no name."""
    images = sorted(image_folder.rglob("*.jpg"))[:3]
    lines = [f"{i},{path},{path.parent.name}" for i, path in enumerate(images)]
    (tmp_path / "list.csv").write_text("\n".join([",path,label", *lines]))
    make(tmp_path / "list.csv", tmp_path / "d")
    assert labelled(tmp_path / "d") == Counter((path.read_bytes(), path.parent.name) for path in images)


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_lists_with_columns_of_any_name(kind: str, image_folder: Path, tmp_path: Path) -> None:
    images = sorted(image_folder.rglob("*.jpg"))[:6]
    rows = [{"picture file": str(path), "kind of thing": path.parent.name, "rest": "x"} for path in images]
    place = tmp_path / f"list.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), place)
    else:
        mark = {"csv": ",", "tsv": "\t"}[kind]
        place.write_text("\n".join([mark.join(rows[0]), *(mark.join(row.values()) for row in rows)]))
    with pytest.raises(ValueError, match=r"no column of paths: name it by --image_key; it has picture file, kind"):
        make(place, tmp_path / "e")
    with pytest.raises(
        ValueError, match=r"no column `picture` \(--image_key\); it has picture file, kind of thing, rest"
    ):
        make(place, tmp_path / "e", image_key="picture")
    make(place, tmp_path / "d", image_key="picture file", label_key="kind of thing")
    assert labelled(tmp_path / "d") == Counter((path.read_bytes(), path.parent.name) for path in images)


def write_table(place: Path, images: list[bytes | None], *, rows: int = 4, **columns: list[Any]) -> Path:
    """As the hub has them: a struct of bytes and path, row groups of `rows`."""
    values = [None if data is None else {"bytes": data, "path": f"{i}.jpg"} for i, data in enumerate(images)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(values, kind), **columns}), place, row_group_size=rows)
    return place


@pytest.fixture(scope="module")
def source(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tables of 30 images."""
    folder = tmp_path_factory.mktemp("tables")
    paths = sorted(path for path in image_folder.rglob("*.*"))
    for part in range(2):
        of_part = paths[30 * part :][:30]
        data = [path.read_bytes() for path in of_part]
        write_table(folder / f"part-{part}.parquet", data, label=[path.parent.name for path in of_part])
    return folder


@pytest.mark.slow
def test_any_number_of_workers_and_any_interruption_give_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off while images are unpacked, while a second file of them is begun, and after the first shard."""
    from pipeline.packing import shard

    monkeypatch.setattr(tables, "PIECE", 50_000)  # several of them

    def pack(dest: Path) -> None:
        make_shards(str(source), str(dest), options=Options(), samples_per_shard=13, num_workers=1)

    pack(tmp_path / "whole")
    expected = files_of(tmp_path / "whole")
    assert not (tmp_path / "whole/.make_shards").exists()
    for dies_at in (3, 40):
        calls, add = iter(range(1000)), tables.Unpacked.add

        def dying(self: Any, data: bytes, calls: Iterator[int] = calls, dies_at: int = dies_at, add: Any = add) -> Any:
            if next(calls) == dies_at:
                raise KeyboardInterrupt
            return add(self, data)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(tables.Unpacked, "add", dying)
            pack(tmp_path / f"cut-{dies_at}")
        pack(tmp_path / f"cut-{dies_at}")
        assert files_of(tmp_path / f"cut-{dies_at}") == expected
    written = []

    def dying_write(task: Any, sink: Any) -> Any:
        if written:
            raise KeyboardInterrupt
        written.append(task)
        return write(task, sink)

    write = shard._write
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shard, "_write", dying_write)
        pack(tmp_path / "half")
    assert len(list((tmp_path / "half").glob("*.tar"))) == 1
    with monkeypatch.context() as patch:  # nothing is unpacked a second time
        patch.setattr(tables.Unpacked, "add", None)
        pack(tmp_path / "half")
        pack(tmp_path / "half")  # complete: known by what is cheap to read
    assert files_of(tmp_path / "half") == expected


@pytest.mark.process
def test_two_workers_give_the_same(source: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        make_shards(
            str(source), str(tmp_path / str(workers)), options=Options(), samples_per_shard=13, num_workers=workers
        )
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")


def test_other_tables_are_noticed(source: Path, tmp_path: Path) -> None:
    src = shutil.copytree(source, tmp_path / "src")
    make(src, tmp_path / "d")
    images = [row["image"]["bytes"] for row in pq.read_table(src / "part-1.parquet").to_pylist()]
    labels = pq.read_table(src / "part-1.parquet")["label"].to_pylist()
    write_table(src / "part-1.parquet", images[:-1], label=labels[:-1])
    with pytest.raises(ValueError, match=r"was made from 60 images that are no longer those"):
        make(src, tmp_path / "d")
    write_table(src / "part-1.parquet", [*images[:-1], images[0]], label=labels)  # as many, another content
    with pytest.raises(ValueError, match=r"was made from 60 images that are no longer those"):
        make(src, tmp_path / "d")


def test_bad_tables_are_clear_errors(drawn: list[bytes], tmp_path: Path) -> None:
    place = write_table(tmp_path / "cut.parquet", drawn)
    whole = place.read_bytes()
    place.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"cut\.parquet is not a whole Parquet file"):
        make(place, tmp_path / "d")
    damaged = bytearray(whole)
    damaged[8:600] = b"\xff" * 592
    place.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"cut\.parquet is not a whole Parquet file"):
        make(place, tmp_path / "d")
    assert not (tmp_path / "d").exists()
    folder = tmp_path / "folder"
    (folder / "data").mkdir(parents=True)
    write_table(folder / "data" / "a.parquet", drawn)
    with pytest.raises(ValueError, match=r"1 parquet; archives and tables in folders of it are not opened"):
        make(folder, tmp_path / "d")
    metadata = [{"info": {"features": {"label": {"_type": "ClassLabel", "names": names}}}} for names in ("ab", "ba")]
    for i, said in enumerate(metadata):
        table = pq.read_table(write_table(tmp_path / "x.parquet", drawn, label=[0, 1, 0, 1, -1]))
        table = table.replace_schema_metadata({"huggingface": json.dumps(said)})
        (tmp_path / "two").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "two" / f"{i}.parquet")
    with pytest.raises(ValueError, match=r"1\.parquet numbers its classes otherwise"):
        make(tmp_path / "two", tmp_path / "d")
    make(tmp_path / "two" / "0.parquet", tmp_path / "d")  # -1 is the hub's way to say that there is none
    assert labelled(tmp_path / "d") == Counter([*zip(drawn, "abab"), (drawn[4], "-1")])


def test_a_row_that_holds_no_image(drawn: list[bytes], tmp_path: Path) -> None:
    """A missing one is a remark; bytes that are none are rejected as everywhere; found = packed + rejected."""
    place = write_table(tmp_path / "t.parquet", [drawn[0], None, b"no image", drawn[1], b""])
    counts = make(place, tmp_path / "d")
    assert counts["found"] == 4 and counts["packed"] == 2 and counts["rejected"] == 2
    assert counts["remarks"] == {"rows have no image": [1, "t-000000001 in t.parquet"]}
    lines = [json.loads(line) for line in (tmp_path / "d/rejected.jsonl").read_text().splitlines()]
    assert Counter(line["reason"] for line in lines) == {"not an image": 1, "empty file": 1}
    make(place, tmp_path / "d")  # nothing to do


@pytest.mark.parametrize("kind", ["http", "s3"])
def test_by_url(kind: str, serve: Callable[..., str], drawn: list[bytes], tmp_path: Path) -> None:
    folder = tmp_path / "served"
    (folder / "data").mkdir(parents=True)
    for path in (FOREIGN / "datasets").iterdir():
        shutil.copy(path, folder / "data")
    url = f"{serve(kind, folder)}/data"
    url = f"{url}/train-00000-of-00002.parquet" if kind == "http" else f"{url}/train-*.parquet"
    make(url, tmp_path / "d")
    assert set(labelled(tmp_path / "d")) <= {(image, CLASSES[i % 3]) for i, image in enumerate(drawn)}
    assert len(read_shards(tmp_path / "d")) == (3 if kind == "http" else 5)
    make(url, tmp_path / "d")


def test_destination_at_a_url(source: Path, tmp_path: Path) -> None:
    import fsspec

    dest = "memory://tables/d"
    make(source, tmp_path / "d", samples_per_shard=13)
    make(source, dest, samples_per_shard=13)
    assert read_shards(dest) == read_shards(tmp_path / "d")
    fs = fsspec.filesystem("memory")
    assert not [name for name in fs.find("tables/d") if ".make_shards" in name]
