"""Images in tars (plain, WebDataset shards, ImageNet's tar of tars) and zip archives: where each one lies.

Nothing is unpacked: an image in an archive is a range of bytes, which any worker reads by itself.
"""

import contextlib
import json
import posixpath
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from pipeline import files
from pipeline.files import is_remote, local_path
from pipeline.packing.listing import ListedImage, Survey, extension, is_image_name

SYNSET = re.compile(r"n\d{8}")  # ImageNet's class tars, when they lie side by side


def several(archives: list[str], survey: Survey) -> Iterator[ListedImage]:
    """The images of some archives, in this order. A manifest.json beside shards tells the names of the classes."""
    for place in archives:
        with _opened(place) as file:
            if place.lower().endswith(".zip"):
                yield from _zip(place, file, survey)
            else:
                stem = posixpath.basename(place)[:-4]
                yield from _tar(place, file, 0, "", stem if SYNSET.fullmatch(stem) else None, survey)
    if archives:
        with contextlib.suppress(OSError, ValueError, KeyError, AttributeError):
            manifest = json.loads(files.read(posixpath.join(posixpath.dirname(archives[0]), "manifest.json")))
            survey.classes = [str(name) for name in manifest["classes"]]


@contextlib.contextmanager
def _opened(place: str) -> Iterator[BinaryIO]:
    if is_remote(place):
        fs, path = files.file_system(place)
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
    except zipfile.BadZipFile as error:
        raise ValueError(f"{place} is not a whole zip archive ({error}): fetch it again") from None
    for member in archive.infolist():
        if member.is_dir():
            continue
        if not is_image_name(member.filename) or member.filename.startswith("__MACOSX/"):
            survey.ignored[extension(member.filename) or "no extension"] += 1
            continue
        packing = -1 if member.flag_bits & 1 else member.compress_type
        name = member.filename.replace("\\", "/")  # as some Windows programs separate folders
        yield ListedImage(_absolute(place), member.header_offset, member.compress_size, name, packing=packing)


class _Window:
    """A part of a file as a file of its own: the inner tar of a tar of tars."""

    def __init__(self, file: BinaryIO, begin: int, size: int) -> None:
        self._file, self._begin, self._size, self._position = file, begin, size, 0

    def seek(self, position: int, whence: int = 0) -> int:
        self._position = position + (0, self._position, self._size)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(self._size - self._position, 0)
        self._file.seek(self._begin + self._position)
        block = self._file.read(left if size < 0 else min(size, left))
        self._position += len(block)
        return block


def _tar(place: str, file: Any, begin: int, above: str, label: str | None, survey: Survey) -> Iterator[ListedImage]:
    """The images of the tar that `file` is. It lies at byte `begin` of `place`; `label` is that of a class tar.

    Members with the same name but for the extension are a WebDataset sample; the image goes first, the others with it.
    """
    path = _absolute(place)
    size = file.seek(0, 2)
    file.seek(0)
    try:
        tar = tarfile.open(fileobj=file, mode="r:", errorlevel=2)  # noqa: SIM115 (the file is closed by who opened it)
    except tarfile.ReadError as error:
        raise ValueError(f"{place} is not a tar ({error}): fetch it again, or unpack it if it is compressed") from None
    key = ""
    images: list[ListedImage] = []
    sidecars: list[tuple[str, int, int]] = []
    end = 0
    for member in _members(tar, place):
        hidden = posixpath.basename(member.name).startswith(".")
        if not member.isfile() or hidden:
            if not member.isdir():  # links in a tar have no data: `tar --dereference --hard-dereference` keeps it
                survey.ignored["hidden" if hidden else "link"] += 1
            continue
        offset = begin + member.offset_data
        end = member.offset_data + member.size
        if end > size:
            raise ValueError(f"{place} is cut short: {member.name} reaches to byte {end:,} of {size:,}; fetch it again")
        name = member.name.removeprefix("./")
        folder, _, base = name.rpartition("/")
        stem, _, extensions = base.partition(".")
        if f"{folder}/{stem}" != key:
            yield from _sample(images, sidecars, survey)
            key, images, sidecars = f"{folder}/{stem}", [], []
        if extension(name) == "tar":
            inner = _Window(file, member.offset_data, member.size)
            yield from _tar(place, inner, offset, f"{above}{stem}/", stem, survey)
        elif is_image_name(name):
            images.append(ListedImage(path, offset, member.size, above + name, label))
        else:
            sidecars.append((extensions, offset, member.size))
    yield from _sample(images, sidecars, survey)


def _members(tar: tarfile.TarFile, place: str) -> Iterator[tarfile.TarInfo]:
    try:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
            yield member
    except tarfile.ReadError as error:
        raise ValueError(f"{place} is damaged or cut short ({error}): fetch it again") from None


def _sample(images: list[ListedImage], sidecars: list[tuple[str, int, int]], survey: Survey) -> Iterator[ListedImage]:
    """What has one key: images, and what lies beside them. Beside `x.jpg` and `x.json`, `x.mask.png` is no image."""
    if not images:
        survey.ignored.update(extension or "no extension" for extension, _, _ in sidecars)
    plain = [image for image in images if image.name.rpartition("/")[2].count(".") == 1]
    if sidecars and plain:
        parts = [(image.name.rpartition("/")[2].partition(".")[2], image.offset, image.size) for image in images]
        sidecars = sidecars + [part for image, part in zip(images, parts) if image not in plain]
        images = plain
    for image in images:
        yield image._replace(sidecars=sidecars) if sidecars else image


def _absolute(place: str) -> str:
    return place if is_remote(place) else str(Path(local_path(place)).resolve())
