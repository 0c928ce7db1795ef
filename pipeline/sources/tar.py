"""The members of a tar, from its headers alone: USTAR, GNU and PAX, in a file of any size.

Shards come from strangers, so every number is checked before it is believed: a size is a whole number that fits into
what is left of the file before anything is skipped or read by it, and headers that describe the next member are read
only up to `MOST_HEADER_BYTES`. Each step moves on by a block at least, so the time is bounded by the file's size.
"""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

BLOCK = 512
MOST_HEADER_BYTES = 16 << 20  # of a PAX header: extended attributes of a file can be megabytes
LONGEST_NAME = 4096  # bytes, as on Linux
COMPRESSED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ\x00")  # gzip, zstd, bzip2, xz
LACKS_END = "without a mark of the end (cut short there, or the writer left it out)"
PATH, SIZE, SPARSE, SPARSE_NAME = b"path", b"size", b"GNU.sparse.", b"GNU.sparse.name"  # keywords of PAX records


class Member(NamedTuple):
    """kind: "file", "folder", "link" (hard or symbolic, without data), "sparse" (a file with its holes left out, so
    that its bytes are not the file's) or "other". Offset and size in bytes, of the data as it lies in the tar."""

    name: str
    offset: int
    size: int
    kind: str


KINDS = {b"0": "file", b"\0": "file", b"7": "file", b"5": "folder", b"1": "link", b"2": "link", b"S": "sparse"}


def walk_tar(read: Callable[[int, int], bytes], begin: int, end: int, label: str) -> Iterator[Member]:
    """The members of the tar that lies from byte `begin` to byte `end` of what `read(offset, size)` reads.

    ValueError, which begins with `label` and names the member, for a tar that is compressed, cut short or damaged.
    """
    start = read(begin, min(BLOCK, end - begin))
    if start.startswith(COMPRESSED):
        raise ValueError(
            f"{label} is compressed, so single images in it cannot be reached (and images do not get smaller): "
            "unpack it once, e.g. `gunzip shard.tar.gz`"
        )
    position = begin
    described: dict[bytes, bytes] = {}  # what PAX and GNU headers say of the member that follows them
    problem = ""
    while position + BLOCK <= end:
        header = read(position, BLOCK)
        if header == bytes(BLOCK):
            return  # end of archive: what may follow is padding
        size = number(header[124:136])
        if number(header[148:156]) not in _checksums(header) or size < 0:
            raise ValueError(
                f"{label} is not a tar or is damaged: no valid header at byte {position - begin:,} of {end - begin:,}"
            )
        kind = header[156:157]
        data = position + BLOCK
        if kind in b"xXgLK":
            if data + size > end:
                raise ValueError(
                    f"{label} is cut short: a header reaches to byte {data - begin + size:,} of {end - begin:,}; "
                    "fetch or write it again"
                )
            try:
                if size > MOST_HEADER_BYTES:
                    raise ValueError(f"comes after a header of {size:,} bytes")
                described.update(_describing(kind, read(data, size)))
            except ValueError as error:  # raised when the member's name is known
                problem = problem or str(error)
            position = data + _padded(size)
            continue
        raw = described.get(SPARSE_NAME) or described.get(PATH) or _header_name(header)
        name = raw.decode("utf-8", "surrogateescape")
        if len(raw) > LONGEST_NAME:
            problem = problem or f"has a name of more than {LONGEST_NAME:,} bytes"
        if SIZE in described:
            digits = described[SIZE]
            if digits.isdigit() and len(digits) <= 18:
                size = int(digits)
            else:
                problem = problem or f"has the size {digits[:30].decode('ascii', 'replace')!r} in its PAX header"
        shown = _on_one_line(name)
        if problem:
            raise ValueError(f"{label} is damaged: member {shown} {problem}; fetch or write it again")
        if kind in b"123456":  # links, devices, folders: nothing follows the header whatever the size says
            size = 0
        kind_name = "sparse" if SPARSE in described else KINDS.get(kind, "other")
        if kind == b"S":  # GNU's map of the holes goes on in further blocks
            more = header[482]
            while more and data + BLOCK <= end:
                more = read(data, BLOCK)[504]
                data += BLOCK
        if data + size > end:
            raise ValueError(
                f"{label} is cut short: {shown} reaches to byte {data - begin + size:,} of {end - begin:,}; "
                "fetch or write it again"
            )
        yield Member(name, data, size, kind_name)
        described = {}
        position = data + _padded(size)
    if position > end or end == begin or any(read(position, end - position)):
        raise ValueError(f"{label} is cut short at byte {end - begin:,}; fetch or write it again")
    # No end-of-archive blocks: see `lacks_end`.


def lacks_end(reached: int, end: int) -> bool:
    """Whether the mark of a tar's end, a block of zeros, is missing after its last member, whose data reach to byte
    `reached`. Some writers leave it out; one that was killed does too, and cutting a tar between two members."""
    return end - reached < BLOCK


def _on_one_line(name: str) -> str:
    """For a message: no line breaks, no bytes that are not UTF-8, not without end."""
    text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in name[:200])
    return text if len(name) <= 200 else f"{text}..."


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _header_name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    # GNU's magic is "ustar " and its bytes 345 on mean other things.
    if header[257:263] == b"ustar\0" and header[345]:
        return header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name


def _checksums(header: bytes) -> tuple[int, int]:
    """The sum of the header's bytes with its own field as spaces; some old writers took the bytes as signed."""
    without = header[:148] + b" " * 8 + header[156:]
    total = sum(without)
    return total, total if without.isascii() else total - 256 * sum(byte > 127 for byte in without)


def number(field: bytes) -> int:
    """An octal number, or GNU's base 256 for sizes of 8 GiB and more; -1 when it is neither."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    digits = field.split(b"\0", 1)[0].strip()
    return int(digits or b"0", 8) if re.fullmatch(rb"[0-7]*", digits) else -1


def _describing(kind: bytes, block: bytes) -> dict[bytes, bytes]:
    """The facts in a header of this kind about the member that follows it; ValueError, to go on after its name."""
    if kind == b"L":
        return {PATH: block[: LONGEST_NAME + 1].split(b"\0", 1)[0]}
    records = _pax_records(block) if kind != b"K" else {}
    if kind == b"g" and records:
        raise ValueError("comes after a PAX header that gives all members one name or size")
    return records


def _pax_records(block: bytes) -> dict[bytes, bytes]:
    """Those that say what a member's name and size are and whether it is sparse. ValueError for what is no list of
    records."""
    records: dict[bytes, bytes] = {}
    position = 0
    while position < len(block) and block[position]:  # some writers fill up with zeros
        digits = block[position : position + 10].partition(b" ")[0]
        end = position + (int(digits) if digits.isdigit() else 0)
        keyword, equals, value = block[position + len(digits) + 1 : max(position, end - 1)].partition(b"=")
        if not equals or end > len(block) or block[end - 1] != ord("\n"):
            raise ValueError(f"comes after a PAX header that is damaged at its byte {position:,}")
        if keyword in (PATH, SIZE, SPARSE_NAME):
            records[keyword] = value[: LONGEST_NAME + 1]
        if keyword.startswith(SPARSE):
            records[SPARSE] = b""
        position = end
    return records
