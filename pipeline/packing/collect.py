"""Which images a source names: `collect(src)` looks at what `src` is and yields its images, in a fixed order.

Nothing here reads an image; what the files hold is found out when they are packed.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import braceexpand

from pipeline.files import file_system, is_remote, local_path
from pipeline.packing import archives, lists
from pipeline.packing.listing import ListedImage, Survey, extension, file_size, is_image_name
from pipeline.sources.card import is_pattern
from pipeline.sources.storage import Storage

SUMMARY = "make_shards.json"  # what the shards beside it were made from; there when all are done
CONTACT_SHEET = "contact_sheet.png"
LISTS = (".txt", ".csv", ".tsv", ".parquet")
ARCHIVES = (".tar", ".zip")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def collect(src: str, survey: Survey, exclude: str = "") -> Iterator[ListedImage]:
    """The images of `src`: a folder, a list of paths, a tar, a zip archive, shards; local or by URL.

    `exclude` is a folder that is left out: the destination may lie in the source. FileNotFoundError when there is
    nothing at `src`, ValueError when it is of no kind that is known.
    """
    lower = src.lower()
    if lower.endswith(COMPRESSED):
        raise ValueError(f"{src} is compressed, single images in it cannot be reached: unpack it to a .tar first")
    if is_pattern(src) and (is_remote(src) or not local_path(src).exists()):
        storage = Storage()
        names = [n for p in braceexpand.braceexpand(src) for n in storage.glob(p)]
        if image := next(filter(is_image_name, names), None):
            raise ValueError(f"{src} names images ({image}), a pattern is of archives: name their folder, or list them")
        yield from archives.several(names, survey)
    elif lower.endswith(LISTS):
        yield from lists.entries(src, survey)
    elif lower.endswith(ARCHIVES):
        yield from archives.several([src], survey)
    elif is_remote(src):
        yield from _remote_folder(src, survey, exclude)
    elif not local_path(src).exists():
        raise FileNotFoundError(f"no such folder or file: {src}")
    elif local_path(src).is_dir():
        folder = local_path(src)
        tars = sorted(str(folder / name) for name in os.listdir(folder) if _is_archive(name))  # noqa: PTH208
        if tars:
            _refuse_both(src, tars, _folder(folder, "", Survey(), exclude, ()))
            yield from archives.several(tars, survey)
        else:
            yield from _folder(folder, "", survey, exclude, ())
    else:
        raise ValueError(
            f"{src} is none of what can be read: a folder, a list ({' '.join(LISTS)}), {' '.join(ARCHIVES)}"
        )


def _is_archive(name: str) -> bool:
    return name.lower().endswith(ARCHIVES) and not name.startswith(".")


def _refuse_both(src: str, tars: list[str], images: Iterator[ListedImage]) -> None:
    """ValueError when a folder of archives has images too: whichever were read, the others would be lost."""
    if image := next(images, None):
        raise ValueError(
            f"{src} holds archives ({tars[0].rpartition('/')[2]}) and images ({image.name}): name one kind, such as "
            f"'{src.rstrip('/')}/*{tars[0][-4:]}', or move the archives elsewhere"
        )


def _folder(
    root: Path, below: str, survey: Survey, exclude: str, above: tuple[tuple[int, int], ...]
) -> Iterator[ListedImage]:
    """The images below root/below; symbolic links are followed, but not into a folder that contains them."""
    folder = root / below
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in above or (exclude and str(folder.resolve()) == exclude):
        return
    with os.scandir(folder) as scan:
        names = sorted((item.name, _is_folder(item)) for item in scan)
    sheet = CONTACT_SHEET if (SUMMARY, False) in names else None  # beside shards that we made: no input
    for name, is_folder in names:
        relative = f"{below}/{name}" if below else name
        if is_folder:
            yield from _folder(root, relative, survey, exclude, (*above, identity))
        elif not is_image_name(name) or name == sheet:
            survey.ignored[extension(name) or "no extension"] += 1
        else:
            full = os.path.join(folder, name)  # noqa: PTH118
            yield ListedImage(full, -1, file_size(full), relative)


def _is_folder(item: "os.DirEntry[str]") -> bool:
    try:
        return item.is_dir()
    except OSError:  # links in a circle
        return False


def _remote_folder(src: str, survey: Survey, exclude: str) -> Iterator[ListedImage]:
    fs, root = file_system(src)
    if not fs.exists(root):
        raise FileNotFoundError(f"no such folder: {src}")
    tars = sorted(fs.unstrip_protocol(p) for p in fs.ls(root, detail=False) if _is_archive(p.rpartition("/")[2]))
    left_out = file_system(exclude)[1].rstrip("/") if is_remote(exclude) else None
    if tars:
        _refuse_both(src, tars, _walk(fs, root, Survey(), left_out))
        yield from archives.several(tars, survey)
    else:
        yield from _walk(fs, root, survey, left_out)


def _walk(fs: Any, root: str, survey: Survey, left_out: str | None) -> Iterator[ListedImage]:
    for folder, folders, files in fs.walk(root, detail=True):
        for name in sorted(folders):  # walk goes into what is left in the dict, in its order
            details = folders.pop(name)
            if details["name"].rstrip("/") != left_out:
                folders[name] = details
        below = folder[len(root) :].strip("/")
        sheet = CONTACT_SHEET if SUMMARY in files else None
        for name in sorted(files):
            if is_image_name(name) and name != sheet:
                size = files[name].get("size")
                relative = f"{below}/{name}" if below else name
                yield ListedImage(fs.unstrip_protocol(files[name]["name"]), -1, -1 if size is None else size, relative)
            elif name:
                survey.ignored[extension(name) or "no extension"] += 1
