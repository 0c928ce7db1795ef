"""The bytes of listed images: files, ranges of archives, URLs; of remote ones, several at a time."""

import contextlib
import itertools
import os
import re
import struct
import zlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from pipeline.files import is_remote
from pipeline.packing.prepare import Rejected
from pipeline.packing.survey import ListedImage, Sidecar
from pipeline.sources import remote

TOGETHER = 32  # remote requests in flight
LINE_TRIES = 3  # for a URL that a list names and nobody has seen: lists from the web hold many dead ones
SILENT = 3  # after so many lines in a row that their host did not answer, the next ones of a shard do not wait for it
# Why an image could not be fetched: --max_failed counts these, --retry_failed tries them again.
NO_SUCH_FILE, NO_PERMISSION, REFUSED, NOT_FETCHED = FAILED = (
    "no such file",
    "permission denied",
    "refused by its server",
    "not fetched",
)
OPEN_ARCHIVES = 64
ZIP_HEADER = 30
LARGEST_MEMBER = 1 << 30  # bytes that a member of a zip may unpack to: there are zip bombs
ZIP_SLACK = 512  # for the name and more in a member's own header; a longer one takes a second read


class Headers(tuple[tuple[str, str], ...]):
    """Names and values for HTTP. They do not show where a task is shown, as Dask does in its log when one fails."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"{len(self)} headers"

    __str__ = __repr__


NO_HEADERS = Headers()


class Part(NamedTuple):
    path: str
    offset: int  # -1: the whole file
    size: int


def parse_headers(given: Sequence[str]) -> Headers:
    """`Name: value` -> (Name, value), with environment variables in place of $NAME. ValueError that shows no value."""
    found = []
    for line in given:
        name, colon, value = line.partition(":")
        expanded = os.path.expandvars(value.strip())
        if (
            not colon
            or not re.fullmatch(r"[A-Za-z0-9-]+", name.strip())
            or not expanded
            or re.search(r"[\r\n]", expanded)
        ):
            raise ValueError(f"--header {name.strip()[:40]!r} ...: it has to be `Name: value`, in one line")
        if unset := re.search(r"\$\{?(\w+)", value if expanded == value.strip() else ""):
            raise ValueError(f"--header {name.strip()}: ${unset[1]} is not set in the environment")
        found.append((name.strip(), expanded))
    return Headers(found)


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


def fetch(images: Iterable[ListedImage], headers: Headers = NO_HEADERS) -> Iterator[list[bytes] | Rejected]:
    """For each image its bytes and those of its neighbours in the sample, or why there are none. `headers` go along
    with the requests for http(s) lines of a list.

    A URL in a list that cannot be fetched costs its line. FileNotFoundError for a file that was there when it was
    listed; OSError for a store of archives, or of a folder, that does not answer.
    """
    silent: Counter[str] = Counter()  # host -> lines in a row that it did not answer
    with contextlib.ExitStack() as stack:
        archives: OrderedDict[str, int] = OrderedDict()
        stack.callback(_close, archives)
        iterator = iter(images)
        while group := list(itertools.islice(iterator, TOGETHER)):
            parts = [parts_of(image) for image in group]
            away = [p for of_image in parts for p in of_image if is_remote(p.path)]
            answers = iter(_remote(away, silent, headers)) if away else iter(())
            for image, of_image in zip(group, parts):
                # All of them, before one can fail: the next image's answers would be taken for the rest of this one's.
                arrived = [next(answers) if is_remote(p.path) else p for p in of_image] if away else of_image
                try:
                    if image.size < 0 and not is_remote(image.path) and not os.path.isfile(image.path):  # noqa: PTH113
                        raise Rejected(NO_SUCH_FILE, image.path)
                    contents = [_local(a, archives) if isinstance(a, Part) else _checked(a, image) for a in arrived]
                    if image.offset >= 0:
                        _check_sizes(of_image, contents, image)
                    if image.packing is not None:
                        members = (image, *(sidecar_alone(image, sidecar) for sidecar in image.sidecars or ()))
                        contents = [_unzip(blob, each, archives) for blob, each in zip(contents, members)]
                    yield contents
                except (FileNotFoundError, IsADirectoryError) as error:
                    if image.size < 0:
                        yield Rejected(NO_SUCH_FILE, image.path)
                        continue
                    raise FileNotFoundError(
                        f"{error.filename or image.path} has vanished since it was listed: put it back and run the "
                        "same command again, or begin anew without it by --overwrite"
                    ) from None
                except PermissionError as error:
                    yield Rejected(NO_PERMISSION, str(error))
                except Rejected as why:
                    yield why


def _check_sizes(parts: list[Part], contents: list[bytes], image: ListedImage) -> None:
    """Checks that all bytes came. A zip read may return fewer: the request allows for the member's header."""
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


def _checked(content: bytes | BaseException, image: ListedImage) -> bytes:
    if isinstance(content, bytes):
        return content
    if isinstance(content, FileNotFoundError | IsADirectoryError):
        raise content
    if isinstance(getattr(content, "status", None), int) and remote.is_final(content):
        raise Rejected(REFUSED, remote.reason(content))
    if image.offset < 0 and image.size < 0:  # a line of a list
        raise Rejected(NOT_FETCHED, remote.reason(content))
    if remote.is_final(content):
        raise ValueError(f"{image.path}: {remote.reason(content)}; check the address and your credentials")
    raise OSError(f"{image.path}: given up after {remote.TRIES} tries, the last: {remote.reason(content)}")


def _remote(parts: list[Part], silent: Counter[str], headers: Headers = NO_HEADERS) -> list[bytes | BaseException]:
    """All parts at once; what failed otherwise than by not being there is asked for again."""
    contents: list[bytes | BaseException] = [OSError("its host did not answer the lines before this one")] * len(parts)
    seen = any(part.size >= 0 for part in parts)  # in a store, when it was listed
    waiting = [i for i, part in enumerate(parts) if silent[_host(part.path)] < SILENT]
    asked = list(waiting)
    for _ in remote.tries(parts[0].path, times=0 if seen else LINE_TRIES):
        for _, members in itertools.groupby(waiting, key=lambda i: parts[i].path.partition("://")[0]):
            numbers = list(members)
            try:
                url = parts[numbers[0]].path
                known = headers if not seen and url.startswith("http") else NO_HEADERS
                fs, _ = remote.reading_from(url, known)
            except Exception as error:  # each file system has its own kinds
                for i in numbers:
                    contents[i] = error
                continue
            paths = [remote.reading_from(parts[i].path)[1] for i in numbers]
            begins = [None if parts[i].offset < 0 else parts[i].offset for i in numbers]
            ends = [None if parts[i].offset < 0 else parts[i].offset + parts[i].size for i in numbers]
            # Not `cat`, even for whole files: it takes `photo [1].jpg` for a pattern.
            for i, answer in zip(numbers, fs.cat_ranges(paths, begins, ends, on_error="return")):
                contents[i] = answer
        waiting = [i for i in waiting if isinstance(contents[i], Exception) and not remote.is_final(contents[i])]
        if not waiting:
            break
    for i in asked:  # connection refused, unknown name, time-out: all are OSErrors, and no answers of a server
        host = _host(parts[i].path)
        silent[host] = silent[host] + 1 if i in waiting and isinstance(contents[i], OSError) else 0
    return contents


def _host(url: str) -> str:
    return "/".join(url.split("/", 3)[:3])


def _unzip(blob: bytes, image: ListedImage, archives: "OrderedDict[str, int]") -> bytes:
    """The member whose local header `blob` begins with."""
    if image.packing not in (0, 8):
        raise Rejected("zip member not readable", "encrypted" if image.packing == -1 else f"method {image.packing}")
    if blob[:4] != b"PK\x03\x04":
        raise Rejected("zip member not readable", "no header where the directory says")
    begin = ZIP_HEADER + sum(struct.unpack("<HH", blob[26:30]))
    if len(blob) < begin + image.size:
        longer = Part(image.path, image.offset, begin + image.size)
        blob = _checked(_remote([longer], Counter())[0], image) if is_remote(image.path) else _local(longer, archives)
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
