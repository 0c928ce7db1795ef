"""The judgement of benchmarks/bad_data.py: what counts as right, turned, wrong, lost, and whose doing an end is."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.bad_data_judge import compare, judge, of_file, row
from benchmarks.bad_data_systems import RECORD, SIDE
from benchmarks.bad_data_watch import Limits, Server

RNG = np.random.default_rng(0)


def picture() -> np.ndarray:
    small = RNG.integers(0, 255, (4, 4, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def test_pixels_may_differ_as_decoders_do_and_no_more() -> None:
    truth = picture()
    near = np.clip(truth + RNG.integers(-3, 4, truth.shape), 0, 255).astype(np.uint8)
    assert compare(near, truth) == "right"
    for turned in (np.rot90(near), near[::-1], near[:, ::-1], near.transpose(1, 0, 2)):
        assert compare(turned, truth) == "turned"
    cut = truth.copy()
    cut[56:] = 128  # the eighth of a truncated JPEG that a lenient decoder paints grey
    assert compare(cut, truth) == "wrong"
    assert compare(np.full_like(truth, 255), truth) == "wrong"


def test_a_file_is_lost_only_where_pillow_opens_it() -> None:
    truth = {0: picture(), 1: "OSError: image file is truncated"}
    assert of_file(0, truth, {}, said=[]) == "lost"
    assert of_file(0, truth, {}, said=[0]) == "lost, said"
    assert of_file(1, truth, {}, said=[]) == "left out"
    assert of_file(1, truth, {1: [picture()]}, said=[]) == "bad, delivered"
    assert of_file(0, truth, {0: [truth[0], np.zeros((SIDE, SIDE, 3), np.uint8)]}, said=[]) == "wrong"  # one of two


def test_an_end_is_the_doing_of_the_awkward_file_and_costs_the_good_ones_behind_it() -> None:
    pixels = {number: picture() for number in range(4)}
    truth = {**pixels, 2: "UnidentifiedImageError"}
    whole = judge([2], truth, {n: [pixels[n]] for n in (0, 1, 3)}, [], "")
    assert (whole.outcomes, whole.good_delivered, whole.good_wrong) == ({2: "left out"}, 3, 0)
    ended = judge([2], truth, {0: [pixels[0]]}, [], "signal 11")
    assert (ended.outcomes, ended.good_delivered) == ({2: "signal"}, 1)
    together = judge([2, 3], truth, {0: [pixels[0]], 3: [pixels[3]]}, [], "exception")
    assert together.outcomes == {2: "exception", 3: "right"}
    counts = row({"a": whole, "b": ended}, beside=3)
    assert (counts["crashes"], counts["signals"], counts["bad_left_out"], counts["good_lost"]) == (1, 1, 1, 2)
    assert counts["good_lost_at_most"] == 2


@pytest.mark.process
def test_a_job_is_stopped_that_takes_too_long_or_too_much_memory(tmp_path: Path) -> None:
    path, broken = tmp_path / "f00007.png", tmp_path / "f00008.png"
    Image.new("RGB", (8, 8), (200, 30, 30)).save(path)
    broken.write_bytes(b"no image")
    places = {place: str(tmp_path / place) for place in ("output", "log", "error")}
    server, usual = Server("pillow", sys.executable, tmp_path), Limits(60, 60, 1 << 30)
    try:
        assert server.run({**places, "paths": [str(path)]}, usual).how == ""
        (record,) = np.fromfile(tmp_path / "output", RECORD)
        assert record["number"] == 7 and record["pixels"].reshape(-1, 3).tolist() == [[200, 30, 30]] * SIDE**2
        ended = server.run({**places, "paths": [str(broken)]}, usual)
        assert ended.how == "exception" and "UnidentifiedImageError" in ended.message
        long = {**places, "paths": [str(path)] * 20_000}
        assert server.run(long, usual._replace(clock=0.05)).how == "hang"
        assert server.run(long, usual._replace(memory=1)).how == "memory"
        assert server.run({**places, "paths": [str(path)]}, usual).how == ""  # and the next one runs
    finally:
        server.close()
