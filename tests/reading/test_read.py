"""The read stage: right bytes, labels, replacement, quarantine, shards that are not what their manifest says, speed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_shards import write_shards

from pipeline.reading.order import Draw, draw_of_ids, make_order
from pipeline.reading.quarantine import Quarantine
from pipeline.reading.reader import Reader, Samples
from pipeline.sources.manifest import Source
from pipeline.sources.opening import open_source
from pipeline.sources.storage import Storage, read_at

ROOT = Path(__file__).resolve().parent.parent.parent
GARBAGE = b"not an image"


def as_draw(source: Source, *ids: int) -> Draw:
    return draw_of_ids(source, np.array(ids, np.int64))


def small_files(image_folder: Path, bad: tuple[int, ...] = ()) -> list[tuple[str, bytes, int | None]]:
    files: list[tuple[str, bytes, int | None]] = []
    for i, path in enumerate(sorted(image_folder.rglob("*.jpg"))[:24]):
        files.append((path.name, GARBAGE if i in bad else path.read_bytes(), i // 8))
    return files


@pytest.fixture
def sick(image_folder: Path, tmp_path: Path) -> Source:
    """24 samples in three shards of 8; rows 2, 3 and 7 of shard 0 and all of shard 2 are bad."""
    return open_source(str(write_shards(tmp_path / "sick", small_files(image_folder, (2, 3, 7, *range(16, 24))), 8)))


def contents(samples: Samples) -> list[bytes]:
    return [encoded.tobytes() for encoded in samples.encoded]


def test_reads_the_bytes_that_were_written(image_folder: Path, tmp_path: Path) -> None:
    files = small_files(image_folder)
    source = open_source(str(write_shards(tmp_path / "s", files, 5)))
    reader = Reader(source, Storage())
    samples = reader.read(as_draw(source, *range(24)))
    assert contents(samples) == [content for _, content, _ in files]
    assert reader.labels(samples.draw).tolist() == [i // 8 for i in range(24)]
    assert samples.heights.min() >= 48 and samples.widths.max() < 72
    reader.close()


def test_a_sample_without_a_label_has_minus_one(image_folder: Path, tmp_path: Path) -> None:
    files = [(name, content, None) for name, content, _ in small_files(image_folder)]
    source = open_source(str(write_shards(tmp_path / "s", files, 24)))
    assert Reader(source, Storage()).labels(as_draw(source, 3)).tolist() == [-1]


def test_bad_samples_are_replaced_by_the_next_good_row(sick: Source, tmp_path: Path) -> None:
    reader = Reader(sick, Storage(), quarantine=tmp_path / "q.jsonl", max_bad_fraction=1)
    samples = reader.read(as_draw(sick, 0, 2, 3, 7))
    assert samples.draw.sample_ids.tolist() == [0, 4, 4, 0]  # 7 is the last of its shard: round to its first
    assert samples.draw.row.tolist() == [0, 4, 4, 0]
    assert contents(samples)[1] == contents(samples)[2] == reader.read(as_draw(sick, 4)).encoded[0].tobytes()
    # A shard without one good sample: on in the shards that follow.
    assert reader.read(as_draw(sick, 16)).draw.sample_ids.tolist() == [0]
    lines = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert {line["sample_id"] for line in lines} == {2, 3, 7, *range(16, 24)} and len(lines) == 11
    assert lines[0]["source"] == "sick" and lines[0]["shard"] == "shard-000000.tar"
    assert lines[0]["key"].startswith("000002_") and "not an image: begins with" in lines[0]["reason"]


def test_without_replacement_they_are_left_out(sick: Source) -> None:
    reader = Reader(sick, Storage(), max_bad_fraction=1)
    samples = reader.read(as_draw(sick, 1, 2, 3, 4), replace=False)
    assert samples.draw.sample_ids.tolist() == [1, 4] and len(samples.encoded) == len(samples.heights) == 2


def test_replacement_does_not_depend_on_history(sick: Source, tmp_path: Path) -> None:
    """Another reader, another order, a quarantine that is known already: the same samples."""
    ids = list(range(16))
    first = Reader(sick, Storage(), quarantine=tmp_path / "q.jsonl", max_bad_fraction=1).read(as_draw(sick, *ids))
    again = Reader(sick, Storage(), quarantine=tmp_path / "q.jsonl", max_bad_fraction=1)
    for i in reversed(ids):
        assert again.read(as_draw(sick, i)).draw.sample_ids[0] == first.draw.sample_ids[i]


def test_too_many_bad_samples_end_the_run(sick: Source, tmp_path: Path) -> None:
    reader = Reader(sick, Storage(), quarantine=tmp_path / "q.jsonl", max_bad_fraction=0.1)
    reader.read(as_draw(sick, 0, 1, 2, 3))  # 2 of 24: allowed
    with pytest.raises(ValueError, match=r"3 of 5 samples read are bad, more than max_bad_fraction 0\.1 .*q\.jsonl"):
        reader.read(as_draw(sick, 7))


def test_no_good_sample_at_all(image_folder: Path, tmp_path: Path) -> None:
    source = open_source(str(write_shards(tmp_path / "s", small_files(image_folder, tuple(range(24))), 8)))
    with pytest.raises(ValueError, match="no sample of source s can be decoded"):
        Reader(source, Storage(), max_bad_fraction=100).read(as_draw(source, 3))


def add_lines(path: Path, count: int) -> None:
    quarantine = Quarantine(path, lambda line: True)
    for sample_id in range(count):
        quarantine.add({"shard": "s", "sample_id": sample_id, "key": "k" * 300, "reason": "r"})


WRITER = """
import sys
from pipeline.reading.quarantine import Quarantine
quarantine = Quarantine(sys.argv[1], lambda line: True)
for sample_id in range(300):
    quarantine.add({"shard": "s", "sample_id": sample_id, "key": "k" * 300, "reason": "by " + sys.argv[2]})
"""


@pytest.mark.process
def test_quarantine_is_written_once_by_many_processes(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(n)], cwd=ROOT) for n in range(3)]
    assert [writer.wait(120) for writer in writers] == [0, 0, 0]
    assert [json.loads(line)["sample_id"] for line in path.read_text().splitlines()] == list(range(300))


def test_quarantine_survives_a_kill_in_the_middle_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    add_lines(path, 2)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"shard": "s", "sample_')
    quarantine = Quarantine(path, lambda line: True)
    quarantine.add({"shard": "s", "sample_id": 5, "reason": "r"})
    assert [json.loads(line)["sample_id"] for line in path.read_text().splitlines()] == [0, 1, 5]


@pytest.mark.parametrize(
    "theirs", [b"my notes", b"my notes\n", b'{"a": 1}', b'{"a": 1}\n', b"[" * 100_000 + b"\n", b"1\n2"]
)
def test_a_file_of_the_user_is_no_quarantine(tmp_path: Path, theirs: bytes) -> None:
    """Half a line at its end is cut off as a killed writer's: not that of somebody's own file."""
    path = tmp_path / "notes.txt"
    path.write_bytes(theirs)
    with pytest.raises(ValueError, match=r"notes.txt is not a list of bad samples.*move it away, or name another"):
        Quarantine(path, lambda line: int(str(line["sample_id"])) >= 0)
    assert path.read_bytes() == theirs


def test_quarantine_of_other_data_does_not_count(sick: Source, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    lines = [{"shard": "other.tar", "sample_id": 0}, {"shard": "shard-000000.tar", "sample_id": 9999}]
    path.write_text("".join(json.dumps(line | {"reason": "old"}) + "\n" for line in lines))
    reader = Reader(sick, Storage(), quarantine=path)
    assert reader.read(as_draw(sick, 0)).draw.sample_ids.tolist() == [0]


def healthy(image_folder: Path, folder: Path) -> Source:
    return open_source(str(write_shards(folder, small_files(image_folder), 8)))


def test_a_missing_shard(image_folder: Path, tmp_path: Path) -> None:
    source = healthy(image_folder, tmp_path / "s")
    (tmp_path / "s" / "shard-000001.tar").unlink()
    reader = Reader(source, Storage())
    reader.read(as_draw(source, 0))
    with pytest.raises(FileNotFoundError, match=r"shard-000001\.tar"):
        reader.read(as_draw(source, 8))


@pytest.mark.parametrize("change", [-512, 512])
def test_a_shard_shorter_or_longer_than_its_manifest(image_folder: Path, tmp_path: Path, change: int) -> None:
    source = healthy(image_folder, tmp_path / "s")
    path = tmp_path / "s" / "shard-000001.tar"
    size = path.stat().st_size
    os.truncate(path, size + change)
    with pytest.raises(ValueError, match=f"{size + change:,} bytes, its manifest says {size:,}"):
        Reader(source, Storage()).read(as_draw(source, 8))


@pytest.mark.parametrize("in_place", [True, False])
def test_a_shard_replaced_during_the_run(image_folder: Path, tmp_path: Path, in_place: bool) -> None:
    """By a tar of the same length with other members, in place or by renaming."""
    source = healthy(image_folder, tmp_path / "s")
    reader = Reader(source, Storage())
    reader.read(as_draw(source, *range(8, 16)))
    path = tmp_path / "s" / "shard-000001.tar"
    files = small_files(image_folder)
    other = write_shards(tmp_path / "other", [*files[9:16], files[8]], 8) / "shard-000000.tar"
    size = path.stat().st_size
    content = other.read_bytes()[:size].ljust(size, b"\0")
    if in_place:
        path.write_bytes(content)
    else:
        (tmp_path / "new").write_bytes(content)
        (tmp_path / "new").replace(path)
    with pytest.raises(ValueError, match=r"shard-000001\.tar has no member of .* the shard was replaced"):
        reader.read(as_draw(source, *range(8, 16)))


def test_a_shard_cut_short_under_the_reader(image_folder: Path, tmp_path: Path) -> None:
    source = healthy(image_folder, tmp_path / "s")
    reader = Reader(source, Storage())
    reader.read(as_draw(source, 8))
    os.truncate(tmp_path / "s" / "shard-000001.tar", 3000)
    with pytest.raises(ValueError, match="3,000 bytes, its manifest says"):
        reader.read(as_draw(source, 15))


def test_a_missing_index(image_folder: Path, tmp_path: Path) -> None:
    """It is built anew, in the cache, as where a remote source lacks one."""
    source = healthy(image_folder, tmp_path / "s")
    whole = Reader(source, Storage()).read(as_draw(source, 0)).encoded[0]
    (tmp_path / "s" / "shard-000000.idx").unlink()
    reader = Reader(source, Storage(cache_dir=str(tmp_path / "cache")))
    assert np.array_equal(reader.read(as_draw(source, 0)).encoded[0], whole)
    assert len(list((tmp_path / "cache" / "indexes").iterdir())) == 1
    assert not (tmp_path / "s" / "shard-000000.idx").exists()


def test_the_index_cache_is_bounded(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.reading.reader.INDEX_CACHE_BYTES", 32 * 16)
    source = healthy(image_folder, tmp_path / "s")
    reader = Reader(source, Storage())
    for _ in range(3):
        assert len(reader.read(as_draw(source, *range(24))).encoded) == 24
        assert len(reader._places) == 2


def test_a_batch_that_is_held_keeps_its_bytes(image_folder: Path, tmp_path: Path) -> None:
    """Later batches are read into memory that earlier ones have used, but not while anybody holds an image of it."""
    source = healthy(image_folder, tmp_path / "s")
    reader = Reader(source, Storage())
    held = reader.read(as_draw(source, *range(8)))
    before = contents(held)
    for _ in range(10):
        reader.read(as_draw(source, *range(8, 16)))
    assert contents(held) == before


def test_slow_disks_are_read_by_threads(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = healthy(image_folder, tmp_path / "s")
    reader = Reader(source, Storage())

    def slow_read(*arguments: Any) -> None:
        time.sleep(0.01)
        read_at(*arguments)

    monkeypatch.setattr("pipeline.reading.reader.read_at", slow_read)
    expected = contents(reader.read(as_draw(source, *range(24))))
    started = time.perf_counter()
    assert contents(reader.read(as_draw(source, *range(24)))) == expected
    assert time.perf_counter() - started < 0.12  # one after the other: 0.24


def test_five_thousand_images_a_second(photos: list[Path], tmp_path: Path) -> None:
    """Read and screen alone, ImageNet's photographs, from the page cache: at most 0.2 ms of processor time for each.
    (Wall-clock time depends on what else the machine does; `python -m pipeline.loader --read_only` tells both.)"""
    files: list[tuple[str, bytes, int | None]] = [(p.stem + ".jpg", p.read_bytes(), None) for p in photos] * 2
    source = open_source(str(write_shards(tmp_path / "photos", files, 125)))
    order = make_order(source, 100, 0)
    reader = Reader(source, Storage())
    reader.read(order.draw(0, 0))
    rates = []
    for epoch in range(4):
        started = time.process_time()
        for step in range(order.steps_per_epoch):
            reader.read(order.draw(epoch, step))
        rates.append(order.steps_per_epoch * 100 / (time.process_time() - started))
    assert max(rates) > 5000, rates
