"""Images in tars (plain, WebDataset shards, ImageNet's tar of tars) and zip archives: where each one lies.

Nothing is unpacked: an image in an archive is a range of bytes, which any worker reads by itself. An archive's names
are looked at as a whole before its first image comes out, since a sidecar may stand anywhere in it.
"""

import contextlib
import json
import posixpath
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from pipeline import files
from pipeline.files import is_remote, local_path
from pipeline.packing.pairing import IMAGE, INNER, SIDECAR, Members, images_of
from pipeline.packing.survey import ListedImage, Survey, extension, is_image_name
from pipeline.sources import remote
from pipeline.sources.tar import LACKS_END, lacks_end, walk_tar

Read = Callable[[int, int], bytes]  # the bytes at an offset, of a size
SYNSET = re.compile(r"n\d{8}")  # ImageNet's class tars, when they lie side by side
MOST_NAMED = 20  # damaged archives in one error
SPARSE = "members are sparse files, whose bytes are not all in the tar: write it without `--sparse`"


def several(archives: list[str], survey: Survey) -> Iterator[ListedImage]:
    """The images of some archives, in this order. A manifest.json beside shards tells the names of the classes.

    ValueError at the end that names all archives which are damaged.
    """
    damaged: list[str] = []
    unended: list[str] = []
    for place in archives:
        with _opened(place) as file:
            try:
                if place.lower().endswith(".zip"):
                    yield from _zip(place, file, survey)
                else:
                    yield from _tar_file(place, file, survey, unended)
            except ValueError as error:
                damaged.append(str(error))
    if damaged:
        raise ValueError(_joined(damaged, "; "))
    if unended:
        survey.remark(f"tars {LACKS_END}", _joined(unended, ", "), len(unended))
    if archives:
        with contextlib.suppress(OSError, ValueError, KeyError, AttributeError):
            manifest = json.loads(files.read(posixpath.join(posixpath.dirname(archives[0]), "manifest.json")))
            survey.classes = [str(name) for name in manifest["classes"]]


def _joined(told: list[str], mark: str) -> str:
    more = f"{mark}and {len(told) - MOST_NAMED:,} more" if len(told) > MOST_NAMED else ""
    return mark.join(told[:MOST_NAMED]) + more


@contextlib.contextmanager
def _opened(place: str) -> Iterator[BinaryIO]:
    if is_remote(place):
        fs, path = remote.reading_from(place)
        try:
            opened = fs.open(path, "rb")
        except FileNotFoundError:
            raise FileNotFoundError(f"no such archive: {place}") from None
        with opened as file:
            yield file
    elif not local_path(place).is_file():
        raise FileNotFoundError(f"no such archive: {place}")
    else:
        with local_path(place).open("rb") as file:
            yield file


def _zip(place: str, file: BinaryIO, survey: Survey) -> Iterator[ListedImage]:
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"{place} is not a whole zip archive ({error}): fetch it again") from None
    members = Members()
    for member in archive.infolist():
        name = member.filename.replace("\\", "/")  # as some Windows programs separate folders
        if name.startswith("__MACOSX/"):
            survey.ignore(name)
        elif not member.is_dir():
            packing = -1 if member.flag_bits & 1 else member.compress_type
            members.add_file(name, survey, offset=member.header_offset, size=member.compress_size, packing=packing)
    yield from images_of(members, _absolute(place), survey, _no_inner, masks=False)


def _tar_file(place: str, file: BinaryIO, survey: Survey, unended: list[str]) -> Iterator[ListedImage]:
    def read(offset: int, size: int) -> bytes:
        file.seek(offset)
        return file.read(size)

    stem = posixpath.basename(place)[:-4]
    label = stem if SYNSET.fullmatch(stem) else None
    yield from _tar(place, read, 0, file.seek(0, 2), "", label, survey, unended)


def _tar(
    place: str, read: Read, begin: int, end: int, above: str, label: str | None, survey: Survey, unended: list[str]
) -> Iterator[ListedImage]:
    """The images of the tar that lies in these bytes of `place`; `label` is that of a class tar."""
    members = Members()
    reached = begin
    for member in walk_tar(read, begin, end, place):
        reached = member.offset + member.size
        name = member.name.removeprefix("./")
        base = posixpath.basename(name)
        if member.kind == "folder" or not base:
            continue
        if member.kind != "file" or base[0] == ".":
            survey.ignored["hidden" if base[0] == "." else member.kind] += 1
        elif extension(name) == "tar":
            members.add(name, INNER, offset=member.offset, size=member.size)
        elif is_image_name(name):
            survey.progress.advance()
            members.add(name, IMAGE, offset=member.offset, size=member.size)
        elif "." in base:
            members.add(name, SIDECAR, offset=member.offset, size=member.size)
        else:
            survey.ignore(name)

        if member.kind == "sparse":
            survey.remark(SPARSE, f"{name} in {place}")
    if lacks_end(reached, end):
        unended.append(f"{place}, {above}" if above else place)

    def inner(i: int) -> Iterator[ListedImage]:
        first, size = members.offsets[i], members.sizes[i]
        stem = posixpath.basename(members.name(i)).partition(".")[0]
        return _tar(place, read, first, first + size, f"{above}{stem}/", stem, survey, unended)

    yield from images_of(members, _absolute(place), survey, inner, masks=True, above=above, label=label)


def _no_inner(_: int) -> Iterator[ListedImage]:
    return iter(())


def _absolute(place: str) -> str:
    return place if is_remote(place) else str(Path(local_path(place)).resolve())
