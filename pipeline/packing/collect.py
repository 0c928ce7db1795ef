"""Which images a source names: `collect(src)` looks at what `src` is and yields its images, in a fixed order.

Nothing here reads an image; what the files hold is found out when they are packed.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from pipeline.files import is_remote, local_path
from pipeline.packing import archives, lists
from pipeline.packing.json_labels import labels_from_json
from pipeline.packing.pairing import INNER, Members, images_of
from pipeline.packing.survey import ListedImage, Survey, file_size, is_image_name
from pipeline.sources import remote
from pipeline.sources.card import is_pattern
from pipeline.sources.storage import Storage

SUMMARY = "make_shards.json"  # what the shards beside it were made from; there when all are done
CONTACT_SHEET = "contact_sheet.png"
LISTS = (".txt", ".csv", ".tsv", ".parquet")
ARCHIVES = (".tar", ".zip")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def collect(src: str, survey: Survey, *, exclude: str = "", label_key: str = "") -> Iterator[ListedImage]:
    """The images of `src`: a folder, a list of paths, a tar, a zip archive, shards; local or by URL.

    `exclude` is a folder that is left out: the destination may lie in the source. `label_key` is the column of a list,
    or the key in the JSON beside an image, that holds its label. FileNotFoundError when there is nothing at `src`,
    ValueError when it is of no kind that is known.
    """
    if is_list(src):
        yield from lists.entries(src, survey, label_key)
    elif label_key:
        yield from labels_from_json(_images(src, survey, exclude), label_key, survey)
    else:
        yield from _images(src, survey, exclude)


def is_list(src: str) -> bool:
    return src.lower().endswith(LISTS) and not _is_local_folder(src)


def _is_local_folder(src: str) -> bool:
    """A folder may be named as anything else is: photos.tar, or [2021]."""
    return not is_remote(src) and local_path(src).is_dir()


def _images(src: str, survey: Survey, exclude: str) -> Iterator[ListedImage]:
    lower = src.lower()
    if _is_local_folder(src):
        folder = local_path(src)
        tars = sorted(str(item) for item in folder.iterdir() if _is_archive(item.name) and not item.is_dir())
        if tars:
            _refuse_both(src, tars, _folder(folder, "", Survey(), exclude, ()))
            yield from archives.several(tars, survey)
        else:
            yield from _folder(folder, "", survey, exclude, ())
        return
    if lower.endswith(COMPRESSED):
        raise ValueError(f"{src} is compressed, single images in it cannot be reached: unpack it to a .tar first")
    if is_pattern(src) and (is_remote(src) or not local_path(src).exists()):
        names = list(Storage().glob(src))
        if image := next(filter(is_image_name, names), None):
            raise ValueError(f"{src} names images ({image}), a pattern is of archives: name their folder, or list them")
        yield from archives.several(names, survey)
    elif lower.endswith(ARCHIVES):
        yield from archives.several([src], survey)
    elif is_remote(src):
        yield from _remote_folder(src, survey, exclude)
    elif not local_path(src).exists():
        raise FileNotFoundError(f"no such folder or file: {src}")
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
    root: Path, below: str, survey: Survey, exclude: str, parents: tuple[tuple[int, int], ...]
) -> Iterator[ListedImage]:
    """The images below root/below; symbolic links are followed, but not into a folder that contains them."""
    folder = root / below
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in parents or (exclude and str(folder.resolve()) == exclude):
        return
    with os.scandir(folder) as scan:
        names = sorted((item.name, _is_folder(item)) for item in scan)
    sheet = CONTACT_SHEET if (SUMMARY, False) in names else None  # beside shards that we made: no input
    members = Members()
    for name, is_folder in names:
        size = -1 if is_folder else file_size(os.path.join(folder, name))  # noqa: PTH118
        if is_folder:
            members.add(name, INNER)
        elif name == sheet or (size < 0 and not is_image_name(name)):
            survey.ignore(name)
        else:
            members.add_file(name, survey, size=size)

    def inner(i: int) -> Iterator[ListedImage]:
        return _folder(root, f"{above}{members.name(i)}", survey, exclude, (*parents, identity))

    above = f"{below}/" if below else ""
    yield from images_of(members, str(folder), survey, inner, masks=False, above=above)


def _is_folder(item: "os.DirEntry[str]") -> bool:
    try:
        return item.is_dir()
    except OSError:  # links in a circle
        return False


def _remote_folder(src: str, survey: Survey, exclude: str) -> Iterator[ListedImage]:
    fs, root = remote.reading_from(src)
    fs.invalidate_cache()  # other processes write there too
    if not fs.exists(root):
        raise FileNotFoundError(f"no such folder: {src}")
    names = [p for p in fs.ls(root, detail=False) if _is_archive(p.rpartition("/")[2])]
    left_out = remote.reading_from(exclude)[1].rstrip("/") if is_remote(exclude) else None
    if tars := sorted(remote.with_protocol(fs, p, src) for p in names):
        _refuse_both(src, tars, _walk(src, Survey(), left_out))
        yield from archives.several(tars, survey)
    else:
        yield from _walk(src, survey, left_out)


def _walk(src: str, survey: Survey, left_out: str | None) -> Iterator[ListedImage]:
    fs, root = remote.reading_from(src)
    for folder, folders, files in fs.walk(root, detail=True):
        for name in sorted(folders):  # walk goes into what is left in the dict, in its order
            details = folders.pop(name)
            if details["name"].rstrip("/") != left_out:
                folders[name] = details
        below = folder[len(root) :].strip("/")
        members = Members()
        for name in sorted(filter(None, files)):
            if name == CONTACT_SHEET and SUMMARY in files:
                survey.ignore(name)
            else:
                size = files[name].get("size")
                members.add_file(name, survey, size=-1 if size is None else size)
        above = f"{below}/" if below else ""
        place = remote.with_protocol(fs, folder, src)
        yield from images_of(members, place, survey, lambda _: iter(()), masks=False, above=above)
