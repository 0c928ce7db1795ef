"""make_shards takes what people have: links, lists, ImageNet's tars, shards, zips, URLs; nothing is lost or doubled."""

import io
import json
import multiprocessing.forkserver
import os
import random
import shutil
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pipeline.make_shards import make_shards
from pipeline.packing import fetch
from pipeline.packing.collect import collect
from pipeline.packing.listing import Listing
from pipeline.packing.prepare import Options, Rejected
from pipeline.packing.survey import ListedImage, Sidecar, Survey
from pipeline.pixels.formats import EXTENSIONS
from pipeline.sources import remote


def make(src: Path | str, dest: Path | str, **more: Any) -> dict[str, Any]:
    make_shards(str(src), str(dest), options=Options(), **{"num_workers": 1, **more})
    with fsspec.open(f"{dest}/make_shards.json") as file:
        return json.load(file)


def read_shards(dest: Path | str) -> dict[str, dict[str, bytes]]:
    """Samples by key, from all tars of a folder or URL."""
    fs, path = fsspec.core.url_to_fs(str(dest))
    samples: dict[str, dict[str, bytes]] = {}
    for place in sorted(fs.glob(f"{path}/*.tar")):
        with tarfile.open(fileobj=io.BytesIO(fs.cat_file(place))) as tar:
            for member in tar.getmembers():
                key, _, extension = member.name.partition(".")
                content = tar.extractfile(member)
                assert content is not None and extension not in samples.setdefault(key, {})
                samples[key][extension] = content.read()
    return samples


def labelled(dest: Path | str) -> Counter[tuple[bytes, str]]:
    """Images with the names of their classes."""
    with fsspec.open(f"{dest}/manifest.json") as file:
        classes = json.load(file)["classes"]
    found: Counter[tuple[bytes, str]] = Counter()
    for sample in read_shards(dest).values():
        image = next(v for k, v in sample.items() if k in EXTENSIONS)
        label = int(sample["cls"]) if "cls" in sample else -1
        found[image, classes[label] if 0 <= label < len(classes) else str(label)] += 1
    return found


def by_folder(image_folder: Path) -> Counter[tuple[bytes, str]]:
    return Counter((p.read_bytes(), p.parent.name) for p in image_folder.rglob("*.*"))


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def test_folder_with_links_and_odd_names(image_folder: Path, tmp_path: Path) -> None:
    images = sorted(image_folder.rglob("*.jpg"))
    root = tmp_path / "src"
    (root / "a/deep er/x").mkdir(parents=True)
    (root / "b").mkdir()
    (tmp_path / "outside").mkdir()
    names = [root / "a/UPPER.JPG", root / "a/two.dots.JpEg", root / "a/deep er/x/ümlaut 図.jpg", root / "b/plain.jpg"]
    names.append(Path(os.fsdecode(os.fsencode(root) + b"/b/latin\xe9.jpg")))  # not UTF-8
    for name, image in zip(names, images):
        name.write_bytes(image.read_bytes())
    (tmp_path / "outside/linked.jpg").write_bytes(images[5].read_bytes())
    (root / "b/folder").symlink_to(tmp_path / "outside")
    (root / "b/file.jpg").symlink_to(images[6])
    (root / "b/loop").symlink_to(root)  # into itself
    (root / "b/nowhere.jpg").symlink_to(root / "gone.jpg")
    (root / "b/circle.jpg").symlink_to("circle.jpg")
    os.mkfifo(root / "b/pipe.jpg")  # opening it would wait for ever
    (root / "b/._plain.jpg").write_bytes(b"\0\5\26\7 what macOS leaves")
    (root / "b/.DS_Store").write_bytes(b"x")
    summary = make(root, tmp_path / "d")
    assert summary["found"] == 11 and summary["packed"] == 7
    assert summary["reasons"] == {"no such file": 3, "not an image": 1}
    expected = Counter((image.read_bytes(), "a" if i < 3 else "b") for i, image in enumerate(images[:7]))
    assert labelled(tmp_path / "d") == expected


def test_what_is_a_class(image_folder: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted(image_folder.rglob("*.jpg"))[:4]):
        (flat / f"{i}.jpg").write_bytes(path.read_bytes())
    assert make(flat, tmp_path / "d1")["classes"] == 0
    nested = tmp_path / "nested/data/images"
    nested.mkdir(parents=True)
    (nested / "train").symlink_to(image_folder)  # folders that all images share are no classes
    make(tmp_path / "nested", tmp_path / "d2")
    assert labelled(tmp_path / "d2") == by_folder(image_folder)
    assert make(image_folder, tmp_path / "d3", labels="none")["classes"] == 0
    assert not any("cls" in sample for sample in read_shards(tmp_path / "d3").values())


def test_destination_inside_the_source(image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "src"
    (root / "images").mkdir(parents=True)
    for path in sorted(image_folder.rglob("*.jpg"))[:3]:
        (root / "images" / f"{path.parent.name}_{path.name}").write_bytes(path.read_bytes())
    assert make(root, root / "shards")["found"] == 3
    make(root, root / "shards")  # its contact sheet is no input
    assert "is complete" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["txt", "tab.txt", "plain.txt", "csv", "headless.csv", "tsv", "parquet"])
def test_lists(kind: str, image_folder: Path, tmp_path: Path) -> None:
    """Paths relative and absolute, labels, columns; a file that is not there is counted."""
    images = sorted(image_folder.rglob("*.*"))[::4]
    rows: list[dict[str, Any]] = [
        {"path": str(p), "label": p.parent.name, "caption": f'№ {i}, "x"', "year": i} for i, p in enumerate(images)
    ]
    for row in rows[::2]:
        row["path"] = os.path.relpath(row["path"], tmp_path)
    rows.append({"path": "gone.jpg", "label": "class_0", "caption": "", "year": -1})
    numbers = kind == "txt"  # Caffe's way
    if numbers:
        for row in rows:
            row["label"] = str(row["label"])[-1]
    place = tmp_path / f"list.{kind}"
    match kind:
        case "txt":
            place.write_text("".join(f"{r['path']} {r['label']}\n" for r in rows))
        case "tab.txt":
            place.write_text("".join(f"{r['path']}\t{r['label']}\n" for r in rows))
        case "plain.txt":
            place.write_text("".join(f"{r['path']}\n" for r in rows) + "\n")
        case "parquet":
            pa = pytest.importorskip("pyarrow")
            import pyarrow.parquet

            pyarrow.parquet.write_table(pa.Table.from_pylist(rows), place)
        case _:
            import csv

            with place.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
                if kind != "headless.csv":
                    writer.writeheader()
                writer.writerows(rows)
    summary = make(place, tmp_path / "d")
    assert summary["found"] == len(rows) and summary["reasons"] == {"no such file": 1}
    samples = read_shards(tmp_path / "d")
    assert len(samples) == len(images)
    if kind != "plain.txt":
        expected = Counter((p.read_bytes(), p.parent.name[-1] if numbers else p.parent.name) for p in images)
        assert labelled(tmp_path / "d") == expected
    for key, sample in samples.items():
        row = rows[int(key.partition("-")[0])]
        columns = json.loads(sample.get("json", b"{}"))
        if kind in ("csv", "tsv"):
            assert columns == {"caption": row["caption"], "year": str(row["year"])}
        elif kind == "parquet":
            assert columns == {"caption": row["caption"], "year": row["year"]}
        elif kind == "headless.csv":
            assert columns == {"column_2": row["caption"], "column_3": str(row["year"])}
        else:
            assert "json" not in sample


def test_lists_as_people_have_them(image_folder: Path, tmp_path: Path) -> None:
    """Excel's mark and line ends, PowerShell's UTF-16, a long caption, empty lines, file://, names that cannot be."""
    a, b = sorted(image_folder.rglob("*.jpg"))[:2]
    place = tmp_path / "list.csv"
    place.write_text(f"path,label,caption\n\n{a},x,{'long ' * 40_000}\nfile://{b},y,z\n , ,\n", encoding="utf-8-sig")
    assert make(place, tmp_path / "excel")["packed"] == 2
    assert labelled(tmp_path / "excel") == Counter({(a.read_bytes(), "x"): 1, (b.read_bytes(), "y"): 1})
    (tmp_path / "~b.jpg").write_bytes(b.read_bytes())  # nobody's home folder
    (tmp_path / "list.txt").write_text(f"{a}\r\n~b.jpg\r\n", encoding="utf-16")
    assert make(tmp_path / "list.txt", tmp_path / "powershell")["packed"] == 2
    names = [str(a), "", str(image_folder), f"{a}/x.jpg", f"/{'x' * 5000}.jpg", "zero\0byte.jpg"]
    place.write_text("path,label\n" + "".join(f"{name},20000000000\n" for name in names))
    summary = make(place, tmp_path / "names")
    assert (summary["packed"], summary["reasons"]) == (1, {"no such file": 5})
    assert labelled(tmp_path / "names") == Counter({(a.read_bytes(), "20000000000"): 1})  # too large: a name
    place.write_text(f"path,label\n{a},x\n{b},y,z\n")
    with pytest.raises(ValueError, match=r"list.csv, line 3: 3 columns, 2 in the first line"):
        make(place, tmp_path / "x")
    place.write_text(f"path,label\n{a},{'x' * (1 << 25)}\n")
    with pytest.raises(ValueError, match=r"list.csv, line 2: field larger than"):
        make(place, tmp_path / "x")


def test_parquet_as_people_have_it(image_folder: Path, tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    place = tmp_path / "list.parquet"
    images = sorted(image_folder.rglob("*.jpg"))[:3]

    def write(rows: list[dict[str, Any]]) -> None:
        pq.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), place)

    missing = float("nan")  # what pandas makes of no label, beside which whole numbers become floats
    write([{"path": str(p), "label": n, "score": n} for p, n in zip(images, (0.0, 1.0, missing))])
    make(place, tmp_path / "d")
    assert labelled(tmp_path / "d") == Counter((p.read_bytes(), n) for p, n in zip(images, ("0", "1", "-1")))
    assert sorted(s.get("json", b"") for s in read_shards(tmp_path / "d").values())[0] == b""
    write([{"image": {"path": p.name}} for p in images])
    with pytest.raises(ValueError, match=r"`image` holds dict, neither paths nor images"):
        make(place, tmp_path / "x")
    place.write_bytes(b"PAR1 cut short")
    with pytest.raises(ValueError, match=r"list.parquet is not a whole Parquet file"):
        make(place, tmp_path / "x")


@pytest.fixture
def imagenet(image_folder: Path, tmp_path: Path) -> Path:
    """ILSVRC2012's files: a tar of class tars, a flat tar, its labels as lines of synsets in the order of the names."""
    root = tmp_path / "imagenet"
    root.mkdir()
    synsets = {f"class_{i}": f"n0144076{i}" for i in range(3)}
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for name in sorted(synsets, reverse=True):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for i, path in enumerate(sorted((image_folder / name).iterdir())):
                    add(tar, f"{synsets[name]}_{i}.JPEG", path.read_bytes())
            add(outer, f"{synsets[name]}.tar", inner.getvalue())
    val = sorted(image_folder.rglob("*.jpg"))
    random.Random(0).shuffle(val)
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as tar:
        for i in random.Random(1).sample(range(20), 20):
            add(tar, f"ILSVRC2012_val_{i + 1:08d}.JPEG", val[i].read_bytes())
    wnids = [synsets[path.parent.name] for path in val[:20]]
    (root / "synsets.txt").write_text("".join(f"{wnid}\n" for wnid in wnids))
    (root / "LOC_val_solution.csv").write_text(  # Kaggle's: no extension, boxes after the synset
        "ImageId,PredictionString\n"
        + "".join(f"ILSVRC2012_val_{i + 1:08d},{wnid} 1 2 30 40 \n" for i, wnid in enumerate(wnids))
    )
    (root / "truth.json").write_text(
        json.dumps([[path.read_bytes().hex(), synsets[path.parent.name]] for path in val[:20]])
    )
    return root


def test_imagenet(imagenet: Path, image_folder: Path, tmp_path: Path) -> None:
    train = tmp_path / "train"
    make(imagenet / "ILSVRC2012_img_train.tar", train)
    names = {f"n0144076{i}": f"class_{i}" for i in range(3)}
    assert Counter((image, names[label]) for image, label in labelled(train).elements()) == by_folder(image_folder)
    truth = Counter((bytes.fromhex(image), label) for image, label in json.loads((imagenet / "truth.json").read_text()))
    for labels in ("synsets.txt", "LOC_val_solution.csv"):
        val = tmp_path / labels
        make(imagenet / "ILSVRC2012_img_val.tar", val, labels=str(imagenet / labels), classes=str(train))
        assert labelled(val) == truth
        assert json.loads((val / "manifest.json").read_text())["classes"] == sorted(names)
    lines = (imagenet / "synsets.txt").read_text().splitlines()
    (imagenet / "short.txt").write_text("\n".join(lines[:-1]))
    with pytest.raises(ValueError, match=r"19 labels and no names, for 20 images"):
        make(imagenet / "ILSVRC2012_img_val.tar", tmp_path / "x", labels=str(imagenet / "short.txt"))
    (imagenet / "other.txt").write_text("\n".join(["n99999999", *lines[1:]]))
    with pytest.raises(ValueError, match=r"not among the 3 classes, the first: n99999999"):
        make(
            imagenet / "ILSVRC2012_img_val.tar", tmp_path / "x", labels=str(imagenet / "other.txt"), classes=str(train)
        )


def test_label_files_as_people_have_them(image_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    images = sorted(image_folder.rglob("*.jpg"))[:3]
    truth = list(zip(images, ("cat", "dog, small", "bird")))
    for i, image in enumerate(images):
        (folder / f"{i}.jpg").write_bytes(image.read_bytes())
    place = tmp_path / "labels.csv"
    for text in (
        'width,File,label\n640,0.jpg,cat\n640,1.jpg,"dog, small"\n640,2.jpg,bird\n',
        '"0.jpg","cat"\n"1.jpg","dog, small"\n"2.jpg","bird"\n',
        "\ufeff0,cat\r\n1,dog, small\r\n2,bird\r\n",
        f"path\tlabel\tnote\n0.jpg\tcat\t\n1.jpg\tdog, small\t{'long ' * 40_000}\n2.jpg\tbird\t\n",
    ):
        place.write_text(text)
        make(folder, tmp_path / "d", labels=str(place), overwrite=True)
        assert labelled(tmp_path / "d") == Counter((image.read_bytes(), label) for image, label in truth), text
    place.write_text("file,label\n0.jpg,cat\n1.jpg,dog, small\n2.jpg,bird\n")
    with pytest.raises(ValueError, match=r"3 columns in `1.jpg,dog, small`, 2 in the first line"):
        make(folder, tmp_path / "d", labels=str(place), overwrite=True)
    place.write_text("file,label\n0.jpg,cat\n1.jpg,\n2.jpg,bird\n")
    with pytest.raises(ValueError, match=r"labels.csv has no label for 1.jpg"):
        make(folder, tmp_path / "d", labels=str(place), overwrite=True)


def test_class_tars_side_by_side(imagenet: Path, image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    with tarfile.open(imagenet / "ILSVRC2012_img_train.tar") as tar:
        tar.extractall(tmp_path / "tars", filter="data")
    make(tmp_path / "tars", tmp_path / "d")
    names = {f"n0144076{i}": f"class_{i}" for i in range(3)}
    assert Counter((image, names[label]) for image, label in labelled(tmp_path / "d").elements()) == by_folder(
        image_folder
    )


def test_tar_of_class_folders(shared_data: Path, tmp_path: Path) -> None:
    """CIFAR-10's tar holds test/CLASS/NAME.png."""
    found = Survey()
    listing = Listing.write(
        tmp_path, collect(str(shared_data / "cifar10-test.tar"), found), found, classes=[], labels=True
    )
    labels = Counter(listing.label(listing[i]) for i in range(0, len(listing), 7))
    assert len(listing) == 10_000 and set(labels) == set(range(10)) and listing.classes[0] == "airplane"


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names(form: int, image_folder: Path, tmp_path: Path) -> None:
    paths = sorted(image_folder.rglob("*.*"))
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        for path in paths:
            tar.add(path, f"{'a very long folder/' * 20}{path.parent.name}/図-{path.name}")
    make(tmp_path / "a.tar", tmp_path / "d")
    assert labelled(tmp_path / "d") == by_folder(image_folder)


@pytest.mark.slow
def test_resharding_keeps_every_member(tmp_path: Path, shards_dir: Path, image_folder: Path) -> None:
    """Captions, metadata, labels go along; class names come from the manifest beside the shards; keys do not grow."""
    old = tmp_path / "old"
    old.mkdir()
    samples = read_shards(shards_dir)
    keys = sorted(samples)
    for s in range(2):
        with tarfile.open(old / f"{s:05d}.tar", "w") as tar:
            for key in keys[s::2]:
                for extension in random.Random(key).sample(sorted(samples[key]), 2):
                    add(tar, f"sub/{key}.{extension}", samples[key][extension])
                add(tar, f"sub/{key}.txt", f"caption of {key}".encode())
                add(tar, f"sub/{key}.seg.png", b"not looked at")
    (old / "manifest.json").write_bytes((shards_dir / "manifest.json").read_bytes())
    summary = make(old, tmp_path / "new", samples_per_shard=7, seed=5)
    assert (summary["packed"], summary["shards"]) == (60, {"": 9})
    assert labelled(tmp_path / "new") == by_folder(image_folder)
    for key, sample in read_shards(tmp_path / "new").items():
        original = sample["txt"].decode().removeprefix("caption of ")
        assert {k: v for k, v in sample.items() if k in samples[original]} == samples[original]
        assert sample["seg.png"] == b"not looked at"
        assert key.partition("-")[2] == original.partition("-")[2]
    for pattern in ("{00000..00001}.tar", "*.tar"):
        assert make(f"{old}/{pattern}", tmp_path / pattern[0])["packed"] == 60
    assert make(old, tmp_path / "none", labels="none")["classes"] == 0
    samples = read_shards(tmp_path / "none")
    assert all("txt" in sample and "cls" not in sample for sample in samples.values())


def test_archives_and_images_in_one_folder(image_folder: Path, shards_dir: Path, tmp_path: Path) -> None:
    """Whichever were read, the others would be lost."""
    root = shutil.copytree(image_folder, tmp_path / "photos")
    with zipfile.ZipFile(root / "old.zip", "w") as archive:
        archive.write(next(image_folder.rglob("*.jpg")), "a.jpg")
    with pytest.raises(ValueError, match=r"holds archives \(old.zip\) and images \(class_0/image_000.jpg\)"):
        make(root, tmp_path / "d")
    assert make(f"{root}/*.zip", tmp_path / "d")["packed"] == 1
    with pytest.raises(ValueError, match=r"names images \(.*class_0/image_000.jpg\), a pattern is of archives"):
        make(f"{root}/class_0/*.jpg", tmp_path / "x")
    # The contact sheet of shards is no image of theirs, nor of the folder that they lie in.
    assert make(shards_dir, tmp_path / "again")["packed"] == 60
    (root / "old.zip").unlink()
    shutil.copytree(shards_dir, root / "shards")
    assert make(root, tmp_path / "photos only")["found"] == 60
    with pytest.raises(ValueError, match=r"holds 4 idx, 4 tar.*: name their folder"):
        make(shards_dir.parent, tmp_path / "x")


def test_what_a_tar_has_beside_images_is_counted(image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src/a.jpg").write_bytes(next(image_folder.rglob("*.jpg")).read_bytes())
    (tmp_path / "src/hard.jpg").hardlink_to(tmp_path / "src/a.jpg")
    (tmp_path / "src/soft.jpg").symlink_to("a.jpg")
    (tmp_path / "src/._a.jpg").write_bytes(b"what macOS's tar adds")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "src", ".")
    summary = make(tmp_path / "a.tar", tmp_path / "d")
    assert (summary["found"], summary["ignored"]) == (1, {"link": 2, "hidden": 1})


def test_damaged_archives_are_errors(image_folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(image_folder, "x")
    whole = (tmp_path / "a.tar").read_bytes()
    for length in (len(whole) // 2, 20_000):
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.tar is (damaged or )?cut short"):
            make(tmp_path / "cut.tar", tmp_path / "d")
    (tmp_path / "bad.zip").write_bytes(b"PK\3\4 nothing")
    with pytest.raises(ValueError, match=r"not a whole zip"):
        make(tmp_path / "bad.zip", tmp_path / "d")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.add(image_folder, "x")
    with pytest.raises(ValueError, match="is compressed"):
        make(tmp_path / "a.tar.gz", tmp_path / "d")
    (tmp_path / "gz.tar").write_bytes((tmp_path / "a.tar.gz").read_bytes())
    with pytest.raises(ValueError, match=r"gz\.tar is compressed"):
        make(tmp_path / "gz.tar", tmp_path / "d")


class Server:
    """As fsspec has it: refuses what is named so, and may send whole files where parts are asked for."""

    sends_parts = True

    def _strip_protocol(self, path: str) -> str:
        return path

    def cat_ranges(self, paths: list[str], begins: list[int], ends: list[int], on_error: str) -> list[Any]:
        return [self._answer(*asked) for asked in zip(paths, begins, ends)]

    def _answer(self, path: str, begin: int, end: int) -> Any:
        error = OSError("forbidden")
        error.status = 403  # type: ignore[attr-defined]  # as aiohttp's
        content = bytes(range(100))
        return error if "refused" in path else content[begin:end] if self.sends_parts else content


def test_answers_of_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is refused costs its image, and what comes after it stays with its own."""
    monkeypatch.setattr(remote, "reading_from", lambda url, *_: (Server(), url))
    names = ("a", "refused", "c")
    entries = [
        ListedImage(f"http://x/{n}.tar", 10 * i, 5, "n", sidecars=[Sidecar("cls", 10 * i + 5, 2)])
        for i, n in enumerate(names)
    ]
    answers = list(fetch.fetch(entries))
    assert [a.reason if isinstance(a, Rejected) else a for a in answers] == [
        [bytes(range(5)), bytes(range(5, 7))],
        "refused by its server",
        [bytes(range(20, 25)), bytes(range(25, 27))],
    ]
    monkeypatch.setattr(Server, "sends_parts", False)
    with pytest.raises(ValueError, match=r"100 bytes where 5 at 0 were asked for: .* cannot send parts"):
        list(fetch.fetch(entries))


def test_zip_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("small.jpg", bytes(10_000))
        archive.writestr("large.jpg", bytes(10_001))
    monkeypatch.setattr(fetch, "LARGEST_MEMBER", 10_000)
    small, large = fetch.fetch(collect(str(tmp_path / "a.zip"), Survey()))
    assert small == [bytes(10_000)]
    assert isinstance(large, Rejected) and "more than 10,000 bytes" in large.detail


def test_an_archive_that_is_cut_after_it_was_listed(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(bytes(1000))
    with pytest.raises(ValueError, match=r"a.tar: 100 bytes where 200 at 900 were asked for: it changed since"):
        list(fetch.fetch([ListedImage(str(tmp_path / "a.tar"), 900, 200, "x.jpg")]))


def test_files_by_url(tmp_path: Path) -> None:
    """Names are no patterns; what is not there, and a folder where an image was listed, cost their line."""
    names = ("photo [1].jpg", "photo1.jpg", "what?.jpg", "*.jpg")
    for name in names:
        (tmp_path / name).write_text(name)
    answers = fetch.fetch([ListedImage(f"local://{tmp_path}/{n}", -1, -1, "x.jpg") for n in (*names, "none.jpg", "")])
    told = [a.reason if isinstance(a, Rejected) else a for a in answers]
    assert told == [[name.encode()] for name in names] + ["no such file"] * 2


def test_zip(image_folder: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for i, path in enumerate(sorted(image_folder.rglob("*.*"))):
            how = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[i % 2]
            archive.write(path, f"data/{path.relative_to(image_folder)}", how)
        archive.writestr("data/class_1/lzma.jpg", b"x" * 100, zipfile.ZIP_LZMA)
        archive.writestr("__MACOSX/data/class_1/._x.jpg", b"resource fork")
        windows = zipfile.ZipInfo("data/class_2/windows.jpg")
        windows.filename = windows.orig_filename = "data\\class_2\\windows.jpg"
        archive.writestr(windows, (image_folder / "class_2/image_000.jpg").read_bytes())
    summary = make(tmp_path / "a.zip", tmp_path / "d")
    assert summary["reasons"] == {"zip member not readable": 1}
    again = Counter({((image_folder / "class_2/image_000.jpg").read_bytes(), "class_2"): 1})
    assert labelled(tmp_path / "d") == by_folder(image_folder) + again


@pytest.fixture
def bucket(image_folder: Path) -> Iterator[str]:
    """An object store in another process, as S3's own protocol has it."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1"}
    settings |= {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    fs.mkdir("things")
    for path in image_folder.rglob("*.*"):
        fs.put_file(str(path), f"things/images/{path.relative_to(image_folder)}")
    yield "s3://things"
    server.stop()
    multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.mark.slow
@pytest.mark.process
def test_from_and_to_an_object_store(bucket: str, image_folder: Path, tmp_path: Path) -> None:
    fs = fsspec.filesystem("s3")
    options = {"samples_per_shard": 15, "dedup": True}
    make(f"{bucket}/images", f"{bucket}/shards", **options)
    make(image_folder, tmp_path / "local", **options)
    for path in sorted((tmp_path / "local").iterdir()):
        if path.name != "make_shards.json":
            assert fs.cat_file(f"things/shards/{path.name}") == path.read_bytes(), path.name
    assert len(fs.ls("things/shards")) == len(list((tmp_path / "local").iterdir()))  # nothing is left of the work
    # A list of URLs, sizes unknown, one of them wrong; into a local folder. Then remote shards once more.
    names = sorted(p.relative_to(image_folder) for p in image_folder.rglob("*.*"))
    (tmp_path / "urls.txt").write_text("".join(f"{bucket}/images/{name}\n" for name in [*names, "none/there.jpg"]))
    summary = make(tmp_path / "urls.txt", tmp_path / "listed")
    assert (summary["packed"], summary["reasons"]) == (60, {"no such file": 1})
    assert make(f"{bucket}/shards", tmp_path / "again")["packed"] == 60
    assert labelled(tmp_path / "again") == by_folder(image_folder)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        make(f"{bucket}/nothing", tmp_path / "x")
    with pytest.raises(FileNotFoundError, match="bucket does not exist"):
        make(image_folder, "s3://thinsg/shards")  # not made on the way
