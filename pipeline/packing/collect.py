"""Which images a source names: `collect(src)` looks at what `src` is and yields its images, in a fixed order.

Nothing here reads an image; what the files hold is found out when they are packed.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from pipeline import files
from pipeline.files import is_remote, local_path
from pipeline.packing import archives, lists, tables
from pipeline.packing.json_labels import labels_from_json
from pipeline.packing.pairing import INNER, Members, images_of
from pipeline.packing.survey import ListedImage, Survey, file_size, is_image_name
from pipeline.packing.tables import Unpacked
from pipeline.sources import remote
from pipeline.sources.card import is_pattern
from pipeline.sources.storage import Storage

SUMMARY = "make_shards.json"  # what the shards beside it were made from; there when all are done
CONTACT_SHEET = "contact_sheet.png"
NEAR_SHEET = "near_duplicates.png"
SHEETS = (CONTACT_SHEET, NEAR_SHEET)
LISTS = (".txt", ".csv", ".tsv", ".parquet")
ARCHIVES = (".tar", ".zip")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def collect(
    src: str,
    survey: Survey,
    *,
    exclude: str = "",
    label_key: str = "",
    image_key: str = "",
    unpacked: Unpacked | None = None,
) -> Iterator[ListedImage]:
    """The images of `src`: a folder, a list of paths, tables with images in them, a tar, a zip archive, shards; local
    or by URL.

    `exclude` is a folder that is left out: the destination may lie in the source. `label_key` is the column of a list
    or table, or the key in the JSON beside an image, that holds its label; `image_key` the column of paths or images.
    `unpacked` takes the images of tables, which have no place without it. FileNotFoundError when there is nothing at
    `src`, ValueError when it is of no kind that is known.
    """
    if parquets := _parquet_files(src, exclude):
        for place in parquets:
            columns = tables.columns_of(place, image_key=image_key, label_key=label_key)
            if columns.image:
                yield from tables.entries(place, columns, survey, unpacked)
            else:
                yield from lists.entries(place, survey, label_key, image_key)
    elif is_list(src):
        yield from lists.entries(src, survey, label_key, image_key)
    elif image_key:
        raise ValueError(f"--image_key {image_key}: {src} is no list and no table, so it has no columns")
    elif label_key:
        yield from labels_from_json(_images(src, survey, exclude), label_key, survey)
    else:
        yield from _images(src, survey, exclude)


def _parquet_files(src: str, exclude: str) -> list[str]:
    """The Parquet files that `src` names: one, a pattern of them, or a folder with neither archives nor images."""
    if _is_local_folder(src):
        folder = local_path(src)
        names = sorted(item.name for item in folder.iterdir() if not item.is_dir())
        images = _folder(folder, "", Survey(), exclude, ())
    elif is_pattern(src) and (is_remote(src) or not local_path(src).exists()):
        found = list(Storage().glob(src))
        are_tables = [_is_parquet(name) for name in found]
        if any(are_tables) and not all(are_tables):
            raise ValueError(f"{src} names Parquet files and {found[are_tables.index(False)]}: name one kind")
        return found if any(are_tables) else []
    elif _is_parquet(src):
        return [src]
    elif is_remote(src) and not src.lower().endswith((*LISTS, *ARCHIVES)):
        fs, root = remote.reading_from(src)
        fs.invalidate_cache()  # other processes write there too
        listed = fs.ls(root, detail=False) if fs.exists(root) else []
        names = sorted(name.rstrip("/").rpartition("/")[2] for name in listed)
        images = _walk(src, Survey(), None)
    else:
        return []
    parquets = [name for name in names if _is_parquet(name)]
    if not parquets or any(map(_is_archive, names)) or next(images, None) is not None:
        return []
    return [files.join(src, name) for name in parquets]


def _is_parquet(name: str) -> bool:
    return name.lower().endswith(".parquet") and not name.rpartition("/")[2].startswith(".")


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
    sheets = SHEETS if (SUMMARY, False) in names else ()  # beside shards that we made: no input
    members = Members()
    for name, is_folder in names:
        size = -1 if is_folder else file_size(os.path.join(folder, name))  # noqa: PTH118
        if is_folder:
            members.add(name, INNER)
        elif name in sheets or (size < 0 and not is_image_name(name)):
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
    for folder, folders, found in fs.walk(root, detail=True):
        for name in sorted(folders):  # walk goes into what is left in the dict, in its order
            details = folders.pop(name)
            if details["name"].rstrip("/") != left_out:
                folders[name] = details
        below = folder[len(root) :].strip("/")
        members = Members()
        for name in sorted(filter(None, found)):
            if name in SHEETS and SUMMARY in found:
                survey.ignore(name)
            else:
                size = found[name].get("size")
                members.add_file(name, survey, size=-1 if size is None else size)
        above = f"{below}/" if below else ""
        place = remote.with_protocol(fs, folder, src)
        yield from images_of(members, place, survey, lambda _: iter(()), masks=False, above=above)
