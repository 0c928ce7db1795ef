"""The bytes of listed images: files, ranges of archives, URLs; of remote ones, several at a time."""

import contextlib
import itertools
import os
import struct
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from pipeline.files import file_system, is_remote
from pipeline.packing.prepare import Rejected
from pipeline.packing.survey import ListedImage, Sidecar
from pipeline.sources import remote

TOGETHER = 32  # remote requests in flight
OPEN_ARCHIVES = 64
ZIP_HEADER = 30
LARGEST_MEMBER = 1 << 30  # bytes that a member of a zip may unpack to: there are zip bombs
ZIP_SLACK = 512  # for the name and more in a member's own header; a longer one takes a second read


class Part(NamedTuple):
    path: str
    offset: int  # -1: the whole file
    size: int


def parts_of(image: ListedImage) -> list[Part]:
    """The image, then what belongs to it. More than its size for a member of a zip, whose header comes first."""
    return [
        Part(each.path, each.offset, each.size + (ZIP_HEADER + ZIP_SLACK if each.packing is not None else 0))
        for each in (image, *(sidecar_alone(image, sidecar) for sidecar in image.sidecars or ()))
    ]


def sidecar_alone(image: ListedImage, sidecar: Sidecar) -> ListedImage:
    """A sidecar as something to fetch by itself."""
    path = f"{image.path.rpartition('/')[0]}/{sidecar.file}" if sidecar.file else image.path
    return ListedImage(
        path, sidecar.offset, sidecar.size, f"{image.name}'s {sidecar.extension}", packing=sidecar.packing
    )


def fetch(images: Iterable[ListedImage]) -> Iterator[list[bytes] | Rejected]:
    """For each image its bytes and those of its neighbours in the sample, or why there are none.

    FileNotFoundError for a file that was there when it was listed; OSError for a store that does not answer.
    """
    with contextlib.ExitStack() as stack:
        archives: OrderedDict[str, int] = OrderedDict()
        stack.callback(_close, archives)
        iterator = iter(images)
        while group := list(itertools.islice(iterator, TOGETHER)):
            parts = [parts_of(image) for image in group]
            away = [p for of_image in parts for p in of_image if is_remote(p.path)]
            answers = iter(_remote(away)) if away else iter(())
            for image, of_image in zip(group, parts):
                # All of them, before one can fail: the next image's answers would be taken for the rest of this one's.
                arrived = [next(answers) if is_remote(p.path) else p for p in of_image] if away else of_image
                try:
                    if image.size < 0 and not is_remote(image.path) and not os.path.isfile(image.path):  # noqa: PTH113
                        raise Rejected("no such file", image.path)
                    contents = [_local(a, archives) if isinstance(a, Part) else _checked(a) for a in arrived]
                    if image.offset >= 0:
                        _check_sizes(of_image, contents, image)
                    if image.packing is not None:
                        members = (image, *(sidecar_alone(image, sidecar) for sidecar in image.sidecars or ()))
                        contents = [_unzip(blob, each, archives) for blob, each in zip(contents, members)]
                    yield contents
                except (FileNotFoundError, IsADirectoryError) as error:
                    if image.size < 0:
                        yield Rejected("no such file", image.path)
                        continue
                    raise FileNotFoundError(
                        f"{error.filename or image.path} has vanished since it was listed: put it back and run the "
                        "same command again, or begin anew without it by --overwrite"
                    ) from None
                except PermissionError as error:
                    yield Rejected("permission denied", str(error))
                except Rejected as why:
                    yield why


def _check_sizes(parts: list[Part], contents: list[bytes], image: ListedImage) -> None:
    """Of a zip's member more was asked for than there may be."""
    for part, content in zip(parts, contents):
        least = 0 if image.packing is not None else part.size
        if not least <= len(content) <= part.size:
            raise ValueError(
                f"{part.path}: {len(content):,} bytes where {part.size:,} at {part.offset:,} were asked for: it "
                "changed since it was listed, or its server cannot send parts of files"
            )


def _close(archives: "OrderedDict[str, int]") -> None:
    for descriptor in archives.values():
        os.close(descriptor)


def _local(part: Part, archives: "OrderedDict[str, int]") -> bytes:
    if part.offset < 0:
        with open(part.path, "rb", buffering=0) as file:  # noqa: PTH123 (a Path would cost as much as the read)
            return file.read()
    descriptor = archives.pop(part.path, -1)
    if descriptor < 0:
        descriptor = os.open(part.path, os.O_RDONLY | os.O_CLOEXEC)
        if len(archives) >= OPEN_ARCHIVES:
            os.close(archives.popitem(last=False)[1])
    archives[part.path] = descriptor  # the youngest
    return os.pread(descriptor, part.size, part.offset)


def _checked(content: bytes | BaseException) -> bytes:
    if isinstance(status := getattr(content, "status", None), int) and remote.is_final(content):
        raise Rejected("refused by its server", f"{status} {getattr(content, 'message', '')}")
    if isinstance(content, BaseException):
        if not isinstance(content, OSError) and remote.is_final(content):
            raise ValueError(f"{remote.reason(content)}: check the address and your credentials")
        raise content
    return content


def _remote(parts: list[Part]) -> list[bytes | BaseException]:
    """All parts at once; what failed otherwise than by not being there is asked for again."""
    contents: list[bytes | BaseException] = [OSError("not read yet")] * len(parts)
    waiting = list(range(len(parts)))
    for is_last in remote.tries(parts[0].path):
        for _, members in itertools.groupby(waiting, key=lambda i: parts[i].path.partition("://")[0]):
            numbers = list(members)
            fs, _ = file_system(parts[numbers[0]].path)
            paths = [fs._strip_protocol(parts[i].path) for i in numbers]
            begins = [None if parts[i].offset < 0 else parts[i].offset for i in numbers]
            ends = [None if parts[i].offset < 0 else parts[i].offset + parts[i].size for i in numbers]
            # Not `cat`, even for whole files: it takes `photo [1].jpg` for a pattern.
            for i, answer in zip(numbers, fs.cat_ranges(paths, begins, ends, on_error="return")):
                contents[i] = answer
        waiting = [i for i in waiting if isinstance(contents[i], Exception) and not remote.is_final(contents[i])]
        if not waiting:
            break
        if is_last:
            url, problem = parts[waiting[0]].path, remote.reason(contents[waiting[0]])
            raise OSError(f"{url}: given up after {remote.TRIES} tries, the last: {problem}")
    return contents


def _unzip(blob: bytes, image: ListedImage, archives: "OrderedDict[str, int]") -> bytes:
    """The member whose local header `blob` begins with."""
    if image.packing not in (0, 8):
        raise Rejected("zip member not readable", "encrypted" if image.packing == -1 else f"method {image.packing}")
    if blob[:4] != b"PK\x03\x04":
        raise Rejected("zip member not readable", "no header where the directory says")
    begin = ZIP_HEADER + sum(struct.unpack("<HH", blob[26:30]))
    if len(blob) < begin + image.size:
        longer = Part(image.path, image.offset, begin + image.size)
        blob = _checked(_remote([longer])[0]) if is_remote(image.path) else _local(longer, archives)
    data = blob[begin : begin + image.size]
    if image.packing == 0:
        return data
    inflater = zlib.decompressobj(-15)
    try:
        data = inflater.decompress(data, LARGEST_MEMBER)
    except zlib.error as error:
        raise Rejected("zip member not readable", str(error)) from None
    if not inflater.eof:
        raise Rejected("zip member not readable", f"cut short, or more than {LARGEST_MEMBER:,} bytes")
    return data
