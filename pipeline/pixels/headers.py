"""Sizes that a file announces where Pillow does not look before it asks for memory.

Each function takes the whole file and returns (width, height) in pixels. IndexError or struct.error when the file ends
too early: then its decoder says so too.
"""

import struct


def gif_size(data: memoryview) -> tuple[int, int]:
    """The logical screen, widened by the first frame: Pillow makes room for the frame while it opens the file."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    position = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    while data[position] != 0x3B:
        if data[position] == 0x2C:
            left, top, frame_width, frame_height = struct.unpack_from("<HHHH", data, position + 1)
            return max(width, left + frame_width), max(height, top + frame_height)
        if data[position] != 0x21:
            position += 1  # Pillow skips bytes that mean nothing
            continue
        position += 2
        while data[position]:
            position += 1 + data[position]
        position += 1
    return width, height


def webp_size(data: memoryview) -> tuple[int, int]:
    """The canvas; (0, 0) when the first chunk says none."""
    chunk = bytes(data[12:16])
    if chunk == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if chunk == b"VP8L" and data[20] == 0x2F:
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, ((bits >> 14) & 0x3FFF) + 1
    if chunk == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    return 0, 0


def jpeg2000_size(data: memoryview) -> tuple[int, int]:
    """The image in the codestream, which the header around it need not agree with; (0, 0) when there is none."""
    begin = _codestream(data)
    if begin is None:
        return 0, 0
    right, bottom, left, top = struct.unpack_from(">4I", data, begin + 8)
    return right - left, bottom - top


def jpeg2000_bands(data: memoryview) -> tuple[int, int]:
    """Components of the codestream, and how many of them are alpha or the black of CMYK; (0, 0) when there is none. The
    fourth of a bare codestream, which says nothing of it, is alpha, as for every reader."""
    begin = _codestream(data)
    if begin is None:
        return 0, 0
    (components,) = struct.unpack_from(">H", data, begin + 40)
    if begin == 0:
        return components, int(components == 4)
    header, others = bytes(data[:begin]), 0
    if (at := header.find(b"cdef")) >= 0:  # of each channel its number, type (1 and 2 are opacity) and association
        (count,) = struct.unpack_from(">H", header, at + 4)
        kinds = [struct.unpack_from(">H", header, at + 8 + 6 * i)[0] for i in range(min(count, 5))]
        others += 1 in kinds or 2 in kinds
    if (at := header.find(b"colr\x01")) >= 0:
        others += header[at + 7 : at + 11] == b"\0\0\0\x0c"  # the enumerated colour space CMYK
    return components, others


def _codestream(data: memoryview) -> int | None:
    """Where it begins; None when there is none."""
    position = 0
    while data[position : position + 4] != b"\xff\x4f\xff\x51":
        length, kind = struct.unpack_from(">I4s", data, position)
        header = 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, position + 8)
            header = 16
        if kind == b"jp2c":
            return position + header
        if length < header:
            return None
        position += length
    return position
