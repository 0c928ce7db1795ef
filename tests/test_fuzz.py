"""Hostile files: valid ones mutated, through every reader of what strangers wrote, bounded in time and memory.

Each reader runs in a process of its own that may take `MEMORY` more than it has at the start, and `SECONDS` of
processor time an input. It either refuses with the exception that it documents, on one line that names the file, or
returns something that its caller can rely on. By hand, with other seeds and longer:

    python tests/test_fuzz.py --seconds 600 --seed 7         # each reader in turn
    python tests/test_fuzz.py tar card --inputs 100000
"""

import argparse
import io
import json
import math
import re
import resource
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
MEMORY = 192 << 20  # bytes; pictures of a million pixels take 3 MB, but decoders keep several copies
SECONDS = 2.0
MAX_PIXELS = 1 << 20
NUMBERS = [0, 1, 2, 7, 8, 127, 255, 511, 512, 65_535, 100_000, (1 << 24) - 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]
TEXTS = [b"-1", b"0", b"", b"1e9", b"0x10", b"9" * 18, b"9" * 19, b"9" * 5000, b"nan", b"\xff\xfe", b"\0", b" ", b"\n"]


class Reader(NamedTuple):
    """valid: files that must be accepted. read: takes one, checks what comes of it, or raises one of `documented`."""

    valid: list[bytes]
    mutate: Callable[[np.random.Generator, bytearray], bytes]
    read: Callable[[bytes], None]
    documented: tuple[type[Exception], ...]
    named: str  # must be in every message; "" where the caller names the file


# --- mutations --------------------------------------------------------------------------------------------------------


def mutate_bytes(rng: np.random.Generator, data: bytearray, *, within: int = 1 << 30) -> bytearray:
    """A number, some bytes, or a whole piece of the first `within` bytes is replaced, repeated, moved or left out."""
    for _ in range(int(rng.integers(1, 4))):
        end = max(1, min(len(data), within))
        at, length = int(rng.integers(0, end)), int(rng.integers(1, 33))
        match int(rng.integers(0, 8)):
            case 0 | 1 | 2:
                form = str(rng.choice(["<I", ">I", "<H", ">H", "B"]))
                size = struct.calcsize(form)
                number = NUMBERS[rng.integers(len(NUMBERS))] & (1 << 8 * size) - 1
                data[at : at + size] = struct.pack(form, number)
            case 3:
                data[at : at + 1] = bytes([int(rng.integers(256))])
            case 4:
                data[at : at + 1] = bytes([(data[at] if at < len(data) else 0) ^ 1 << int(rng.integers(8))])
            case 5:
                del data[at : at + length]
            case 6:
                data[at:at] = data[at : at + length] * int(rng.integers(1, 4))
            case 7:
                del data[int(rng.integers(0, len(data) + 1)) :]
    return data


def mutate_text(rng: np.random.Generator, data: bytearray) -> bytes:
    """Mostly a whole number or word becomes another."""
    for _ in range(int(rng.integers(1, 3))):
        words = list(re.finditer(rb"[\w.-]+", data))
        if not words or rng.random() < 0.3:
            mutate_bytes(rng, data)
            continue
        word = words[rng.integers(len(words))]
        other = words[rng.integers(len(words))]
        data[word.start() : word.end()] = TEXTS[rng.integers(len(TEXTS))] if rng.random() < 0.7 else other[0]
    return bytes(data)


def mutate_image(rng: np.random.Generator, data: bytearray) -> bytes:
    is_png = data[:4] == b"\x89PNG"
    mutate_bytes(rng, data, within=400 if rng.random() < 0.8 else 1 << 30)
    if is_png and rng.random() < 0.8:  # with right checksums it gets further
        at = 8
        while at + 12 <= len(data):
            end = at + 8 + struct.unpack_from(">I", data, at)[0]
            if end + 4 > len(data):
                break
            struct.pack_into(">I", data, end, zlib.crc32(data[at + 4 : end]))
            at = end + 4
    return bytes(data)


FIELDS = {"name": (0, 100), "size": (124, 136), "kind": (156, 157), "magic": (257, 265), "prefix": (345, 500)}
KINDS = [b"0", b"\0", b"1", b"2", b"5", b"7", b"S", b"x", b"g", b"L", b"K", b"X", b"?"]


def mutate_tar(rng: np.random.Generator, data: bytearray) -> bytes:
    """A field of a header, a PAX record, or any bytes; then most headers get right checksums again."""
    headers = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
    for _ in range(int(rng.integers(1, 4))):
        at = headers[rng.integers(len(headers))] if headers else 0
        choice = rng.random()
        if choice < 0.5 and headers:
            name = str(rng.choice(list(FIELDS)))
            begin, end = (at + place for place in FIELDS[name])
            if name == "kind":
                data[begin:end] = KINDS[rng.integers(len(KINDS))]
            elif name == "size" and rng.random() < 0.7:
                number = NUMBERS[rng.integers(len(NUMBERS))]
                octal, binary = b"%011o\0" % number, b"\x80" + number.to_bytes(11, "big")
                data[begin:end] = octal if rng.random() < 0.7 else binary
            else:
                text = TEXTS[rng.integers(len(TEXTS))] if rng.random() < 0.5 else rng.bytes(end - begin)
                data[begin:end] = text[: end - begin].ljust(end - begin, b"\0")
        elif choice < 0.8 and (records := list(re.finditer(rb"(\d+) ([\w.]+)=([^\n]*)\n", data))):
            record = records[rng.integers(len(records))]
            part = int(rng.integers(1, 4))
            data[record.start(part) : record.end(part)] = TEXTS[rng.integers(len(TEXTS))][: len(record[part])].ljust(
                len(record[part]), b"0"
            )
        elif choice < 0.9:
            mutate_bytes(rng, data)
        else:
            block = int(rng.integers(0, len(data) // 512 + 1)) * 512
            data[block:block] = data[at : at + 512 * int(rng.integers(1, 4))]
    for at in headers:
        if rng.random() < 0.9 and at + 512 <= len(data):
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 155] = b"%06o\0" % sum(data[at : at + 512])
    return bytes(data)


# --- readers ----------------------------------------------------------------------------------------------------------


def image_reader() -> Reader:
    from awkward_images import known_images, not_images

    from pipeline.pixels.decode import BadImage, decode, picture
    from pipeline.pixels.screen import inspect, verify

    def read(content: bytes) -> None:
        encoded = np.frombuffer(content, np.uint8)
        refused: dict[str, BadImage] = {}
        sizes = {}
        for name, look in (
            ("inspect", lambda: inspect(encoded, MAX_PIXELS)),
            ("decode", lambda: decode(encoded, MAX_PIXELS).shape[:2]),
            ("verify", lambda: verify(encoded, MAX_PIXELS)),
            ("picture", lambda: picture(encoded, MAX_PIXELS, least_side=16).size),
        ):
            try:
                sizes[name] = look()
            except BadImage as error:
                refused[name] = error
        if "decode" in refused:
            raise refused["decode"]
        height, width = sizes["decode"]
        assert 0 < height * width <= MAX_PIXELS
        assert sizes.get("inspect") in (None, (height, width))
        assert "verify" not in refused, refused["verify"]

    valid = [content for content, _ in known_images().values()]
    assert all(not_images().values())
    return Reader(valid, mutate_image, read, (BadImage,), "")


def make_tars() -> list[bytes]:
    """Small ones in the three formats, with long names, sidecars, links, sparse members and PAX records."""
    tars = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
            for number in range(3):
                for extension in ("jpg", "cls", "seg.png"):
                    info = tarfile.TarInfo(f"folder/{number:04d}.{extension}")
                    content = f"{extension} {number}".encode() * (number * 200 + 1)
                    info.size = len(content)
                    if form == tarfile.PAX_FORMAT and number:
                        info.pax_headers = {"path": info.name, "size": str(info.size), "SCHILY.xattr.user.a": "b" * 9}
                    tar.addfile(info, io.BytesIO(content))
            if form != tarfile.USTAR_FORMAT:
                tar.addfile(tarfile.TarInfo("n" * 300 + ".png"))
            link = tarfile.TarInfo("link.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "folder/0000.jpg"
            tar.addfile(link)
            if form == tarfile.PAX_FORMAT:
                sparse = tarfile.TarInfo("GNUSparseFile.0/hole.jpg")
                sparse.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "hole.jpg"}
                tar.addfile(sparse)
        tars.append(stream.getvalue()[: stream.tell()].rstrip(b"\0") + bytes(2048))
        tars[-1] = tars[-1][: len(tars[-1]) // 512 * 512]
    return tars


def tar_reader() -> Reader:
    from pipeline.sources.index import format_index, index_tar, read_index

    def read(content: bytes) -> None:
        samples = index_tar(np.frombuffer(content, np.uint8))
        assert all(0 < c.offset <= c.offset + c.size <= len(content) for sample in samples for c in sample)
        index = read_index(format_index(samples), samples=len(samples), size=len(content))
        assert ((index.offsets + index.sizes) <= len(content)).all()

    return Reader(make_tars(), mutate_tar, read, (ValueError,), "the tar")


def index_reader() -> Reader:
    from pipeline.sources.index import format_index, index_tar, read_index, sample_key

    tars = [np.frombuffer(tar, np.uint8) for tar in make_tars()]
    size = max(len(tar) for tar in tars)

    def read(content: bytes) -> None:
        index = read_index(content, size=size, label="a.idx")
        has_label = index.label_offsets >= 0
        assert (index.offsets >= 512).all() and (index.sizes >= 0).all() and (index.label_sizes[has_label] >= 0).all()
        assert (index.offsets + index.sizes <= size).all() and (index.label_offsets + index.label_sizes <= size).all()
        for row in {0, len(index) - 1} if len(index) else ():
            assert isinstance(sample_key(content, row), str)

    return Reader([format_index(index_tar(tar)) for tar in tars], mutate_text, read, (ValueError,), "a.idx")


def manifest_reader() -> Reader:
    from pipeline.sources.manifest import parse_manifest

    def read(content: bytes) -> None:
        manifest = parse_manifest(content, "data/manifest.json")
        assert manifest.samples > 0 and len(manifest.fingerprint) == 32
        for number, shard in enumerate(manifest.shards):
            assert ".." not in shard.path.split("/")
            assert manifest.shard_url(number) == f"{manifest.root.rstrip('/')}/{shard.path}"
            assert manifest.index_url(number).startswith("data/")

    shards = [
        {"path": f"s-{i:06d}.tar", "samples": 9 + i, "bytes": 2048 * (i + 1), "checksum": f"xxh3_64:{i:016x}"}
        for i in range(4)
    ]
    head = {"format": 1, "samples": 42, "classes": ["a", "b c"], "shards": shards}
    nested = {"format": 1, "shards": [{**shards[0], "more": [[[{}]]] * 3}]}
    valid = [json.dumps(each).encode() for each in (head, head | {"root": "s3://bucket/a"}, nested)]

    def mutate(rng: np.random.Generator, data: bytearray) -> bytes:
        if rng.random() < 0.02:
            return bytes(data).replace(b"[", b"[" * 100_000, 1)
        if rng.random() < 0.1:
            path = str(rng.choice(["../a.tar", "/etc/a.tar", "a/../../b.tar", "s3://x/a.tar", "file:///a.tar"]))
            return bytes(data).replace(b"s-000000.tar", path.encode())
        return mutate_text(rng, data)

    return Reader(valid, mutate, read, (ValueError,), "data/manifest.json")


CARDS = [
    b"sources:\n  - {data: in1m/train, weight: 1, name: in1m}\n  - {data: web, weight: 3.5, name: web}\nlanes: 8\n",
    b'sources:\n- data: "s3://bucket/{00000..00999}.tar"\n- data: b/*.tar\n  name: b\nchunk_shards: all\n',
    b"sources: [{data: a}]\nchunk_shards: 4\n",
]
YAML_OF_STRANGERS = [
    b"&a [x, x, x, x, x, x, x, x]",
    b"!!python/object/apply:os.system [id]",
    b"2020-13-45",
    b"!!binary x",
    b"{? [a] : b}",
    b"*a",
    b"{<<: [1]}",
    b"1:99:99",
    b".inf",
    b"~",
    b"[[[]]]",
]


def laughs(depth: int) -> bytes:
    """Aliases of aliases: small as text and as objects, endless when written out."""
    lines = [b"sources:", b"- data: a", b"  name:", b"  - &l0 [ha, ha, ha, ha, ha, ha, ha, ha]"]
    lines += [b"  - &l%d [%s]" % (i, b", ".join([b"*l%d" % (i - 1)] * 8)) for i in range(1, depth)]
    return b"\n".join(lines) + b"\n"


def card_reader() -> Reader:
    from pipeline.sources.card import read_card

    folder = tempfile.TemporaryDirectory(prefix="fuzz-")  # removed when the process ends

    def read(content: bytes) -> None:
        place = Path(folder.name) / "card.yaml"
        place.write_bytes(content)
        try:
            card = read_card(place)
        finally:
            place.unlink()
        assert card.sources and all(entry.data and entry.name for entry in card.sources)
        assert all(entry.weight is None or 0 < entry.weight < float("inf") for entry in card.sources)

    def mutate(rng: np.random.Generator, data: bytearray) -> bytes:
        choice = rng.random()
        if choice < 0.02:
            return laughs(int(rng.integers(2, 12)))
        if choice < 0.03:
            return bytes(data).replace(b": ", b": " + b"[" * 3000, 1)
        if choice < 0.3:
            values = list(re.finditer(rb"(?<=: )[^,}\n]+", data))
            value = values[rng.integers(len(values))]
            data[value.start() : value.end()] = YAML_OF_STRANGERS[rng.integers(len(YAML_OF_STRANGERS))]
            return bytes(data)
        return mutate_text(rng, data)

    return Reader(CARDS, mutate, read, (ValueError,), "card.yaml")


READERS: dict[str, Callable[[], Reader]] = {
    "image": image_reader,
    "tar": tar_reader,
    "index": index_reader,
    "manifest": manifest_reader,
    "card": card_reader,
}


# --- the trial --------------------------------------------------------------------------------------------------------


class TooSlow(BaseException):
    """Not an Exception, which a reader may turn into a refusal."""


def fuzz(name: str, *, seed: int, inputs: int, seconds: float = math.inf) -> Iterator[str]:
    """Tries mutated files until there were so many or so much processor time has passed. Yields each fault, then one
    line with the counts."""

    def interrupt(*_: object) -> None:
        raise TooSlow(f"more than {SECONDS} s")

    reader, rng, counts = READERS[name](), np.random.default_rng(seed), {"accepted": 0, "refused": 0}
    for content in reader.valid:  # imports everything, and is the control: without a mutation nothing is refused
        reader.read(content)
    status = Path("/proc/self/status").read_text()
    size = int(re.search(r"VmSize:\s*(\d+)", status)[1]) << 10  # type: ignore[index]
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    signal.signal(signal.SIGPROF, interrupt)
    began, slowest, number = time.process_time(), 0.0, 0
    while number < inputs and time.process_time() - began < seconds:
        content = reader.mutate(rng, bytearray(reader.valid[number % len(reader.valid)]))
        started, problem = time.process_time(), ""
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            reader.read(content)
            counts["accepted"] += 1
        except reader.documented as error:
            counts["refused"] += 1
            if reader.named not in str(error):
                problem = f"does not name the file: {error}"
            elif "\n" in str(error) or len(str(error)) > 4000:
                problem = f"is no line: {str(error)[:300]!r}"
        except (Exception, TooSlow) as error:
            problem = f"{type(error).__name__}: {str(error)[:300]}"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        slowest = max(slowest, time.process_time() - started)
        if problem:
            yield f"{name}: input {number} of seed {seed} {problem}; it begins {content[:200]!r}"
        number += 1
    yield (
        f"{name}: {number} inputs, {counts['accepted']} accepted, {counts['refused']} refused, "
        f"{time.process_time() - began:.1f} s, slowest {slowest:.3f} s"
    )


@pytest.mark.process
@pytest.mark.parametrize(
    ("name", "inputs"), [("image", 2500), ("tar", 2500), ("index", 3000), ("manifest", 8000), ("card", 1000)]
)
def test_hostile_files(name: str, inputs: int) -> None:
    command = [sys.executable, __file__, name, "--inputs", str(inputs)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    *faults, summary = result.stdout.splitlines()
    assert faults == []
    accepted, refused = (int(re.search(rf"(\d+) {kind}", summary)[1]) for kind in ("accepted", "refused"))  # type: ignore[index]
    # A mutation that nothing survives, or that nothing sees, tries little.
    assert accepted + refused == inputs and min(accepted, refused) > inputs // 50


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", metavar="READER", help=f"some of {' '.join(READERS)}; default: all")
    parser.add_argument("--seconds", type=float, default=math.inf, help="processor time for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inputs", type=int, help="files for each reader; default: 2000, without end with --seconds")
    options = parser.parse_args()
    if len(options.readers) != 1:
        flags = [flag for flag in sys.argv[1:] if flag not in options.readers]
        return max(
            subprocess.run([sys.executable, __file__, reader, *flags]).returncode
            for reader in options.readers or READERS
        )
    inputs = options.inputs or (2000 if options.seconds == math.inf else sys.maxsize)
    lines = fuzz(options.readers[0], seed=options.seed, inputs=inputs, seconds=options.seconds)
    faults = -1  # the last line is no fault
    for line in lines:
        print(line, flush=True)
        faults += 1
    return 1 if faults else 0


if __name__ == "__main__":
    sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests" / "pixels")]
    sys.exit(main())
