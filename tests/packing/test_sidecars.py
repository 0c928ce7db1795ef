"""Labels and captions go with their image and with no other, wherever they stand and however names are dotted."""

import io
import json
import tarfile
import time
import tracemalloc
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import webdataset  # noqa: F401 (with it comes torch, whose import starts a program: here, before any test runs)
from PIL import Image

from pipeline.make_shards import make_shards
from pipeline.packing.collect import collect
from pipeline.packing.pairing import IMAGE, SIDECAR, Members
from pipeline.packing.prepare import Options
from pipeline.packing.survey import Survey, is_image_name

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset's


def picture(i: int) -> bytes:
    """Another image for every number."""
    file = io.BytesIO()
    Image.new("RGB", (40, 40), (i % 256, i // 256, 77)).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_folder(root: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    for name, content in members:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_zip(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def pack(src: Path, dest: Path, **more: Any) -> tuple[dict[str, Any], list[dict[str, bytes]]]:
    """The summary, and the samples: extension -> content."""
    make_shards(str(src), str(dest), options=Options(), num_workers=1, **more)
    samples: dict[str, dict[str, bytes]] = {}
    for place in sorted(dest.glob("*.tar")):
        with tarfile.open(place) as tar:
            for member in tar.getmembers():
                key, _, extension = member.name.partition(".")
                content = tar.extractfile(member)
                assert content is not None and extension not in samples.setdefault(key, {})
                samples[key][extension] = content.read()
    return json.loads((dest / "make_shards.json").read_text()), [samples[key] for key in sorted(samples)]


def found(members: list[str], tmp_path: Path) -> dict[str, list[str]]:
    """Image -> the extensions of its sidecars in the shard, from a tar of such members."""
    tar = write_tar(tmp_path / "a.tar", [(name, name.encode()) for name in members])
    images = collect(str(tar), Survey())
    return {image.name: [sidecar.extension for sidecar in image.sidecars or ()] for image in images}


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ("a.jpg a.cls b.jpg b.cls", {"a.jpg": ["cls"], "b.jpg": ["cls"]}),
        ("a.jpg b.jpg b.cls a.cls", {"a.jpg": ["cls"], "b.jpg": ["cls"]}),
        ("a.cls a.json a.jpg", {"a.jpg": ["cls", "json"]}),
        ("v1.2.jpg v1.3.jpg v1.3.cls v1.2.txt", {"v1.2.jpg": ["txt"], "v1.3.jpg": ["cls"]}),
        ("1.image.jpg 1.label.cls 1.image.txt", {"1.image.jpg": ["cls", "txt"]}),
        ("1.image.jpg 1.cls", {"1.image.jpg": ["cls"]}),
        ("1.left.jpg 1.right.jpg 1.cls", {"1.left.jpg": [], "1.right.jpg": []}),  # whose label is it?
        ("1.left.jpg 1.right.jpg 1.left.cls", {"1.left.jpg": ["cls"], "1.right.jpg": []}),
        ("a.jpg a.jpg.json a.jpg.cls", {"a.jpg": ["jpg.json", "cls"]}),
        ("v1.2.jpg v1.3.jpg v1.3.jpg.json", {"v1.2.jpg": [], "v1.3.jpg": ["jpg.json"]}),
        ("a.jpg a.coarse.cls a.fine.cls", {"a.jpg": ["coarse.cls", "fine.cls"]}),  # neither is *the* label
        ("a.jpg a.mask.png a.cls", {"a.jpg": ["cls", "mask.png"]}),
        ("a.jpg a.mask.png", {"a.jpg": [], "a.mask.png": []}),
        ("a.jpg a.mask.png a.cls a.mask.cls", {"a.jpg": ["cls"], "a.mask.png": ["cls"]}),
        ("cat.jpg cat.1.jpg cat.cls", {"cat.jpg": ["cls"], "cat.1.jpg": []}),  # a number counts images
        ("x/a.jpg y/a.jpg y/a.cls", {"x/a.jpg": [], "y/a.jpg": ["cls"]}),
        ("a.jpg a.png a.cls", {"a.jpg": ["cls"], "a.png": ["cls"]}),
        ("a.JPG a.CLS", {"a.JPG": ["cls"]}),
        (".a.jpg a.cls", {}),
    ],
)
def test_which_sidecar_belongs_to_which_image(members: str, expected: dict[str, list[str]], tmp_path: Path) -> None:
    assert found(members.split(), tmp_path) == expected


def test_tars_put_together(tmp_path: Path) -> None:
    """Names that come again are other images, with sidecars of their own."""
    members = [("1.jpg", b"A"), ("2.jpg", b"B"), ("2.cls", b"b"), ("1.jpg", b"C"), ("1.cls", b"c"), ("2.jpg", b"D")]
    tar = write_tar(tmp_path / "a.tar", members)
    content = tar.read_bytes()
    told = [
        (content[image.offset : image.offset + 1], [content[s.offset : s.offset + 1] for s in image.sidecars or ()])
        for image in collect(str(tar), Survey())
    ]
    assert told == [(b"A", []), (b"B", [b"b"]), (b"C", [b"c"]), (b"D", [])]


def test_dotted_names_keep_their_own(tmp_path: Path) -> None:
    members = []
    for i in range(300):
        stem = f"2021.05-{i:05d}"
        members += [(f"{stem}.png", picture(i)), (f"{stem}.cls", b"%d" % (i % 4)), (f"{stem}.json", b'{"i": %d}' % i)]
    summary, samples = pack(write_tar(tmp_path / "a.tar", members), tmp_path / "d")
    assert (summary["packed"], summary["classes"]) == (300, 4)
    for i, sample in enumerate(samples):
        assert sample == {"png": picture(i), "cls": b"%d" % (i % 4), "json": b'{"i": %d}' % i}


def test_many_dotted_names_cost_as_many_plain_ones() -> None:
    """24,000 members with one name up to the first dot: linear in time, bounded in memory."""
    tracemalloc.start()
    began = time.process_time()
    members = Members()
    for i in range(8_000):
        for extension in ("jpg", "cls", "json"):
            name = f"folder/2021.05-{i:06d}.{extension}"
            members.add(name, IMAGE if is_image_name(name) else SIDECAR, offset=i, size=1)
    paired = list(members.samples(masks=True))
    seconds, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [len(sidecars) for _, sidecars in paired] == [2] * 8_000 + [0]
    assert seconds < 8, seconds  # half a second, without tracing
    assert peak < 24_000 * 600, peak  # the lists of the result are most of it


@pytest.mark.parametrize("kind", ["tar", "zip", "folder"])
def test_unsorted_and_dotted_extensions_keep_labels(kind: str, tmp_path: Path) -> None:
    members = [(f"{i:04d}.image.png", picture(i)) for i in range(20)]
    members += [(f"{i:04d}.label.cls", b"%d" % (i % 3)) for i in range(20)]
    members += [(f"{i:04d}.image.txt", f"caption {i}".encode()) for i in range(20)]
    write = {"tar": write_tar, "zip": write_zip, "folder": write_folder}[kind]
    summary, samples = pack(write(tmp_path / f"a.{kind}", members), tmp_path / "d")
    assert (summary["packed"], summary["classes"], summary["ignored"]) == (20, 3, {})
    for i, sample in enumerate(samples):
        assert sample == {"png": picture(i), "cls": b"%d" % (i % 3), "txt": f"caption {i}".encode()}


def img2dataset(root: Path, *, stats: bool = True, shards: int = 3, each: int = 4) -> Path:
    """What `img2dataset --output_format files` writes."""
    members = []
    for s in range(shards):
        for i in range(each):
            name = f"{s:05d}/{s:05d}{i:04d}"
            about = {"caption": f"a photo {i}", "tag": ["cat", "dog"][i % 2], "tags": ["x", "y"][: i % 3]}
            members += [(f"{name}.jpg", picture(10 * s + i)), (f"{name}.txt", f"a photo {i}".encode())]
            members.append((f"{name}.json", json.dumps(about).encode()))
        if stats:
            members += [(f"{s:05d}_stats.json", b"{}"), (f"{s:05d}.parquet", b"PAR1")]
    return write_folder(root, members)


@pytest.mark.parametrize("stats", [True, False])
def test_shard_folders_of_img2dataset_are_no_classes(
    stats: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary, samples = pack(img2dataset(tmp_path / "src", stats=stats), tmp_path / "d")
    assert (summary["packed"], summary["classes"]) == (12, 0)
    assert [sample["txt"] for sample in samples] == [b"a photo %d" % (i % 4) for i in range(12)]
    assert all(json.loads(sample["json"])["caption"] == sample["txt"].decode() for sample in samples)
    told = capsys.readouterr().out
    assert "folders are shards of img2dataset, not classes; the first: 00000 of 3" in told
    assert "images have sidecars (12 json, 12 txt) and no label came of them" in told and "--label_key" in told


def test_folders_of_numbers_may_be_classes(tmp_path: Path) -> None:
    """As in GTSRB: 00000/00000_00012.ppm."""
    members = [(f"{c:05d}/{c:05d}_{i:05d}.png", picture(10 * c + i)) for c in range(3) for i in range(4)]
    summary, samples = pack(write_folder(tmp_path / "src", members), tmp_path / "d")
    assert summary["classes"] == 3 and [int(sample["cls"]) for sample in samples] == [0] * 4 + [1] * 4 + [2] * 4


def test_label_key_of_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = img2dataset(tmp_path / "src")
    (src / "00001/000010000.json").write_text("{damaged")
    (src / "00001/000010001.json").unlink()
    summary, samples = pack(src, tmp_path / "d", label_key="tag")
    assert summary["classes"] == 2 and json.loads((tmp_path / "d/manifest.json").read_text())["classes"] == [
        "cat",
        "dog",
    ]
    labels = [sample.get("cls") for sample in samples]
    assert labels == [b"0", b"1", b"0", b"1", None, None, b"0", b"1", b"0", b"1", b"0", b"1"]
    told = capsys.readouterr().out
    assert "2  images have no `tag` in a JSON beside them, so no label; the first: 00001/000010000.jpg" in told
    with pytest.raises(ValueError, match=r"--label_key tga: no image has it .* 11 such files, which hold caption, tag"):
        pack(src, tmp_path / "x", label_key="tga")
    with pytest.raises(ValueError, match=r"was made otherwise \(label_key 'tag' there, None now\)"):
        pack(src, tmp_path / "d")


def test_lists_of_labels(tmp_path: Path) -> None:
    summary, samples = pack(img2dataset(tmp_path / "src"), tmp_path / "d", label_key="tags")
    assert summary["classes"] == 2
    assert [json.loads(sample["labels.json"]) for sample in samples] == [[], [0], [0, 1], []] * 3
    assert not any("cls" in sample for sample in samples) and all("caption" in json.loads(s["json"]) for s in samples)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_label_key_of_a_list(kind: str, tmp_path: Path) -> None:
    write_folder(tmp_path, [(f"{i}.png", picture(i)) for i in range(3)])
    rows = [{"path": f"{i}.png", "label": "other", "species": name, "ids": [4, i]} for i, name in enumerate("bab")]
    place = tmp_path / f"list.{kind}"
    if kind == "csv":
        lines = [f'{row["path"]},other,{row["species"]},"[4, {i}]"' for i, row in enumerate(rows)]
        place.write_text("path,label,species,ids\n" + "\n".join(lines))
    else:
        pq = pytest.importorskip("pyarrow.parquet")
        pq.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), place)
    _, samples = pack(place, tmp_path / "d", label_key="species")
    assert [sample["cls"] for sample in samples] == [b"1", b"0", b"1"]
    assert json.loads(samples[0]["json"])["label"] == "other"
    _, samples = pack(place, tmp_path / "several", label_key="ids")
    assert [json.loads(sample["labels.json"]) for sample in samples] == [[4, 0], [4, 1], [4, 2]]  # as they are
    with pytest.raises(ValueError, match=r"has no column `color` \(--label_key\); it has path, label, species, ids"):
        pack(place, tmp_path / "x", label_key="color")


def test_labels_beside_images_and_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers of two kinds are not mixed."""
    members = [(f"{c}/{i}.png", picture(10 * c + i)) for c in range(2) for i in range(3)]
    write_folder(tmp_path / "src", [*members, ("0/0.cls", b"7"), ("0/gone.cls", b"9")])
    summary, samples = pack(tmp_path / "src", tmp_path / "d")
    assert [sample.get("cls") for sample in samples] == [b"7"] + [None] * 5
    assert summary["classes"] == 1 and summary["ignored"] == {"cls": 1}
    told = capsys.readouterr().out
    assert "images have a .cls, so the folders of the others are no classes; the first: 0 of 2" in told
    assert "labels (.cls) belong to no image; the first: 0/gone.cls" in told
