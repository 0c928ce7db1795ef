"""Which sidecar belongs to which image: `a.json`, `a.txt` and `a.cls` to `a.jpg`.

1. A sidecar belongs to the image with the same full stem (the name without its last extension), wherever in the
   archive it stands: `2021.05-1.json` to `2021.05-1.jpg`. `a.jpg.json` belongs to `a.jpg`.
2. If there is none, it belongs to the image with the same name up to the first dot, if exactly one has it:
   `0001.label.cls` to `0001.image.jpg`.
3. `a.mask.png` is a sidecar of `a.jpg` when `a.jpg` has others too and `a.mask.png` has none of its own.
4. The last part of an extension says what a sidecar is: `a.label.cls` is the label of `a.jpg`.

Names are compared by their hashes, in arrays: a million members take about 150 MB while their archive is listed.
"""

import re
from array import array
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import xxhash

from pipeline.packing.survey import ListedImage, Sidecar, Survey, extension, is_image_name, last_part
from pipeline.sources.index import LABEL_EXTENSION

IMAGE, SIDECAR, INNER = range(3)  # kinds of members, told by their names; INNER: an archive or folder of its own
FILE_SIDECARS = ("cls", "json", "txt")  # of folders and zips; what else lies there may be raw photographs and films
LONGEST_EXTENSION = 24  # letters; with the key it has to fit into the 100 of a tar's header
NO_ZIP = -2  # in place of how a member is packed


class Members:
    """The files of an archive or of a folder, in its order: names, and where the bytes of each lie."""

    def __init__(self) -> None:
        self.kinds = array("b")
        self.offsets, self.sizes, self.packings = array("q"), array("q"), array("i")
        self._text, self._ends = bytearray(), array("q")

    def add(self, name: str, kind: int, *, offset: int = -1, size: int = -1, packing: int = NO_ZIP) -> None:
        self._text += name.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._text))
        self.offsets.append(offset)
        self.sizes.append(size)
        self.packings.append(packing)
        self.kinds.append(kind)

    def add_file(self, name: str, survey: Survey, *, offset: int = -1, size: int = -1, packing: int = NO_ZIP) -> None:
        """Adds a file of a folder or zip when it is an image or may be a sidecar; the survey counts others."""
        if is_image_name(name):
            survey.progress.advance()
            self.add(name, IMAGE, offset=offset, size=size, packing=packing)
        elif extension(name) in FILE_SIDECARS and not name.rpartition("/")[2].startswith("."):
            self.add(name, SIDECAR, offset=offset, size=size, packing=packing)
        else:
            survey.ignore(name)

    def name(self, i: int) -> str:
        begin = self._ends[i - 1] if i else 0
        return self._text[begin : self._ends[i]].decode("utf-8", "surrogateescape")

    def samples(self, *, masks: bool) -> Iterator[tuple[int, list[int]]]:
        """Numbers of members: (image, its sidecars) in the order of the images, (INNER, []) where it stands.

        At the end comes (-1, sidecars that belong to no image). Without `masks` every image is one, whatever rule 3.
        """
        kinds = np.frombuffer(self.kinds, np.int8)
        sample, is_sidecar = self._pair(kinds, masks)
        sidecars = np.flatnonzero(is_sidecar)
        sidecars = sidecars[np.lexsort((sidecars, kinds[sidecars] == IMAGE, sample[sidecars]))]
        of = sample[sidecars]
        others = np.flatnonzero(~is_sidecar)
        first, last = (np.searchsorted(of, sample[others], side) for side in ("left", "right"))
        for i, begin, end in zip(others, first, last):
            yield int(i), sidecars[begin:end].tolist() if end > begin else []
        yield -1, sidecars[of < 0].tolist()

    def _pair(self, kinds: np.ndarray, masks: bool) -> tuple[np.ndarray, np.ndarray]:
        """int64 [n]: the first image of the sample that a member belongs to, -1 for none; bool [n]: is it a sidecar.

        Images with the same stem (a.jpg, a.png) share their sidecars.
        """
        images, rest = np.flatnonzero(kinds == IMAGE), np.flatnonzero(kinds == SIDECAR)
        sample = np.full(len(kinds), -1, np.int64)
        sample[images] = images
        is_sidecar = kinds == SIDECAR
        sample[kinds == INNER] = len(kinds)  # of no image
        if not len(rest) or not len(images):
            return sample, is_sidecar
        (names, stems, keys), has_suffix = self._hashes()
        known, first, which = np.unique(stems[images], return_index=True, return_inverse=True)
        sample[images] = images[first][which]
        sample[rest] = _look_up(known, images[first], stems[rest])
        left = rest[sample[rest] < 0]
        order = np.argsort(names[images], kind="stable")
        sample[left] = _look_up(names[images][order], sample[images][order], stems[left])  # a.jpg.json

        if masks:
            plain = images[stems[images] == keys[images]]
            second = images[has_suffix[images]]
            second = second[~np.isin(sample[second], sample[rest])]
            second = second[np.isin(keys[second], np.intersect1d(keys[plain], keys[rest]))]
            is_sidecar[second] = True
            sample[second] = _look_up(known, images[first], keys[second])

        left = rest[sample[rest] < 0]
        candidates = np.unique(sample[images[~is_sidecar[images]]])
        shared, at, count = np.unique(keys[candidates], return_index=True, return_counts=True)
        sample[left] = _look_up(shared[count == 1], candidates[at[count == 1]], keys[left])
        return sample, is_sidecar

    def _hashes(self) -> tuple[np.ndarray, np.ndarray]:
        """uint64 [3, n]: of the whole name, of the name without its last extension, of the name up to the first dot;
        bool [n]: are there letters between the two, as `mask` in a.mask.png.

        Where a name comes again (tars that were put together may repeat their names), the hashes of what follows it
        differ from those before, among the names with one key.
        """
        hashes = np.empty((3, len(self.kinds)), np.uint64)
        has_suffix = np.empty(len(self.kinds), bool)
        for i, name in enumerate(map(self.name, range(len(self.kinds)))):
            folder, slash, base = name.rpartition("/")
            stem, key = _stem(base), base.partition(".")[0]
            hashes[:, i] = _hash(name), _hash(folder + slash + stem), _hash(folder + slash + key)
            has_suffix[i] = stem[len(key) + 1 :][:1].isalpha()  # a number counts images: cat.1.jpg
        names, _, keys = hashes
        _, first, count = np.unique(names, return_index=True, return_counts=True)
        turns: dict[int, tuple[int, set[int]]] = {}  # by key: how often a name came again, and the names since then
        for i in np.flatnonzero(np.isin(keys, keys[first[count > 1]])).tolist():
            hashed, of_key = int(names[i]), int(keys[i])
            turn, seen = turns.get(of_key, (0, set()))
            if hashed in seen:
                turn, seen = turn + 1, set()
            turns[of_key] = turn, seen
            seen.add(hashed)
            if turn:
                hashes[:, i] = [_hash(f"{h} {turn}") for h in hashes[:, i]]
        return hashes, has_suffix


def images_of(
    members: Members,
    place: str,
    survey: Survey,
    inner: Callable[[int], Iterator[ListedImage]],
    *,
    masks: bool,
    above: str = "",
    label: str | None = None,
) -> Iterator[ListedImage]:
    """The images with their sidecars, and what `inner` yields for each INNER, in the order of the members.

    `place` is the archive, or the folder, that holds the members; `above` stands before their names, and ends with a
    slash. `masks`: whether rule 3 holds, which it does in tars alone.
    """
    for i, others in members.samples(masks=masks):
        if i < 0:
            for name in map(members.name, others):
                survey.ignore(name)
                if extension(name) == LABEL_EXTENSION:
                    survey.remark("labels (.cls) belong to no image", above + name)
            continue
        if members.kinds[i] == INNER:
            yield from inner(i)
            continue
        name, names = members.name(i), list(map(members.name, others))
        sidecars = []
        for j, other, part in zip(others, names, sidecar_extensions(name, names) if names else ()):
            is_file = members.offsets[j] < 0
            sidecars.append(
                Sidecar(part, members.offsets[j], members.sizes[j], other if is_file else "", _packing(members, j))
            )
            if members.kinds[j] == IMAGE:
                survey.remark("images were kept as sidecars of another", f"{above}{other} of {name}")
        yield ListedImage(
            place if members.offsets[i] >= 0 else f"{place.rstrip('/')}/{name}",
            members.offsets[i],
            members.sizes[i],
            above + name,
            label,
            sidecars=sidecars or None,
            packing=_packing(members, i),
        )


def _packing(members: Members, i: int) -> int | None:
    return None if members.packings[i] == NO_ZIP else members.packings[i]


def sidecar_extensions(image: str, sidecars: Sequence[str]) -> list[str]:
    """The names of an image's sidecars in its shard: `json`, `mask.png`; the label `cls`, however it was named.

    Two labels (a.coarse.cls, a.fine.cls) are none: they keep their names.
    """
    stem = _stem(image.rpartition("/")[2]) + "."
    bases = [name.rpartition("/")[2] for name in sidecars]
    found = [base[len(stem) :] if base.startswith(stem) else base.partition(".")[2] for base in bases]
    labels = [i for i, name in enumerate(found) if last_part(name) == LABEL_EXTENSION]
    if len(labels) == 1:
        found[labels[0]] = LABEL_EXTENSION
    return [re.sub(r"[^A-Za-z0-9_.-]+", "_", name)[-LONGEST_EXTENSION:].lstrip(".") for name in found]


def _hash(name: str) -> int:
    return xxhash.xxh3_64_intdigest(name.encode("utf-8", "surrogateescape"))


def _stem(base: str) -> str:
    return base.rpartition(".")[0] or base


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key, -1 where there is none. `keys` are sorted."""
    if not len(keys):
        return np.full(len(wanted), -1)
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], -1)
