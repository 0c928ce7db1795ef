"""Troublesome files among good ones, end to end: the run ends, each bad file is noted once, the pixels are right."""

import csv
import io
import json
import os
import subprocess
import sys
import warnings
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command
from PIL import Image, ImageOps
from sample_shards import write_shards

import pipeline.pixels.screen
import pipeline.reading.reader
from pipeline.labelled import eval_batches
from pipeline.loader import Loader
from pipeline.reading.order import draw_of_ids, make_order
from pipeline.reading.reader import Reader
from pipeline.sources.manifest import Source
from pipeline.sources.opening import open_source
from pipeline.sources.storage import Storage

ROOT = Path(__file__).resolve().parent.parent.parent
Files = list[tuple[str, bytes, int | None]]


def bad_names(troublesome: list[Path]) -> set[str]:
    """Those that Pillow refuses, by the table that came with them."""
    with (troublesome[0].parent.parent / "MANIFEST.tsv").open() as table:
        rows = list(csv.DictReader(table, delimiter="\t"))
    return {row["file"].rpartition("/")[2] for row in rows if row["Pillow open+convert('RGB')"] != "ok"}


def mixed(troublesome: list[Path], good: list[Path]) -> tuple[Files, set[int]]:
    """Nine good files after each troublesome one, and the rows of the bad ones."""
    files: Files = []
    bad = set()
    names = bad_names(troublesome)
    for i, path in enumerate(troublesome):
        if path.name in names:
            bad.add(len(files))
        files.append((f"{path.stem}.jpg", path.read_bytes(), None))
        for j in range(9):
            photo = good[(9 * i + j) % len(good)]
            files.append((f"good.{photo.suffix[1:].lower()}", photo.read_bytes(), None))
    return files, bad


def quarantined(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_one_in_ten_troublesome(troublesome: list[Path], image_folder: Path, tmp_path: Path) -> None:
    """An epoch on two ranks, then a restart and an epoch on one."""
    files, bad = mixed(troublesome, sorted(image_folder.rglob("*.jpg")))
    assert len(files) == 820 and len(bad) == 13
    source = open_source(str(write_shards(tmp_path / "shards", files, 100)))
    log = tmp_path / "run" / "quarantine.jsonl"
    options: dict[str, Any] = {"batch_size": 40, "image_size": 32, "num_threads": 1, "quarantine": log}
    used: list[int] = []
    ranks = [Loader(source, rank=rank, world_size=2, max_bad_fraction=0.1, **options) for rank in range(2)]
    for _ in range(20):
        for loader in ranks:
            batch = next(loader)
            assert torch.isfinite(batch.query).all() and len(batch.query) == 20
            used += batch.sample_ids.tolist()
    state = ranks[0].state_dict()
    for loader in ranks:
        loader.close()
    single = Loader(source, max_bad_fraction=0.1, **options)
    single.load_state_dict(state)
    order = make_order(source, 40, 0)
    for step in range(20):
        batch = next(single)
        used += batch.sample_ids.tolist()
        drawn = order.draw(1, step).sample_ids
        replaced = np.isin(drawn, list(bad))
        assert np.array_equal(batch.sample_ids.numpy()[~replaced], drawn[~replaced])
        for before, after in zip(drawn[replaced], batch.sample_ids.numpy()[replaced]):
            # The next good row of its shard of 100, round to the first.
            rows = [(before % 100 + k) % 100 + before // 100 * 100 for k in range(1, 100)]
            assert after == next(row for row in rows if row < 820 and row not in bad)
    single.close()
    assert not bad & set(used)
    lines = quarantined(log)
    assert sorted(line["sample_id"] for line in lines) == sorted(bad)  # each once
    assert all(line["reason"] and line["key"] and line["shard"].endswith(".tar") for line in lines)


def test_max_bad_fraction_ends_the_run(
    troublesome: list[Path], image_folder: Path, run_command: Command, tmp_path: Path
) -> None:
    files, _ = mixed(troublesome, sorted(image_folder.rglob("*.jpg")))
    data = write_shards(tmp_path / "shards", files, 100)
    flags = ["--data", data, "--batch_size", "40", "--image_size", "32", "--max_bad_fraction", "0.005"]
    flags += ["--quarantine", tmp_path / "q.jsonl", "--num_threads", "1"]
    result = run_command("pipeline.loader", *flags)
    assert result.returncode == 2, result.stderr
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: 5 of ") and "more than max_bad_fraction 0.005 allows" in error
    assert 5 <= len(quarantined(tmp_path / "q.jsonl")) <= 6


@pytest.mark.slow
def test_pixels_of_troublesome_files_are_pillow_s(troublesome: list[Path], image_folder: Path, tmp_path: Path) -> None:
    """Through the whole pipeline: the views of lossless copies that Pillow made, within 2/255 on the average."""
    names = bad_names(troublesome)
    files, copies = [], []
    for path in troublesome:
        if path.name in names:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = ImageOps.exif_transpose(Image.open(path))
        if image.mode.startswith("I;16"):  # `convert` makes white of all above 255
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        pixels = image.convert("RGB")
        copy = io.BytesIO()
        Image.fromarray(np.asarray(pixels)).save(copy, "PNG", compress_level=1)
        files.append((f"{path.stem}.jpg", path.read_bytes(), 0))
        copies.append((f"{path.stem}.png", copy.getvalue(), 0))

    def views(folder: str, files: Any) -> torch.Tensor:
        source = open_source(str(write_shards(tmp_path / folder, files, 100)))
        batches = eval_batches(source, image_size=96, resize=110, batch_size=16, num_threads=2, max_bad_fraction=0)
        return torch.cat([batch.images.clone() for batch in batches])

    difference = (views("files", files) - views("copies", copies)).abs().mean((1, 2, 3)) * 0.225 * 255
    assert difference.shape == (69,)
    worst = int(difference.argmax())
    assert float(difference[worst]) <= 2, files[worst][0]


def test_evaluation_leaves_bad_files_out_and_says_so(
    troublesome: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    small = [path for path in troublesome if path.stat().st_size < 60_000]
    source = open_source(str(write_shards(tmp_path / "s", [(p.stem + ".jpg", p.read_bytes(), 7) for p in small], 9)))
    batches = list(eval_batches(source, image_size=16, resize=18, batch_size=5, num_threads=1, max_bad_fraction=1))
    bad = {i for i, path in enumerate(small) if path.name in bad_names(troublesome)}
    ids = [i for batch in batches for i in batch.sample_ids.tolist()]
    assert ids == [i for i in range(len(small)) if i not in bad]
    assert all((batch.labels == 7).all() for batch in batches)
    assert f"{len(bad)} of {len(small)} samples left out" in capfd.readouterr().err


def broken_tables(content: bytes) -> bytes:
    """A JPEG whose markers are all in order, with Huffman tables that no decoder takes."""
    damaged = bytearray(content)
    at = damaged.index(b"\xff\xc4") + 5
    damaged[at : at + 4] = b"\xff\xff\xff\xff"
    return bytes(damaged)


def good_jpegs(image_folder: Path, count: int = 24) -> Files:
    return [(path.name, path.read_bytes(), None) for path in sorted(image_folder.rglob("*.jpg"))[:count]]


def without(batches: list[Any], kept: set[int]) -> list[tuple[int, bytes, bytes]]:
    rows = [row for b in batches for row in zip(b.sample_ids.tolist(), b.query, b.key)]
    return [(i, q.numpy().tobytes(), k.numpy().tobytes()) for i, q, k in rows if i in kept]


@pytest.mark.parametrize("prefetch", [1, 2, 4])
def test_what_only_the_decoder_notices_is_replaced_too(image_folder: Path, tmp_path: Path, prefetch: int) -> None:
    """Screening cannot see into Huffman tables: DALI raises, and the run goes on, nothing lost, nothing twice."""
    files = good_jpegs(image_folder)
    healthy = open_source(str(write_shards(tmp_path / "healthy", files, 8)))
    sick_rows = {3, 4, 11, 20}
    sick_files: Files = [
        (name, broken_tables(content) if i in sick_rows else content, None)
        for i, (name, content, _) in enumerate(files)
    ]
    assert pipeline.pixels.screen.inspect(np.frombuffer(sick_files[3][1], np.uint8)) is not None
    sick = open_source(str(write_shards(tmp_path / "sick", sick_files, 8)))
    options: dict[str, Any] = {"batch_size": 4, "image_size": 32, "num_threads": 1, "prefetch": prefetch}

    def run(source: Source, **more: Any) -> list[Any]:
        loader = Loader(source, **options, **more)
        batches = [type(b)(*(t.clone() for t in b)) for b in islice(loader, 18)]  # three epochs
        loader.close()
        return batches

    log = tmp_path / "q.jsonl"
    expected, found = run(healthy), run(sick, quarantine=log, max_bad_fraction=1)
    replacement = {3: 5, 4: 5, 11: 12, 20: 21}
    wanted = [[replacement.get(i, i) for i in batch.sample_ids.tolist()] for batch in expected]
    assert [batch.sample_ids.tolist() for batch in found] == wanted
    untouched = set(range(24)) - sick_rows - set(replacement.values())
    for (i, *left), (j, *right) in zip(without(expected, untouched), without(found, untouched)):
        assert i == j
        for a, b in zip(left, right):  # decoded by DALI or by Pillow: the same libjpeg, or nearly
            assert np.abs(np.frombuffer(a, np.float32) - np.frombuffer(b, np.float32)).mean() * 0.225 * 255 < 1
    assert sorted(line["sample_id"] for line in quarantined(log)) == sorted(sick_rows)


def test_the_replacement_is_decoded_too(image_folder: Path, tmp_path: Path) -> None:
    """When a batch has failed already, headers are not believed: not of the sample that steps in, either."""
    files = [(n, broken_tables(c) if i in (3, 4) else c, None) for i, (n, c, _) in enumerate(good_jpegs(image_folder))]
    source = open_source(str(write_shards(tmp_path / "s", files, 8)))
    reader = Reader(source, Storage(), max_bad_fraction=1)
    samples = reader.read(draw_of_ids(source, np.array([2, 3])))
    assert samples.draw.sample_ids.tolist() == [2, 3]
    assert reader.decode_with_pillow(samples).draw.sample_ids.tolist() == [2, 5]
    assert set(reader.quarantine.reasons) == {3, 4}


def test_what_only_dali_refuses_is_kept(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that passes the screening and that DALI cannot decode but Pillow can: used, not quarantined."""
    files = good_jpegs(image_folder)
    gif = io.BytesIO()
    Image.open(io.BytesIO(files[5][1])).convert("P").save(gif, "GIF")
    files[5] = ("picture.gif", gif.getvalue(), None)
    source = open_source(str(write_shards(tmp_path / "s", files, 8)))
    inspect = pipeline.pixels.screen.inspect

    def credulous(encoded: np.ndarray, max_pixels: int) -> tuple[int, int] | None:
        if encoded[:3].tobytes() == b"GIF":
            width, height = np.frombuffer(encoded[6:10].tobytes(), "<u2").tolist()
            return height, width
        return inspect(encoded, max_pixels)

    monkeypatch.setattr(pipeline.reading.reader, "inspect", credulous)
    loader = Loader(source, batch_size=8, image_size=32, num_threads=1, quarantine=tmp_path / "q.jsonl")
    ids = [i for batch in islice(loader, 6) for i in batch.sample_ids.tolist()]
    loader.close()
    order = make_order(source, 8, 0)
    assert ids == [i for step in range(6) for i in order.draw(*divmod(step, 3)).sample_ids.tolist()]
    assert not (tmp_path / "q.jsonl").exists()


MEMORY = """
import sys
from pathlib import Path
from pipeline.loader import Loader
from pipeline.sources.opening import open_source
loader = Loader(open_source(sys.argv[1]), image_size=32, batch_size=20, num_threads=2, max_bad_fraction=1)
peaks = []
for epoch in range(3):
    for _ in range(loader.steps_per_epoch):
        next(loader)
    # Not ru_maxrss, which begins with the peak of the process that started this one.
    peaks.append(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024)
print(*peaks)
"""


@pytest.mark.slow
@pytest.mark.process
def test_memory_is_bounded(troublesome: list[Path], image_folder: Path, tmp_path: Path) -> None:
    """Bombs of 4 gigapixels cost nothing, and later epochs need no more than the first."""
    good = sorted(image_folder.rglob("*.jpg"))
    files: Files = [(p.stem + ".jpg", p.read_bytes(), None) for p in [*troublesome, *good[:18]]]
    data = write_shards(tmp_path / "s", files, 50)
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, str(data)], cwd=ROOT, capture_output=True, text=True, timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    first, _, third = map(int, result.stdout.split())
    assert third < first + 200 and third < 2500, result.stdout  # MB; importing torch and DALI takes most of it
