"""Tars of strangers: numbers that lie, members that are no plain files, names without end. Each is one error that names
file and member, in bounded time, or is left out and said so."""

import io
import os
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.sources.check import Expected, check_shards
from pipeline.sources.index import format_index, index_tar, read_index
from pipeline.sources.opening import open_source
from pipeline.sources.storage import Storage
from pipeline.sources.tar import LONGEST_NAME, MOST_HEADER_BYTES, walk_tar


def picture(number: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), number * 7 % 256, np.uint8)).save(stream, "JPEG")
    return stream.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], pax: dict[str, str] | None = None, at: int = 0) -> Path:
    """A tar whose member number `at` has these PAX records."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT if pax else tarfile.USTAR_FORMAT) as tar:
        for number, (name, content) in enumerate(members):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if pax and number == at:
                info.pax_headers = pax
            tar.addfile(info, io.BytesIO(content))
    return path


def header(name: bytes, size: int, kind: bytes, **fields: bytes) -> bytes:
    """A block with a right checksum; fields: {"b482": bytes} puts these bytes at 482."""
    block = bytearray(512)
    block[: len(name)] = name
    block[124:135] = b"%011o" % size
    block[156:157] = kind
    block[257:265] = b"ustar  \0"
    for place, value in fields.items():
        block[int(place[1:]) : int(place[1:]) + len(value)] = value
    block[148:156] = b" " * 8
    block[148:155] = b"%06o\0" % sum(block)
    return bytes(block)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("size", ["-1536", "-2048", "-4096", "abc", "1e3", "", "12 ", "9" * 19, "0x10"])
def test_a_size_that_is_none(tmp_path: Path, size: str) -> None:
    """With a negative one, the walk came to the same header again for ever."""
    write_tar(tmp_path / "a.tar", [(f"{i:04d}.jpg", picture()) for i in range(16)], {"size": size}, at=8)
    with pytest.raises(ValueError, match=r"a\.tar is damaged: member 0008\.jpg has the size .* in its PAX header") as e:
        open_source(str(tmp_path))
    assert "\n" not in str(e.value)


@pytest.mark.timeout(20)
def test_a_size_beyond_the_file(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [(f"{i}.jpg", picture()) for i in range(4)], {"size": "9" * 18}, at=2)
    with pytest.raises(ValueError, match=r"a\.tar is cut short: 2\.jpg reaches to byte"):
        open_source(str(tmp_path))


def extended(kind: bytes, content: bytes) -> bytes:
    return header(b"x", len(content), kind) + padded(content)


def record(keyword: bytes, value: bytes) -> bytes:
    rest = b" " + keyword + b"=" + value + b"\n"
    length = len(rest) + 1
    while length != len(rest) + len(str(length)):
        length = len(rest) + len(str(length))
    return str(length).encode() + rest


MEMBER = header(b"a.jpg", 5, b"0") + padded(b"image")


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "content, said",
    [
        (extended(b"x", b"5 path=x\n") + MEMBER, "comes after a PAX header that is damaged at its byte 0"),
        (extended(b"x", record(b"path", b"b.jpg") + b"-3 size=1\n") + MEMBER, "damaged at its byte 14"),
        (extended(b"x", record(b"path", b"b.jpg") + b"0 size=1\n") + MEMBER, "damaged at its byte 14"),
        (extended(b"x", b"99999999999 path=x\n") + MEMBER, "damaged at its byte 0"),
        (extended(b"x", record(b"path", b"n" * (LONGEST_NAME + 1) + b".jpg")) + MEMBER, "a name of more than 4,096"),
        (extended(b"L", b"n" * 100_000 + b".jpg\0") + MEMBER, "a name of more than 4,096"),
        (extended(b"x", bytes(MOST_HEADER_BYTES + 1)) + MEMBER, "comes after a header of 16,777,217 bytes"),
        (extended(b"g", record(b"path", b"all.jpg")) + MEMBER, "gives all members one name"),
        (header(b"x", 1 << 32, b"x") + MEMBER, "cut short: a header reaches to byte"),
        (header(b"a.jpg", 5, b"0", b124=b"\xff" * 12) + padded(b"image"), "no valid header at byte 0"),
        (header(b"a.jpg", 5, b"0", b124=b"-0000000010\0") + padded(b"image"), "no valid header at byte 0"),
        (header(b"a.jpg", 5, b"0", b124=b"\x80" + b"\xff" * 11) + padded(b"image"), "cut short: a.jpg reaches"),
        (header(b"a.jpg", 0, b"S", b482=b"\1") + (bytes(504) + b"\1" + bytes(7)) * 3, "no images"),
    ],
)
def test_headers_that_lie(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "a.tar").write_bytes(content + bytes(1024))
    with pytest.raises(ValueError, match=said) as e:
        open_source(str(tmp_path))
    assert str(tmp_path / "a.tar") in str(e.value)


def test_harmless_oddities(tmp_path: Path) -> None:
    """Comments for all members, records filled up with zeros, signed checksums, GNU's long names, no end of archive."""
    signed = bytearray(header(b"\xe4.jpg", 5, b"0"))
    signed[148:155] = b"%06o\0" % (sum(signed[:148] + b" " * 8 + signed[156:]) - 256)
    long = b"d/" * 60 + b"b.jpg"
    content = extended(b"g", record(b"comment", b"of git")) + MEMBER + bytes(signed) + padded(b"image")
    content += extended(b"L", long + b"\0") + header(b"d", 5, b"0") + padded(b"image")
    content += extended(b"x", record(b"path", b"c.jpg") + record(b"mtime", b"-1.5") + bytes(9)) + MEMBER
    (tmp_path / "a.tar").write_bytes(content)
    samples = index_tar(tmp_path / "a.tar")
    assert [s[0].name.encode("utf-8", "surrogateescape") for s in samples] == [b"a.jpg", b"\xe4.jpg", long, b"c.jpg"]


def test_a_tar_inside_a_file() -> None:
    """A tar of tars is walked where it lies: offsets are the outer file's, nothing beyond its end is read."""
    content = b"?" * 100 + MEMBER + MEMBER + b"!" * 1000

    def read(offset: int, size: int) -> bytes:
        assert offset >= 100 and offset + size <= 100 + 2 * len(MEMBER)
        return content[offset : offset + size]

    members = list(walk_tar(read, 100, 100 + 2 * len(MEMBER), "inner"))
    assert [(m.name, m.offset, m.size, m.kind) for m in members] == [
        ("a.jpg", 612, 5, "file"),
        ("a.jpg", 1636, 5, "file"),
    ]
    with pytest.raises(ValueError, match="inner is cut short at byte 1,530"):
        list(walk_tar(lambda o, s: content[o : o + s], 100, 1630, "inner"))


@pytest.mark.process
@pytest.mark.parametrize("format", ["gnu", "pax0.0", "pax0.1", "pax1.0"])
def test_sparse_members_are_left_out_and_said_so(
    tmp_path: Path, format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`tar -S` stores a file with holes as its pieces: its bytes are no image. The others are used."""
    if "GNU" not in subprocess.run(["tar", "--version"], capture_output=True, text=True).stdout:
        pytest.skip("tar is not GNU tar")
    images = tmp_path / "images"
    images.mkdir()
    for i in range(3):
        (images / f"{i}.jpg").write_bytes(picture(i))
    with (images / "1.jpg").open("r+b") as file:  # an image and 30 pieces far behind it, more than one header holds
        for piece in range(1, 31):
            file.seek(piece << 17)
            file.write(b"piece")
    flags = ["--format=gnu"] if format == "gnu" else ["--format=posix", f"--sparse-version={format[3:]}"]
    (tmp_path / "shards").mkdir()
    command = ["tar", "-S", *flags, "-cf", str(tmp_path / "shards" / "a.tar"), "0.jpg", "1.jpg", "2.jpg"]
    subprocess.run(command, cwd=images, check=True)
    assert (tmp_path / "shards" / "a.tar").stat().st_size < 1 << 20
    kinds: Counter[str] = Counter()
    samples = index_tar(tmp_path / "shards" / "a.tar", kinds)
    assert [s[0].name for s in samples] == ["0.jpg", "2.jpg"] and kinds["sparse"] == 1
    assert open_source(str(tmp_path / "shards")).samples == 2
    said = capsys.readouterr().err
    assert "1 members" in said and "sparse" in said and "--sparse" in said


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_many_images_of_one_key_take_linear_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Dotted names: every image of a day has the key `2024`. 60,000 of them took minutes."""
    block = b"".join(header(b"2024.05-%06d.jpg" % i, 0, b"0") for i in range(60_000))
    (tmp_path / "a.tar").write_bytes(block + bytes(1024))
    assert open_source(str(tmp_path)).samples == 1
    said = capsys.readouterr().err
    assert "59,999 images" in said and "first dot" in said and "make_shards" in said and said.count("warning:") == 1


# --- the index --------------------------------------------------------------------------------------------------------


def test_the_last_part_of_an_extension_says_what_a_member_is() -> None:
    """`0001.image.jpg` and `0001.label.cls`; the plain `cls` before others, and of two others neither."""
    text = b"v1.2 4\n"
    text += b"image.jpg 512 5 0.image.jpg label.cls 1536 1 0.label.cls\n"
    text += b"jpg 512 5 1.jpg weak.cls 1536 1 1.weak.cls cls 2560 1 1.cls\n"
    text += b"jpg 512 5 2.jpg fine.cls 1536 1 2.fine.cls coarse.cls 2560 1 2.coarse.cls\n"
    text += b"jpg 512 5 3.jpg cls.txt 1536 1 3.cls.txt\n"
    index = read_index(text)
    assert index.label_offsets.tolist() == [1536, 2560, -1, -1]
    assert index.offsets.tolist() == [512] * 4
    long = b"v1.2 1\n" + b"x" * 100 + b".jpg 512 5 " + b"x" * 110 + b".jpg\n"
    assert len(read_index(long)) == 1


@pytest.mark.parametrize(
    "line, said",
    [
        (b"jpg -512 5 a.jpg", "not a number"),
        (b"jpg 512 -5 a.jpg", "not a number"),
        (b"jpg 18446744073709551615 5 a.jpg", "not a number of 1 to 18 digits"),
        (b"jpg 512 9223372036854775807 a.jpg", "not a number of 1 to 18 digits"),
        (b"jpg 999999999999999999 999999999999999999 a.jpg", "reaches to byte 1,999,999,999,999,999,998 of a tar of"),
        (b"jpg 512  a.jpg", "not a number"),
        (b"jpg 0 5 a.jpg", "data at byte 0, inside the first header"),
        (b"jpg 9999 5 a.jpg", "reaches to byte 10,004 of a tar of 2,048"),
    ],
)
def test_an_index_with_impossible_places(tmp_path: Path, line: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said) as e:
        read_index(b"v1.2 1\n" + line + b"\n", samples=1, size=2048, label="d/a.idx")
    assert str(e.value).startswith("d/a.idx ") and "delete" in str(e.value) and "\n" not in str(e.value)


def test_an_index_that_counts_beyond_all_numbers() -> None:
    for count in (b"9" * 5000, b"-1", b"1.5"):
        with pytest.raises(ValueError, match=r"d/a.idx .*delete it"):
            read_index(b"v1.2 " + count + b"\njpg 512 5 a.jpg\n", label="d/a.idx")


def test_an_index_of_long_extensions_takes_bounded_memory() -> None:
    import tracemalloc

    line = b"x" * 80 + b".jpg 512 1 a.jpg\n"
    text = b"v1.2 200000\n" + line * 200_000
    tracemalloc.start()
    assert len(read_index(text)) == 200_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * len(text), peak  # 14 times with all components at once


def test_white_space_and_zeros_in_names(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a b\n.jpg", b"x")], {"path": "n\nul.j pg.jpg"})
    text = format_index(index_tar(tmp_path / "a.tar"))
    assert len(read_index(text, samples=1)) == 1
    assert os.fsencode("n%0Aul.j%20pg.jpg") in text


def test_a_tar_without_an_end_is_told_and_is_a_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cut between two members, a tar looks whole but for the mark of its end."""
    for i in range(4):
        tar = write_tar(tmp_path / f"{i}.tar", [(f"{n}.jpg", picture(n)) for n in range(8)])
        if i > 1:
            member = 512 + -(-len(picture()) // 512) * 512
            tar.write_bytes(tar.read_bytes()[: 5 * member])
    source = open_source(str(tmp_path), progress=False)
    assert source.samples == 2 * 8 + 2 * 5
    told = capsys.readouterr().err
    assert "2 tars without a mark of the end" in told and "2.tar, 3.tar in " in told
    shards = [
        Expected(str(tmp_path / f"{i}.tar"), str(tmp_path / f"{i}.idx"), n, (tmp_path / f"{i}.tar").stat().st_size, "")
        for i, n in enumerate((8, 8, 5, 5))
    ]
    faults = list(check_shards(shards, Storage(), workers=1, progress=False))
    assert [fault.partition(" (")[0] for fault in faults] == [
        f"{tmp_path}/{i}.tar: a tar without a mark of the end" for i in (2, 3)
    ]
