"""make_shards --dedup_near: copies of other size, quality or format drop out, the first in the input's order stays."""

import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_foreign_inputs import files_of

from pipeline.make_shards import make_shards
from pipeline.packing import near
from pipeline.packing.near import find_near_duplicates, near_pairs
from pipeline.packing.plan import duplicate_pairs
from pipeline.packing.prepare import Options

pytest.importorskip("imagehash")


def brute_force(hashes: np.ndarray, bits: int) -> dict[int, int]:
    """By the definition: in order, an image drops out when one that stays is at most `bits` from it."""
    stay: list[int] = []
    dropped = {}
    for i, (bits_of, usable) in enumerate(hashes.tolist()):
        if usable:
            found = next((j for j in stay if (bits_of ^ int(hashes[j, 0])).bit_count() <= bits), None)
            if found is None:
                stay.append(i)
            else:
                dropped[i] = found
    return dropped


@pytest.mark.parametrize("bits", [0, 1, 2, 3])
def test_the_tables_find_what_comparing_all_finds(bits: int, tmp_path: Path) -> None:
    """Hashes around a few centres, so that there are chains, equal ones, and some without a hash."""
    rng = np.random.default_rng(bits)
    hashes = np.zeros((600, 2), np.uint64)
    centres = rng.integers(0, 1 << 64, 40, np.uint64)
    for i in range(len(hashes)):
        turned = [int(bit) for bit in rng.integers(0, 64, rng.integers(0, 6))]
        hashes[i] = centres[rng.integers(40)] ^ np.uint64(sum({1 << bit for bit in turned})), rng.random() > 0.05
    kept, count = find_near_duplicates(hashes, bits, tmp_path)
    expected = brute_force(hashes, bits)
    assert {left_out: stays for left_out, stays, _ in duplicate_pairs(tmp_path)} == expected
    assert count == len(expected) > 20
    assert kept.tolist() == [i for i in range(600) if i not in expected]
    for left_out, stays, apart in duplicate_pairs(tmp_path):
        assert int(hashes[left_out, 0] ^ hashes[stays, 0]).bit_count() == apart <= bits


def test_no_place_of_three_bits_is_overlooked() -> None:
    """Whichever bits differ, two blocks are whole: an eighth of all 41,664 triples."""
    start = 0x0123456789ABCDEF
    for a, b, c in itertools.islice(itertools.combinations(range(64), 3), 0, None, 8):
        other = start ^ (1 << a) ^ (1 << b) ^ (1 << c)
        assert near_pairs(np.array([start, other], np.uint64), 3).tolist() == [[0, 1]]


def test_many_alike_are_not_compared_with_each_other(tmp_path: Path) -> None:
    """A hundred thousand blank pages have one hash: they are one entry in the tables."""
    hashes = np.ones((100_000, 2), np.uint64)
    kept, count = find_near_duplicates(hashes, 3, tmp_path)
    assert kept.tolist() == [0] and count == 99_999


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures; three of them again, smaller, of lower quality, as PNG, twice the same; one that is too small, with
    a larger copy after it; one cut off, with a whole copy after it."""
    folder = tmp_path_factory.mktemp("near") / "src"
    folder.mkdir()
    rng = np.random.default_rng(7)
    pictures = []
    for i in range(10):
        coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), np.uint8))
        pictures.append(coarse.resize((320, 240), Image.Resampling.BICUBIC))
        pictures[-1].save(folder / f"a{i}.jpg", quality=92)
    pictures[2].resize((200, 150), Image.Resampling.LANCZOS).save(folder / "b2_smaller.jpg", quality=85)
    pictures[3].save(folder / "b3_poorer.jpg", quality=30)
    pictures[4].save(folder / "b4_other.png")
    (folder / "b5_same.jpg").write_bytes((folder / "a5.jpg").read_bytes())
    late = Image.fromarray(rng.integers(0, 256, (7, 9, 3), np.uint8)).resize((320, 240), Image.Resampling.BICUBIC)
    late.resize((40, 30)).save(folder / "c_small.jpg")
    late.save(folder / "d_large.jpg")
    whole = io.BytesIO()
    other = Image.fromarray(rng.integers(0, 256, (7, 9, 3), np.uint8)).resize((320, 240), Image.Resampling.BICUBIC)
    other.save(whole, "JPEG")
    (folder / "e_cut.jpg").write_bytes(whole.getvalue()[:-900])
    (folder / "f_whole.jpg").write_bytes(whole.getvalue())
    return folder


def pack(source: Path, dest: Path, **more: Any) -> dict[str, Any]:
    settings = {"num_workers": 1, "samples_per_shard": 5, "dedup_near": 3, **more}
    make_shards(str(source), str(dest), options=Options(min_side=64), **settings)
    summary: dict[str, Any] = json.loads((dest / "make_shards.json").read_text())
    return summary


def test_copies_drop_out_and_none_takes_another_ones_place(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = pack(source, tmp_path / "d")
    lines = [json.loads(line) for line in (tmp_path / "d/duplicates.jsonl").read_text().splitlines()]
    assert {line["name"]: line["same_as"] for line in lines} == {
        "b2_smaller.jpg": "a2.jpg",
        "b3_poorer.jpg": "a3.jpg",
        "b4_other.png": "a4.jpg",
        "b5_same.jpg": "a5.jpg",
    }
    assert all(0 <= line["bits"] <= 3 for line in lines)
    assert (counts["found"], counts["packed"], counts["rejected"], counts["duplicates"]) == (18, 12, 2, 4)
    packed = {path.read_bytes() for path in source.iterdir() if path.name in ("d_large.jpg", "f_whole.jpg")}
    tars = b"".join(path.read_bytes() for path in (tmp_path / "d").glob("*.tar"))
    assert all(image in tars for image in packed)  # what is rejected is no reason to leave a copy out
    printed = capsys.readouterr().out
    assert sum(counts["bits_apart"].values()) == 4 and "0 bits from an image that stays" in printed
    with Image.open(tmp_path / "d/near_duplicates.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (144, 4 * 268, 3)
    assert np.abs(pixels[30:100, 20:110].astype(int) - pixels[30:100, 148:238]).mean() < 12  # the two look alike
    make_shards(
        str(tmp_path / "d"), str(tmp_path / "again"), options=Options(), num_workers=1
    )  # no input, that picture


def test_an_interruption_changes_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline import make_shards as door

    pack(source, tmp_path / "whole")
    expected = files_of(tmp_path / "whole")
    monkeypatch.setattr(door, "HASHED_TOGETHER", 4)
    hash_pictures, done = near.hash_pictures, []

    def dying(task: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(task.output)
        return hash_pictures(task)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(near, "hash_pictures", dying)
        pack(source, tmp_path / "d")
    hashed: list[int] = []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(near, "hash_pictures", lambda task: (hashed.append(len(task.images)), hash_pictures(task))[1])
        patch.setattr(door, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        pack(source, tmp_path / "d")
    assert sum(hashed) == 10  # of 18, the 8 that were done are not done again
    pack(source, tmp_path / "d")
    assert files_of(tmp_path / "d") == expected
    with pytest.raises(ValueError, match=r"made otherwise \(dedup_near 3 there, 2 now\)"):
        pack(source, tmp_path / "d", dedup_near=2)


@pytest.mark.process
def test_two_workers_find_the_same(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline import make_shards as door

    pack(source, tmp_path / "1")
    monkeypatch.setattr(door, "HASHED_TOGETHER", 4)
    pack(source, tmp_path / "2", num_workers=2)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")


def test_what_does_not_go_together(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="finds exact duplicates too: drop --dedup"):
        pack(source, tmp_path / "d", dedup=True)
    monkeypatch.setitem(__import__("sys").modules, "imagehash", None)
    with pytest.raises(ValueError, match=r"takes ImageHash: pip install -e '\.\[near\]'"):
        pack(source, tmp_path / "d")
    assert not (tmp_path / "d").exists()
